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

import pytest
import torch

from cosattn import abi, cpu, launch
from cosattn.spec import KernelSpec

STREAM = 0x5EA
WORKSPACE = 1000


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

    def workspace_bytes(self, problem: bytes) -> int:
        assert len(problem) == struct.calcsize(abi.PROBLEM_FORMAT)
        return WORKSPACE

    def error(self, code: int) -> RuntimeError:
        return RuntimeError(f"cuda error {code}")

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
