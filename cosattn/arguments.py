"""Checks the arguments of an attention call: every problem is found before any is reported.

Also the only place that knows the shapes a caller may use; the rest of the package sees (B, H, S, D).
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosattn.errors import ArgumentError

CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU_DTYPES = (*CUDA_DTYPES, torch.float64)


class Sizes(NamedTuple):
    """Sizes of a checked call, in the symbols of the documentation."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int
    merged: bool = False
    """q, k and v are (N, S, D): N is the batch, and there is one head."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute: no query, no key, no batch or no head."""
        return self.batch == 0 or self.q_heads == 0 or self.q_len == 0 or self.k_len == 0


def check(
    q: Any,
    k: Any,
    v: Any,
    *,
    scale: Any,
    groups: Any,
    mask: Any,
    attn_bias: Any,
    attn_bias_batch_dim: Any,
    scale_max: Any,
    bias_bound: Any,
    deterministic: Any,
) -> Sizes:
    """Sizes of a call, or one ArgumentError that lists every problem."""
    problems: list[str] = []
    sizes = _check_qkv(problems, q, k, v, groups)
    device = q.device if isinstance(q, Tensor) else None
    _check_mask(problems, mask, sizes, device)
    _check_bias(problems, attn_bias, attn_bias_batch_dim, sizes, device)
    _check_scale(problems, scale, scale_max, sizes, device)
    if bias_bound is not None and not _is_finite_number(bias_bound, minimum=0.0):
        problems.append(f"bias_bound must be a finite number >= 0 or None, got {bias_bound!r}")
    if deterministic is not None and not isinstance(deterministic, bool):
        problems.append(f"deterministic must be True, False or None, got {deterministic!r}")
    if problems or sizes is None:
        head = "cosine_attention: 1 problem" if len(problems) == 1 else f"cosine_attention: {len(problems)} problems"
        raise ArgumentError("\n  - ".join([head, *problems]))
    return sizes


