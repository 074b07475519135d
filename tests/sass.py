"""Rendered kernels -> machine code without a GPU: what ptxas says about them, and which instructions they hold."""

from __future__ import annotations

import collections
import importlib.metadata
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cosattn import toolchain
from cosattn.arch import ARCHS, Arch
from cosattn.build import nvcc_flags
from cosattn.render import render
from cosattn.spec import KernelSpec

_KERNEL = re.compile(r"_Z(\d+)(\w+)")


@dataclass
class Kernel:
    """One ``__global__`` function."""

    registers: int = 0
    stack: int = 0
    spilled: int = 0
    """Bytes of spill stores and loads."""
    instructions: collections.Counter[str] = field(default_factory=collections.Counter)
    """Opcodes with their modifiers, for example ``HMMA.16816.F32.BF16``."""
    overtaking: list[str] = field(default_factory=list)
    """Arrivals at a barrier that are issued while matrices are still on their way from shared memory."""

    def count(self, opcode: str) -> int:
        """Instructions of an opcode, whatever the modifiers."""
        return sum(n for name, n in self.instructions.items() if name.split(".")[0] == opcode)


@dataclass
class Cubin:
    kernels: dict[str, Kernel]
    warnings: list[str]
    """What nvcc and ptxas warned of, spills and slow instruction sequences (C75xx) among it."""


def nvdisasm() -> Path | None:
    """The disassembler of the nvidia-cuda-nvdisasm wheel, else the one on PATH or of a toolkit."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
        found = [Path(str(file.locate())) for file in files if file.name == "nvdisasm"]
    except importlib.metadata.PackageNotFoundError:
        found = []
    found += [Path(path) for path in [shutil.which("nvdisasm")] if path]
    found += [toolkit.home / "bin" / "nvdisasm" for toolkit in toolchain.toolkits()]
    return next((path for path in found if path.is_file()), None)


def compile_spec(spec: KernelSpec, folder: Path) -> Cubin:
    """Compile a spec with the flags of a build. Raises ToolchainError without nvcc, AssertionError when nvcc fails."""
    arch = ARCHS[spec.arch]
    rendered = render(spec)
    source = folder / "kernel.cu"
    source.write_text(rendered.source)
    for name, text in rendered.headers.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return compile_source(source, arch)


def compile_source(source: Path, arch: Arch) -> Cubin:
    nvcc = toolchain.find(arch, torch.version.cuda).cuda_home / "bin" / "nvcc"
    target = source.with_suffix(".cubin")
    verbose = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    done = subprocess.run(
        [nvcc, *nvcc_flags(arch), *verbose, "-cubin", source, "-o", target], capture_output=True, text=True
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    cubin = Cubin({}, [line for line in log.splitlines() if "warning" in line or re.search(r"\(C75\d\d\)", line)])
    kernel = Kernel()
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = cubin.kernels.setdefault(_name(found[1]), Kernel())
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.stack, kernel.spilled = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(found[1])
    if (disassembler := nvdisasm()) is not None:
        _disassemble(disassembler, target, cubin)
    return cubin


# An instruction, and in the upper half of its encoding, on the next line, what it waits for.
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+\s+)?([A-Z][\w.]*).*?)\s*/\* 0x[0-9a-f]+ \*/\s+/\* (0x[0-9a-f]+) \*/",
    re.MULTILINE,
)


def _disassemble(disassembler: Path, target: Path, cubin: Cubin) -> None:
    text = subprocess.run([disassembler, "-c", "-hex", target], capture_output=True, text=True, check=True).stdout
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        found = _INSTRUCTION.findall(section)
        kernel = cubin.kernels[_name(section.split(",")[0])]
        kernel.instructions.update(opcode for _, opcode, _ in found)
        kernel.overtaking = overtaking([(instruction, int(upper, 16)) for instruction, _, upper in found])


def overtaking(instructions: list[tuple[str, int]]) -> list[str]:
    """Arrivals before which the matrices loaded last need not have come, as instructions lie one after another.

    An arrival does not wait for loads of its thread. Where it gives a tile back, the copy engine may overwrite what has
    been asked for and not read. Loads come in order, so it is enough that somebody waited for the last one: bits 46 to
    48 of an instruction's upper half are the counter that it holds until then, bits 52 to 57 those it waits for.
    """
    found, counter = [], None
    for text, upper in instructions:
        if counter is not None and upper >> 52 + counter & 1:
            counter = None
        if "LDSM" in text and (held := upper >> 46 & 7) < 6:
            counter = held
        elif "SYNCS.ARRIVE" in text and counter is not None:
            found.append(text)
        elif re.match(r"BRA `|EXIT|RET", text):
            counter = None
    return found


def _name(mangled: str) -> str:
    found = _KERNEL.match(mangled)
    return found[2][: int(found[1])] if found else mangled
