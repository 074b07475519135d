"""What the benchmarks time: one case, its tensors, cosattn's side of it, and the row of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cosattn import cosine_attention
from cosattn.bench import DTYPES, Timing, directions

OURS = "cosattn"
SCALE = 8.0


@dataclass(frozen=True)
class Case:
    """One problem to time: ``mask_prob`` is the share of keys masked out, ``bias`` a (H, S, S) bias with gradient."""

    dtype: str
    batch: int
    heads: int
    head_dim: int
    seq_len: int
    direction: str
    causal: bool = False
    mask_prob: float = 0.0
    bias: bool = False

    @property
    def label(self) -> str:
        features = ["causal"] * self.causal + [f"mask {self.mask_prob:g}"] * bool(self.mask_prob) + ["bias"] * self.bias
        shape = f"b{self.batch} h{self.heads} d{self.head_dim} S{self.seq_len}"
        return " ".join([self.dtype, shape, *features, self.direction])


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None

    @property
    def all(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.bias) if x is not None]


def make_inputs(case: Case, device: torch.device, heads_last: bool = False) -> Inputs:
    """Random normal q, k, v (requiring gradients), a random key mask that always keeps key 0, a random bias.

    ``heads_last`` stores (B, S, H, D), as a projection gives it and as flash attention likes it best.
    """
    torch.manual_seed(0)
    sizes = (case.batch, case.heads, case.seq_len, case.head_dim)
    stored = [sizes[i] for i in (0, 2, 1, 3)] if heads_last else sizes
    values = (torch.randn(stored, device=device, dtype=DTYPES[case.dtype]) for _ in range(3))
    q, k, v = ((x.transpose(1, 2) if heads_last else x).requires_grad_() for x in values)
    mask = bias = None
    if case.mask_prob:
        mask = torch.rand(case.batch, case.seq_len, device=device) >= case.mask_prob
        mask[:, 0] = True
    if case.bias:
        bias_shape = (case.heads, case.seq_len, case.seq_len)
        bias = torch.randn(bias_shape, device=device, dtype=DTYPES[case.dtype], requires_grad=True)
    return Inputs(q, k, v, mask, bias)


def cosattn_work(case: Case, x: Inputs) -> Callable[[], object]:
    """Our side of a case."""
    return directions(
        lambda: cosine_attention(x.q, x.k, x.v, scale=SCALE, causal=case.causal, mask=x.mask, attn_bias=x.bias),
        x.all,
        case.direction,
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """In Frobenius norm, computed in float64."""
    exact = expected.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm().clamp_min(1e-30))


def operations(case: Case) -> float:
    """By the usual count: two products forward, five backward, half of them under a causal mask."""
    products = {"forward": 2.0, "backward": 5.0, "both": 7.0}[case.direction]
    return products * 2.0 * case.batch * case.heads * case.seq_len**2 * case.head_dim * (0.5 if case.causal else 1.0)


def row_of(case: Case, timings: dict[str, Timing], **extra: object) -> dict[str, Any]:
    """One result row: times, ratios to ours (above 1: cosattn is faster) and TFLOP/s."""
    ours = timings[OURS].milliseconds
    times = {name: t.milliseconds for name, t in timings.items() if t.milliseconds is not None}
    return {
        "case": asdict(case),
        "timings": {name: asdict(t) for name, t in timings.items()},
        "ratios": {name: ms / ours for name, ms in times.items() if name != OURS} if ours else {},
        "tflops": {name: operations(case) / (ms * 1e-3) / 1e12 for name, ms in times.items()},
        **extra,
    }
