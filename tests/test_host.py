"""The host extension: what it serves and what it leaves to Python, on emulated kernels; when it is built and used."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_kernel import DEFAULTS, EmulatedKernel, attend, extension_in_use
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cosattn import cache, functional, host, host_build, plan, toolchain
from cosattn.errors import BuildError, ToolchainError, UnsupportedError
from cosattn.functional import cosine_attention
from cosattn.spec import KernelSpec

Kernels = dict[KernelSpec, EmulatedKernel]
only_extension = pytest.mark.parametrize("way", ["extension"], indirect=True)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def three(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(2, 4, 5, 16, dtype=dtype), leaf(2, 2, 7, 16, dtype=dtype), leaf(2, 2, 7, 8, dtype=dtype)


def bshd(*shape: int) -> Tensor:
    batch, heads, rows, width = shape
    return torch.randn(batch, rows, heads, width).transpose(1, 2).requires_grad_()


CALLS: dict[str, Callable[[], tuple[tuple[Tensor, ...], dict[str, Any]]]] = {
    "plain": lambda: (three(), {}),
    "half": lambda: (three(torch.bfloat16), {"causal": True}),
    "lse": lambda: (three(), {"return_lse": True}),
    "stored (B, S, H, D)": lambda: ((bshd(2, 4, 5, 16), bshd(2, 2, 7, 16), bshd(2, 2, 7, 8)), {"causal": True}),
    "merged": lambda: ((leaf(6, 5, 16), leaf(6, 7, 16), leaf(6, 7, 8)), {"l2norm_qk": False, "scale": 0.125}),
    "mask": lambda: (three(), {"mask": torch.rand(2, 7) < 0.8, "groups": 4}),
    "bias": lambda: (three(), {"attn_bias": leaf(4, 5, 7), "deterministic": True}),
    "mask of pairs": lambda: (three(), {"mask": torch.rand(1, 4, 5, 7) < 0.8}),
    "windows": lambda: (
        three(),
        {"mask": torch.rand(1, 2, 1, 5, 7) < 0.8, "attn_bias": leaf(1, 1, 4, 5, 7), "scale": torch.tensor(12.0)},
    ),
    "half bias of the batch": lambda: (
        three(),
        {"attn_bias": leaf(2, 5, 7, dtype=torch.bfloat16), "attn_bias_batch_dim": True, "bias_bound": 9},
    ),
    "learned scale": lambda: (three(), {"scale": torch.rand(4, 1, 1).requires_grad_(), "scale_max": 2.0}),
    "one learned scale": lambda: (three(), {"scale": torch.tensor(3.0, requires_grad=True)}),
    "whole number": lambda: (three(), {"scale": 8}),
}


def results(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> list[Tensor]:
    """Outputs, then gradients, of a call."""
    found = attend(*tensors, **options)
    outs = list(found) if isinstance(found, tuple) else [found]
    leaves = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(7)
    douts = [torch.empty(x.shape).normal_(generator=generator).to(x.dtype) for x in outs]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)]


@only_extension
@pytest.mark.parametrize("call", CALLS)
def test_both_ways_give_the_same_and_the_extension_launches_everything(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    tensors, options = CALLS[call]()
    for _ in range(2):
        found = results(tensors, options)
    assert [kernel.by_address for kernel in kernels.values()] == [2, 2]
    assert [len(kernel.calls) for kernel in kernels.values()] == [2, 2]
    host.disconnect()
    monkeypatch.setattr(plan, "plans", {})
    monkeypatch.setattr(functional, "plans", plan.plans)
    expected = results(tensors, options)
    assert [kernel.by_address for kernel in kernels.values()] == [2, 2]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()


@only_extension
def test_every_kind_of_metadata_has_a_plan_of_its_own(kernels: Kernels, extension: Any) -> None:
    """Calls that differ in one thing, twice in turns: none is taken for another."""
    q, k, v = three()
    changes: list[dict[str, Any]] = [
        {},
        {"q": bshd(2, 4, 5, 16)},
        {"k": bshd(2, 2, 7, 16)},
        {"v": torch.randn(2, 2, 7, 16)},
        {"q": torch.randn(2, 8, 5, 16)},
        dict(zip("qkv", (x.to(torch.bfloat16) for x in (q, k, v)), strict=True)),
        {"mask": torch.ones(2, 7, dtype=torch.bool)},
        {"mask": torch.ones(1, 7, dtype=torch.bool)},
        {"mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)},
        {"mask": torch.ones(1, 2, 1, 5, 7, dtype=torch.bool)},
        {"attn_bias": torch.zeros(4, 5, 7)},
        {"attn_bias": torch.zeros(1, 4, 5, 7)},
        {"attn_bias": torch.zeros(4, 5, 7, dtype=torch.float16)},
        {"attn_bias": torch.zeros(4, 5, 7), "bias_bound": 1.0},
        {"scale": 7.0},
        {"scale": torch.full((4,), 7.0)},
        {"scale": torch.full((4,), 7.0), "scale_max": 8.0},
        {"groups": 2},
        {"causal": True},
        {"l2norm_qk": False, "scale": 0.5},
    ]
    for round_ in range(2):
        for change in changes:
            inputs = {"q": q, "k": k, "v": v} | change
            tensors = tuple(inputs.pop(name) for name in "qkv")
            before = extension.count()
            found = attend(*tensors, **inputs)
            assert extension.count() - before == (1 if round_ == 0 else 0), change
            assert torch.equal(found, functional._planned(*tensors, *(DEFAULTS | inputs).values()))
    assert extension.count() == len(changes)


class Subclass(Tensor):
    pass


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """What ``torch.autocast("cuda")`` does where there is a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def negated() -> Tensor:
    return torch._neg_view(torch.randn(2, 4, 5, 16))


