"""Stand-ins for built kernels on a machine without a GPU, with CPU tensors in the place of CUDA tensors.

``EmulatedKernel`` obeys the launch contract of ``cosattn/abi.py``: it finds its tensors through nothing but the two
packed structs and computes with ``cosattn.cpu``, so what the kernels would be told is checked by the results.
``compile_recorder`` builds a shared library that does nothing, for what ctypes itself does.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cosattn import abi, autograd, cpu, functional, host, launch, ops, plan
from cosattn.spec import KernelSpec

DEFAULTS: dict[str, Any] = {
    "mask": None,
    "attn_bias": None,
    "scale": 8.0,
    "groups": 1,
    "causal": False,
    "attn_bias_batch_dim": False,
    "l2norm_qk": True,
    "scale_max": None,
    "bias_bound": None,
    "return_lse": False,
    "deterministic": None,
}
STREAM = 0x5EA
FAILED = -1
"""What a C entry point returns for an exception."""
WORKSPACE = 1000


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
    """cosine_attention as CUDA tensors take it."""
    unknown = options.keys() - DEFAULTS.keys()
    assert not unknown
    return functional._direct(q, k, v, *(DEFAULTS | options).values())


@contextmanager
def scratch_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Main memory for ``launch.allocate``; yields the sizes asked for. At the end everything must have been freed."""
    memory: dict[int, torch.Tensor] = {}
    sizes: list[int] = []

    def allocate(size: int, stream: int) -> int:
        assert stream == STREAM
        tensor = torch.empty(size, dtype=torch.uint8)
        memory[tensor.data_ptr()] = tensor
        sizes.append(size)
        return tensor.data_ptr()

    monkeypatch.setattr(launch, "allocate", allocate)
    monkeypatch.setattr(launch, "free", memory.pop)
    yield sizes
    assert not memory, "a workspace is left behind"


@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))
def current_stream(device: int, stream: Any) -> int:
    """In the place of ``aoti_torch_get_current_cuda_stream``."""
    stream[0] = STREAM
    return 0


@contextmanager
def extension_in_use(module: Any, stream: int | None = None) -> Iterator[None]:
    """Calls go through the host extension, on emulated kernels unless a real stream function's address is given."""
    if stream is None:
        stream = ctypes.cast(current_stream, ctypes.c_void_p).value or 0
    # Or a first plan would look for the extension, and connect it to the streams of a torch that has CUDA.
    begun, host._begun = host._begun, True
    host.connect(module, stream, autograd.gradients_for_host)
    try:
        yield
    finally:
        host.disconnect()
        host._begun = begun
        plan.plans.clear()  # plans remember that the extension knew them


