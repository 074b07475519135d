"""Which kernels a command line selects, and the command line that selects one kernel."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import replace

from cosattn import tiles_short, tiles_split
from cosattn.arch import ARCHS
from cosattn.families import SHORT_CLASSES_SM90, few_rows, repeatable_once, short_class_sm90
from cosattn.spec import DIRECTIONS, DTYPES, HEAD_DIMS, SOFTMAX_MODES, KernelSpec

_SWITCH = {"no": [False], "yes": [True], "both": [False, True]}
_SWITCHES = {
    "causal": "causal attention",
    "mask": "a boolean mask over keys",
    "pair-mask": "a boolean mask over queries and keys",
    "l2norm": "normalise q and k inside the kernel",
    "few": "at most 64 queries of narrow heads (sm90 only; backward up to d 32: 128)",
    "deterministic": "bitwise repeatable gradients (backward only)",
    "bias-grad": "the bias requires a gradient (backward only)",
}
_DEFAULTS = {name: {"causal": "both", "l2norm": "yes"}.get(name, "no") for name in _SWITCHES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select kernels. Several values select every combination."""
    group = parser.add_argument_group("selection (several values: every combination)")
    group.add_argument(
        "--arch", nargs="+", choices=list(ARCHS), help="GPU architectures; default: those of the GPUs in this machine"
    )
    group.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), help="default: both")
    group.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["float16", "bfloat16"], help="default: float16 bfloat16"
    )
    group.add_argument("--head-dim", nargs="+", type=_dim, default=[64], metavar="D", help="of q and k; default: 64")
    group.add_argument("--value-dim", nargs="+", type=_dim, metavar="DV", help="of v; default: the head dim")
    group.add_argument("--groups", nargs="+", type=int, default=[1], metavar="G", help="chunks of the norm; default: 1")
    group.add_argument(
        "--bias",
        nargs="+",
        choices=["none", *DTYPES],
        default=["none"],
        help="type of the additive bias; default: none",
    )
    group.add_argument(
        "--softmax",
        nargs="+",
        choices=SOFTMAX_MODES,
        help="default: bounded, and online with a bias",
    )
    group.add_argument(
        "--split",
        nargs="+",
        type=int,
        choices=[0, *tiles_split.ROWS],
        default=[0],
        metavar="ROWS",
        help="rows of a tile where the keys of few queries are split, as in a kernel's name; default: 0, not split",
    )
    group.add_argument(
        "--short",
        nargs="+",
        type=int,
        default=[0, *SHORT_CLASSES_SM90],
        metavar="ROWS",
        help="size class of short sequences, as in a kernel's name, or 0 for kernels of any length; default: 0 and the "
        f"larger classes ({', '.join(map(str, SHORT_CLASSES_SM90))}), so that all of more than 256 tokens is built",
    )
    for name, meaning in _SWITCHES.items():
        group.add_argument(
            f"--{name}",
            nargs="?",
            const="yes",
            choices=list(_SWITCH),
            default=_DEFAULTS[name],
            help=f"{meaning}; default: {_DEFAULTS[name]}",
        )


def specs(options: argparse.Namespace, archs: Sequence[str]) -> list[KernelSpec]:
    """The kernels that parsed options select for these architectures, each once, in a stable order.

    A combination that names no kernel (a bias gradient without a bias, two directions of ``deterministic``, sizes that
    change nothing or that no kernel is for) collapses onto the one it is equal to.
    """
    chosen: dict[KernelSpec, None] = {}
    axes = itertools.product(
        archs,
        options.dtype,
        options.head_dim,
        options.value_dim or [None],
        options.groups,
        _SWITCH[options.l2norm],
        _SWITCH[options.causal],
        _SWITCH[options.mask],
        _SWITCH[options.pair_mask],
        [None if bias == "none" else bias for bias in options.bias],
        options.softmax or [None],
        options.direction,
        _SWITCH[options.few],
        options.short,
        options.split,
        _SWITCH[options.deterministic],
        _SWITCH[options.bias_grad],
    )
    for (
        arch,
        dtype,
        head,
        value,
        groups,
        norm,
        causal,
        mask,
        pair_mask,
        bias,
        softmax,
        direction,
        few,
        short,
        split,
        repeatable,
        bias_grad,
    ) in axes:
        backward = direction == "backward"
        spec = KernelSpec(
            direction=direction,
            arch=arch,
            dtype=dtype,
            head_dim=head,
            value_dim=value or head,
            groups=groups if norm else 1,
            l2norm=norm,
            causal=causal,
            mask=mask,
            pair_mask=pair_mask,
            bias=bias,
            softmax=softmax or ("online" if bias else "bounded"),
            deterministic=repeatable and backward,
            bias_grad=bias_grad and backward and bias is not None,
        )
        if split and tiles_split.serves(spec):
            spec = replace(spec, split=split)
        elif short and short in (
            tiles_short.size_class(spec, short, short),
            short_class_sm90(spec, short),
        ):
            spec = replace(spec, short=short)
        elif few:
            spec = replace(spec, few=few_rows(spec) > 0)
        chosen[repeatable_once(spec)] = None
    return list(chosen)


def command_for(spec: KernelSpec) -> str:
    """The command that builds exactly this kernel."""
    words = [
        "python -m cosattn.warmup",
        f"--arch {spec.arch}",
        f"--direction {spec.direction}",
        f"--dtype {spec.dtype}",
        f"--head-dim {spec.head_dim}",
    ]
    if spec.value_dim != spec.head_dim:
        words.append(f"--value-dim {spec.value_dim}")
    if spec.groups != 1:
        words.append(f"--groups {spec.groups}")
    if spec.bias is not None:
        words.append(f"--bias {spec.bias}")
    words.append(f"--softmax {spec.softmax}")
    if spec.short or spec.arch == "sm90":
        words.append(f"--short {spec.short}")
    if spec.split:
        words.append(f"--split {spec.split}")
    for name in _SWITCHES:
        value = "yes" if getattr(spec, name.replace("-", "_")) else "no"
        if value != _DEFAULTS[name]:
            words.append(f"--{name} {value}")
    return " ".join(words)


def _dim(text: str) -> int:
    value = int(text)
    if value not in HEAD_DIMS:
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of 8 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}")
    return value
