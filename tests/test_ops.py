"""The registered operators: opcheck, fake and meta tensors, transforms; the same operators over emulated kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_kernel import EmulatedKernel, emulated_kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cosattn import fallback, ops, plan
from cosattn.errors import UnsupportedError
from cosattn.functional import cosine_attention
from cosattn.spec import KernelSpec

OPTIONS = (8.0, 1, True, True, False, False)
"""scale, groups, causal, l2norm, online, deterministic."""


def samples() -> list[tuple[Any, ...]]:
    """Arguments of attention_forward: every storage and every optional argument at least once."""
    torch.manual_seed(0)

    def bshd(heads: int, rows: int, width: int) -> Tensor:
        return torch.randn(2, rows, heads, width).transpose(1, 2).requires_grad_()

    plain = [torch.randn(2, 4, rows, width, requires_grad=True) for rows, width in ((5, 16), (7, 16), (7, 8))]
    stored = [bshd(4, 5, 16), bshd(2, 7, 16), bshd(2, 7, 8)]
    mask = torch.rand(2, 7) < 0.8
    bias = torch.randn(1, 4, 5, 7, requires_grad=True)
    scale = (torch.rand(4) + 1).requires_grad_()
    half = [x.detach().bfloat16().requires_grad_() for x in stored]
    empty = [x.detach()[:, :, :0].requires_grad_() for x in plain]
    return [
        (*plain, None, None, None, *OPTIONS),
        (*stored, mask, None, None, *OPTIONS),
        (*stored, mask[:1].expand(2, 7), bias, scale, *OPTIONS),
        (*half, None, bias.detach(), scale, *OPTIONS),
        (plain[0], *empty[1:], None, None, None, *OPTIONS),
        (*stored, torch.rand(2, 4, 5, 7) < 0.8, bias, scale, *OPTIONS),
        (*plain, (torch.rand(1, 1, 5, 7) < 0.8).expand(1, 4, 5, 7), None, None, *OPTIONS),
    ]


@pytest.mark.parametrize("sample", range(7))
def test_opcheck_of_forward(sample: int) -> None:
    torch.library.opcheck(ops.attention_forward, samples()[sample])


def backward_arguments(sample: int) -> tuple[Any, ...]:
    forward = tuple(x.detach() if isinstance(x, Tensor) else x for x in samples()[sample])
    out, lse = ops.attention_forward(*forward)
    bias, scale = forward[4:6]
    return (
        torch.randn_like(out), torch.randn_like(lse), *forward[:6], out, lse, *forward[6:],
        bias is not None, scale is not None,
    )  # fmt: skip


@pytest.mark.parametrize("sample", range(7))
def test_opcheck_of_backward(sample: int) -> None:
    arguments = backward_arguments(sample)
    torch.library.opcheck(ops.attention_backward, arguments)
    torch.library.opcheck(ops.attention_backward, (None, *arguments[1:]))
    torch.library.opcheck(ops.attention_backward, (arguments[0], None, *arguments[2:]))


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal: bool) -> None:
    q, k, v = (
        torch.randn(2, heads, rows, 4, dtype=torch.float64, requires_grad=True)
        for heads, rows in ((4, 3), (2, 5), (2, 5))
    )
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    bias = torch.randn(2, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(4, 1, 1, dtype=torch.float64, requires_grad=True)

    def function(*x: Tensor) -> Any:
        q, k, v, bias, scale = x
        return cosine_attention(
            q, k, v, mask=mask, attn_bias=bias, scale=scale, groups=2, causal=causal, return_lse=True
        )

    assert torch.autograd.gradcheck(function, (q, k, v, bias, scale))


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_fake_tensors_have_the_right_shapes(where: str) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(2, rows, 4, 16, device=where, dtype=torch.float16).transpose(1, 2) for rows in (5, 7, 7))
        bias = torch.empty(4, 5, 7, device=where, requires_grad=True)
        out, lse = cosine_attention(q.requires_grad_(), k, v, attn_bias=bias, return_lse=True)
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 5, 16), torch.float16, where)
        assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
        assert out.stride() == q.stride()
        dq, dbias = torch.autograd.grad(out, (q, bias), torch.empty_like(out))
        assert (dq.shape, dq.stride(), dq.dtype) == (q.shape, q.stride(), q.dtype)
        assert (dbias.shape, dbias.dtype) == (bias.shape, bias.dtype)


def test_meta_tensors_without_a_mode() -> None:
    q, k, v = (torch.empty(2, 4, rows, 16, device="meta", requires_grad=True) for rows in (5, 7, 7))
    out = cosine_attention(q, k, v)
    assert (out.device.type, out.shape) == ("meta", (2, 4, 5, 16))
    out.sum().backward()
    assert k.grad is not None
    assert k.grad.shape == k.shape


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_records_one_operator_each_way(tracing_mode: str) -> None:
    q, k, v = (torch.randn(2, 4, 5, 16, requires_grad=True) for _ in range(3))

    def step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cosine_attention(q, k, v).sum(), (q, k, v))

    graph = make_fx(step, tracing_mode=tracing_mode)(q, k, v)
    called = [node.target for node in graph.graph.nodes if "cosattn" in str(node.target)]
    assert called == [ops.attention_forward, ops.attention_backward]
    for one, other in zip(graph(q, k, v), step(q, k, v), strict=True):
        torch.testing.assert_close(one, other)


def test_dispatch_modes_see_the_operator() -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 1, 4, 8)
    with Watch():
        cosine_attention(x, x, x)
    assert ops.attention_forward in seen


def test_flops_are_counted_as_for_other_attention() -> None:
    x = torch.randn(2, 4, 16, 8, requires_grad=True)
    counts = []
    for attend in (cosine_attention, torch.nn.functional.scaled_dot_product_attention):
        with FlopCounterMode(display=False) as counter:
            attend(x, x, x).sum().backward()
        counts.append(counter.get_total_flops())
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert counts[0] == (2 + 5) * product


def test_tensor_subclasses_keep_their_type() -> None:
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(1, 1, 4, 8)
    assert type(cosine_attention(x.as_subclass(Tagged), x, x)) is Tagged


def test_activation_checkpointing() -> None:
    q, k, v = (torch.randn(2, 2, 4, 8, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(cosine_attention(q, k, v).sum(), (q, k, v))
    out = torch.utils.checkpoint.checkpoint(cosine_attention, q, k, v, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(one, other)


class TestOverKernels:
    """The CUDA implementations, called with CPU tensors and emulated kernels."""

    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[KernelSpec, EmulatedKernel]]:
        with emulated_kernels(monkeypatch) as found:
            yield found

    @pytest.mark.parametrize("served", [True, False])
    @pytest.mark.parametrize("sample", range(7))
    @pytest.mark.filterwarnings("ignore:cosattn uses")
    def test_both_devices_give_the_same(self, sample: int, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        if not served:

            def refuse(spec: KernelSpec) -> EmulatedKernel:
                raise UnsupportedError("no kernel today")

            monkeypatch.setattr(plan, "load", refuse)
            monkeypatch.setenv("COSATTN_FALLBACK", "1")
            monkeypatch.setattr(fallback, "_warned", False)
        half = samples()[sample][0].dtype == torch.bfloat16
        tolerance = {"rtol": 2e-2, "atol": 4e-2} if half else {"rtol": 1e-4, "atol": 2e-5}
        forward = tuple(x.detach() if isinstance(x, Tensor) else x for x in samples()[sample])
        for one, other in zip(ops._cuda_forward(*forward), ops._cpu_forward(*forward), strict=True):
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, **tolerance)
        arguments = backward_arguments(sample)
        for given in (arguments, (None, *arguments[1:]), (arguments[0], None, *arguments[2:])):
            found = ops._cuda_backward(*given)
            for one, other in zip(found, ops._cpu_backward(*given), strict=True):
                assert one.stride() == other.stride()
                torch.testing.assert_close(one, other, **tolerance)

    def test_strides_of_a_compiler_are_copied_when_they_must_be(self) -> None:
        q, k, v = (torch.randn(2, 4, 5, 17)[..., :16] for _ in range(3))
        bias = torch.randn(1, 4, 7, 5).mT[:, :, :5, :5]
        scale = torch.rand(8)[::2]
        forward = (q, k, v, None, bias, scale, *OPTIONS)
        for one, other in zip(ops._cuda_forward(*forward), ops._cpu_forward(*forward), strict=True):
            torch.testing.assert_close(one, other)

    def test_a_second_call_plans_nothing(self, kernels: dict[KernelSpec, EmulatedKernel]) -> None:
        forward = tuple(x.detach() if isinstance(x, Tensor) else x for x in samples()[0])
        ops._cuda_forward(*forward)
        ops._cuda_forward(*forward)
        assert len(plan.plans) == 1