LEFT_TO_PYTHON: dict[str, tuple[dict[str, Any], Callable[[], AbstractContextManager[Any]]]] = {
    "a subclass": ({"q": torch.randn(2, 4, 5, 16).as_subclass(Subclass)}, nullcontext),
    "no tensor": ({"k": [1.0]}, nullcontext),
    "a sparse mask": ({"mask": torch.ones(2, 7, dtype=torch.bool).to_sparse()}, nullcontext),
    "a negated tensor": ({"q": negated()}, nullcontext),
    "a misaligned tensor": ({"q": torch.randn(2 * 4 * 5 * 16 + 1)[1:].view(2, 4, 5, 16)}, nullcontext),
    "many dimensions": ({"q": torch.randn(1, 1, 1, 2, 4, 5, 16)}, nullcontext),
    "a scale of another kind": ({"scale": "8"}, nullcontext),
    "no scale": ({"scale": None}, nullcontext),
    "a number as groups": ({"groups": 1.0}, nullcontext),
    "an enormous number": ({"groups": 10**30, "scale": 10**400}, nullcontext),
    "a number as causal": ({"causal": 0}, nullcontext),
    "a number as deterministic": ({"deterministic": 0}, nullcontext),
    "a dispatch mode": ({}, Mode),
    "a fake mode": ({}, FakeTensorMode),
    "autocast to another type": ({}, cuda_autocast),
}


@only_extension
@pytest.mark.parametrize("case", LEFT_TO_PYTHON)
def test_what_is_left_to_python(kernels: Kernels, case: str) -> None:
    change, context = LEFT_TO_PYTHON[case]
    inputs = dict(zip("qkv", (x.detach() for x in three()), strict=True)) | DEFAULTS
    attend(*(inputs[name] for name in "qkv"))
    assert host.attend is not None
    assert host.attend(*inputs.values()) is not None
    with context():
        assert host.attend(*(inputs | change).values()) is None
    assert host.attend(*inputs.values()) is not None


@only_extension
def test_transforms_and_traces_are_left_to_python(kernels: Kernels) -> None:
    tensors = tuple(x.detach() for x in three())
    attend(*tensors)
    assert host.attend is not None
    found = []

    def call(*inputs: Tensor) -> Tensor:
        found.append(host.attend(*inputs, *DEFAULTS.values()))
        return inputs[0].sum()

    torch.func.grad(call)(*tensors)
    torch.vmap(call)(*(x[None] for x in tensors))
    with pytest.warns(DeprecationWarning, match="trace"):
        torch.jit.trace(call, tensors, check_trace=False)
    assert found == [None, None, None]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        with pytest.raises(UnsupportedError, match="forward-mode"):
            cosine_attention(dual, *tensors[1:])
    call(*tensors)
    assert found[-1] is not None


@only_extension
def test_under_autocast_what_is_cast_already_is_served(kernels: Kernels) -> None:
    with cuda_autocast():
        cast = attend(*three())
        out = attend(*three(torch.bfloat16))
    assert cast.dtype == out.dtype == torch.bfloat16
    forward, *_ = kernels.values()
    assert forward.by_address == 2
    cast.square().sum().backward()


