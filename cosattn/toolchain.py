"""Finds nvcc, the host compiler and ninja. The only code that probes for tools; nothing here runs on a cache hit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cosattn.arch import Arch
from cosattn.errors import ToolchainError

INSTALL = (
    'install a compiler from PyPI: pip install "cosattn[nvcc]" (or, by hand, "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]'
    '==<the CUDA version of your torch>": all five extras, since nvcc beside a newer nvvm fails)'
)
WAYS_OUT = (
    INSTALL,
    "install the CUDA toolkit and set CUDA_HOME to the folder that holds bin/nvcc and include/cuda_runtime.h",
    "build elsewhere with `python -m cosattn.warmup --arch ARCH --output DIR`, copy DIR here, set COSATTN_PREBUILT_DIR",
    "set COSATTN_FALLBACK=1 to use scaled_dot_product_attention on normalised inputs (slower)",
)


@dataclass(frozen=True, slots=True)
class Toolkit:
    """One place that was searched for a CUDA toolkit."""

    origin: str
    """Why it was looked at: ``CUDA_HOME``, ``pip``, ``PATH``, ``/usr/local``."""
    home: Path | None
    problem: str | None
    """None when it is a complete toolkit."""
    version: tuple[int, int] | None = None
    release: str = ""
    """Full release, for example ``13.0.88``."""

    def describe(self) -> str:
        where = "" if self.home is None else f" {self.home}"
        return f"{self.origin}{where}: {self.problem or 'nvcc ' + self.release}"


@dataclass(frozen=True, slots=True)
class Toolchain:
    """Everything a build needs, by absolute path."""

    cuda_home: Path
    cuda_version: tuple[int, int]
    cuda_release: str
    cudart: Path
    """The shared CUDA runtime library that kernels are linked with."""
    cxx: Path
    cxx_version: str
    ninja: Path

    @property
    def identity(self) -> str:
        """What is recorded with each kernel: the versions of the compilers that made it."""
        return f"nvcc {self.cuda_release}; {self.cxx_version}"


def toolkits() -> list[Toolkit]:
    """Every CUDA toolkit within reach, best first. ``CUDA_HOME``, else ``CUDA_PATH``, when set, is the only one."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            return [_examine(variable, Path(value))]
    return [_examine(origin, home) for origin, home in _homes()]


def find(arch: Arch, torch_cuda: str | None) -> Toolchain:
    """The toolchain that builds for ``arch``.

    ``torch_cuda`` is ``torch.version.cuda``. A kernel shares the CUDA runtime library with torch, so the major
    versions must agree; with a CPU build of torch (None) any will do.

    Raises ToolchainError: lists what was searched, what was found, and the ways out.
    """
    candidates = toolkits()
    problems = [_unfit(toolkit, arch, torch_cuda) for toolkit in candidates]
    chosen = next((toolkit for toolkit, problem in zip(candidates, problems, strict=True) if problem is None), None)
    cxx, cxx_problem = host_compiler()
    ninja, ninja_problem = find_ninja()
    if chosen is None or cxx is None or ninja is None:
        missing = [
            name for name, got in (("nvcc", chosen), ("host C++ compiler", cxx), ("ninja", ninja)) if got is None
        ]
        lines = [f"cannot compile a kernel for {arch.name}: no usable {', no usable '.join(missing)}.", "Searched:"]
        for toolkit, problem in zip(candidates, problems, strict=True):
            lines.append(f"  - {toolkit.describe()}" + (f" ({problem})" if problem and not toolkit.problem else ""))
        if not candidates:
            lines.append("  - nvcc: CUDA_HOME, CUDA_PATH, pip's nvidia packages, PATH, /usr/local/cuda*: nothing there")
        lines.append(f"  - host compiler: {cxx_problem or cxx}")
        lines.append(f"  - ninja: {ninja_problem or ninja}")
        lines.append("Ways out:")
        lines.extend(f"  - {way}" for way in _ways_out(chosen, cxx, ninja))
        raise ToolchainError("\n".join(lines))
    assert chosen.home is not None
    assert chosen.version is not None
    return Toolchain(chosen.home, chosen.version, chosen.release, _cudart(chosen.home), cxx, identify(cxx), ninja)


