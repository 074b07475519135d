"""The formula, written down: naive O(Sq * Sk) memory, every option, differentiable by autograd, exact in float64.

What the kernels and the CPU path are tested against, and what ``compat.plain_cosine_sim_attention`` runs.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from einops import rearrange, repeat
from torch import Tensor, einsum

EPS = 1e-12
"""A chunk whose norm is not above this has no direction: it normalises to zeros."""


def l2norm(x: Tensor, groups: int = 1) -> Tensor:
    """Normalise each of ``groups`` equal chunks of the last dimension, in the dtype of ``x``.

    A chunk whose norm is <= ``EPS`` gives zeros and has a zero gradient: dividing by infinity selects both.
    """
    chunks = rearrange(x, "... (g c) -> ... g c", g=groups)
    norm = torch.linalg.vector_norm(chunks, dim=-1, keepdim=True)
    unit: Tensor = rearrange(chunks / norm.masked_fill(norm <= EPS, float("inf")), "... g c -> ... (g c)")
    return unit


@overload
def cosine_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor = ...,
    groups: int = ...,
    causal: bool = ...,
    mask: Tensor | None = ...,
    attn_bias: Tensor | None = ...,
    attn_bias_batch_dim: bool = ...,
    l2norm_qk: bool = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def cosine_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor = ...,
    groups: int = ...,
    causal: bool = ...,
    mask: Tensor | None = ...,
    attn_bias: Tensor | None = ...,
    attn_bias_batch_dim: bool = ...,
    l2norm_qk: bool = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def cosine_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor = 8.0,
    groups: int = 1,
    causal: bool = False,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_batch_dim: bool = False,
    l2norm_qk: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cosine-similarity attention by its definition.

    Args:
        q: ``(B, Hq, Sq, D)``, or ``(N, Sq, D)`` with batch and heads merged.
        k: ``(B, Hkv, Sk, D)``, ``(B, Sk, D)`` for single-head key/values, or ``(N, Sk, D)``.
        v: ``(B, Hkv, Sk, Dv)``, ``(B, Sk, Dv)`` or ``(N, Sk, Dv)``.
        scale: a number, or a tensor of one value per query head: ``(Hq,)``, ``(Hq, 1, 1)`` or ``(1, Hq, 1, 1)``.
        groups: chunks of the head dimension that are normalised separately.
        causal: query i sees the keys j <= i + Sk - Sq.
        mask: bool ``(B, Sk)`` (``(N, Sk)`` when merged), broadcastable to ``(B, Hq, Sq, Sk)``, or
            ``(1, W, Hq, Sq, Sk)`` for the batch seen as ``(B / W, W)``; True = may be attended.
        attn_bias: ``(Hq, Sq, Sk)``; ``(B, Sq, Sk)`` with ``attn_bias_batch_dim`` or merged heads; or in four or five
            dimensions as ``mask``.
        l2norm_qk: normalise q and k; False promises that they are normalised already.
        return_lse: also return the log of the softmax denominators.

    Returns:
        The output, shaped like q with last dimension Dv, in q's dtype; with ``return_lse`` also the log-sum-exp
        of each row, ``(B, Hq, Sq)`` (``(N, Sq)`` when merged), float32 (float64 for float64 inputs).
        Computed in float32, or float64 when the inputs are. A row that sees no key is zero, its log-sum-exp -inf.
    """
    merged = q.ndim == 3
    if merged:
        q = rearrange(q, "n i d -> n 1 i d")
    if k.ndim == 3:
        k, v = rearrange(k, "b j d -> b 1 j d"), rearrange(v, "b j d -> b 1 j d")
    if attn_bias is not None and attn_bias.ndim == 3:
        attn_bias = rearrange(attn_bias, "b i j -> b 1 i j" if merged or attn_bias_batch_dim else "h i j -> 1 h i j")
    if attn_bias is not None and attn_bias.ndim == 5:
        attn_bias = repeated(attn_bias[0], q.shape[0])
    if mask is not None and mask.ndim != 4:
        mask = rearrange(mask, "b j -> b 1 1 j") if mask.ndim == 2 else repeated(mask[0], q.shape[0])
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, 1, 1)

    with torch.autocast(q.device.type, enabled=False):
        out, lse = _attend(q, k, v, scale, groups, causal, mask, attn_bias, l2norm_qk)
    if merged:
        out, lse = rearrange(out, "n 1 i d -> n i d"), rearrange(lse, "n 1 i -> n i")
    return (out, lse) if return_lse else out


def repeated(x: Tensor, batch: int) -> Tensor:
    """``(W, ...)`` for all of a batch, entry b being entry b % W: ``(B, ...)``, or as it is where W is 1."""
    return x if x.shape[0] in (1, batch) else repeat(x, "w ... -> (n w) ...", n=batch // x.shape[0])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | Tensor,
    groups: int,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    l2norm_qk: bool,
) -> tuple[Tensor, Tensor]:
    """Everything 4-D: the output ``(B, Hq, Sq, Dv)`` and the log-sum-exp ``(B, Hq, Sq)``."""
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    # A product with a weight of 0 would spread NaN and Inf to rows that do not see them: compute without them,
    # then put NaN back exactly where they are seen.
    q_broken, k_broken, v_broken = ~q.isfinite().all(-1), ~k.isfinite().all(-1), ~v.isfinite()
    q, k, v = q.masked_fill(q_broken[..., None], 0), k.masked_fill(k_broken[..., None], 0), v.masked_fill(v_broken, 0)
    if l2norm_qk:
        q, k = l2norm(q, groups), l2norm(k, groups)

    heads_per_kv = q.shape[1] // max(k.shape[1], 1)
    k, k_broken, v, v_broken = (repeat(x, "b h ... -> b (h r) ...", r=heads_per_kv) for x in (k, k_broken, v, v_broken))
    logits = scale * einsum("b h i d, b h j d -> b h i j", q, k)
    visible = torch.ones_like(logits, dtype=torch.bool)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
        visible = visible & (bias != float("-inf"))
    if causal:
        visible = visible.tril(k.shape[2] - q.shape[2])
    if mask is not None:
        visible = visible & mask
    logits = logits.masked_fill(q_broken[..., :, None] | k_broken[..., None, :], float("nan"))
    logits = logits.masked_fill(~visible, float("-inf"))

    lse = logits.logsumexp(dim=-1)
    sees_nothing = lse == float("-inf")
    weights = (logits - lse.masked_fill(sees_nothing, 0)[..., None]).exp().masked_fill(~visible, 0)
    out = einsum("b h i j, b h j d -> b h i d", weights, v)
    if v_broken.any():
        reached = einsum("b h i j, b h j d -> b h i d", visible.to(v.dtype), v_broken.to(v.dtype)) > 0
        out = out.masked_fill(reached, float("nan"))
    return out.to(dtype), lse
