"""The CPU path: derivatives by finite differences, tiles, memory, and inputs that are empty or broken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosattn import cosine_attention, cosine_attention_reference, cpu

F64 = torch.float64
INF, NAN = float("inf"), float("nan")


def normal(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 keys and 16 rows."""
    monkeypatch.setattr(cpu, "_TILE_KEYS", 3)
    monkeypatch.setattr(cpu, "_TILE_ELEMENTS", 1)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "mask": {"mask": True},
    "causal-mask": {"causal": True, "mask": True},
    "groups": {"groups": 2},
    "no-norm": {"l2norm_qk": False},
    "bias-heads": {"bias": (2, 4, 5)},
    "bias-batch": {"bias": (2, 4, 5), "attn_bias_batch_dim": True},
    "bias-shared": {"bias": (1, 1, 4, 5)},
    "bias-keys": {"bias": (2, 1, 5)},
    "bias-rows": {"bias": (1, 1, 4, 1)},
    "bias-windows": {"bias": (1, 1, 2, 4, 5)},
    "pair-mask": {"mask": (2, 2, 4, 5)},
    "everything-pairs": {"causal": True, "mask": (1, 1, 1, 4, 5), "groups": 2, "bias": (1, 2, 1, 1, 5)},
    "everything": {"causal": True, "mask": True, "groups": 2, "bias": (2, 1, 4, 5)},
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("learned_scale", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("feature", FEATURES)
def test_gradients_by_finite_differences(feature: str, kv_heads: int, learned_scale: bool) -> None:
    options = dict(FEATURES[feature])
    bias_shape = options.pop("bias", None)
    mask = options.pop("mask", False)
    if isinstance(mask, tuple):
        options["mask"] = torch.rand(mask, generator=torch.Generator().manual_seed(3)) < 0.6
    elif mask:
        options["mask"] = torch.tensor([[True, True, False, True, True], [False, True, False, True, True]])
    leaves = {"q": normal(2, 2, 4, 4), "k": normal(2, kv_heads, 5, 4, seed=1), "v": normal(2, kv_heads, 5, 3)}
    if bias_shape is not None:
        leaves["attn_bias"] = normal(*bias_shape)
    if learned_scale:
        leaves["scale"] = torch.tensor([2.0, -3.0], dtype=F64)
    names = list(leaves)

    def call(*tensors: Tensor) -> Any:
        return cosine_attention(**dict(zip(names, tensors, strict=True)), **options, return_lse=True)

    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves.values()], fast_mode=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("form", ["merged", "single_head_kv"])
def test_gradients_of_three_dimensional_forms_by_finite_differences(form: str) -> None:
    q = normal(2, 4, 4) if form == "merged" else normal(2, 3, 4, 4)
    leaves = [x.requires_grad_() for x in (q, normal(2, 5, 4), normal(2, 5, 3))]

    def call(*tensors: Tensor) -> Any:
        return cosine_attention(*tensors, causal=True, groups=2)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.usefixtures("small_tiles")
def test_every_entry_of_the_jacobian() -> None:
    leaves = [x.requires_grad_() for x in (normal(1, 2, 2, 4), normal(1, 1, 4, 4), normal(1, 1, 4, 2), normal(2, 2, 4))]

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return cosine_attention(q, k, v, attn_bias=bias, causal=True, groups=2, return_lse=True)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(("keys", "elements"), [(1, 1), (7, 2000), (64, 1), (100, 1 << 20), (512, 1 << 20)])
def test_the_cut_into_tiles_changes_nothing(monkeypatch: pytest.MonkeyPatch, keys: int, elements: int) -> None:
    monkeypatch.setattr(cpu, "_TILE_KEYS", keys)
    monkeypatch.setattr(cpu, "_TILE_ELEMENTS", elements)
    leaves = [x.requires_grad_() for x in (normal(2, 4, 70, 8), normal(2, 2, 90, 8), normal(2, 2, 90, 8))]
    mask = torch.arange(90) % 5 > 0
    options: dict[str, Any] = {"causal": True, "mask": mask.expand(2, -1), "attn_bias": normal(4, 70, 90)}
    found, expected = (
        (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))
        for out in (cosine_attention(*leaves, **options), cosine_attention_reference(*leaves, **options))
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_is_linear_in_the_length() -> None:
    length, heads, dim = 4096, 2, 8
    q, k, v, dout = (normal(1, heads, length, dim, dtype=torch.float32, seed=n) for n in range(4))
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[0, 5] = False
    options: dict[str, Any] = {"groups": 1, "causal": True, "l2norm": True}
    with _LargestTensor() as largest:
        out, lse = cpu.forward(q, k, v, mask, None, 8.0, **options)
        cpu.backward(q, k, v, mask, None, 8.0, out, lse, dout, None, **options, needs=(False, False))
    assert largest.elements <= max(cpu._TILE_ELEMENTS, q.numel()) < heads * length * length // 8