def _is_finite_number(value: Any, minimum: float = -math.inf) -> bool:
    if isinstance(value, bool):
        return False
    if not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        if not isinstance(value, numbers.Real):
            return False
        value = float(value)
    # comparisons, because torch.compile can not trace math.isfinite of a symbolic number; NaN fails them
    return bool(-math.inf < value < math.inf and value >= minimum)


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def _check_tensor(problems: list[str], name: str, value: Any, device: torch.device | None) -> bool:
    if not isinstance(value, Tensor):
        problems.append(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        return False
    if value.layout != torch.strided:
        problems.append(f"{name} must be a dense (strided) tensor, got {value.layout}; convert it with .to_dense()")
        return False
    if device is not None and value.device != device:
        problems.append(f"{name} is on {value.device} and q is on {device}; move it with .to(q.device)")
    return True


def _check_qkv(problems: list[str], q: Any, k: Any, v: Any, groups: Any) -> Sizes | None:
    q_ok = _check_tensor(problems, "q", q, None)
    device = q.device if q_ok else None
    others_ok = [_check_tensor(problems, name, value, device) for name, value in (("k", k), ("v", v))]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        problems.append(f"groups must be a whole number >= 1, got {groups!r}")
        groups = 1
    if not (q_ok and all(others_ok)):
        return None
    _check_dtypes(problems, q, k, v)
    if q.ndim not in (3, 4):
        problems.append(f"q must be (B, Hq, Sq, D), or (N, Sq, D) with batch and heads merged; got {_shape(q)}")
        return None
    if q.ndim == 3 and (k.ndim != 3 or v.ndim != 3):
        problems.append(
            f"q is {_shape(q)}, batch and heads merged, so k and v must be (N, Sk, D) and (N, Sk, Dv); "
            f"got {_shape(k)} and {_shape(v)}"
        )
        return None
    if k.ndim not in (3, 4) or v.ndim != k.ndim:
        problems.append(
            f"k and v must be (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), or without Hkv for a single head; "
            f"got {_shape(k)} and {_shape(v)}"
        )
        return None
    (batch, q_len, head_dim), q_heads = (q.shape[0], q.shape[-2], q.shape[-1]), 1 if q.ndim == 3 else q.shape[1]
    (k_len, value_dim), kv_heads = (k.shape[-2], v.shape[-1]), 1 if k.ndim == 3 else k.shape[1]
    if k.shape[0] != batch or v.shape[0] != batch:
        problems.append(
            f"q, k and v must have one batch size, got {batch}, {k.shape[0]} and {v.shape[0]}; "
            "a batch of 1 is repeated without a copy by .expand"
        )
    if v.ndim == 4 and v.shape[1] != kv_heads:
        problems.append(f"k and v must have the same heads, got {kv_heads} and {v.shape[1]}")
    if kv_heads == 0 and q_heads != 0:
        problems.append(f"q has {q_heads} heads but k has none")
    if kv_heads != 0 and q_heads % kv_heads != 0:
        problems.append(f"the heads of q must be a multiple of the heads of k, got {q_heads} and {kv_heads}")
    if v.shape[-2] != k_len:
        problems.append(f"k and v must have the same length, got {k_len} and {v.shape[-2]}")
    if k.shape[-1] != head_dim:
        problems.append(f"q and k must have the same head dimension, got {head_dim} and {k.shape[-1]}")
    if head_dim == 0 or value_dim == 0:
        problems.append(f"head dimensions must be at least 1, got {head_dim} for q and {value_dim} for v")
    elif head_dim % groups != 0:
        problems.append(f"groups must divide the head dimension, got {groups} and {head_dim}")
    return Sizes(batch, q_heads, kv_heads, q_len, k_len, head_dim, value_dim, q.ndim == 3)


def _check_dtypes(problems: list[str], q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype:
        problems.append(
            f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them, or use torch.autocast"
        )
        return
    if q.dtype not in CPU_DTYPES:
        problems.append(f"q, k and v must be float32, float16, bfloat16 or (not on CUDA) float64, got {q.dtype}")
    elif q.is_cuda and q.dtype not in CUDA_DTYPES:
        problems.append("float64 is not served on CUDA: cast q, k and v to float32, or move them to the CPU")


def _check_mask(problems: list[str], mask: Any, sizes: Sizes | None, device: torch.device | None) -> None:
    if mask is None or not _check_tensor(problems, "mask", mask, device):
        return
    if mask.dtype != torch.bool:
        problems.append(
            f"mask must be boolean with True for keys that may be attended, got {mask.dtype}; "
            "0/1 masks convert with mask.bool(), additive ones go to attn_bias"
        )
    if sizes is None:
        return
    batch, k_len = sizes.batch, sizes.k_len
    if mask.ndim in (4, 5):
        _check_pairs(problems, "mask", mask, sizes)
    elif mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, k_len):
        hint = "; three dimensions are ambiguous, so give four" if mask.ndim == 3 else ""
        problems.append(
            f"mask must be (B, Sk) = ({batch}, {k_len}), or 1 in their place, or broadcastable to (B, Hq, Sq, Sk) = "
            f"({batch}, {sizes.q_heads}, {sizes.q_len}, {k_len}); got {_shape(mask)}{hint}"
        )


def _check_pairs(problems: list[str], name: str, tensor: Tensor, sizes: Sizes) -> None:
    """Four dimensions broadcast to (B, Hq, Sq, Sk), or five to (B / W, W, Hq, Sq, Sk) with 1 as the first."""
    batch = sizes.batch
    inner = (sizes.q_heads, sizes.q_len, sizes.k_len)
    fits = all(size in (1, full) for size, full in zip(tensor.shape[-3:], inner, strict=True))
    if tensor.ndim == 4:
        if not fits or tensor.shape[0] not in (1, batch):
            problems.append(
                f"{name} with four dimensions must be (B, Hq, Sq, Sk) = ({batch}, {inner[0]}, {inner[1]}, {inner[2]}), "
                f"or 1 in their place; got {_shape(tensor)}"
            )
        return
    period = tensor.shape[1]
    if not fits or tensor.shape[0] != 1 or (period != batch and (period == 0 or batch % period != 0)):
        problems.append(
            f"{name} with five dimensions must be (1, W, Hq, Sq, Sk) = (1, W, {inner[0]}, {inner[1]}, {inner[2]}), "
            f"where W divides the batch of {batch}, or 1 in the place of the last three; got {_shape(tensor)}"
        )


def _check_bias(
    problems: list[str], bias: Any, batch_dim: Any, sizes: Sizes | None, device: torch.device | None
) -> None:
    if not isinstance(batch_dim, bool):
        problems.append(f"attn_bias_batch_dim must be True or False, got {batch_dim!r}")
    if bias is None or not _check_tensor(problems, "attn_bias", bias, device):
        return
    dtypes = CUDA_DTYPES if bias.is_cuda else CPU_DTYPES
    if bias.dtype not in dtypes:
        hint = " (False to -inf: torch.where(allowed, 0.0, -math.inf))" if bias.dtype == torch.bool else ""
        names = ", ".join(str(dtype) for dtype in dtypes)
        problems.append(f"attn_bias must be one of {names}; got {bias.dtype}: cast it{hint}")
    if sizes is None:
        return
    batch, heads, q_len, k_len = sizes.batch, sizes.q_heads, sizes.q_len, sizes.k_len
    inner = bias.ndim >= 2 and bias.shape[-2] in (1, q_len) and bias.shape[-1] in (1, k_len)
    if bias.ndim == 3 and sizes.merged:
        if bias.shape[0] not in (1, batch) or not inner:
            problems.append(
                f"attn_bias for merged batch and heads must be (N, Sq, Sk) = ({batch}, {q_len}, {k_len}), "
                f"got {_shape(bias)}"
            )
    elif bias.ndim == 3:
        name, lead = ("B", batch) if batch_dim else ("Hq", heads)
        if bias.shape[0] != lead or not inner:
            hint = "" if batch_dim else "; (B, Sq, Sk) needs attn_bias_batch_dim=True"
            problems.append(
                f"attn_bias with three dimensions must be ({name}, Sq, Sk) = ({lead}, {q_len}, {k_len}), "
                f"got {_shape(bias)}{hint}"
            )
    elif bias.ndim not in (4, 5):
        problems.append(
            f"attn_bias must be (Hq, Sq, Sk), (B, Sq, Sk) with attn_bias_batch_dim=True, 4-D or 5-D, got {_shape(bias)}"
        )
    else:
        _check_pairs(problems, "attn_bias", bias, sizes)


def _check_scale(
    problems: list[str], scale: Any, scale_max: Any, sizes: Sizes | None, device: torch.device | None
) -> None:
    if scale_max is not None and not _is_finite_number(scale_max, minimum=0.0):
        problems.append(f"scale_max must be a finite number >= 0 or None, got {scale_max!r}")
        scale_max = None
    if not isinstance(scale, Tensor):
        if not _is_finite_number(scale):
            problems.append(f"scale must be a finite number or a tensor with one value per query head, got {scale!r}")
        elif scale_max is not None and abs(scale) > scale_max:
            problems.append(f"scale is {scale}, beyond scale_max={scale_max}")
        return
    if not _check_tensor(problems, "scale", scale, device):
        return
    if not scale.is_floating_point():
        problems.append(f"scale must be of a floating point dtype, got {scale.dtype}")
    if sizes is None:
        return
    heads = sizes.q_heads
    allowed = ((), (1,), (1, 1, 1), (1, 1, 1, 1), (heads,), (heads, 1, 1), (1, heads, 1, 1))
    if tuple(scale.shape) not in allowed:
        problems.append(
            f"scale must hold one value per query head, as (Hq,), (Hq, 1, 1) or (1, Hq, 1, 1) with Hq = {heads}, "
            f"or a single value; got {_shape(scale)}"
        )


def logit_bound(
    scale: float | Tensor, groups: int, scale_max: float | None, attn_bias: Tensor | None, bias_bound: float | None
) -> float | None:
    """The provable bound on |logit| of a checked call, None when there is none."""
    largest = scale_max if isinstance(scale, Tensor) else abs(scale)
    if largest is None or (attn_bias is not None and bias_bound is None):
        return None
    return largest * groups + (bias_bound if attn_bias is not None and bias_bound is not None else 0.0)


def with_heads(tensor: Tensor) -> Tensor:
    """(N, S, D) as (N, 1, S, D); four dimensions stay."""
    return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor


def bias_with_four_dimensions(bias: Tensor, batch_dim: bool, sizes: Sizes) -> Tensor:
    """``attn_bias`` of any accepted form as (W, Hq or 1, Sq, Sk), W a divisor of B: a view, differentiable."""
    if bias.ndim == 3:
        bias = bias.unsqueeze(1) if batch_dim else bias.unsqueeze(0)
    elif bias.ndim == 5:
        bias = bias.squeeze(0)
    return bias.expand(-1, -1, sizes.q_len, sizes.k_len)


def canonical_mask(mask: Tensor, sizes: Sizes) -> Tensor:
    """``mask`` of any accepted form as (B, Sk), or (W, Hq, Sq, Sk) with W a divisor of B: a view."""
    if mask.ndim == 2:
        return mask.expand(sizes.batch, sizes.k_len)
    if mask.ndim == 5:
        mask = mask.squeeze(0)
    if mask.shape[1:3] == (1, 1) and mask.shape[0] in (1, sizes.batch):  # one row of keys, whoever asks
        return mask[:, 0, 0].expand(sizes.batch, sizes.k_len)
    return mask.expand(-1, sizes.q_heads, sizes.q_len, sizes.k_len)


def scale_per_head(scale: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """A scale tensor of any accepted form as (Hq,), differentiable."""
    return scale.reshape(-1).to(dtype).expand(heads).contiguous()
