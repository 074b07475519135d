"""The way CUDA calls take, on CPU tensors with emulated kernels: what is packed, allocated, copied and kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_kernel import DEFAULTS, STREAM, WORKSPACE, EmulatedKernel, attend, scratch_memory
from torch import Tensor

import cosattn
from cosattn import fallback, functional, launch, plan
from cosattn.errors import ArgumentError, UnsupportedError
from cosattn.reference import cosine_attention_reference
from cosattn.spec import KernelSpec


def leaf(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def bshd(batch: int, heads: int, rows: int, width: int) -> Tensor:
    """(B, S, H, D) storage seen as (B, H, S, D)."""
    return torch.randn(batch, rows, heads, width).transpose(1, 2).requires_grad_()


def packed_heads(batch: int, heads: int, rows: int, width: int) -> Tensor:
    """The q of a fused projection to q, k and v."""
    return torch.randn(batch, rows, 3, heads, width)[:, :, 0].transpose(1, 2).requires_grad_()


def transposed(batch: int, heads: int, rows: int, width: int) -> Tensor:
    """Rows contiguous instead of columns: has to be copied."""
    return torch.randn(batch, heads, width, rows).mT.requires_grad_()


def misaligned(batch: int, heads: int, rows: int, width: int) -> Tensor:
    """Starts at a multiple of 4 bytes that is none of 16: has to be copied."""
    flat = torch.randn(batch * heads * rows * width + 1)
    return flat[1:].view(batch, heads, rows, width).requires_grad_()


def odd_rows(batch: int, heads: int, rows: int, width: int) -> Tensor:
    """A row stride that is no multiple of 16 bytes: has to be copied."""
    return torch.randn(batch, heads, rows, width + 1)[..., :width].requires_grad_()


def expanded(batch: int, heads: int, rows: int, width: int) -> Tensor:
    """One batch, one head and one row seen many times."""
    return torch.randn(1, 1, 1, width).expand(batch, heads, rows, width).requires_grad_()


def shared_heads(batch: int, heads: int, rows: int, width: int) -> Tensor:
    """One batch and one head seen many times."""
    return torch.randn(1, 1, rows, width).expand(batch, heads, rows, width).requires_grad_()


STORAGES: list[Callable[..., Tensor]] = [
    leaf,
    bshd,
    packed_heads,
    transposed,
    misaligned,
    odd_rows,
    expanded,
    shared_heads,
]


def check(options: dict[str, Any], *tensors: Tensor, with_lse: bool = True) -> None:
    """Outputs and gradients of the direct way against the definition."""
    q, k, v, *_ = tensors
    leaves = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    found = attend(q, k, v, **options, return_lse=with_lse)
    known = {name: value for name, value in options.items() if name not in ("scale_max", "bias_bound", "deterministic")}
    expected = cosine_attention_reference(q, k, v, **known, return_lse=with_lse)
    if not with_lse:
        found, expected = (found,), (expected,)
    torch.manual_seed(1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    douts = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad(found, leaves, douts)
    for one, other, x in zip(grads, torch.autograd.grad(expected, leaves, douts), leaves, strict=True):
        assert one.dtype == x.dtype
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_is_read_right(kernels: dict[KernelSpec, EmulatedKernel], storage: Callable[..., Tensor]) -> None:
    check({"causal": True}, storage(2, 4, 5, 16), storage(2, 2, 7, 16), storage(2, 2, 7, 8))


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8)), {}),
        (((2, 4, 5, 16), (2, 7, 16), (2, 7, 8)), {"causal": True}),
        (((2, 4, 5, 16), (2, 7, 16), (2, 7, 8)), {"groups": 4, "scale": 0.5}),
        (((6, 5, 16), (6, 7, 16), (6, 7, 8)), {"l2norm_qk": False, "scale": 0.1}),
        (((1, 1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 8)), {}),
    ],
)
def test_forms_and_options(kernels: dict[KernelSpec, EmulatedKernel], shapes: Any, options: dict[str, Any]) -> None:
    check(options, *(leaf(*shape) for shape in shapes))


@pytest.mark.parametrize("mask_shape", [(2, 7), (1, 7), (2, 1)])
def test_masks(kernels: dict[KernelSpec, EmulatedKernel], mask_shape: tuple[int, int]) -> None:
    mask = torch.rand(mask_shape) < 0.7
    full = mask.expand(2, 7)
    q, k, v = leaf(2, 4, 5, 16), leaf(2, 4, 7, 16), leaf(2, 4, 7, 16)
    for one in (mask, full, torch.stack([full, full], -1)[..., 0]):
        torch.testing.assert_close(attend(q, k, v, mask=one), cosine_attention_reference(q, k, v, mask=full))
    assert all(spec.mask for spec in kernels)


@pytest.mark.parametrize(
    "shape",
    [
        (4, 2, 5, 7),
        (1, 1, 5, 7),
        (4, 1, 5, 1),
        (1, 2, 1, 7),
        (1, 1, 1, 1),
        (1, 2, 1, 5, 7),
        (1, 2, 2, 5, 7),
        (1, 2, 1, 1, 7),
    ],
)
def test_masks_over_pairs(kernels: dict[KernelSpec, EmulatedKernel], shape: tuple[int, ...]) -> None:
    """Read where they are, whatever is broadcast."""
    mask = torch.rand(shape) < 0.7
    q, k, v = leaf(4, 2, 5, 16), leaf(4, 1, 7, 16), leaf(4, 1, 7, 8)
    for one in (mask, mask.mT.contiguous().mT, torch.stack([mask, mask], -1)[..., 0]):
        check({"mask": one, "causal": True}, q, k, v)
    addresses = {call[0]["mask"] for kernel in kernels.values() for call in kernel.calls}
    assert mask.data_ptr() in addresses
    assert all(spec.pair_mask != spec.mask for spec in kernels)


@pytest.mark.parametrize("shape", [(4, 1, 1, 7), (1, 1, 1, 7), (1, 4, 1, 1, 7)])
def test_a_mask_over_pairs_that_is_one_over_keys(
    kernels: dict[KernelSpec, EmulatedKernel], shape: tuple[int, ...]
) -> None:
    mask = torch.rand(shape) < 0.7
    q, k, v = leaf(4, 2, 5, 16), leaf(4, 2, 7, 16), leaf(4, 2, 7, 8)
    check({"mask": mask}, q, k, v)
    check({"mask": mask.expand(*shape[:-3], 2, 5, 7)}, q, k, v)
    assert all(spec.mask and not spec.pair_mask for spec in kernels)


@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 5, 7), (1, 2, 1, 5, 7), (1, 2, 1, 1, 7), (1, 4, 2, 1, 1), (4, 1, 5, 1), (1, 2, 1, 7), (2, 1, 7)]
)
def test_a_bias_broadcast_anywhere(kernels: dict[KernelSpec, EmulatedKernel], shape: tuple[int, ...]) -> None:
    q, k, v = leaf(4, 2, 5, 16), leaf(4, 2, 7, 16), leaf(4, 2, 7, 8)
    check({"attn_bias": leaf(*shape)}, q, k, v)
    check({"attn_bias": leaf(*shape), "mask": torch.rand(1, 2, 1, 5, 7) < 0.7}, q, k, v)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 5, 7), {}),
        ((2, 5, 7), {"attn_bias_batch_dim": True}),
        ((2, 4, 5, 7), {}),
        ((1, 4, 5, 7), {}),
        ((2, 1, 5, 7), {}),
        ((1, 1, 5, 7), {"bias_bound": 6.0}),
    ],
)
@pytest.mark.parametrize("storage", ["contiguous", "expanded rows", "keys first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases(
    kernels: dict[KernelSpec, EmulatedKernel], shape: Any, options: dict[str, Any], storage: str, dtype: torch.dtype
) -> None:
    bias = torch.randn(shape, dtype=dtype)
    if storage == "expanded rows":
        bias = bias[..., :1, :].expand(shape)
    elif storage == "keys first":
        bias = bias.mT.contiguous().mT
    q, k, v = leaf(2, 4, 5, 16), leaf(2, 4, 7, 16), leaf(2, 4, 7, 16)
    bias.requires_grad_()
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    found = attend(q, k, v, attn_bias=bias, **options)
    options.pop("bias_bound", None)
    expected = cosine_attention_reference(q, k, v, attn_bias=bias, **options)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(found)
    leaves = [q, k, v, bias]
    for one, other in zip(
        torch.autograd.grad(found, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


def test_a_bias_of_merged_heads(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = leaf(6, 5, 16), leaf(6, 7, 16), leaf(6, 7, 16)
    check({"attn_bias": leaf(6, 5, 7)}, q, k, v)
    check({"attn_bias": leaf(1, 5, 7)}, q, k, v)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4,), (4, 1, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_learned_scales(kernels: dict[KernelSpec, EmulatedKernel], shape: Any, dtype: torch.dtype) -> None:
    scale = (torch.rand(shape) * 5 - 1).to(dtype).requires_grad_()
    q, k, v = leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 16)
    found = attend(q, k, v, scale=scale)
    per_head = scale.float().reshape(-1).expand(4)
    expected = cosine_attention_reference(q, k, v, scale=per_head)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(found)
    one, other = (torch.autograd.grad(x, scale, dout)[0] for x in (found, expected))
    assert one.shape == scale.shape
    torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_a_scale_of_zero_still_learns(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    check({"scale": torch.tensor([0.0, 1.0, 0.0, -2.0], requires_grad=True)}, *(leaf(2, 4, 5, 16) for _ in range(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(kernels: dict[KernelSpec, EmulatedKernel], dtype: torch.dtype) -> None:
    q, k, v = (leaf(2, 4, 5, 16, dtype=dtype) for _ in range(3))
    out, lse = attend(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out, cosine_attention_reference(q, k, v))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == dtype


def test_specs_say_what_the_call_says(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = leaf(2, 4, 5, 16), leaf(2, 4, 7, 16), leaf(2, 4, 7, 8)
    attend(q, k, v, groups=2, causal=True).sum().backward()
    attend(
        q, k, v, attn_bias=leaf(4, 5, 7), mask=torch.ones(2, 7, dtype=torch.bool), deterministic=True
    ).sum().backward()
    attend(q, k, v, scale=torch.tensor(8.0), scale_max=10.0, l2norm_qk=False, groups=2)
    attend(q, k, v, scale=50.0)
    assert [spec.name for spec in kernels] == [
        "forward_sm90_f32_d16_dv8_g2_causal",
        "backward_sm90_f32_d16_dv8_g2_causal",
        "forward_sm90_f32_d16_dv8_mask_bias-f32_online",
        "backward_sm90_f32_d16_dv8_mask_bias-f32-grad_online_deterministic",
        "forward_sm90_f32_d16_dv8_nonorm",
        "forward_sm90_f32_d16_dv8_online",
    ]


def test_determinism_follows_the_global_switch_of_backward(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (leaf(1, 1, 4, 8) for _ in range(3))
    out = attend(q, k, v)
    torch.use_deterministic_algorithms(True)
    try:
        out.sum().backward()
        attend(q, k, v, deterministic=False).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [spec.deterministic for spec in kernels if spec.direction == "backward"] == [True, False]


def test_the_second_call_is_a_hit_and_backward_is_built_when_needed(
    kernels: dict[KernelSpec, EmulatedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    attend(q, k, v)
    assert [spec.direction for spec in kernels] == ["forward"]
    monkeypatch.setattr(functional, "_check", lambda *_: pytest.fail("a hit checks nothing"))
    attend(q.clone(), k.clone(), v.clone()).sum().backward()
    assert [spec.direction for spec in kernels] == ["forward", "backward"]
    assert len(plan.plans) == 1


def test_lse_is_computed_only_when_somebody_wants_it(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    with torch.no_grad():
        attend(q, k, v)
        attend(q, k, v, return_lse=True)
    attend(q, k, v)
    attend(q.detach(), k.detach(), v.detach())
    (kernel,) = kernels.values()
    assert [bool(pointers["lse"]) for pointers, _ in kernel.calls] == [False, True, True, False]


def test_pointers_that_nobody_gave_are_null(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    attend(q, k, v).sum().backward()
    forward, backward = (kernel.calls[0][0] for kernel in kernels.values())
    assert {name for name, pointer in forward.items() if pointer} == {"q", "k", "v", "out", "lse", "workspace"}
    assert {name for name, pointer in backward.items() if not pointer} == {
        "mask",
        "bias",
        "scale",
        "dlse",
        "dbias",
        "dscale",
    }


def test_only_one_lse_gradient_or_only_one_out_gradient(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    for which in (0, 1):
        found = attend(q, k, v, return_lse=True)[which]
        expected = cosine_attention_reference(q, k, v, return_lse=True)[which]
        dout = torch.randn_like(found)
        for one, other in zip(
            torch.autograd.grad(found, (q, k), dout), torch.autograd.grad(expected, (q, k), dout), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_results_are_stored_in_the_order_of_the_inputs(
    kernels: dict[KernelSpec, EmulatedKernel], storage: Callable[..., Tensor]
) -> None:
    q, k, v = storage(2, 4, 5, 16), storage(2, 4, 7, 16), storage(2, 4, 7, 16)
    out = attend(q, k, v)
    order = (0, 2, 1, 3) if storage in (bshd, packed_heads) else (0, 1, 2, 3)
    assert out.permute(order).is_contiguous()
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for gradient in grads:
        if storage in (leaf, bshd, packed_heads):
            assert gradient.permute(order).is_contiguous()


def test_strides_of_single_dimensions_mean_nothing(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (torch.randn(1, 1, 6, 8).as_strided((1, 1, 6, 8), (3, 1, 8, 1)) for _ in range(3))
    torch.testing.assert_close(attend(q, k, v), cosine_attention_reference(q, k, v))
    one_row = torch.randn(2, 2, 1, 8).as_strided((2, 2, 1, 8), (16, 8, 5, 1))
    torch.testing.assert_close(attend(one_row, one_row, one_row), cosine_attention_reference(one_row, one_row, one_row))
    for kernel in kernels.values():
        for _, problem in kernel.calls:
            assert problem["q_b"] % 4 == problem["q_h"] % 4 == problem["q_s"] % 4 == 0


def test_inputs_that_can_be_read_in_place_are(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    for storage in (leaf, bshd, packed_heads, shared_heads):
        q, k, v = storage(2, 4, 5, 16), storage(2, 4, 7, 16), storage(2, 4, 7, 16)
        attend(q, k, v)
        (kernel,) = kernels.values()
        pointers, _ = kernel.calls[-1]
        assert [pointers["q"], pointers["k"], pointers["v"]] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]


def test_a_row_seen_many_times_is_copied(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    """The copy engine has no step of 0 from row to row."""
    attend(expanded(2, 4, 5, 16), expanded(2, 4, 7, 16), expanded(2, 4, 7, 16))
    (kernel,) = kernels.values()
    _, problem = kernel.calls[-1]
    assert (problem["q_s"], problem["k_s"], problem["v_s"]) == (16, 16, 16)


def test_saved_tensors_may_come_back_in_another_storage(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    """As torch.autograd.graph.save_on_cpu gives them: contiguous, whatever they were."""
    expected = None
    for hooks in (nullcontext(), torch.autograd.graph.saved_tensors_hooks(Tensor.contiguous, Tensor.contiguous)):
        torch.manual_seed(0)
        q, k, v = packed_heads(2, 4, 5, 16), bshd(2, 4, 7, 16), transposed(2, 4, 7, 16)
        mask = (torch.rand(2, 7) < 0.8).mT.contiguous().mT
        bias = torch.randn(5, 7, 4).permute(2, 0, 1).requires_grad_()
        with hooks:
            out = attend(q, k, v, mask=mask, attn_bias=bias)
        grads = torch.autograd.grad(out, (q, k, v, bias), torch.ones_like(out))
        if expected is not None:
            for one, other in zip(grads, expected, strict=True):
                torch.testing.assert_close(one, other)
        expected = grads


@pytest.mark.parametrize("empty", ["batch", "heads", "q_len", "k_len"])
def test_nothing_is_launched_for_empty_inputs(kernels: dict[KernelSpec, EmulatedKernel], empty: str) -> None:
    sizes = {"batch": 2, "heads": 4, "q_len": 5, "k_len": 7} | {empty: 0}
    batch, heads, q_len, k_len = sizes.values()
    q, k, v = leaf(batch, heads, q_len, 16), leaf(batch, heads, k_len, 16), leaf(batch, heads, k_len, 8)
    bias, scale = leaf(1, heads, q_len, k_len), leaf(1)
    out, lse = attend(q, k, v, attn_bias=bias, scale=scale, return_lse=True)
    assert out.shape == (batch, heads, q_len, 8)
    assert lse.shape == (batch, heads, q_len)
    assert out.count_nonzero() == 0
    assert (lse == -torch.inf).all()
    (out.sum() + lse.exp().sum()).backward()
    for x in (q, k, v, bias, scale):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert x.grad.count_nonzero() == 0
    assert not kernels


def test_second_derivatives_are_refused_and_first_ones_with_create_graph_are_not(
    kernels: dict[KernelSpec, EmulatedKernel],
) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    (dq,) = torch.autograd.grad(attend(q, k, v).sum(), q, create_graph=True)
    (expected,) = torch.autograd.grad(cosine_attention_reference(q, k, v).sum(), q)
    torch.testing.assert_close(dq, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedError, match=r"no second derivative.*Way out: .*reference"):
        dq.sum().backward()


def test_a_changed_input_is_noticed(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    out = attend(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_refused_launch_is_an_error_forward_and_backward(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    out = attend(q, k, v)
    out.sum().backward()
    for kernel in kernels.values():
        kernel.code = 700
    with pytest.raises(RuntimeError, match="cuda error 700"):
        attend(q, k, v)
    kernels[next(iter(kernels))].code = 0
    with pytest.raises(RuntimeError, match="cuda error 700"):
        attend(q, k, v).sum().backward()


def test_a_hit_with_a_wrong_argument_is_still_an_argument_error(kernels: dict[KernelSpec, EmulatedKernel]) -> None:
    q, k, v = (leaf(1, 2, 4, 8) for _ in range(3))
    attend(q, k, v)
    for options in ({"mask": [True]}, {"groups": [1]}, {"scale": "8"}, {"deterministic": "yes"}, {"scale": torch.nan}):
        with pytest.raises(ArgumentError):
            attend(q, k, v, **options)
    with pytest.raises(ArgumentError, match="dense"):
        attend(q, k, v, mask=torch.ones(1, 4, dtype=torch.bool).to_sparse())


def test_plans_are_bounded(kernels: dict[KernelSpec, EmulatedKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MAX_PLANS", 3)
    monkeypatch.setattr(plan, "_MAX_BACKWARDS", 2)
    for rows in range(1, 9):
        x = leaf(1, 1, rows, 8)
        attend(x, x, x).sum().backward()
    assert len(plan.plans) == 3
    x = leaf(1, 1, 2, 8)
    out = attend(x, x, x)
    for stride in (8, 16, 24, 32):
        dout = torch.randn(1, 1, 2, stride)[..., :8]
        torch.autograd.grad(out, x, dout, retain_graph=True)
    assert len(next(reversed(plan.plans.values()))._backwards) == 2


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 1, 4, 8), (1, 3, 1, 8), (5, 4, 8), (1, 1, 1, 8)])
def test_dense_strides_is_what_empty_like_does(shape: tuple[int, ...]) -> None:
    leading = range(len(shape) - 1)
    for order in [tuple(leading), tuple(reversed(leading))]:
        x = torch.empty([shape[axis] for axis in order] + [shape[-1]]).permute(*(order.index(a) for a in leading), -1)
        found = torch.empty_strided(shape, plan.dense_strides(shape, x.stride()))
        like = torch.empty_like(x)
        for axis in leading:
            assert shape[axis] <= 1 or found.stride(axis) == like.stride(axis)
        assert plan.dense_strides(shape, found.stride()) == found.stride()


class _Refusal:
    """Kernels of one direction can not be had."""

    def __init__(self, direction: str, kernels: dict[KernelSpec, EmulatedKernel]) -> None:
        self.direction, self.kernels, self.asked = direction, kernels, 0

    def __call__(self, spec: KernelSpec) -> EmulatedKernel:
        if spec.direction == self.direction:
            self.asked += 1
            raise UnsupportedError("no kernel today")
        return self.kernels.setdefault(spec, EmulatedKernel(spec))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_fallback_is_never_silent(
    kernels: dict[KernelSpec, EmulatedKernel], monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    refusal = _Refusal(direction, kernels)
    monkeypatch.setattr(plan, "load", refusal)
    monkeypatch.setattr(fallback, "_warned", False)
    monkeypatch.delenv("COSATTN_FALLBACK", raising=False)
    q, k, v = (leaf(2, 4, 5, 16) for _ in range(3))
    with pytest.raises(UnsupportedError, match="no kernel today"):
        attend(q, k, v).sum().backward()
    monkeypatch.setenv("COSATTN_FALLBACK", "1")
    with pytest.warns(RuntimeWarning, match="COSATTN_FALLBACK is on.*no kernel today"):
        attend(q, k, v).sum().backward()
    asked = refusal.asked
    attend(q, k, v).sum().backward()
    assert refusal.asked == asked


@pytest.mark.filterwarnings("ignore:cosattn uses")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8)), {}),
        (((2, 4, 5, 16), (2, 5, 16), (2, 5, 8)), {"causal": True, "groups": 2}),
        (((2, 4, 7, 16), (2, 4, 5, 16), (2, 4, 5, 8)), {"causal": True}),
        (((6, 5, 16), (6, 7, 16), (6, 7, 8)), {"l2norm_qk": False, "scale": 0.1, "mask": torch.rand(6, 7) < 0.3}),
        (((6, 5, 16), (6, 7, 16), (6, 7, 8)), {"attn_bias": leaf(6, 5, 7), "mask": torch.rand(1, 7) < 0.6}),
        (((2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8)), {"attn_bias": leaf(2, 5, 7), "attn_bias_batch_dim": True}),
        (((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 8)), {"scale": torch.rand(4, 1, 1).requires_grad_(), "causal": True}),
        (
            ((4, 2, 5, 16), (4, 2, 7, 16), (4, 2, 7, 8)),
            {"mask": torch.rand(1, 2, 1, 5, 7) < 0.6, "attn_bias": leaf(1, 2, 2, 5, 1)},
        ),
        (((4, 2, 5, 16), (4, 2, 7, 16), (4, 2, 7, 8)), {"mask": torch.rand(1, 2, 5, 1) < 0.6, "causal": True}),
    ],
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_the_fallback_computes_the_same(
    kernels: dict[KernelSpec, EmulatedKernel],
    monkeypatch: pytest.MonkeyPatch,
    direction: str,
    shapes: Any,
    options: dict[str, Any],
    with_lse: bool,
) -> None:
    monkeypatch.setattr(plan, "load", _Refusal(direction, kernels))
    monkeypatch.setenv("COSATTN_FALLBACK", "1")
    check(options, *(leaf(*shape) for shape in shapes), with_lse=with_lse)


@pytest.mark.parametrize("way", ["python"], indirect=True)  # the extension takes its own from the allocator
def test_the_workspace_is_as_large_as_the_kernel_wants(
    kernels: dict[KernelSpec, EmulatedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with scratch_memory(monkeypatch) as sizes:
        attend(*(leaf(1, 2, 4, 8) for _ in range(3))).sum().backward()
    assert sizes == [WORKSPACE, WORKSPACE]


def test_every_reason_of_a_refusal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec("forward", "sm90", "float32", 12, 12)
    reasons = SimpleNamespace(reasons=lambda spec: ["12 is no multiple of 8", "it is Monday"])
    monkeypatch.setattr(cosattn, "support", reasons, raising=False)
    with pytest.raises(UnsupportedError, match=r"(?s)f32_d12:.*12 is no.*Monday.*Ways out: .*COSATTN_FALLBACK=1"):
        plan.load(spec)
    asked = []
    monkeypatch.setattr(reasons, "reasons", lambda spec: [])
    monkeypatch.setattr(launch, "kernel", asked.append)
    plan.load(spec)
    assert asked == [spec]


def test_a_gpu_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    with pytest.raises(UnsupportedError, match=r"Old GPU \(compute capability 7\.0\)\. Ways out: "):
        plan.architecture(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert plan.architecture(0) == "sm90"


@pytest.mark.parametrize("way", ["python"], indirect=True)  # the extension has torch's guard
def test_work_moves_to_the_device_of_the_tensors_and_back(
    kernels: dict[KernelSpec, EmulatedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [3]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    seen = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(launch, "current_device", lambda: current[0])
    monkeypatch.setattr(launch, "current_stream", lambda device: seen.append((device, current[0])) or STREAM)
    x = leaf(1, 1, 4, 8)
    attend(x, x, x).sum().backward()
    assert seen == [(-1, -1), (-1, -1)]
    assert current == [3]


@pytest.mark.parametrize("way", ["python"], indirect=True)  # nothing of the extension can be counted
def test_a_hit_does_little(kernels: dict[KernelSpec, EmulatedKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Host time where it can be counted without a GPU: calls of Python and C functions on the way to the launch."""
    monkeypatch.setattr(EmulatedKernel, "launch", lambda *_: 0)
    monkeypatch.setattr(launch, "allocate", lambda size, stream: 256)
    monkeypatch.setattr(launch, "free", lambda address: None)
    q, k, v = (leaf(1, 2, 4, 8, grad=False) for _ in range(3))
    attend(q, k, v)
    count = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    options = DEFAULTS.values()
    sys.setprofile(watch)
    try:
        functional._planned(q, k, v, *options)
    finally:
        sys.setprofile(None)
    assert count <= 29, count