@only_extension
def test_the_compiler_sees_nothing_of_it(kernels: Kernels) -> None:
    torch._dynamo.reset()
    tensors = three()
    expected = cosine_attention(*tensors)
    compiled = torch.compile(cosine_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors), expected)
    torch._dynamo.reset()


def test_the_graph_looks_the_same(kernels: Kernels, way: str) -> None:
    q, k, v = three()
    bias, scale = leaf(4, 5, 7), torch.rand(4).requires_grad_()
    out, lse = attend(q, k * 2, v, attn_bias=bias, scale=scale, return_lse=True)
    assert out.grad_fn.name() == "AttentionBackward"
    assert out.grad_fn is lse.grad_fn
    assert isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction) == (way == "python")
    names = [None if node is None else node.name() for node, _ in out.grad_fn.next_functions]
    gradients = ["torch::autograd::AccumulateGrad", "MulBackward0"] + 3 * ["torch::autograd::AccumulateGrad"]
    assert [name for name in names if name is not None] == gradients
    assert not attend(q.detach(), k.detach(), v.detach()).requires_grad
    with torch.no_grad():
        assert not attend(q, k, v).requires_grad
    seen: list[Tensor] = []
    out.register_hook(seen.append)
    out.grad_fn.register_prehook(lambda grads: seen.extend(grads[:1]))
    (out * 2).sum().backward()
    assert len(seen) == 2


