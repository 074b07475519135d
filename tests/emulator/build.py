"""Rendered source -> shared library for the emulator, one compilation per distinct source."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPLACED = ("ptx.cuh", "launch.cuh", "hopper.cuh", "tensor_map.cuh", "wgmma.cuh")
"""Headers of the kernels that the emulator brings its own version of."""

_COMPILER = os.environ.get("CXX", "g++")
_COMMON = ["-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", f"-I{HERE / 'include'}"]
_MACHINE = [*_COMMON, "-O3", "-march=native", "-Wall", "-Wextra", "-shared"]
_KERNEL = [
    *_COMMON,
    "-O1",
    "-g1",
    "-fsanitize=thread",  # every load and store calls the machine; the sanitizer's own runtime is not linked
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    "-include",
    "cuda_runtime.h",
]


class CompileError(AssertionError):
    """The host compiler refused the source."""


def cache_directory() -> Path:
    """Where libraries are kept; names are content digests, so it may outlive a test session."""
    path = Path(os.environ.get("COSATTN_EMULATOR_CACHE", f"{tempfile.gettempdir()}/cosattn-emulator-{os.getuid()}"))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def library(source: str, headers: Mapping[str, str] | None = None) -> Path:
    """Compile one ``.cu`` source with the headers it includes (relative name -> text)."""
    emulator = {path.name: path.read_text() for path in sorted((HERE / "include").iterdir())}
    headers = replaced(headers or {})
    machine = machine_library()
    digest = _digest(source, sorted(headers.items()), emulator, machine.name, _KERNEL)
    target = cache_directory() / f"{digest}.so"
    if target.exists():
        return target
    # In a folder of its own: other processes may be at the same source.
    with tempfile.TemporaryDirectory(dir=cache_directory()) as name:
        folder = Path(name)
        for header, text in headers.items():
            path = folder / header
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        kernel, object_file, private = (folder / file for file in ("kernel.cpp", "kernel.o", "kernel.so"))
        kernel.write_text(source)
        _compile([*_KERNEL, f"-I{folder}", "-c", str(kernel), "-o", str(object_file)])
        # Linked without -fsanitize=thread: the machine defines what the instrumentation calls.
        link = ["-shared", "-Wl,--no-undefined", f"-Wl,-rpath,{machine.parent}", str(object_file), str(machine)]
        _compile([*link, "-o", str(private)])
        private.replace(target)
    return target


def replaced(headers: Mapping[str, str]) -> dict[str, str]:
    """A kernel's headers (relative name -> text) with the emulator's own in the place of those it replaces."""
    own = {path.name: path.read_text() for path in (HERE / "include").iterdir() if path.name in REPLACED}
    return {
        name: _rendered_products(text) + own[Path(name).name] if Path(name).name in own else text
        for name, text in headers.items()
    }


def machine_library() -> Path:
    """The emulated machine: one library, which every kernel of a process shares."""
    sources = sorted(HERE.glob("machine*.cpp"))
    headers = sorted([*HERE.glob("machine*.h"), *HERE.glob("include/machine*.h")])
    digest = _digest([path.read_text() for path in [*sources, *headers]], _MACHINE)
    target = cache_directory() / f"machine-{digest}.so"
    if not target.exists():
        private = target.with_suffix(f".{os.getpid()}")
        _compile([*_MACHINE, *map(str, sources), f"-Wl,-soname,{target.name}", "-ldl", "-o", str(private)])
        private.replace(target)
    return target


def _rendered_products(header: str) -> str:
    """What the emulator's wgmma.cuh is told of the rendered one: the shapes and the element type of its products."""
    shapes = sorted({int(columns) for columns in re.findall(r"m64n(\d+)k16", header)})
    elements = set(re.findall(r"k16\.f32\.(\w+)\.", header))
    if not shapes:
        return ""
    (element,) = elements
    columns = ", ".join(map(str, shapes))
    return f"#define EMULATOR_WGMMA_COLUMNS {columns}\n#define EMULATOR_WGMMA_ELEMENT {element}\n"


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((_COMPILER, parts)).encode()).hexdigest()[:24]


def _compile(arguments: list[str]) -> None:
    done = subprocess.run([_COMPILER, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{_COMPILER} {' '.join(arguments)}\n{done.stderr}")
