"""The names, order and defaults of flash-cosine-sim-attention 0.1.40, and the numbers its formula gives."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosattn import flash_cosine_sim_attention, l2norm_tensors, plain_cosine_sim_attention

ATTENTIONS = pytest.mark.parametrize("attention", [flash_cosine_sim_attention, plain_cosine_sim_attention])
SEED_SIGNATURE = {
    "q": inspect.Parameter.empty,
    "k": inspect.Parameter.empty,
    "v": inspect.Parameter.empty,
    "mask": None,
    "attn_bias": None,
    "scale": 8,
    "groups": 1,
    "causal": False,
    "l2norm_qk": True,
    "attn_bias_batch_dim": False,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@ATTENTIONS
def test_order_and_defaults(attention: Any) -> None:
    parameters = inspect.signature(attention).parameters.values()
    assert {p.name: p.default for p in parameters} == SEED_SIGNATURE
    assert [p.name for p in parameters] == list(SEED_SIGNATURE)
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor, bias: Tensor | float) -> Tensor:
    """The formula on 4-D inputs of equally many heads, every row seeing something."""
    logits = scale * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT + bias
    return logits.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@ATTENTIONS
@pytest.mark.parametrize("causal", [False, True])
def test_every_argument_by_position(attention: Any, causal: bool) -> None:
    q, k, v, bias = normal(2, 3, 5, 8), normal(2, 3, 7, 8, seed=1), normal(2, 3, 7, 8, seed=2), normal(2, 5, 7)
    mask = torch.tensor([[True] * 6 + [False], [True, False] * 3 + [True]])
    q, k = l2norm_tensors(q, k)
    allowed = mask[:, None, None, :] & (torch.ones(5, 7).tril(2) > 0 if causal else torch.ones(5, 7) > 0)
    out = attention(q, k, v, mask, bias, 10, 1, causal, False, True)
    torch.testing.assert_close(out, softmax_attention(q, k, v, 10, allowed, bias[:, None]))


@ATTENTIONS
@pytest.mark.parametrize(
    ("q", "k", "options"),
    [
        ((1, 4, 10, 16), (1, 4, 10, 16), {}),
        ((1, 4, 10, 16), (1, 4, 20, 16), {}),
        ((1, 4, 10, 16), (1, 4, 20, 16), {"mask": torch.ones(1, 20).bool()}),
        ((4, 4, 10, 16), (4, 4, 10, 16), {"causal": True}),
        ((4, 4, 10, 16), (4, 10, 16), {"causal": True}),
        ((1, 4, 10, 16), (1, 4, 20, 16), {"causal": True}),
        ((8, 10, 16), (8, 20, 16), {"causal": True}),
        ((8, 10, 16), (8, 20, 16), {"attn_bias": normal(8, 10, 20)}),
    ],
)
def test_the_calls_of_its_readme(attention: Any, q: Any, k: Any, options: dict[str, Any]) -> None:
    query, key, value = normal(*q), normal(*k, seed=1), normal(*k, seed=2)
    out = attention(query, key, value, **options)
    assert out.shape == query.shape
    if query.ndim == 3:
        query = query[:, None]
        options = {name: x[:, None] if name == "attn_bias" else x for name, x in options.items()}
    if key.ndim == 3:
        key, value = key[:, None], value[:, None]
    key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
    allowed = torch.ones(query.shape[2], key.shape[2]).bool()
    if options.get("causal"):
        allowed = allowed.tril(key.shape[2] - query.shape[2])
    expected = softmax_attention(query, key, value, 8, allowed, options.get("attn_bias", 0.0))
    torch.testing.assert_close(out, expected.view(q))


def test_both_train_alike() -> None:
    leaves = [normal(2, 3, 9, 8, seed=seed).double().requires_grad_() for seed in range(3)]
    bias = normal(3, 9, 9).double().requires_grad_()
    gradients = [
        torch.autograd.grad(attention(*leaves, attn_bias=bias, groups=2, causal=True).square().sum(), [*leaves, bias])
        for attention in (flash_cosine_sim_attention, plain_cosine_sim_attention)
    ]
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def test_normalising_first_is_the_same() -> None:
    q, k, v = normal(2, 3, 9, 8), normal(2, 9, 8, seed=1), normal(2, 9, 8, seed=2)
    unit_q, unit_k = l2norm_tensors(q, k, groups=4)
    torch.testing.assert_close(
        flash_cosine_sim_attention(unit_q, unit_k, v, groups=4, l2norm_qk=False),
        flash_cosine_sim_attention(q, k, v, groups=4),
    )


def test_l2norm_tensors_returns_the_first_dtype_and_unit_chunks() -> None:
    x, y = normal(2, 3, 8).half(), normal(5, 8)
    y[0] = 0
    unit_x, unit_y = l2norm_tensors(x, y, groups=2)
    assert (unit_x.dtype, unit_y.dtype) == (torch.float16, torch.float16)
    norms = unit_y.float().view(5, 2, 4).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(5, 2).index_fill(0, torch.tensor([0]), 0), rtol=1e-3, atol=0)
    torch.testing.assert_close(unit_x, F.normalize(x.float().view(2, 3, 2, 4), dim=-1).view(2, 3, 8).half())
    assert len(l2norm_tensors(x)) == 1
    with pytest.raises(TypeError, match="at least one"):
        l2norm_tensors()
