"""Template families: (spec) -> the folder of ``kernels_templates/`` that its kernel is rendered from."""

from __future__ import annotations

import itertools
from dataclasses import replace

from cosattn import tiles_short, tiles_sm90_backward, tiles_sm90_forward, tiles_split
from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec


def family_of(spec: KernelSpec) -> str:
    """The fastest family of the architecture that serves ``spec``; ``sm80`` serves everything.

    ``short`` (one launch, all keys of a head in shared memory) serves what has a size class, but for the larger ones,
    which are those of sm90 kernels: forward that normalise keys where they meet them, backward that keep the sums of dQ
    in shared memory or compute dQ apart.
    ``sm90`` (wgmma, TMA) multiplies 16-bit types only: float32 takes split products, which live in registers. Masks
    over pairs, which are those of windows, are sm80's too. ``split`` serves few queries of many keys.
    """
    if spec.split:
        return "split"
    if spec.short:
        return "sm90" if short_class_sm90(spec, spec.short) == spec.short else "short"
    for family in ARCHS[spec.arch].families:
        if family == "sm80" or (not spec.few and not spec.pair_mask and spec.dtype != "float32" and _serves_sm90(spec)):
            return family
    raise AssertionError(f"no family serves {spec.name}")


def few_rows(spec: KernelSpec) -> int:
    """Up to so many queries the sm80 kernels beat those of sm90, whose blocks have more rows; 0 for never."""
    widest = max(spec.head_dim, spec.value_dim)
    if widest > 64 or family_of(replace(spec, few=False, short=0, split=0)) == "sm80":
        return 0
    return 128 if spec.direction == "backward" and widest <= 32 else 64


def sized(spec: KernelSpec, q_len: int, k_len: int, group: int = 1, heads: int = 1) -> KernelSpec:
    """The spec of a call with so many queries and keys, query heads to a key head, and key heads of all the batch."""
    if rows := tiles_split.tile_rows(spec, q_len, k_len, group, heads):
        return replace(spec, few=False, short=0, split=rows, causal=spec.causal and q_len > 1)  # one row sees every key
    spec = replace(spec, few=False, short=0, split=0)
    if tiles_short.measured(spec, q_len, k_len, group, heads) and (size := tiles_short.size_class(spec, q_len, k_len)):
        return replace(spec, short=size)
    if q_len <= few_rows(spec):
        return replace(spec, few=True)
    size = (
        tiles_sm90_forward.in_place(spec, q_len, k_len, group, heads)
        or tiles_sm90_backward.by_head(spec, q_len, group, heads)
        or tiles_sm90_backward.apart(spec, q_len, k_len, heads * group)
    )
    return repeatable_once(replace(spec, short=size))


SHORT_CLASSES_SM90 = sorted(
    {
        tiles_sm90_forward.FEW_KEYS,
        tiles_sm90_forward.FEWER_KEYS,
        tiles_sm90_backward.APART_KEYS,
        *itertools.chain.from_iterable(tiles_sm90_backward.HEAD_ROWS.values()),
    }
)
"""Values of ``spec.short`` that name sm90 kernels: few, and larger than those of the kernels for short sequences."""


def short_class_sm90(spec: KernelSpec, rows: int) -> int:
    """``spec.short`` of an sm90 kernel for so many rows; 0 where it is none."""
    return tiles_sm90_forward.short_class(spec, rows) or tiles_sm90_backward.short_class(spec, rows)


def repeatable_once(spec: KernelSpec) -> KernelSpec:
    """One spec where a kernel is repeatable whether it is asked to be or not."""
    if spec.deterministic and family_of(spec) == "sm90" and tiles_sm90_backward.repeatable(spec):
        return replace(spec, deterministic=False)
    return spec


def _serves_sm90(spec: KernelSpec) -> bool:
    return tiles_sm90_forward.serves(spec) if spec.direction == "forward" else tiles_sm90_backward.serves(spec)