_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def view(address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The memory at an address as a tensor."""
    assert address, "null pointer"
    assert address % dtype.itemsize == 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (span * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@dataclass
class EmulatedKernel:
    """Takes the place of ``launch.Kernel``."""

    spec: KernelSpec
    code: int = 0
    """What ``launch`` returns; nothing is computed when it is not 0."""
    calls: list[tuple[dict[str, int], dict[str, float]]] = field(default_factory=list)
    """Pointers and problem of every launch."""
    by_address: int = 0
    """Launches through ``address``: those of the host extension."""
    failure: Exception | None = None
    _entry: Any = None

    def workspace_bytes(self, problem: bytes) -> int:
        assert len(problem) == struct.calcsize(abi.PROBLEM_FORMAT)
        return WORKSPACE

    def error(self, code: int) -> Exception:
        return self.failure or RuntimeError(f"cuda error {code}")

    @property
    def address(self) -> int:
        """Of a C function that does what ``launch`` does."""

        def entry(pointers: int, problem: int, stream: int) -> int:
            self.by_address += 1
            sizes = struct.calcsize(abi.POINTERS_FORMAT), struct.calcsize(abi.PROBLEM_FORMAT)
            try:
                return self.launch(ctypes.string_at(pointers, sizes[0]), ctypes.string_at(problem, sizes[1]), stream)
            except Exception as failure:  # ctypes would print and forget it
                self.failure = failure
                return FAILED

        if self._entry is None:
            signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
            self._entry = signature(entry)
        return ctypes.cast(self._entry, ctypes.c_void_p).value or 0

    def launch(self, pointers: bytes, problem: bytes, stream: int) -> int:
        assert stream == STREAM
        p = dict(zip(abi.POINTERS, struct.unpack(abi.POINTERS_FORMAT, pointers), strict=True))
        n = dict(zip((*abi.INTEGERS, *abi.DOUBLES), struct.unpack(abi.PROBLEM_FORMAT, problem), strict=True))
        self.calls.append((p, n))
        if self.code == 0:
            self._compute(p, n)
        return self.code

    def _compute(self, p: dict[str, int], n: dict[str, float]) -> None:
        spec, dtype = self.spec, _DTYPES[self.spec.dtype]
        batch, q_heads, kv_heads, q_len, k_len = (int(n[x]) for x in abi.INTEGERS[:5])
        wide = {"q": spec.head_dim, "k": spec.head_dim, "v": spec.value_dim, "out": spec.value_dim}
        wide |= {"dq": wide["q"], "dk": wide["k"], "dv": wide["v"], "dout": wide["out"]}

        def tensor(name: str) -> torch.Tensor:
            heads, rows = (kv_heads, k_len) if name in ("k", "v", "dk", "dv") else (q_heads, q_len)
            strides = tuple(int(n[f"{name}_{axis}"]) for axis in "bhs")
            assert p[name] % 16 == 0
            assert all(stride * dtype.itemsize % 16 == 0 for stride in strides)
            return view(p[name], (batch, heads, rows, wide[name]), (*strides, 1), dtype)

        def rows(name: str) -> torch.Tensor:
            return view(p[name], (batch, q_heads, q_len), (q_heads * q_len, q_len, 1), torch.float32)

        def matrix(name: str, dtype: torch.dtype) -> torch.Tensor:
            strides = tuple(int(n[f"{name}_{axis}"]) for axis in "bhs")
            shape = (int(n["bias_batches"]), 1 if strides[1] == 0 else q_heads, q_len, k_len)
            return view(p[name], shape, (*strides, 1), dtype)

        assert p["workspace"]
        assert bool(p["mask"]) == (spec.mask or spec.pair_mask)
        assert bool(p["bias"]) == (spec.bias is not None)
        assert spec.l2norm or spec.groups == 1
        mask = view(p["mask"], (batch, k_len), (int(n["mask_b"]), int(n["mask_s"])), torch.bool) if spec.mask else None
        if spec.pair_mask:
            strides = tuple(int(n[f"mask_{axis}"]) for axis in "bhqs")
            mask = view(p["mask"], (int(n["mask_batches"]), q_heads, q_len, k_len), strides, torch.bool)
        bias = matrix("bias", _DTYPES[spec.bias]) if spec.bias else None
        scale = view(p["scale"], (q_heads,), (1,), torch.float32) if p["scale"] else float(n["scale"])
        inputs = (tensor("q"), tensor("k"), tensor("v"), mask, bias, scale)
        flags = {"groups": spec.groups, "causal": spec.causal, "l2norm": spec.l2norm}
        if spec.direction == "forward":
            out, lse = cpu.forward(*inputs, **flags)
            tensor("out").copy_(out)
            if p["lse"]:
                rows("lse").copy_(lse)
            return
        needs = (bool(p["dbias"]), bool(p["dscale"]))
        assert spec.bias_grad == needs[0]
        dlse = rows("dlse") if p["dlse"] else None
        found = cpu.backward(*inputs, tensor("out"), rows("lse"), tensor("dout"), dlse, **flags, needs=needs)
        for name, gradient in zip(("dq", "dk", "dv"), found, strict=False):
            tensor(name).copy_(gradient)
        if needs[0]:
            matrix("dbias", torch.float32).copy_(found[3])
        if needs[1]:
            # one number per head: only the sum over batch and rows is promised
            buffer = rows("dscale").zero_()
            buffer[0, :, 0] = found[4]


_RECORDER = r"""
#include <string.h>
static unsigned long long pointers[@POINTERS@];
static unsigned char problem[@PROBLEM@];
static void* last_stream;
int code;
int cosattn_launch(const void* p, const void* n, void* stream) {
    memcpy(pointers, p, sizeof pointers);
    memcpy(problem, n, sizeof problem);
    last_stream = stream;
    return code;
}
const void* recorded_pointers(void) { return pointers; }
const void* recorded_problem(void) { return problem; }
const void* recorded_stream(void) { return last_stream; }
long long cosattn_workspace_bytes(const void* n) { return ((const long long*)n)[0]; }
const char* cosattn_error_string(int e) { return e == 2 ? "out of memory" : "other"; }
const char* cosattn_spec_name(void) { return "@NAME@"; }
int cosattn_abi_bytes(void) { return @BYTES@; }
"""


def compile_recorder(folder: Path, name: str, abi_bytes: int | None = None) -> Path:
    """A library with the exports of a kernel named ``name`` that records its arguments and returns ``code``."""
    sizes = len(abi.POINTERS), struct.calcsize(abi.PROBLEM_FORMAT)
    total = sizes[0] * 8 + sizes[1] if abi_bytes is None else abi_bytes
    source = _RECORDER.replace("@POINTERS@", str(sizes[0])).replace("@PROBLEM@", str(sizes[1]))
    source = source.replace("@NAME@", name).replace("@BYTES@", str(total))
    (folder / "recorder.c").write_text(source)
    library = folder / "recorder.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, folder / "recorder.c"], check=True)
    return library


@contextmanager
def emulated_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[KernelSpec, EmulatedKernel]]:
    """CUDA calls take CPU tensors. Yields their kernels by spec, in the order asked for; no plan is left behind."""
    found: dict[KernelSpec, EmulatedKernel] = {}
    plans: dict[Any, Any] = {}
    monkeypatch.setattr(plan, "load", lambda spec: found.setdefault(spec, EmulatedKernel(spec)))
    monkeypatch.setattr(plan, "architecture", lambda device: "sm90")
    for module in (plan, functional, ops):
        monkeypatch.setattr(module, "plans", plans)
    monkeypatch.setattr(launch, "current_device", lambda: -1)
    monkeypatch.setattr(launch, "current_stream", lambda device: STREAM)
    with scratch_memory(monkeypatch):
        yield found
