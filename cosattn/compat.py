"""The names, argument order and defaults of flash-cosine-sim-attention 0.1.40: changing the import is the migration.

What differs from it on purpose: a mask may be combined with ``causal``, a row that sees no key gives zeros instead of
the mean of the values, the CPU has a backward pass, and norms are taken in float32 whatever the input type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosattn.functional import cosine_attention
from cosattn.reference import cosine_attention_reference, l2norm


def flash_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
) -> Tensor:
    """``cosattn.cosine_attention`` under the name and argument order of flash-cosine-sim-attention.

    Shapes, dtypes and errors are those of ``cosattn.cosine_attention``; with batch and heads merged, a 3-D
    ``attn_bias`` is ``(N, Sq, Sk)`` whatever ``attn_bias_batch_dim`` says.
    """
    return cosine_attention(
        q,
        k,
        v,
        scale=scale,
        groups=groups,
        causal=causal,
        mask=mask,
        attn_bias=attn_bias,
        attn_bias_batch_dim=attn_bias_batch_dim,
        l2norm_qk=l2norm_qk,
    )


def plain_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
) -> Tensor:
    """The same attention by its formula: O(Sq * Sk) memory, differentiable any number of times.

    Arguments as for ``flash_cosine_sim_attention``; computed by ``cosattn.cosine_attention_reference``.
    """
    return cosine_attention_reference(
        q,
        k,
        v,
        scale=scale,
        groups=groups,
        causal=causal,
        mask=mask,
        attn_bias=attn_bias,
        attn_bias_batch_dim=attn_bias_batch_dim,
        l2norm_qk=l2norm_qk,
    )


def l2norm_tensors(*tensors: Tensor, groups: int = 1) -> tuple[Tensor, ...]:
    """L2-normalise the last dimension of each tensor in ``groups`` equal chunks.

    Args:
        tensors: any shapes ``(..., D)`` with ``groups`` dividing D, at least one tensor.

    Returns:
        One tensor for each, in the dtype of the first. Norms are taken in float32 (float64 for float64). A chunk whose
        norm is <= 1e-12 gives zeros and has a zero gradient.
    """
    if not tensors:
        raise TypeError("l2norm_tensors needs at least one tensor")
    dtype = tensors[0].dtype
    return tuple(l2norm(x.to(torch.promote_types(x.dtype, torch.float32)), groups).to(dtype) for x in tensors)
