"""The CPU path: the forward and the backward pass in tiles of queries and keys, O(Sq + Sk) extra memory.

Plain torch operations with all heads batched. Sums are float32 (float64 for float64 inputs) whatever the input type,
and the softmax is always the online one: on a CPU the running maximum costs next to nothing.

Shapes inside this file: a query head is ``(kv head, member of its group)``, so q is ``(B, Hkv, G, Sq, D)`` and one
matrix product serves the G query heads that share a key head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cosattn.reference import EPS, repeated

_TILE_KEYS = 512
_TILE_ELEMENTS = 1 << 20
"""Logits alive at once: small enough for the last-level cache, large enough to keep the matrix products efficient."""


def forward(
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
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        q: ``(B, Hq, Sq, D)``.
        k: ``(B, Hkv, Sk, D)``.
        v: ``(B, Hkv, Sk, Dv)``.
        mask: bool ``(B, Sk)``, or ``(W, Hq|1, Sq, Sk)`` where W divides B; True = may be attended.
        bias: ``(W, Hq|1, Sq, Sk)``.
        scale: a number or ``(Hq,)``.

    Returns:
        The output ``(B, Hq, Sq, Dv)`` in q's dtype, and the log-sum-exp ``(B, Hq, Sq)``, float32 (float64 for
        float64): 0 and -inf for a row that sees no key.
    """
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=_accumulator(q))
    if out.numel() == 0 or k.shape[2] == 0:
        return out, lse
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        tiles = _Tiles(q, k, v, mask, bias, scale, groups, causal, l2norm)
        out_rows, lse_rows = tiles.group(out), tiles.group(lse)
        for rows in tiles.rows():
            shape = (*tiles.q.shape[:3], rows.stop - rows.start)
            peak = lse.new_full(shape, float("-inf"))
            total = lse.new_zeros(shape)
            acc = lse.new_zeros(*shape, v.shape[3])
            for keys in tiles.keys(rows):
                logits, hidden = tiles.logits(rows, keys)
                new_peak = torch.maximum(peak, logits.amax(-1))
                # A peak of -inf (nothing seen yet) or NaN must not turn the zeros of unseen keys into NaN.
                shift = new_peak.where(new_peak.isfinite(), 0)
                weights = logits.sub_(shift[..., None]).exp_()
                keep = (peak - shift).exp_()
                total = total.mul_(keep).add_(weights.sum(-1))
                acc = acc.mul_(keep[..., None]).add_(_weighted_sum(weights, hidden, tiles.v[:, :, keys]))
                peak = new_peak
            out_rows[:, :, :, rows] = acc.div_(total.masked_fill(total == 0, 1)[..., None])
            lse_rows[:, :, :, rows] = peak.where(peak.isfinite(), 0).add_(total.log_())
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    *,
    groups: int,
    causal: bool,
    l2norm: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of ``forward``, which returned ``out`` and ``lse``, from the gradients of both.

    Args:
        dlse: ``(B, Hq, Sq)``, None when nobody used the log-sum-exp.
        needs: whether the gradients of bias and of scale (then a tensor) are wanted.

    Returns:
        ``(dq, dk, dv, dbias | None, dscale | None)``, each in the shape and dtype of its input.
    """
    needs_bias, needs_scale = needs
    accumulator = _accumulator(q)
    dbias = torch.zeros_like(bias, dtype=accumulator) if bias is not None and needs_bias else None
    dscale = torch.zeros_like(scale) if isinstance(scale, Tensor) and needs_scale else None
    if q.numel() == 0 or k.shape[2] == 0 or v.shape[3] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), _cast(dbias, bias), dscale
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        sees_nothing = lse == float("-inf")
        q, dout = (x.masked_fill(sees_nothing[..., None], 0) for x in (q, dout.to(accumulator)))
        tiles = _Tiles(q, k, v, mask, bias, scale, groups, causal, l2norm)
        delta = (dout * out).sum(-1)
        if dlse is not None:
            delta -= dlse.masked_fill(sees_nothing, 0)
        dout, delta, shift = (tiles.group(x) for x in (dout, delta, lse.masked_fill(sees_nothing, 0)))
        dq, dk, dv = (torch.zeros_like(x) for x in (tiles.q, tiles.k, tiles.v))
        for rows in tiles.rows():
            dout_rows, q_rows = _fold(dout[:, :, :, rows]), _fold(tiles.q[:, :, :, rows])
            for keys in tiles.keys(rows):
                logits, hidden = tiles.logits(rows, keys)
                weights = logits.sub_(shift[:, :, :, rows, None]).exp_()
                dlogits = (dout_rows @ tiles.v[:, :, keys].mT).view_as(weights)
                dlogits.sub_(delta[:, :, :, rows, None]).mul_(weights)
                if hidden is not None:
                    weights.masked_fill_(hidden, 0)
                    dlogits.masked_fill_(hidden, 0)
                dv[:, :, keys] += _weighted_sum_over_rows(weights, hidden, dout_rows)
                dk[:, :, keys] += _weighted_sum_over_rows(dlogits, hidden, q_rows)
                dq[:, :, :, rows] += _weighted_sum(dlogits, hidden, tiles.k[:, :, keys])
                if dbias is not None:
                    part = dlogits.flatten(1, 2).unflatten(0, (-1, dbias.shape[0])).sum(0)
                    dbias[:, :, rows, keys] = part.sum_to_size(dbias[:, :, rows, keys].shape)
        # From here the gradient of scale * normalised q.
        if dscale is not None:
            dscale.copy_((tiles.q_unit * dq).sum(dim=(0, 3, 4)).flatten())
        dq = (dq * tiles.scale).flatten(1, 2)
        if l2norm:
            dq = _normalise_backward(dq, tiles.q_unit.flatten(1, 2), tiles.q_norm)
            dk = _normalise_backward(dk, tiles.k, tiles.k_norm)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), _cast(dbias, bias), dscale


class _Tiles:
    """Normalised inputs of one call, and the logits of any tile of them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float | Tensor,
        groups: int,
        causal: bool,
        l2norm: bool,
    ) -> None:
        accumulator = _accumulator(q)
        self.kv_heads, self.q_len, self.k_len = k.shape[1], q.shape[2], k.shape[2]
        self.batch, self.causal = q.shape[0], causal
        key_mask = mask if mask is not None and mask.ndim == 2 else None
        self.mask = mask if key_mask is None else key_mask[:, None, None]
        self.bias = bias
        q, k, v = q.to(accumulator), k.to(accumulator), v.to(accumulator)
        if key_mask is not None:  # whatever lies behind the mask must not reach a product, not even times 0
            k, v = k.where(key_mask[:, None, :, None], 0), v.where(key_mask[:, None, :, None], 0)
        if l2norm:
            q, self.q_norm = _normalise(q, groups)
            k, self.k_norm = _normalise(k, groups)
        self.q_unit, self.k, self.v = self.group(q), k, v
        self.scale = scale.to(accumulator).view(self.kv_heads, -1, 1, 1) if isinstance(scale, Tensor) else scale
        self.q = self.q_unit * self.scale
        heads = q.shape[0] * q.shape[1]
        self.tile_keys = min(self.k_len, _TILE_KEYS)
        self.tile_rows = max(_TILE_ELEMENTS // (heads * self.tile_keys), 16)

    def group(self, x: Tensor) -> Tensor:
        """``(B, Hq, ...)`` as ``(B, Hkv, G, ...)``."""
        grouped: Tensor = x.unflatten(1, (self.kv_heads, -1))
        return grouped

    def rows(self) -> Iterator[slice]:
        """The tiles of queries."""
        return (slice(at, min(at + self.tile_rows, self.q_len)) for at in range(0, self.q_len, self.tile_rows))

    def keys(self, rows: slice) -> Iterator[slice]:
        """The tiles of keys that some row of ``rows`` may see."""
        end = min(rows.stop + self.k_len - self.q_len, self.k_len) if self.causal else self.k_len
        return (slice(at, min(at + self.tile_keys, end)) for at in range(0, end, self.tile_keys))

    def logits(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """A tile of logits ``(B, Hkv, G, rows, keys)``, -inf where hidden, and what is hidden (None: nothing)."""
        q = self.q[:, :, :, rows]
        logits = (_fold(q) @ self.k[:, :, keys].mT).view(*q.shape[:4], -1)
        if self.bias is not None:
            logits += self._pairs(self.bias, rows, keys)
        hidden = self._hidden(rows, keys)
        if hidden is not None:
            logits.masked_fill_(hidden, float("-inf"))
        return logits, hidden

    def _hidden(self, rows: slice, keys: slice) -> Tensor | None:
        """Broadcastable to ``(B, Hkv, G, rows, keys)``."""
        hidden: Tensor | None = None
        last_seen_by_first = rows.start + self.k_len - self.q_len
        if self.causal and keys.stop - 1 > last_seen_by_first:
            seen = torch.ones(rows.stop - rows.start, keys.stop - keys.start, dtype=torch.bool)
            hidden = seen.triu_(last_seen_by_first - keys.start + 1)
        if self.mask is not None:
            masked = ~self._pairs(self.mask, rows, keys)
            if masked.any():
                hidden = masked if hidden is None else hidden | masked
        return hidden

    def _pairs(self, tensor: Tensor, rows: slice, keys: slice) -> Tensor:
        """A tile of ``(W, Hq|1, Sq|1, Sk)``, broadcastable to ``(B, Hkv, G, rows, keys)``."""
        tile = repeated(tensor[:, :, rows if tensor.shape[2] != 1 else slice(None), keys], self.batch)
        split: Tensor = tile.unflatten(1, (1, 1) if tile.shape[1] == 1 else (self.kv_heads, -1))
        return split


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _fold(x: Tensor) -> Tensor:
    """``(B, Hkv, G, rows, ...)`` as ``(B, Hkv, G * rows, ...)``."""
    return x.flatten(2, 3)


def _weighted_sum(weights: Tensor, hidden: Tensor | None, values: Tensor) -> Tensor:
    """Sum over keys of ``weights * values``: ``(B, Hkv, G, rows, d)`` from values ``(B, Hkv, keys, d)``."""
    product = _isolated(_fold(weights), values, None if hidden is None else _fold(hidden.expand_as(weights)))
    return product.view(*weights.shape[:4], -1)


def _weighted_sum_over_rows(weights: Tensor, hidden: Tensor | None, values: Tensor) -> Tensor:
    """Sum over rows of ``weights * values``: ``(B, Hkv, keys, d)`` from values ``(B, Hkv, G * rows, d)``."""
    return _isolated(_fold(weights).mT, values, None if hidden is None else _fold(hidden.expand_as(weights)).mT)


def _isolated(weights: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """``weights @ values`` where a hidden pair contributes nothing, even when the value is NaN or Inf."""
    if hidden is None or (finite := values.isfinite()).all():
        return weights @ values
    reached = (~hidden).to(weights.dtype) @ (~finite).to(weights.dtype) > 0
    return (weights @ values.where(finite, 0)).masked_fill_(reached, float("nan"))


def _normalise(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Chunks of the last dimension over their norms, and the divisors: infinity where the norm is <= EPS."""
    chunks = x.unflatten(-1, (groups, -1))
    norm = torch.linalg.vector_norm(chunks, dim=-1, keepdim=True)
    norm.masked_fill_(norm <= EPS, float("inf"))
    return (chunks / norm).flatten(-2), norm


def _normalise_backward(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Only the part of the gradient across the unit vector passes."""
    groups = norm.shape[-2]
    gradient, unit = gradient.unflatten(-1, (groups, -1)), unit.unflatten(-1, (groups, -1))
    return ((gradient - unit * (gradient * unit).sum(-1, keepdim=True)) / norm).flatten(-2)
