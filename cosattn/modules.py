"""``CosineAttention``: the attention layer of a transformer block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cosattn.compat import l2norm_tensors
from cosattn.errors import ArgumentError
from cosattn.functional import cosine_attention

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps normalised q ``(B, Hq, Sq, D)`` and k ``(B, Hkv, Sk, D)`` to rotated ones of the same norms."""


class CosineAttention(nn.Module):
    """Multi-head cosine-similarity attention with its four projections.

    Args:
        dim: width of the input and the output.
        heads: query heads.
        kv_heads: key/value heads, a divisor of ``heads``; None: as many as ``heads``. 1 is multi-query attention.
        dim_head: width of a head.
        context_dim: width of ``context`` in cross-attention; None: ``dim``.
        groups: chunks of a head that are normalised separately; divides ``dim_head``.
        causal: position i attends keys j <= i + Sk - Sq.
        scale: the factor of the cosine, or its initial value when learned; positive.
        learned_scale: one scale per query head, learned through its logarithm (parameter ``log_scale``, ``(heads,)``).
        scale_max: upper limit of a learned scale. SwinV2 uses 100. A small one (``scale_max * groups`` up to 41, in
            float16 up to 10) allows the faster softmax without a running maximum.
        rotary: rotation applied between the norm and the attention, ``(q, k) -> (q, k)``; it must keep norms. None: the
            norm is fused into the attention.
        bias: whether the projections have biases.

    Raises:
        ArgumentError: lists everything that is wrong with the sizes or the scale.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        dim_head: int = 64,
        context_dim: int | None = None,
        groups: int = 1,
        causal: bool = False,
        scale: float = 8.0,
        learned_scale: bool = False,
        scale_max: float | None = None,
        rotary: Rotary | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        context_dim = dim if context_dim is None else context_dim
        _check(dim, heads, kv_heads, dim_head, context_dim, groups, scale, learned_scale, scale_max)
        self.heads, self.kv_heads, self.dim_head = heads, kv_heads, dim_head
        self.groups, self.causal = groups, causal
        self.scale_max, self.rotary = scale_max, rotary
        self.to_q = nn.Linear(dim, heads * dim_head, bias=bias)
        self.to_k = nn.Linear(context_dim, kv_heads * dim_head, bias=bias)
        self.to_v = nn.Linear(context_dim, kv_heads * dim_head, bias=bias)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=bias)
        self.constant_scale = float(scale)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(scale))) if learned_scale else None

    @property
    def scale(self) -> float | Tensor:
        """The constant scale, or the learned ones, ``(heads,)``."""
        if self.log_scale is None:
            return self.constant_scale
        log_scale = self.log_scale.float()  # a model cast to half precision must not round its scale past the limit
        if self.scale_max is not None:
            log_scale = log_scale.clamp(max=math.log(self.scale_max))
        return log_scale.exp()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        attn_bias_batch_dim: bool = False,
        bias_bound: float | None = None,
    ) -> Tensor:
        """Attend from ``x`` to itself or to ``context``.

        Args:
            x: ``(B, Sq, dim)``.
            context: ``(B, Sk, context_dim)``; None: self-attention, ``context = x``.
            mask: bool, True = may be attended; the forms of ``cosattn.cosine_attention``.
            attn_bias: its forms too: ``(heads, Sq, Sk)``, ``(B, Sq, Sk)`` with ``attn_bias_batch_dim``, four or five
                dimensions.
            bias_bound: promise about the size of ``attn_bias``, as in ``cosattn.cosine_attention``.

        Returns:
            ``(B, Sq, dim)``.
        """
        context = x if context is None else context
        q = self.to_q(x).unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)
        k = self.to_k(context).unflatten(-1, (self.kv_heads, self.dim_head)).transpose(1, 2)
        v = self.to_v(context).unflatten(-1, (self.kv_heads, self.dim_head)).transpose(1, 2)
        if self.rotary is not None:
            q, k = self.rotary(*l2norm_tensors(q, k, groups=self.groups))
        out = cosine_attention(
            q,
            k,
            v,
            scale=self.scale,
            groups=self.groups,
            causal=self.causal,
            mask=mask,
            attn_bias=attn_bias,
            attn_bias_batch_dim=attn_bias_batch_dim,
            l2norm_qk=self.rotary is None,
            scale_max=self._promised_scale_max(),
            bias_bound=bias_bound,
        )
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return projected

    def _promised_scale_max(self) -> float | None:
        """The clamp is in logarithms and float32, whose rounding may pass the limit by a little."""
        return None if self.log_scale is None or self.scale_max is None else self.scale_max * (1 + 1e-6)

    def extra_repr(self) -> str:
        """What the projections do not show."""
        scale = "learned" if self.log_scale is not None else f"{self.constant_scale:g}"
        shown = f"heads={self.heads}, kv_heads={self.kv_heads}, dim_head={self.dim_head}, scale={scale}"
        if self.scale_max is not None:
            shown += f", scale_max={self.scale_max:g}"
        return f"{shown}, groups={self.groups}, causal={self.causal}"


def _check(
    dim: int,
    heads: int,
    kv_heads: int,
    dim_head: int,
    context_dim: int,
    groups: int,
    scale: float,
    learned_scale: bool,
    scale_max: float | None,
) -> None:
    sizes = {
        "dim": dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "dim_head": dim_head,
        "context_dim": context_dim,
        "groups": groups,
    }
    problems = [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
    if not problems:
        if heads % kv_heads:
            problems.append(f"heads must be a multiple of kv_heads, got {heads} and {kv_heads}")
        if dim_head % groups:
            problems.append(f"groups must divide dim_head, got {groups} and {dim_head}")
    if not 0 < scale < math.inf:
        problems.append(f"scale must be positive and finite, got {scale}")
    if scale_max is not None:
        if not learned_scale:
            problems.append("scale_max limits a learned scale: give learned_scale=True, or leave it out")
        elif not scale <= scale_max < math.inf:
            problems.append(f"scale_max must be finite and at least the initial scale, got {scale_max} and {scale}")
    if problems:
        raise ArgumentError("\n".join(["CosineAttention:", *(f"- {problem}" for problem in problems)]))