def test_inputs_are_left_alone() -> None:
    tensors = [normal(1, 2, 5, 4), normal(1, 2, 6, 4), normal(1, 2, 6, 4), normal(2, 5, 6), torch.ones(2, dtype=F64)]
    copies = [x.clone() for x in tensors]
    q, k, v, bias, scale = (x.requires_grad_() for x in tensors)
    out, lse = cosine_attention(
        q, k, v, scale=scale, attn_bias=bias, l2norm_qk=False, mask=torch.ones(1, 6, dtype=torch.bool), return_lse=True
    )
    (out.sum() + lse.sum()).backward()
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)
        assert x._version == 0


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_empty_inputs(shape: tuple[int, int, int, int]) -> None:
    batch, heads, q_len, k_len = shape
    q, k, v = (torch.zeros(batch, heads, n, 8, requires_grad=True) for n in (q_len, k_len, k_len))
    scale = torch.ones(heads, requires_grad=True)
    bias = torch.zeros(heads, q_len, k_len, requires_grad=True)
    mask = torch.ones(batch, k_len, dtype=torch.bool)
    out, lse = cosine_attention(q, k, v, scale=scale, attn_bias=bias, mask=mask, causal=True, return_lse=True)
    assert (out.shape, lse.shape) == ((batch, heads, q_len, 8), (batch, heads, q_len))
    assert not out.any()
    assert (lse == -INF).all()
    for x, gradient in zip((q, k, v, scale, bias), torch.autograd.grad(out.sum(), (q, k, v, scale, bias)), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()


def test_a_gradient_that_arrives_at_a_row_that_sees_nothing_goes_nowhere() -> None:
    leaves = [x.requires_grad_() for x in (normal(1, 1, 4, 4), normal(1, 1, 2, 4), normal(1, 1, 2, 4))]
    out, lse = cosine_attention(*leaves, causal=True, return_lse=True)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    dout[:, :, :2] = NAN
    dlse[:, :, :2] = NAN
    for gradient in torch.autograd.grad((out, lse), leaves, (dout, dlse)):
        assert gradient.isfinite().all()


def test_nan_gradients_reach_only_what_their_row_sees() -> None:
    leaves = [x.requires_grad_() for x in (normal(1, 1, 4, 4), normal(1, 1, 4, 4), normal(1, 1, 4, 4))]
    dout = torch.ones(1, 1, 4, 4, dtype=F64)
    dout[:, :, 1] = NAN
    dq, dk, dv = torch.autograd.grad(cosine_attention(*leaves, causal=True), leaves, dout)
    assert dq.isfinite().all(-1).flatten().tolist() == [True, False, True, True]
    assert dk.isfinite().all(-1).flatten().tolist() == [False, False, True, True]
    assert dv.isfinite().all(-1).flatten().tolist() == [False, False, True, True]


def test_a_bias_of_minus_infinity_hides() -> None:
    q, k, v = (normal(1, 1, 3, 4) for _ in range(3))
    bias = torch.zeros(1, 3, 3, dtype=F64)
    bias[:, :, 2] = -INF
    bias[:, 1] = -INF
    out, lse = cosine_attention(q, k, v, attn_bias=bias.requires_grad_(), return_lse=True)
    torch.testing.assert_close(out[:, :, ::2], cosine_attention(q[:, :, ::2], k[:, :, :2], v[:, :, :2]))
    assert not out[:, :, 1].any()
    assert lse[0, 0, 1] == -INF
    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    assert gradient.isfinite().all()
    assert not gradient[:, 1].any()


def test_autocast_does_not_reach_the_arithmetic() -> None:
    q, k, v = (normal(1, 2, 20, 8, dtype=torch.float32, seed=n) for n in range(3))
    options: dict[str, Any] = {"groups": 1, "causal": False, "l2norm": True}
    expected = cpu.forward(q, k, v, None, None, 8.0, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cpu.forward(q, k, v, None, None, 8.0, **options)
        gradients = cpu.backward(q, k, v, None, None, 8.0, *found, q, None, **options, needs=(False, False))
    assert torch.equal(found[0], expected[0])
    outside = cpu.backward(q, k, v, None, None, 8.0, *expected, q, None, **options, needs=(False, False))
    for x, y in zip(gradients[:3], outside[:3], strict=True):
        assert x is not None
        assert y is not None
        assert torch.equal(x, y)


def test_a_large_scale_neither_overflows_nor_loses_the_maximum() -> None:
    q, k, v = (normal(1, 1, 40, 8, dtype=torch.float32, seed=n) for n in range(3))
    out, lse = cosine_attention(q, k, v, scale=1e4, return_lse=True)
    exact, exact_lse = cosine_attention_reference(q.double(), k.double(), v.double(), scale=1e4, return_lse=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    nearest = (torch.nn.functional.normalize(k, dim=-1) @ torch.nn.functional.normalize(q, dim=-1).mT).argmax(-2)
    assert torch.equal(out[0, 0].argmax(-1), exact[0, 0].argmax(-1))
    torch.testing.assert_close(out[0, 0], v[0, 0, nearest[0, 0]], rtol=0.2, atol=0.2)


def test_second_derivatives_are_refused() -> None:
    q, k, v = (normal(1, 1, 3, 4).requires_grad_() for _ in range(3))
    (dq,) = torch.autograd.grad(cosine_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dq.sum().backward()
