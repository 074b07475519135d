"""Calls emulated kernels with CPU tensors, through the same ABI as a launch on a GPU.

    from emulator import harness
    spec = harness.spec_of("forward", q, k, v, causal=True)
    result = harness.run_forward(spec, q, k, v)            # .out, .lse
    grads = harness.run_backward(replace(spec, direction="backward"), q, k, v, result.out, result.lse, dout)

Tensors are canonical: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), any strides with a contiguous last
dimension, mask (B, Sk) bool, bias (B|1, Hq|1, Sq, Sk), scale a float or a (Hq,) tensor. Inputs are placed in memory
that ends where they end, with NaN in their gaps; results and workspace start as NaN.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cosattn import abi
from cosattn.render import render
from cosattn.spec import DType, KernelSpec, Softmax, softmax_mode
from emulator import build
from emulator.memory import Guarded

DTYPES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
STATISTICS = (
    "blocks",
    "barriers",
    "collectives",
    "mma",
    "ldmatrix",
    "ldmatrix_conflicts",
    "copies",
    "products",
    "loads",
    "stores",
)


class KernelFault(AssertionError):
    """The machine stopped the kernel: a race, a deadlock, memory out of bounds, ..."""


@dataclass
class Forward:
    out: Tensor
    lse: Tensor
    statistics: dict[str, int]
    workspace: Tensor
    """Bytes, as the kernel left them."""


@dataclass
class Backward:
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    """float32, shape of the bias."""
    dscale_rows: Tensor | None
    """(B, Hq, Sq) float32: q_hat . sum_j dS_ij k_hat_j of each row; their sum over b and rows is dscale."""
    statistics: dict[str, int]
    workspace: Tensor
    """Bytes, as the kernels left them."""


class Library:
    """A compiled source with the emulated machine inside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.symbols = ctypes.CDLL(str(path))
        self.symbols.emulator_configure.argtypes = (ctypes.c_ulonglong, ctypes.c_int)
        self.symbols.emulator_written_before.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self.symbols.emulator_fault.restype = ctypes.c_char_p

    def configure(self, seed: int, patience_s: int = 60, memory: Guarded | None = None) -> None:
        """Choose the order in which threads and blocks run; reset the statistics.

        A first launch that overlaps what ran before has to wait before it touches ``memory``.
        """
        self.symbols.emulator_configure(seed, patience_s)
        for first, size in memory.spans() if memory is not None else ():
            self.symbols.emulator_written_before(first, size)

    def statistics(self) -> dict[str, int]:
        counts = (ctypes.c_uint64 * len(STATISTICS))()
        self.symbols.emulator_statistics(counts)
        return dict(zip(STATISTICS, counts, strict=True))

    def check(self, status: int, memory: Guarded | None = None) -> None:
        """Raise KernelFault for a non-zero status, with source lines and tensor names in the message."""
        if status == 0:
            return
        message = self.symbols.emulator_fault().decode() or f"cudaError {status}"
        message = re.sub(r"<\+(0x[0-9a-f]+)>", lambda found: self._line(found[1]), message)
        if memory is not None:
            place = memory.describe
            message = re.sub(r"<(0x[0-9a-f]+)>", lambda found: f"{found[1]} ({place(int(found[1], 16))})", message)
        raise KernelFault(message)

    def _line(self, offset: str) -> str:
        done = subprocess.run(["addr2line", "-i", "-e", str(self.path), offset], capture_output=True, text=True)
        places = [line.split(" ")[0].rsplit("/", 1)[-1] for line in done.stdout.splitlines()]
        return " < ".join(places[:4]) or f"+{offset}"


@cache
def library(spec: KernelSpec) -> Library:
    """The rendered kernel of a spec, compiled once per source."""
    rendered = render(spec)
    return Library(build.library(rendered.source, rendered.headers))


def spec_of(
    direction: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    arch: str = "sm80",
    scale: float | Tensor = 8.0,
    groups: int = 1,
    l2norm: bool = True,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softmax: Softmax | None = None,
    deterministic: bool = False,
    bias_grad: bool = False,
) -> KernelSpec:
    """The spec of a call; ``softmax`` is chosen as the public function does unless given."""
    dtype = DTYPES[q.dtype]
    bound = None if isinstance(scale, Tensor) or bias is not None else abs(scale) * groups
    return KernelSpec(
        direction=direction,  # type: ignore[arg-type]
        arch=arch,
        dtype=dtype,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        groups=groups,
        l2norm=l2norm,
        causal=causal,
        mask=mask is not None and mask.ndim == 2,
        pair_mask=mask is not None and mask.ndim == 4,
        bias=None if bias is None else DTYPES[bias.dtype],
        softmax=softmax or softmax_mode(dtype, bound),
        deterministic=deterministic,
        bias_grad=bias_grad,
    )


