"""The kernel specification: everything that changes the emitted CUDA source, and nothing else.

Two calls with equal specs run the same binary; sizes, strides, scale and pointers are run-time arguments (``abi.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Direction = Literal["forward", "backward"]
DType = Literal["float32", "float16", "bfloat16"]
Softmax = Literal["bounded", "online"]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DTYPES: tuple[DType, ...] = get_args(DType)
SOFTMAX_MODES: tuple[Softmax, ...] = get_args(Softmax)
HEAD_DIMS: tuple[int, ...] = tuple(range(8, 257, 8))

_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One specialised kernel.

    The backward spec of a forward call differs only in ``direction``, ``short``, ``split``, ``deterministic`` and
    ``bias_grad`` (the last two are False on every forward spec).
    """

    direction: Direction
    arch: str
    """Key of ``arch.ARCHS``."""
    dtype: DType
    """Type of q, k, v, out and their gradients."""
    head_dim: int
    """D, of q and k."""
    value_dim: int
    """Dv, of v and out."""
    groups: int = 1
    """Chunks the L2 norm is taken over (1 when ``l2norm`` is False)."""
    l2norm: bool = True
    causal: bool = False
    mask: bool = False
    """A mask over keys, (B, Sk)."""
    pair_mask: bool = False
    """A mask over queries and keys, (W, Hq|1, Sq|1, Sk); never beside ``mask``."""
    bias: DType | None = None
    """Type of the additive bias, None without one."""
    softmax: Softmax = "bounded"
    few: bool = False
    """Few queries, where that leaves a call to the family with the smaller blocks: ``families.sized``."""
    short: int = 0
    """Size class of a short sequence, 0 where lengths do not change the kernel: ``families.sized``."""
    split: int = 0
    """Forward only: rows of a tile where the keys are split over blocks, 0 elsewhere: ``families.sized``."""
    deterministic: bool = False
    """Backward only: bitwise repeatable gradients."""
    bias_grad: bool = False
    """Backward only: the bias requires a gradient."""

    @property
    def name(self) -> str:
        """Readable and unique: ``forward_sm90_bf16_d64_causal``, ``backward_sm80_f32_d64_g8_bias-f32-grad_online``."""
        parts = [self.direction, self.arch, _SHORT[self.dtype], f"d{self.head_dim}"]
        if self.value_dim != self.head_dim:
            parts.append(f"dv{self.value_dim}")
        if not self.l2norm:
            parts.append("nonorm")
        elif self.groups != 1:
            parts.append(f"g{self.groups}")
        if self.causal:
            parts.append("causal")
        if self.mask:
            parts.append("mask")
        if self.pair_mask:
            parts.append("pairmask")
        if self.bias is not None:
            parts.append(f"bias-{_SHORT[self.bias]}" + ("-grad" if self.bias_grad else ""))
        if self.softmax == "online":
            parts.append("online")
        if self.few:
            parts.append("few")
        if self.short:
            parts.append(f"short{self.short}")
        if self.split:
            parts.append(f"split{self.split}")
        if self.deterministic:
            parts.append("deterministic")
        return "_".join(parts)


def softmax_mode(dtype: str, bound: float | None) -> Softmax:
    """Choose the softmax from the provable bound on |logit|, ``scale * groups + bias_bound``.

    ==================  =====================================================  =========
    P is stored in      condition                                              mode
    ==================  =====================================================  =========
    float32, bfloat16   2 * bound * log2(e) <= 120                             bounded
    float16             2 * bound * log2(e) <= 29                              bounded
    any                 larger, or the bound is unknown (``bound`` is None)    online
    ==================  =====================================================  =========

    The bound is unknown when scale is a tensor without ``scale_max``, or a bias is given without ``bias_bound``.
    """
    limit = 29.0 if dtype == "float16" else 120.0
    if bound is not None and 2.0 * bound * math.log2(math.e) <= limit:
        return "bounded"
    return "online"
