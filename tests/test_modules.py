"""``CosineAttention``: what its options mean, against the reference run on its own projections."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cosattn import ArgumentError, CosineAttention, cosine_attention_reference


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_hand(layer: CosineAttention, x: Tensor, context: Tensor | None = None, **options: Any) -> Tensor:
    """The layer from its projections and the reference."""
    context = x if context is None else context
    q, k, v = (
        projection(source).unflatten(-1, (-1, layer.dim_head)).transpose(1, 2)
        for projection, source in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context))
    )
    out = cosine_attention_reference(q, k, v, scale=layer.scale, groups=layer.groups, causal=layer.causal, **options)
    return layer.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 1},
        {"kv_heads": 2, "causal": True},
        {"groups": 4, "scale": 2.0},
        {"bias": True},
        {"learned_scale": True},
        {"learned_scale": True, "scale_max": 9.0, "causal": True},
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention(options: dict[str, Any], masked: bool) -> None:
    layer, x = CosineAttention(24, heads=4, dim_head=8, **options), normal(2, 10, 24)
    given: dict[str, Any] = {"mask": torch.arange(10) < torch.tensor([[10], [6]])} if masked else {}
    out = layer(x, **given)
    assert out.shape == x.shape
    torch.testing.assert_close(out, by_hand(layer, x, **given))


def test_cross_attention_and_bias() -> None:
    layer = CosineAttention(24, heads=4, dim_head=8, context_dim=12)
    x, context, bias = normal(2, 5, 24), normal(2, 9, 12), normal(2, 5, 9)
    out = layer(x, context, attn_bias=bias, attn_bias_batch_dim=True)
    torch.testing.assert_close(out, by_hand(layer, x, context, attn_bias=bias, attn_bias_batch_dim=True))


def test_each_head_learns_its_own_scale() -> None:
    layer = CosineAttention(24, heads=4, dim_head=8, scale=10.0, learned_scale=True)
    torch.testing.assert_close(layer.scale, torch.full((4,), 10.0))
    layer(normal(2, 10, 24)).square().sum().backward()
    assert layer.log_scale is not None
    assert layer.log_scale.grad is not None
    assert layer.log_scale.grad.unique().numel() == 4
    constant = CosineAttention(24, heads=4, dim_head=8, scale=10.0)
    assert constant.scale == 10.0
    assert {name for name, _ in layer.named_parameters()} - {name for name, _ in constant.named_parameters()} == {
        "log_scale"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_scale_stays_below_its_limit(dtype: torch.dtype) -> None:
    layer = CosineAttention(24, heads=4, dim_head=8, scale=99.0, learned_scale=True, scale_max=100.0).to(dtype)
    assert layer.log_scale is not None
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([1.0, 4.0, 6.0, 1000.0]))
    scale = layer.scale
    assert isinstance(scale, Tensor)
    torch.testing.assert_close(scale, torch.tensor([math.e, math.exp(4), 100.0, 100.0]))
    assert layer(normal(2, 10, 24).to(dtype)).isfinite().all()


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Rotary position embedding of ``(B, H, S, D)``, positions from ``first``."""
    half = x.shape[-1] // 2
    angles = torch.arange(first, first + x.shape[2])[:, None] / 10 ** torch.linspace(0, 2, half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def test_the_rotary_hook_stands_between_norm_and_attention() -> None:
    seen: list[Tensor] = []

    def hook(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend((q, k))
        return rotate(q), rotate(k)

    layer = CosineAttention(24, heads=4, kv_heads=2, dim_head=8, groups=2, causal=True, rotary=hook)
    x = normal(2, 6, 24)
    out = layer(x)
    q, k = seen
    assert (q.shape, k.shape) == ((2, 4, 6, 8), (2, 2, 6, 8))
    for unit in (q, k):
        torch.testing.assert_close(unit.unflatten(-1, (2, 4)).norm(dim=-1), torch.ones(*unit.shape[:3], 2))
    v = layer.to_v(x).unflatten(-1, (2, 8)).transpose(1, 2)
    expected = cosine_attention_reference(rotate(q), rotate(k), v, groups=2, causal=True, l2norm_qk=False)
    torch.testing.assert_close(out, layer.to_out(expected.transpose(1, 2).flatten(2)))

    layer.rotary = lambda q, k: (rotate(q, 5), rotate(k, 5))
    torch.testing.assert_close(layer(x), out, msg="only relative positions matter")
    layer.rotary = lambda q, k: (q, k)
    identity = layer(x)
    layer.rotary = None
    torch.testing.assert_close(layer(x), identity)
    assert not torch.allclose(identity, out)


def test_a_saved_layer_loads_and_copies() -> None:
    layer, x = CosineAttention(24, heads=4, dim_head=8, learned_scale=True), normal(2, 10, 24)
    other = CosineAttention(24, heads=4, dim_head=8, learned_scale=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_its_repr_says_what_it_does() -> None:
    text = repr(CosineAttention(24, heads=4, kv_heads=2, dim_head=8, learned_scale=True, scale_max=20, causal=True))
    for words in ("heads=4", "kv_heads=2", "dim_head=8", "scale=learned", "scale_max=20", "groups=1", "causal=True"):
        assert words in text


def test_several_problems_are_reported_together() -> None:
    with pytest.raises(ArgumentError) as raised:
        CosineAttention(24, heads=4, kv_heads=3, dim_head=8, groups=3, scale=-1.0, scale_max=5.0)
    for words in ("multiple of kv_heads", "groups must divide", "scale must be positive", "learned_scale=True"):
        assert words in str(raised.value)
    with pytest.raises(ArgumentError, match="heads must be at least 1, got 0"):
        CosineAttention(24, heads=0)
    with pytest.raises(ArgumentError, match="at least the initial scale"):
        CosineAttention(24, learned_scale=True, scale=8.0, scale_max=5.0)


def test_a_small_model_learns() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Embedding(8, 16), CosineAttention(16, heads=2, dim_head=8, learned_scale=True, scale=5.0))
    head, tokens = nn.Linear(16, 8), torch.randint(8, (8, 12))
    target = tokens[:, :1].expand(-1, 12)  # copy the first token: only attention can
    tokens = tokens.clone()
    tokens[:, 1:] = 0
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(head(layer(tokens)).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_torch_compile_keeps_the_layer_whole() -> None:
    layer = CosineAttention(24, heads=4, dim_head=8, learned_scale=True, scale_max=20, causal=True)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), normal(2, 10, 24)
    torch.testing.assert_close(compiled(x), layer(x))
    found, expected = (
        torch.autograd.grad(attention(x).square().sum(), list(layer.parameters())) for attention in (compiled, layer)
    )
    torch.testing.assert_close(found, expected)