def test_negated_gradients_are_read_with_their_sign(kernels: Kernels) -> None:
    q, k, v = three()
    outs = attend(q, k, v, return_lse=True)
    douts = [torch.randn_like(x) for x in outs]
    expected = torch.autograd.grad(outs, (q, k, v), [-x for x in douts], retain_graph=True)
    found = torch.autograd.grad(outs, (q, k, v), [torch._neg_view(x) for x in douts])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_backward_twice(kernels: Kernels) -> None:
    q, k, v = three()
    out = attend(q, k, v)
    first = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
    second = torch.autograd.grad(out, q, torch.ones_like(out))
    assert torch.equal(*first, *second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, q, torch.ones_like(out))


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_result_is_noticed(kernels: Kernels, which: int) -> None:
    q, k, v = three()
    found = attend(q, k, v, return_lse=True)
    with torch.no_grad():
        found[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (found[0].sum() + found[1].sum()).backward()


def test_saved_tensors(kernels: Kernels) -> None:
    """q, k, v, out and lse are saved, and hooks see them once."""
    q, k, v = three()
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = attend(q, k, v)
    assert [tuple(x.shape) for x in packed] == [(2, 4, 5, 16), (2, 2, 7, 16), (2, 2, 7, 8), (2, 4, 5, 8), (2, 4, 5)]
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    out = attend(q, k, v)
    for one, other in zip(found, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
        assert torch.equal(one, other)


def plans_alive() -> int:
    gc.collect()
    return sum(type(x) is plan.Plan for x in gc.get_objects())


def test_nothing_is_kept_alive(kernels: Kernels) -> None:
    before = plans_alive()
    q, k, v = three()
    for _ in range(3):
        out, lse = attend(q, k, v, return_lse=True)
        watched = [weakref.ref(x) for x in (out, lse)]
        out.sum().backward()
        del out, lse
        assert all(ref() is None for ref in watched)
        attend(q, k, v)  # and without a backward pass
    for rows in range(1, 6):
        attend(q[:, :, :rows].detach(), k.detach(), v.detach())
    assert plans_alive() == before + len(plan.plans) == before + 5
    plan.plans.clear()
    host.disconnect()
    assert plans_alive() == before


@only_extension
def test_a_plan_that_python_drops_is_dropped(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, extension: Any) -> None:
    monkeypatch.setattr(plan, "_MAX_PLANS", 3)
    outs = []
    for rows in range(1, 8):
        x = leaf(1, 1, rows, 8)
        outs.append((x, attend(x, x, x)))
        assert extension.count() <= 3
    for x, out in outs:  # a dropped plan still serves the backward passes of its calls
        out.square().sum().backward()
        assert x.grad is not None
        assert x.grad.count_nonzero() > 0
    assert extension.count() == 3


def test_inference_mode(kernels: Kernels) -> None:
    q, k, v = three()
    expected = attend(q, k, v)
    with torch.inference_mode():
        found = attend(q, k, v)
        assert found.is_inference()
        inside = attend(q.clone(), k.clone(), v.clone())
    assert torch.equal(found, expected)
    assert torch.equal(inside, expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        attend(q, k[:, :, :5], found[:, :2])


def test_errors_of_a_backward_pass_arrive(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = three()
    out = attend(q, k, v)

    def refuse(spec: KernelSpec) -> EmulatedKernel:
        raise UnsupportedError(f"no kernel for {spec.direction}")

    monkeypatch.setattr(plan, "load", refuse)
    monkeypatch.delenv("COSATTN_FALLBACK", raising=False)
    with pytest.raises(UnsupportedError, match="no kernel for backward"):
        out.sum().backward()


def test_threads(kernels: Kernels) -> None:
    calls = [three() for _ in range(8)]
    expected = [results(tensors, {}) for tensors in calls]
    failures: list[object] = []

    def work(i: int) -> None:
        for _ in range(20):
            found = results(calls[i], {})
            if not all(torch.equal(one, other) for one, other in zip(found, expected[i], strict=True)):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@only_extension
def test_compiled_autograd_is_refused_with_a_way_out(kernels: Kernels) -> None:
    from torch._dynamo import compiled_autograd

    out = attend(*three())
    with (
        pytest.raises(NotImplementedError, match=r"compiled autograd.*COSATTN_DISABLE_EXTENSION=1"),
        compiled_autograd._enable(torch.compile(backend="eager")),
    ):
        out.sum().backward()


# ---------------------------------------------------------------------------------------------------------------------
# When it is built and taken up


@pytest.fixture
def unbegun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[object]]:
    """A process that has not looked for the extension, with an empty cache; yields what gets connected."""
    monkeypatch.setattr(host, "_begun", False)
    for name in ("COSATTN_DISABLE_EXTENSION", "COSATTN_DISABLE_JIT", "COSATTN_PREBUILT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "address_of_current_stream", lambda: 1)
    monkeypatch.setattr(host, "load", lambda path: SimpleNamespace(path=path))
    connected: list[object] = []
    monkeypatch.setattr(host, "connect", lambda module, stream, gradients: connected.append(module.path))
    host_build.key.cache_clear()
    yield connected
    host_build.key.cache_clear()


def settle() -> None:
    for thread in threading.enumerate():
        if thread.name == "cosattn host extension":
            thread.join()


TINY = '#include <cstdio>\nextern "C" int value() { return @VALUE@; }\n'


@pytest.fixture
def tiny(unbegun: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a source in the place of host.cpp, also for processes that are started, and lets it be compiled."""
    source = tmp_path / "host.cpp"

    def put(text: str) -> None:
        source.write_text(text)
        host_build.key.cache_clear()

    monkeypatch.setattr(host_build, "SOURCE", source)
    put(TINY.replace("@VALUE@", "1"))
    real = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["-m", "cosattn.host_build"]
        code = (
            "import sys, pathlib, cosattn.host_build as b\n"
            f"b.SOURCE = pathlib.Path({str(source)!r})\nsys.exit(b.main())"
        )
        return real([command[0], "-c", code], **options)

    monkeypatch.setattr(subprocess, "run", lambda command, **options: (
        run if command[1:] == ["-m", "cosattn.host_build"] else real)(command, **options))  # fmt: skip
    return put


def test_what_is_built_is_taken_up_at_once(unbegun: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_build, "find", lambda: Path("/built"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing has to be built"))
    for _ in range(2):
        host.begin(lambda *_: None)
    assert unbegun == [Path("/built")]


@pytest.mark.parametrize("variable", ["COSATTN_DISABLE_EXTENSION", "COSATTN_DISABLE_JIT"])
def test_switches(unbegun: list[object], monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(host, "_build", lambda gradients: pytest.fail("no build is allowed"))
    host.begin(lambda *_: None)
    settle()
    monkeypatch.setattr(host_build, "find", lambda: Path("/built"))
    monkeypatch.setattr(host, "_begun", False)
    host.begin(lambda *_: None)
    assert unbegun == ([] if variable == "COSATTN_DISABLE_EXTENSION" else [Path("/built")])


def test_it_is_built_in_the_background_and_taken_up(unbegun: list[object], tiny: Callable[[str], None]) -> None:
    began = time.perf_counter()
    host.begin(lambda *_: None)
    assert time.perf_counter() - began < 1
    settle()
    assert unbegun == [host_build.find()]


def test_a_failed_build_is_said_once_and_not_tried_again(
    unbegun: list[object],
    tiny: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny("this is not C++\n")
    with caplog.at_level(logging.WARNING, "cosattn"):
        host.begin(lambda *_: None)
        settle()
    (record,) = caplog.records
    log = host_build.failure()
    assert log is not None
    assert str(log) in record.getMessage()
    assert "COSATTN_DISABLE_EXTENSION=1" in record.getMessage()
    assert "error" in log.read_text()
    caplog.clear()
    monkeypatch.setattr(host, "_begun", False)  # the next process
    monkeypatch.setattr(host, "_build", lambda gradients: pytest.fail("the same source fails again"))
    with caplog.at_level(logging.WARNING, "cosattn"):
        host.begin(lambda *_: None)
    assert not caplog.records
    assert not unbegun
    assert str(log) in (host_build.why_not() or "")
    with pytest.raises(BuildError, match="did not compile"):
        host_build.ensure()
    tiny(TINY.replace("@VALUE@", "2"))
    assert host_build.why_not() is None, "another source is another try"


def test_without_a_compiler(unbegun: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "host_compiler", lambda: (None, "c++ not found"))
    monkeypatch.setattr(host, "_build", lambda gradients: pytest.fail("there is no compiler"))
    host.begin(lambda *_: None)
    assert host_build.why_not() == "the host extension can not be compiled: c++ not found"
    with pytest.raises(ToolchainError, match=r"c\+\+ not found"):
        host_build.ensure()


@pytest.mark.parametrize("error", [OSError("disk"), ImportError("undefined symbol"), AttributeError("no stream")])
def test_a_broken_extension_breaks_no_call(
    unbegun: list[object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def broken(path: Path) -> None:
        raise error

    monkeypatch.setattr(host_build, "find", lambda: Path("/built"))
    monkeypatch.setattr(host, "load", broken)
    with caplog.at_level(logging.WARNING, "cosattn"):
        host.begin(lambda *_: None)
    (record,) = caplog.records
    assert str(error) in record.getMessage()


def test_one_entry_for_each_source_torch_and_python(
    tiny: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = host_build.ensure()
    assert host_build.ensure() == first == host_build.find()
    assert {path.name for path in first.parent.iterdir()} == {
        cache.LIBRARY, cache.LOG, cache.MANIFEST, "host.cpp"
    }  # fmt: skip
    (manifest,) = cache.manifests(first.parents[4])
    assert manifest["torch"] == torch.__version__
    assert manifest["name"] == "host"
    tiny(TINY.replace("@VALUE@", "2"))
    assert host_build.find() is None
    assert host_build.ensure() != first
    host_build.key.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert host_build.find() is None
    assert "torch9.9.9" in host_build.runtime()


def _take_a_turn(queue: Any, seconds: float) -> None:
    with host_build.only_one():
        began = time.time()
        time.sleep(seconds)
        queue.put((began, time.time()))


def test_one_build_at_a_time_and_a_killed_one_gives_its_turn_back(unbegun: list[object]) -> None:
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    killed = fork.Process(target=_take_a_turn, args=(queue, 60))
    killed.start()
    time.sleep(0.5)
    waiting = [fork.Process(target=_take_a_turn, args=(queue, 0.2)) for _ in range(2)]
    for process in waiting:
        process.start()
    time.sleep(0.5)
    assert queue.empty()
    killed.kill()
    (first_began, first_ended), (second_began, second_ended) = sorted(queue.get(timeout=20) for _ in waiting)
    for process in waiting:
        process.join()
    assert first_began < first_ended <= second_began < second_ended


def test_the_command(tmp_path: Path) -> None:
    environment = {**os.environ, "COSATTN_CACHE_DIR": str(tmp_path), "CXX": "/nowhere/c++"}
    ran = subprocess.run(
        [sys.executable, "-m", "cosattn.host_build"], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert "ToolchainError: cannot compile the host extension: /nowhere/c++ not found" in ran.stderr


def test_the_real_one_is_in_the_cache(extension: Any) -> None:
    path = host_build.find()
    assert path is not None
    with extension_in_use(host.load(path)):
        assert host.attend is not None
