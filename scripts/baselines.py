"""What cosattn is compared with: plain attention, the original package, and the rivals on a Hopper GPU."""

from __future__ import annotations

import argparse
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from cosattn.bench import sdpa


def grouped_normalize(x: Tensor, groups: int = 1) -> Tensor:
    """L2 norm over ``groups`` equal chunks of the last dimension."""
    return F.normalize(x.unflatten(-1, (groups, -1)), dim=-1).flatten(-2)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 8.0,
    groups: int = 1,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Cosine-similarity attention in five lines of einsum, in the input's own dtype and with O(S^2) memory.

    q, k, v are ``(B, H, S, D)``, mask is boolean ``(B, S)``, True = may be attended.
    """
    logits = torch.einsum("bhid,bhjd->bhij", grouped_normalize(q, groups), grouped_normalize(k, groups)) * scale
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[-2] - q.shape[-2] + 1)
        logits = logits.masked_fill(hidden, -torch.finfo(logits.dtype).max)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.finfo(logits.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", logits.softmax(dim=-1), v)


def original_triton() -> Callable[..., Tensor]:
    """The Triton path of flash-cosine-sim-attention 0.2.2, without the compilation its CUDA path starts at import.

    Raises:
        ImportError: the package or Triton is not installed.
    """
    package = "flash_cosine_sim_attention"
    if find_spec("triton") is None:
        raise ImportError("Triton is not installed")
    try:
        release = version("flash-cosine-sim-attention")
    except PackageNotFoundError as error:
        raise ImportError("flash-cosine-sim-attention is not installed") from error
    extension = f"{package}_cuda_{release.replace('.', '_')}"
    if extension not in sys.modules:
        stand_in = types.ModuleType(extension)  # found by the package's import, so nothing is compiled
        stand_in.forward = stand_in.backward = stand_in.debug = None  # type: ignore[attr-defined]
        sys.modules[extension] = stand_in
    module = importlib.import_module(f"{package}.triton_flash_cosine_sim_attention")
    return module.triton_flash_cosine_sim_attention  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rival:
    """An attention kernel that cosattn is measured against. It gets q and k normalised already."""

    name: str
    attention: Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]
    """Of q, k and v ``(B, H, S, D)``, the scale and whether it is causal."""
    version: str
    backward: bool = True
    compiles: bool = False
    """Whether torch.compile takes it whole, together with the normalisation before it."""


def sdpa_rival(name: str, backend: str) -> Rival:
    """One backend of PyTorch's own attention."""

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        return sdpa(q, k, v, scale=scale, causal=causal, backend=backend, normalize=False)

    release = f"cuDNN {torch.backends.cudnn.version()}" if backend == "cudnn" else f"torch {torch.__version__}"
    return Rival(name, attention, release, compiles=True)


def flash_rival(name: str, module: str, package: str, backward: bool) -> Rival:
    """The ``flash_attn_func`` of a module, which takes ``(B, S, H, D)``.

    Raises:
        ImportError: the package is not installed.
    """
    function = importlib.import_module(module).flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    try:
        release = version(package)
    except PackageNotFoundError:  # only the files were put on the path
        release = "of unknown version"
    return Rival(name, attention, f"{package} {release}", backward)


RIVALS: dict[str, Callable[[], Rival]] = {
    "cudnn": lambda: sdpa_rival("cuDNN", "cudnn"),
    "fa3": lambda: flash_rival("FA3", "fa3_fwd_interface", "fa3-fwd", backward=False),
    "fa4": lambda: flash_rival("FA4", "flash_attn.cute", "flash-attn-4", backward=True),
    "flash": lambda: sdpa_rival("FA2", "flash"),
}


def rival_names(text: str) -> list[str]:
    """What a command line's comma-separated list names; '' for none.

    Raises:
        argparse.ArgumentTypeError: a name is not one of ``RIVALS``.
    """
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(RIVALS):
        raise argparse.ArgumentTypeError(f"takes some of {','.join(RIVALS)}, not {','.join(sorted(unknown))}")
    return names


def load_rivals(keys: Sequence[str]) -> tuple[list[Rival], dict[str, str]]:
    """Those of ``RIVALS`` that can be imported here, and why the others can not."""
    rivals, missing = [], {}
    for key in keys:
        try:
            rivals.append(RIVALS[key]())
        except Exception as error:  # a broken installation raises anything
            missing[key] = f"{type(error).__name__}: {error}"
    return rivals, missing