def run_forward(
    spec: KernelSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 8.0,
    want_lse: bool = True,
    seed: int = 0,
) -> Forward:
    """One forward launch. Raises KernelFault."""
    memory = Guarded()
    tensors = _inputs(memory, q, k, v, mask, bias, scale)
    tensors["out"] = memory.like("out", _stored_like(q, v.shape[-1]))
    lse = memory.empty("lse", tuple(q.shape[:-1]), torch.float32)
    if want_lse:
        tensors["lse"] = lse
    statistics, workspace = _launch(spec, memory, tensors, scale, seed)
    return Forward(tensors["out"].clone(), lse.clone(), statistics, workspace.clone())


def run_backward(
    spec: KernelSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    dlse: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | Tensor = 8.0,
    want_dscale: bool = False,
    seed: int = 0,
) -> Backward:
    """One backward launch. Raises KernelFault."""
    memory = Guarded()
    tensors = _inputs(memory, q, k, v, mask, bias, scale)
    tensors |= {name: memory.copy(name, tensor) for name, tensor in (("out", out), ("lse", lse), ("dout", dout))}
    if dlse is not None:
        tensors["dlse"] = memory.copy("dlse", dlse)
    for name, source in (("dq", q), ("dk", k), ("dv", v)):
        tensors[name] = memory.like(name, _stored_like(source, source.shape[-1]))
    if spec.bias_grad:
        assert bias is not None
        tensors["dbias"] = memory.empty("dbias", tuple(bias.shape), torch.float32)
    if want_dscale:
        tensors["dscale"] = memory.empty("dscale", tuple(q.shape[:-1]), torch.float32)
    statistics, workspace = _launch(spec, memory, tensors, scale, seed)
    dq, dk, dv = (tensors[name].clone() for name in ("dq", "dk", "dv"))
    dbias, dscale = (tensors[name].clone() if name in tensors else None for name in ("dbias", "dscale"))
    return Backward(dq, dk, dv, dbias, dscale, statistics, workspace.clone())


def _inputs(
    memory: Guarded,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
) -> dict[str, Tensor]:
    given = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "scale": scale}
    return {name: memory.copy(name, tensor) for name, tensor in given.items() if isinstance(tensor, Tensor)}


def _stored_like(tensor: Tensor, width: int) -> Tensor:
    """Shape of ``tensor`` with another last dimension; (B, S, H, D) storage stays one."""
    b, h, s, _ = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return torch.empty(b, s, h, width, dtype=tensor.dtype).transpose(1, 2)
    return torch.empty(b, h, s, width, dtype=tensor.dtype)


def _launch(
    spec: KernelSpec, memory: Guarded, tensors: Mapping[str, Tensor], scale: float | Tensor, seed: int
) -> tuple[dict[str, int], Tensor]:
    emulated = library(spec)
    problem = _problem(tensors, scale)
    workspace_bytes = emulated.symbols.cosattn_workspace_bytes
    workspace_bytes.restype = ctypes.c_longlong
    workspace = memory.empty("workspace", (workspace_bytes(problem),), torch.uint8)
    named = {**tensors, "workspace": workspace}
    addresses = [named[name].data_ptr() if name in named else 0 for name in abi.POINTERS]
    pointers = struct.pack(abi.POINTERS_FORMAT, *addresses)
    emulated.configure(seed, memory=memory)
    emulated.check(emulated.symbols.cosattn_launch(pointers, problem, None), memory)
    return emulated.statistics(), workspace


def _problem(tensors: Mapping[str, Tensor], scale: float | Tensor) -> bytes:
    q, k = tensors["q"], tensors["k"]
    values = {
        "batch": q.shape[0],
        "q_heads": q.shape[1],
        "kv_heads": k.shape[1],
        "q_len": q.shape[2],
        "k_len": k.shape[2],
    }
    for name, tensor in tensors.items():
        for axis, letter in enumerate("bhs"):
            if f"{name}_{letter}" in abi.INTEGERS and name != "mask":
                values[f"{name}_{letter}"] = tensor.stride(axis) if tensor.shape[axis] > 1 or name[-4:] != "bias" else 0
    if "mask" in tensors:
        axes = "bs" if tensors["mask"].ndim == 2 else "bhqs"
        values |= {f"mask_{axis}": stride for axis, stride in zip(axes, tensors["mask"].stride(), strict=True)}
        values["mask_batches"] = tensors["mask"].shape[0]
    if "bias" in tensors:
        values["bias_batches"] = tensors["bias"].shape[0]
    integers = [values.get(name, 0) for name in abi.INTEGERS]
    return struct.pack(abi.PROBLEM_FORMAT, *integers, 0.0 if isinstance(scale, Tensor) else float(scale))
