"""PyTorch's scaled_dot_product_attention on normalised inputs, for GPUs or machines that no kernel can serve.

Used only when ``COSATTN_FALLBACK`` is on, and announced by one warning. The results are the same beyond rounding, but
a mask, a bias, causal with different lengths, and lse need memory that grows with Sq * Sk.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from cosattn import env
from cosattn.reference import EPS, repeated

_warned = False


def enabled() -> bool:
    """Whether the switch is on."""
    return env.flag("COSATTN_FALLBACK")


def warn_once(reason: Exception) -> None:
    """Say, once per process, that calls are served by PyTorch and why."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"cosattn uses torch.nn.functional.scaled_dot_product_attention (COSATTN_FALLBACK is on), because {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
    *,
    groups: int,
    causal: bool,
    l2norm: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out, and lse when asked for; differentiable.

    Args:
        q, k, v: (B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv).
        mask: (B, Sk) or (W, Hq, Sq, Sk) bool, True = may be attended; W divides B.
        bias: (W, Hq or 1, Sq, Sk).
        scale: a constant, or (Hq,).
    """
    q_len, k_len = q.shape[2], k.shape[2]
    bias = None if bias is None else repeated(bias, q.shape[0])
    q_hat = _normalise(q, groups) if l2norm else q
    k_hat = _normalise(k, groups) if l2norm else k
    factor = scale.view(1, -1, 1, 1) if isinstance(scale, Tensor) else scale
    q_hat = (q_hat.float() * factor).to(q.dtype)
    k_hat = k_hat.to(q.dtype)
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k_hat, v = k_hat.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    square = causal and q_len == k_len and mask is None and bias is None and not with_lse
    if square:
        return F.scaled_dot_product_attention(q_hat, k_hat, v, is_causal=True, scale=1.0), None
    allowed = _allowed(q, k_len, mask, causal)
    seen = None
    additive: Tensor | None = None
    if allowed is not None or bias is not None:
        additive = q.new_zeros((1, 1, q_len, k_len)) if bias is None else bias.to(q.dtype)
        if allowed is not None:
            additive = additive.masked_fill(~allowed, -math.inf)
        # a row that sees nothing attends everything here, and is cleared below: softmax of nothing would be NaN
        seen = (additive.detach() > -math.inf).any(-1, keepdim=True)
        additive = additive.masked_fill(~seen, 0.0)
    out = F.scaled_dot_product_attention(q_hat, k_hat, v, attn_mask=additive, scale=1.0)
    lse: Tensor | None = None
    if with_lse:
        logits = q_hat.float() @ k_hat.float().mT
        lse = torch.logsumexp(logits if additive is None else logits + additive.float(), -1)
    if seen is not None:
        out = out.masked_fill(~seen, 0.0)
        lse = None if lse is None else lse.masked_fill(~seen.squeeze(-1), -math.inf)
    return out, lse


def gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor],
    douts: tuple[Tensor | None, Tensor | None],
    *,
    groups: int,
    causal: bool,
    l2norm: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, and dbias, dscale where ``wanted``, by running ``attention`` again under autograd."""
    q, k, v, mask, bias, scale = inputs
    dout, dlse = douts
    with torch.enable_grad():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        leaves = [q, k, v]
        if bias is not None:
            bias = bias.detach().requires_grad_(wanted[0])
        if isinstance(scale, Tensor):
            scale = scale.detach().requires_grad_(wanted[1])
        leaves += [leaf for leaf in (bias, scale) if isinstance(leaf, Tensor) and leaf.requires_grad]
        out, lse = attention(
            q, k, v, mask, bias, scale, groups=groups, causal=causal, l2norm=l2norm, with_lse=dlse is not None
        )
        pairs = [(out, dout), (lse, dlse)]
        heads = [(y, dy) for y, dy in pairs if y is not None and dy is not None]
        grads = list(
            torch.autograd.grad([y for y, _ in heads], leaves, [dy for _, dy in heads], materialize_grads=True)
        )
    dq, dk, dv = grads[:3]
    rest = grads[3:]
    dbias = rest.pop(0) if bias is not None and wanted[0] else None
    dscale = rest.pop(0) if isinstance(scale, Tensor) and wanted[1] else None
    return dq, dk, dv, dbias, dscale


def _normalise(x: Tensor, groups: int) -> Tensor:
    """L2 norm of ``groups`` equal chunks of the last dimension, in float32; a chunk of zeros stays zero."""
    chunks = x.float().unflatten(-1, (groups, -1))
    return F.normalize(chunks, dim=-1, eps=EPS).flatten(-2)


def _allowed(q: Tensor, k_len: int, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Boolean (B or 1, Hq or 1, Sq, Sk) of what may be attended; None when everything may."""
    allowed = None
    if mask is not None:
        allowed = repeated(mask, q.shape[0]) if mask.ndim == 4 else mask[:, None, None, :]
        allowed = allowed.expand(-1, -1, q.shape[2], k_len)
    if causal:
        q_len = q.shape[2]
        lower = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
        allowed = lower[None, None] if allowed is None else allowed & lower
    return allowed
