"""The reference against the definition, written out in plain Python numbers, and on the inputs where formulas break."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cosattn import cosine_attention_reference
from cosattn.reference import EPS, l2norm

F64 = torch.float64
INF = float("inf")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def by_definition(
    q: list[Any], k: list[Any], v: list[Any], scale: float, groups: int, offset: int | None, keys: list[bool], bias: Any
) -> tuple[list[list[float]], list[float]]:
    """One head, lists of lists; ``offset`` is Sk - Sq when causal. Output rows and log-sum-exps."""

    def unit(x: list[float]) -> list[float]:
        size = len(x) // groups
        chunks = [x[at : at + size] for at in range(0, len(x), size)]
        norms = [math.sqrt(sum(c * c for c in chunk)) for chunk in chunks]
        return [c / norm if norm > EPS else 0.0 for chunk, norm in zip(chunks, norms, strict=True) for c in chunk]

    rows, lses = [], []
    for i, query in enumerate(q):
        weights = {}
        for j, key in enumerate(k):
            if keys[j] and (offset is None or j <= i + offset):
                cosine = sum(a * b for a, b in zip(unit(query), unit(key), strict=True))
                weights[j] = math.exp(scale * cosine + bias[i][j])
        total = sum(weights.values())
        lses.append(math.log(total) if weights else -INF)
        rows.append([sum(w * v[j][c] for j, w in weights.items()) / (total or 1.0) for c in range(len(v[0]))])
    return rows, lses


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(3, 5), (5, 3), (4, 4), (1, 1)])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_definition(causal: bool, q_len: int, k_len: int, groups: int) -> None:
    batch, q_heads, kv_heads = 2, 4, 2
    q, k, v = normal(batch, q_heads, q_len, 6), normal(batch, kv_heads, k_len, 6), normal(batch, kv_heads, k_len, 2)
    q[0, 0, 0] = 0
    mask = torch.rand(batch, k_len, generator=torch.Generator().manual_seed(1)) < 0.7
    bias, scale = normal(batch, q_heads, q_len, k_len), torch.tensor([1.0, 8.0, -3.0, 0.0], dtype=F64)
    out, lse = cosine_attention_reference(
        q, k, v, scale=scale, groups=groups, causal=causal, mask=mask, attn_bias=bias, return_lse=True
    )
    for b in range(batch):
        for h in range(q_heads):
            rows, lses = by_definition(
                q[b, h].tolist(),
                k[b, h // 2].tolist(),
                v[b, h // 2].tolist(),
                scale[h].item(),
                groups,
                k_len - q_len if causal else None,
                mask[b].tolist(),
                bias[b, h].tolist(),
            )
            torch.testing.assert_close(out[b, h], torch.tensor(rows, dtype=F64))
            torch.testing.assert_close(lse[b, h], torch.tensor(lses, dtype=F64))


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_on_normalised_inputs(causal: bool) -> None:
    q, k, v = normal(2, 3, 9, 8), normal(2, 3, 9, 8, seed=1), normal(2, 3, 9, 5)
    unit_q, unit_k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    expected = F.scaled_dot_product_attention(unit_q, unit_k, v, is_causal=causal, scale=8)
    torch.testing.assert_close(cosine_attention_reference(q, k, v, causal=causal), expected)


def test_three_dimensional_forms_are_the_four_dimensional_ones() -> None:
    q, k, v, bias = normal(6, 1, 5, 8), normal(6, 1, 7, 8), normal(6, 1, 7, 4), normal(6, 1, 5, 7)
    mask = torch.arange(7) < torch.arange(2, 8)[:, None]
    options: dict[str, Any] = {"mask": mask, "causal": True, "return_lse": True}
    expected, expected_lse = cosine_attention_reference(q, k, v, attn_bias=bias, **options)
    out, lse = cosine_attention_reference(q[:, 0], k[:, 0], v[:, 0], attn_bias=bias[:, 0], **options)
    assert torch.equal(out, expected[:, 0])
    assert torch.equal(lse, expected_lse[:, 0])

    q = normal(6, 4, 5, 8)
    expected = cosine_attention_reference(q, k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1))
    torch.testing.assert_close(cosine_attention_reference(q, k[:, 0], v[:, 0]), expected)


def test_five_dimensions_repeat_over_the_batch() -> None:
    """As windows do over images: entry b reads entry b % W."""
    q, k, v = normal(6, 4, 5, 8), normal(6, 4, 7, 8), normal(6, 4, 7, 8)
    mask, bias = normal(3, 1, 5, 7) < 0.5, normal(3, 4, 1, 7)
    expected = cosine_attention_reference(
        q, k, v, mask=mask[[0, 1, 2, 0, 1, 2]], attn_bias=bias[[0, 1, 2, 0, 1, 2]].expand(-1, -1, 5, -1)
    )
    assert torch.equal(cosine_attention_reference(q, k, v, mask=mask[None], attn_bias=bias[None]), expected)
    keys = normal(6, 7) < 0.5
    assert torch.equal(
        cosine_attention_reference(q, k, v, mask=keys[:, None, None]), cosine_attention_reference(q, k, v, mask=keys)
    )


def test_bias_forms() -> None:
    q, k, v = normal(2, 4, 5, 8), normal(2, 4, 7, 8), normal(2, 4, 7, 8)
    heads, batch = normal(4, 5, 7), normal(2, 5, 7)
    full = heads[None].expand(2, -1, -1, -1)
    assert torch.equal(
        cosine_attention_reference(q, k, v, attn_bias=heads), cosine_attention_reference(q, k, v, attn_bias=full)
    )
    assert torch.equal(
        cosine_attention_reference(q, k, v, attn_bias=batch, attn_bias_batch_dim=True),
        cosine_attention_reference(q, k, v, attn_bias=batch[:, None].expand(-1, 4, -1, -1)),
    )


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (1, 4, 1, 1)])
def test_scale_forms(shape: tuple[int, ...]) -> None:
    q, k, v = normal(2, 4, 5, 8), normal(2, 4, 7, 8), normal(2, 4, 7, 8)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64)
    out = cosine_attention_reference(q, k, v, scale=scale.view(shape))
    for head in range(4):
        alone = cosine_attention_reference(q[:, head], k[:, head], v[:, head], scale=scale[head].item())
        torch.testing.assert_close(out[:, head], alone)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"l2norm_qk": False}, {"groups": 2}])
def test_derivatives_to_second_order(options: dict[str, Any]) -> None:
    q, k, v = (normal(1, 2, n, 4, seed=s).requires_grad_() for s, n in enumerate((2, 3, 3)))
    scale = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    mask = torch.tensor([[True, False, True]])

    def call(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Any:
        return cosine_attention_reference(q, k, v, scale=scale, mask=mask, return_lse=True, **options)

    assert torch.autograd.gradcheck(call, (q, k, v, scale))
    assert torch.autograd.gradgradcheck(call, (q, k, v, scale))


@pytest.mark.parametrize("factor", [0.0, 1e-14, 1e-200])
def test_a_vector_without_direction_gives_zeros_and_has_no_gradient(factor: float) -> None:
    x = (normal(3, 8) * factor).requires_grad_()
    unit = l2norm(x, groups=2)
    (gradient,) = torch.autograd.grad(unit.sum(), x)
    assert not unit.any()
    assert not gradient.any()


def test_the_norm_at_the_epsilon() -> None:
    x = torch.tensor([[EPS, 0.0], [EPS * 1.001, 0.0]], dtype=F64)
    assert l2norm(x).tolist() == [[0.0, 0.0], [1.0, 0.0]]


def test_a_norm_is_taken_over_each_chunk() -> None:
    x = normal(2, 3, 12)
    expected = F.normalize(x.view(2, 3, 4, 3), dim=-1).view(2, 3, 12)
    torch.testing.assert_close(l2norm(x, groups=4), expected)


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient() -> None:
    q, k, v = (normal(1, 1, n, 4).requires_grad_() for n in (5, 3, 3))
    out, lse = cosine_attention_reference(q, k, v, causal=True, return_lse=True)
    assert not out[:, :, :2].any()
    assert lse[0, 0, :2].tolist() == [-INF, -INF]
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), (q, k, v))
    assert not dq[:, :, :2].any()
    for gradient in (dq, dk, dv):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize(("key", "unreached"), [(1, 4), (3, 3)], ids=["masked", "future"])
def test_a_broken_key_reaches_only_the_rows_that_see_it(key: int, unreached: int) -> None:
    q, k, v = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1), normal(1, 1, 4, 4, seed=2)
    mask = torch.tensor([[True, False, True, True]])
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    k[:, :, key] = math.nan
    v[:, :, key] = INF
    dirty = [x.requires_grad_() for x in (q, k, v)]
    outs = [cosine_attention_reference(*x, causal=True, mask=mask) for x in (clean, dirty)]
    assert torch.equal(outs[0][:, :, :unreached], outs[1][:, :, :unreached])
    assert not outs[1][:, :, unreached:].isfinite().any()
    expected, found = (torch.autograd.grad(out.sum(), x) for out, x in zip(outs, (clean, dirty), strict=True))
    torch.testing.assert_close(found[0][:, :, :unreached], expected[0][:, :, :unreached])
    if unreached == 4:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_inputs(shape: tuple[int, int, int, int]) -> None:
    batch, heads, q_len, k_len = shape
    q, k, v = (torch.zeros(batch, heads, n, 8, requires_grad=True) for n in (q_len, k_len, k_len))
    out, lse = cosine_attention_reference(q, k, v, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((batch, heads, q_len, 8), (batch, heads, q_len))
    assert not out.any()
    assert (lse == -INF).all()
    out.sum().backward()
    assert q.grad is not None
    assert not q.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_half_precision_is_computed_in_float32_and_returned_as_given(dtype: torch.dtype) -> None:
    q, k, v = (normal(1, 2, 16, 8).to(dtype) for _ in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    out, lse = cosine_attention_reference(q, k, v, return_lse=True)
    exact, exact_lse = cosine_attention_reference(q.to(wide), k.to(wide), v.to(wide), return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, wide)
    assert torch.equal(out, exact.to(dtype))
    assert torch.equal(lse, exact_lse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cosine_attention_reference(q, k, v), out)
