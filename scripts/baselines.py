"""What cosattn is compared with, beside ``F.scaled_dot_product_attention`` (``cosattn.bench.sdpa``)."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor


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