def host_compiler() -> tuple[Path | None, str | None]:
    """(path, None) of the C++ compiler, or (None, what was searched)."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return Path(found), None
    return None, f"{' / '.join(names)} not found on PATH (Debian, Ubuntu: apt install g++)"


def find_ninja() -> tuple[Path | None, str | None]:
    """(path, None) of ninja, or (None, what was searched).

    The pip package is looked at first: its folder is not on PATH when Python is called by path from a virtual
    environment that is not activated.
    """
    # The package's record of its files holds also where ninja.BIN_DIR is empty: in a virtual environment that sees the
    # packages of the Python it was made from.
    try:
        files = importlib.metadata.files("ninja") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        program = Path(str(file.locate())).resolve()
        if file.name == "ninja" and os.access(program, os.X_OK) and program.is_file():
            return program, None
    if found := shutil.which("ninja"):
        return Path(found), None
    return None, "neither the pip package nor a program on PATH (pip install ninja)"


def _homes() -> Iterator[tuple[str, Path]]:
    """Places that may hold a toolkit, each real folder once."""
    seen: set[Path] = set()
    for origin, home in _guesses():
        real = home.resolve()
        if real not in seen and (real / "bin" / "nvcc").exists():
            seen.add(real)
            yield origin, real


def _guesses() -> Iterator[tuple[str, Path]]:
    # pip's comes first: whoever installed a compiler beside torch got the version that fits it.
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for home in sorted(Path(folder).glob("cu[0-9]*"), key=_version_in_name, reverse=True):
            yield "pip", home
    if on_path := shutil.which("nvcc"):
        yield "PATH", Path(on_path).resolve().parent.parent
    yield "/usr/local", Path("/usr/local/cuda")
    for home in sorted(Path("/usr/local").glob("cuda-*"), key=_version_in_name, reverse=True):
        yield "/usr/local", home


def _version_in_name(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _examine(origin: str, home: Path) -> Toolkit:
    """A toolkit is bin/nvcc *and* the headers: a wrapper script in /usr/local/bin makes /usr/local look like one."""
    for part in ("bin/nvcc", "include/cuda_runtime.h"):
        if not (home / part).exists():
            return Toolkit(origin, home, f"{part} is missing")
    try:
        version, release = _nvcc_version(home / "bin" / "nvcc")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Toolkit(origin, home, f"bin/nvcc does not run: {error}")
    try:
        _cudart(home)
    except FileNotFoundError as error:
        return Toolkit(origin, home, str(error), version, release)
    return Toolkit(origin, home, None, version, release)


@cache
def _nvcc_version(nvcc: Path) -> tuple[tuple[int, int], str]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"release (\d+)\.(\d+)(?:, V([\d.]+))?", text)
    if found is None:
        raise ValueError(f"no release in the output of --version: {text[-200:]!r}")
    return (int(found[1]), int(found[2])), found[3] or f"{found[1]}.{found[2]}"


def _cudart(home: Path) -> Path:
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        libraries = sorted((home / folder).glob("libcudart.so*"), key=lambda path: len(path.name))
        if libraries:
            return libraries[0]
    raise FileNotFoundError("lib64/libcudart.so is missing")


def _unfit(toolkit: Toolkit, arch: Arch, torch_cuda: str | None) -> str | None:
    """Why a toolkit can not build for ``arch`` beside this torch, None when it can."""
    if toolkit.problem is not None:
        return toolkit.problem
    assert toolkit.version is not None
    if toolkit.version < arch.minimum_cuda:
        return f"{arch.name} needs CUDA {arch.minimum_cuda[0]}.{arch.minimum_cuda[1]} or newer"
    if torch_cuda is not None and toolkit.version[0] != int(torch_cuda.split(".")[0]):
        return f"torch brings CUDA {torch_cuda}: the major versions must agree"
    return None


def _ways_out(toolkit: Toolkit | None, cxx: Path | None, ninja: Path | None) -> list[str]:
    ways = list(WAYS_OUT) if toolkit is None else list(WAYS_OUT[2:])
    if toolkit is None and (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        ways.insert(0, "unset CUDA_HOME and CUDA_PATH to have every usual place searched")
    if cxx is None:
        ways.insert(0, "install g++ (Debian, Ubuntu: apt install g++) or set CXX")
    if ninja is None:
        ways.insert(0, "pip install ninja")
    return ways


@cache
def identify(program: Path) -> str:
    """The first line a compiler says of itself."""
    run = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=60)
    return (run.stdout or run.stderr).partition("\n")[0].strip()
