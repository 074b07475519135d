"""What the public function promises, on CPU tensors: refusals, forms, dtypes, autocast."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import cosattn
from cosattn.errors import ArgumentError, CosattnError, UnsupportedError
from cosattn.functional import cosine_attention
from cosattn.reference import cosine_attention_reference


def inputs(batch: int = 2, heads: int = 4, q_len: int = 5, k_len: int = 7) -> dict[str, Any]:
    return {
        "q": torch.randn(batch, heads, q_len, 16),
        "k": torch.randn(batch, heads, k_len, 16),
        "v": torch.randn(batch, heads, k_len, 8),
    }


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"q": [1.0]}, "q must be a torch.Tensor, got list"),
    ({"k": None}, "k must be a torch.Tensor, got NoneType"),
    ({"q": zeros(2, 4, 5, 16).to_sparse()}, r"q must be a dense \(strided\) tensor.*to_dense"),
    ({"q": zeros(5, 16)}, r"q must be \(B, Hq, Sq, D\).*got \(5, 16\)"),
    ({"q": zeros(2, 5, 16)}, r"batch and heads merged, so k and v must be"),
    ({"k": zeros(7, 16)}, "k and v must be"),
    ({"k": zeros(2, 7, 16)}, "k and v must be"),
    ({"k": zeros(1, 4, 7, 16)}, r"one batch size, got 2, 1 and 2; .*\.expand"),
    ({"k": zeros(2, 2, 7, 16)}, "same heads, got 2 and 4"),
    ({"k": zeros(2, 3, 7, 16), "v": zeros(2, 3, 7, 8)}, "multiple of the heads of k, got 4 and 3"),
    ({"k": zeros(2, 0, 7, 16), "v": zeros(2, 0, 7, 8)}, "q has 4 heads but k has none"),
    ({"v": zeros(2, 4, 6, 8)}, "same length, got 7 and 6"),
    ({"k": zeros(2, 4, 7, 8)}, "same head dimension, got 16 and 8"),
    ({"v": zeros(2, 4, 7, 0)}, "head dimensions must be at least 1, got 16 for q and 0 for v"),
    ({"v": zeros(2, 4, 7, 8, dtype=torch.float16)}, "one dtype, got .*float16; .*autocast"),
    (
        dict.fromkeys("qkv", zeros(2, 4, 7, 16, dtype=torch.int32)),
        "must be float32, float16, bfloat16.*got torch.int32",
    ),
    ({"k": zeros(2, 4, 7, 16).to("meta")}, r"k is on meta and q is on cpu; move it with \.to\(q\.device\)"),
    ({"groups": 3}, "groups must divide the head dimension, got 3 and 16"),
    ({"groups": 0}, "groups must be a whole number >= 1, got 0"),
    ({"groups": 2.0}, "groups must be a whole number"),
    ({"groups": True}, "groups must be a whole number"),
    ({"mask": zeros(2, 7)}, r"mask must be boolean.*mask\.bool\(\)"),
    ({"mask": [True]}, "mask must be a torch.Tensor"),
    ({"mask": zeros(2, 5, 7).bool()}, r"mask must be \(B, Sk\) = \(2, 7\).*three dimensions are ambiguous"),
    ({"mask": zeros(2, 3, 5, 7).bool()}, r"\(B, Hq, Sq, Sk\) = \(2, 4, 5, 7\).*got \(2, 3, 5, 7\)"),
    ({"mask": zeros(1, 3, 4, 5, 7).bool()}, r"\(1, W, Hq, Sq, Sk\) = \(1, W, 4, 5, 7\).*W divides the batch of 2"),
    ({"mask": zeros(2, 1, 4, 5, 7).bool()}, r"\(1, W, Hq, Sq, Sk\).*got \(2, 1, 4, 5, 7\)"),
    ({"attn_bias": zeros(1, 0, 1, 5, 7)}, r"attn_bias with five dimensions must be \(1, W"),
    ({"mask": zeros(2, 6).bool()}, r"mask must be \(B, Sk\) = \(2, 7\)"),
    ({"attn_bias": zeros(5, 7)}, r"attn_bias must be \(Hq, Sq, Sk\)"),
    ({"attn_bias": zeros(2, 5, 7)}, r"\(Hq, Sq, Sk\) = \(4, 5, 7\), got \(2, 5, 7\); \(B, Sq, Sk\) needs"),
    ({"attn_bias": zeros(4, 5, 7), "attn_bias_batch_dim": True}, r"\(B, Sq, Sk\) = \(2, 5, 7\)"),
    ({"attn_bias": zeros(2, 4, 2, 7)}, r"= \(2, 4, 5, 7\), or 1 in their place; got \(2, 4, 2, 7\)"),
    ({"attn_bias": zeros(4, 5, 7).bool()}, r"attn_bias must be one of .*cast it.*torch\.where"),
    ({"attn_bias_batch_dim": 1}, "attn_bias_batch_dim must be True or False"),
    ({"scale": "8"}, "scale must be a finite number"),
    ({"scale": float("nan")}, "scale must be a finite number"),
    ({"scale": True}, "scale must be a finite number"),
    ({"scale": torch.ones(3)}, r"scale must hold one value per query head.*Hq = 4.*got \(3\)"),
    ({"scale": torch.ones(4, dtype=torch.int64)}, "scale must be of a floating point dtype"),
    ({"scale": 8.0, "scale_max": 4.0}, "scale is 8.0, beyond scale_max=4.0"),
    ({"scale_max": -1.0}, "scale_max must be a finite number >= 0"),
    ({"bias_bound": float("inf")}, "bias_bound must be a finite number >= 0"),
    ({"deterministic": 1}, "deterministic must be True, False or None"),
]


@pytest.mark.parametrize(("change", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_a_wrong_argument_is_named_with_what_was_found(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as caught:
        cosine_attention(**(inputs() | change))
    assert str(caught.value).startswith("cosine_attention: 1 problem\n  - ")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CosattnError)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ArgumentError) as caught:
        cosine_attention(
            **inputs() | {"k": zeros(2, 4, 7, 8), "mask": zeros(3, 7)}, scale=None, groups=0, bias_bound=-1.0
        )
    text = str(caught.value)
    assert text.startswith("cosine_attention: 6 problems\n")
    for words in (
        "same head dimension",
        "mask must be boolean",
        "mask must be (B, Sk)",
        "scale",
        "groups",
        "bias_bound",
    ):
        assert words in text


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        cosine_attention(*inputs().values(), 8.0)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_type_of_q(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs().values())
    out, lse = cosine_attention(q, k, v, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.shape, lse.shape) == ((2, 4, 5, 8), (2, 4, 5))
    torch.testing.assert_close(out, cosine_attention_reference(q, k, v))


@pytest.mark.parametrize(
    "scale", [8, numpy.float32(8), numpy.float64(8), torch.tensor(8.0), torch.full((1, 4, 1, 1), 8.0)]
)
def test_numbers_of_every_kind_are_a_scale(scale: Any) -> None:
    torch.testing.assert_close(
        cosine_attention(**inputs_once(), scale=scale), cosine_attention_reference(**inputs_once())
    )


def inputs_once() -> dict[str, Any]:
    torch.manual_seed(0)
    return inputs()


def test_merged_heads_give_merged_results() -> None:
    q, k, v = torch.randn(6, 5, 16), torch.randn(6, 7, 16), torch.randn(6, 7, 8)
    found = cosine_attention(q, k, v, attn_bias=torch.ones(6, 5, 7), mask=torch.ones(1, 7).bool(), return_lse=True)
    assert [x.shape for x in found] == [(6, 5, 8), (6, 5)]


def test_autocast_casts_q_k_and_v_but_not_scale_and_bias() -> None:
    q, k, v = inputs().values()
    q.requires_grad_()
    scale = torch.full((4,), 8.001, requires_grad=True)
    bias = torch.randn(4, 5, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = cosine_attention(q, k, v.bfloat16(), scale=scale, attn_bias=bias)
    assert out.dtype == torch.bfloat16
    expected = cosine_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=scale, attn_bias=bias)
    assert torch.equal(out, expected)
    out.sum().backward()
    for x in (q, scale, bias):
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert cosine_attention(q.double(), k.double(), v.double()).dtype == torch.float64


def test_forward_mode_and_transforms_are_refused_with_a_way_out() -> None:
    q, k, v = inputs().values()
    with torch.autograd.forward_ad.dual_level():
        cosine_attention(q, k, v)
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(UnsupportedError, match=r"forward-mode.*Ways out: .*reference"):
            cosine_attention(dual, k, v)
    with pytest.raises(UnsupportedError, match=r"torch\.func.*Ways out: "):
        torch.func.grad(lambda q: cosine_attention(q, k, v).sum())(q)
    with pytest.raises(UnsupportedError, match=r"vmap.*Ways out: .*folded into the batch"):
        torch.vmap(lambda q: cosine_attention(q, k[:1], v[:1]))(q[:, None])


def test_second_derivatives_are_refused_with_a_way_out() -> None:
    q, k, v = (x.requires_grad_() for x in inputs().values())
    (dq,) = torch.autograd.grad(cosine_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match=r"no second derivative.*Way out"):
        dq.sum().backward()


def test_the_docstring_names_every_argument() -> None:
    text = cosine_attention.__doc__ or ""
    names = re.findall(r"(\w+):", text.partition("Args:")[2].partition("Returns:")[0])
    signature = cosine_attention.__annotations__.keys() - {"return"}
    assert signature <= set(names)
    assert cosattn.cosine_attention is cosine_attention
