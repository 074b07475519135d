"""How PyTorch's machinery meets the kernels on a real GPU: compile, graphs, streams, devices, autocast, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from cosattn import ops
from cosattn.errors import ArgumentError, MissingKernelError
from cosattn.functional import cosine_attention
from cosattn.reference import cosine_attention_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("way")]

DTYPE = torch.bfloat16
DIM = 64


def leaf(*shape: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device, requires_grad=True)


def bshd(batch: int, heads: int, rows: int) -> Tensor:
    """(B, S, H, D) storage seen as (B, H, S, D)."""
    return torch.randn(batch, rows, heads, DIM, dtype=DTYPE, device="cuda").transpose(1, 2).requires_grad_()


def assert_right(found: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    expected = cosine_attention_reference(q.detach().double(), k.detach().double(), v.detach().double(), **options)
    assert relative_error(found, expected) < 1e-2


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_step(backend: str) -> None:
    scale = torch.full((4,), 8.0, device="cuda", requires_grad=True)
    mask = torch.rand(2, 200, device="cuda") < 0.9

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = cosine_attention(q * 2, k, v, causal=True, mask=mask, scale=scale, scale_max=10.0)
        return (out.float() * 0.5).square().sum()

    tensors = (bshd(2, 4, 150), bshd(2, 2, 200), bshd(2, 2, 200))
    leaves = (*tensors, scale)
    expected = torch.autograd.grad(step(*tensors), leaves)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=backend)(*tensors), leaves)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 5e-3


@pytest.mark.usefixtures("fresh_compiler")
def test_lengths_that_change_recompile_once() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda q, k, v: cosine_attention(q, k, v, causal=True), fullgraph=True, backend=counter)
    counts = []
    for length in (64, 100, 131, 257, 512):
        q, k, v = (leaf(2, 4, length, DIM) for _ in range(3))
        out = compiled(q, k, v)
        assert_right(out, q, k, v, causal=True)
        out.sum().backward()
        assert q.grad is not None
        assert q.grad.isfinite().all()
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


@pytest.mark.parametrize("learned", [False, True])
def test_opcheck(learned: bool) -> None:
    q, k, v = bshd(2, 4, 70), bshd(2, 2, 90), bshd(2, 2, 90)
    mask = torch.rand(2, 90, device="cuda") < 0.9 if learned else None
    bias = leaf(1, 4, 70, 90) if learned else None
    scale = torch.full((4,), 6.0, device="cuda", requires_grad=True) if learned else None
    options = (8.0, 1, True, True, learned, False)
    torch.library.opcheck(ops.attention_forward, (q, k, v, mask, bias, scale, *options))
    plain = [x if x is None else x.detach() for x in (q, k, v, mask, bias, scale)]
    out, lse = ops.attention_forward(*plain, *options)
    arguments = (torch.randn_like(out), None, *plain, out, lse, *options, learned, learned)
    # Atomic additions make repeated gradients differ in the last bit, so nothing here compares bitwise.
    torch.library.opcheck(ops.attention_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_both_ways_give_the_same() -> None:
    q, k, v = bshd(2, 4, 150), bshd(2, 2, 200), bshd(2, 2, 200)
    direct, direct_lse = cosine_attention(q, k, v, causal=True, return_lse=True)
    out, lse = ops.attention_forward(q, k, v, None, None, None, 8.0, 1, True, True, False, False)
    assert torch.equal(direct, out)
    assert torch.equal(direct_lse, lse)
    assert direct.stride() == out.stride() == q.stride()


def test_repeated_calls_are_served_by_the_extension(way: str) -> None:
    for make in (leaf, lambda *shape: bshd(*shape[:3])):
        q, k, v = (make(2, 4, 150, DIM) for _ in range(3))
        out = cosine_attention(q, k, v, causal=True)
        assert isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction) == (way == "python")
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        assert_right(out, q, k, v, causal=True)


def test_a_negated_tensor_is_read_as_what_it_is() -> None:
    """Its memory holds the numbers with the other sign."""
    q, k, v = (torch.randn(2, 4, 64, DIM, dtype=DTYPE, device="cuda") for _ in range(3))
    assert torch.equal(cosine_attention(torch._neg_view(q), k, v), cosine_attention(-q, k, v))


def test_autocast() -> None:
    q, k, v = (leaf(2, 4, 100, DIM, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cuda", DTYPE):
        out = cosine_attention(q, k, v)
    assert out.dtype == DTYPE
    assert torch.equal(out, cosine_attention(q.to(DTYPE), k.to(DTYPE), v.to(DTYPE)))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_meta_and_fake_cuda_tensors_launch_nothing() -> None:
    q = torch.empty(2, 4, 100, DIM, dtype=DTYPE, device="meta", requires_grad=True)
    cosine_attention(q, q, q).sum().backward()
    with FakeTensorMode():
        q = torch.empty(2, 100, 4, DIM, dtype=DTYPE, device="cuda").transpose(1, 2).requires_grad_()
        out = cosine_attention(q, q, q)
        assert (out.device.type, out.stride()) == ("cuda", q.stride())
        (dq,) = torch.autograd.grad(out, q, torch.empty_like(out))
        assert dq.stride() == q.stride()


def test_float64_is_refused_with_a_way_out() -> None:
    x = torch.randn(1, 1, 8, DIM, dtype=torch.float64, device="cuda")
    with pytest.raises(ArgumentError, match=r"float64 is not served on CUDA: cast .* float32"):
        cosine_attention(x, x, x)


def test_graph_capture_and_replay_of_forward() -> None:
    q, k, v = (torch.randn(2, 4, 200, DIM, dtype=DTYPE, device="cuda") for _ in range(3))
    cosine_attention(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cosine_attention(q, k, v, causal=True)
    for _ in range(2):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        assert torch.equal(out, cosine_attention(q, k, v, causal=True))


def test_graph_capture_and_replay_of_a_training_step() -> None:
    q, k, v = (leaf(2, 4, 200, DIM) for _ in range(3))
    dout = torch.randn_like(q)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(cosine_attention(q, k, v, deterministic=True), (q, k, v), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in (q, k, v, dout):
            x.normal_()
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


def test_a_kernel_that_is_not_built_is_refused_during_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path))
    x = torch.randn(1, 1, 64, 248, dtype=DTYPE, device="cuda")
    with (
        pytest.raises(MissingKernelError, match=r"(?s)CUDA graph.*python -m cosattn\.warmup"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cosine_attention(x, x, x, scale=0.125)


_FIRST_LAUNCH_WHILE_CAPTURING = """
import torch
leaves = [torch.randn(2, 4, 200, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
dout = torch.randn_like(leaves[0])
torch.cuda.synchronize()
from cosattn import cosine_attention
def step():
    return torch.autograd.grad(cosine_attention(*leaves, deterministic=True), leaves, dout)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
graph.replay()
assert all(torch.equal(one, other) for one, other in zip(captured, step()))
"""


def test_a_kernel_that_is_built_may_be_loaded_during_capture() -> None:
    q, k, v = (leaf(2, 4, 200, DIM) for _ in range(3))
    torch.autograd.grad(cosine_attention(q, k, v, deterministic=True), (q, k, v), torch.ones_like(q))
    run = subprocess.run([sys.executable, "-c", _FIRST_LAUNCH_WHILE_CAPTURING], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


_FIRST_LAUNCH_IN_A_BACKWARD = """
import torch
leaves = [torch.randn(1, 4, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
from cosattn import cosine_attention
out, dout = cosine_attention(*leaves), torch.ones_like(leaves[0])
spare = [torch.empty(size, device="cuda") for size in (1 << 10, 1 << 18, 1 << 22) for _ in range(8)]
del spare  # the allocator has memory now: backward does not ask CUDA for any
assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out, leaves, dout))
"""


def test_a_backward_is_the_first_work_of_autograds_thread() -> None:
    """That thread has no CUDA context yet, which the driver needs to describe a tensor."""
    q, k, v = (leaf(1, 4, 256, 64) for _ in range(3))
    torch.autograd.grad(cosine_attention(q, k, v), (q, k, v), torch.ones_like(q))
    run = subprocess.run([sys.executable, "-c", _FIRST_LAUNCH_IN_A_BACKWARD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_work_goes_to_the_current_stream() -> None:
    inputs = [torch.randn(2, 4, 300, DIM, dtype=DTYPE, device="cuda") for _ in range(3)]
    dout = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        # New leaves: autograd makes the caller's stream wait for the stream on which a leaf was first used.
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        out = cosine_attention(q, k, v, deterministic=True)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))

    expected = step()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # so that the allocator has memory for this stream
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # keeps the default stream busy for about a second
    with torch.cuda.stream(side):
        found = step()
    side.synchronize()
    assert not torch.cuda.default_stream().query(), "the default stream was waited for"
    with torch.cuda.stream(side):
        same = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
    assert all(same)
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_device_of_the_tensors() -> None:
    assert torch.cuda.current_device() == 0
    q, k, v = (leaf(2, 4, 100, DIM, device="cuda:1") for _ in range(3))
    out = cosine_attention(q, k, v)
    assert out.device.index == 1
    assert_right(out, q, k, v)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.device.index == 1
    assert torch.cuda.current_device() == 0
    with pytest.raises(ArgumentError, match="k is on cuda:0 and q is on cuda:1"):
        cosine_attention(q, k.to("cuda:0"), v)


def test_saved_tensors_on_the_cpu() -> None:
    q, k, v = bshd(2, 4, 150), bshd(2, 4, 200), bshd(2, 4, 200)
    dout = torch.randn_like(q)
    expected = torch.autograd.grad(cosine_attention(q, k, v, deterministic=True), (q, k, v), dout)
    with torch.autograd.graph.save_on_cpu():
        out = cosine_attention(q, k, v, deterministic=True)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), dout), expected, strict=True):
        assert relative_error(one, other) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_linear_in_the_length(dtype: torch.dtype) -> None:
    q, k, v = (leaf(1, 1, 65_536, DIM, dtype=dtype) for _ in range(3))
    size = 3 * q.numel() * q.element_size()
    cosine_attention(q, k, v).sum().backward()  # builds what has to be built
    for x in (q, k, v):
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cosine_attention(q, k, v).sum().backward()
    torch.cuda.synchronize()
    ratio = (torch.cuda.max_memory_allocated() - before) / size
    print(f"\n{dtype}: forward and backward of 65536 rows take {ratio:.2f} times the memory of q, k and v")
    assert ratio < 16


def test_strides_beyond_32_bits() -> None:
    size, far_away = 2 * 64 * 64, 2**31
    storage = torch.empty(far_away + 3 * size, dtype=torch.bfloat16, device="cuda")
    far = [storage.as_strided((2, 2, 64, 64), (far_away, 64 * 64, 64, 1), i * size) for i in range(3)]
    near = [torch.randn(2, 2, 64, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
    for there, here in zip(far, near, strict=True):
        there.copy_(here.detach()).requires_grad_()
    dout = torch.randn_like(near[0])
    outs = [cosine_attention(*tensors, causal=True) for tensors in (far, near)]
    assert torch.equal(*outs)
    gradients = [torch.autograd.grad(out, tensors, dout) for out, tensors in zip(outs, (far, near), strict=True)]
    for there, here in zip(*gradients, strict=True):
        assert torch.equal(there, here)  # one block of keys: nothing is added in an order that could change


def test_more_heads_than_a_grid_dimension_holds() -> None:
    heads = 70_000
    tensors = [torch.randn(heads, 16, 32, dtype=torch.float16, device="cuda", requires_grad=True) for _ in range(3)]
    out = cosine_attention(*tensors)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, dout)
    last = [x.detach()[-3:].requires_grad_() for x in tensors]
    expected = cosine_attention(*last)
    assert torch.equal(out[-3:], expected)
    for found, alone in zip(gradients, torch.autograd.grad(expected, last, dout[-3:]), strict=True):
        assert torch.equal(found[-3:], alone)
