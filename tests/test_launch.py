"""Loading and calling built kernels, with a library that only records."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from pathlib import Path

import pytest
from emulated_kernel import compile_recorder

from cosattn import abi, build, launch
from cosattn.errors import LaunchError
from cosattn.spec import KernelSpec

SPEC = KernelSpec("forward", "sm90", "bfloat16", 64, 64)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_recorder(tmp_path_factory.mktemp("kernel"), SPEC.name)


def test_a_launch_hands_over_both_structs_and_the_stream(library: Path) -> None:
    kernel = launch.Kernel(SPEC, library)
    pointers = launch.pack_pointers(*range(1, 1 + len(abi.POINTERS)))
    problem = launch.pack_problem(*(7 * i - 2**40 for i in range(len(abi.INTEGERS))), 8.25)
    kernel(pointers, problem, 0xABC)
    recorded = ctypes.CDLL(str(library))
    for function in (recorded.recorded_pointers, recorded.recorded_problem, recorded.recorded_stream):
        function.restype = ctypes.c_void_p
    assert ctypes.string_at(recorded.recorded_pointers(), len(pointers)) == pointers
    assert ctypes.string_at(recorded.recorded_problem(), len(problem)) == problem
    assert recorded.recorded_stream() == 0xABC
    assert kernel.workspace_bytes(struct.pack("q", 2**40) + problem[8:]) == 2**40


def test_a_refused_launch_says_what_cuda_said(library: Path) -> None:
    kernel = launch.Kernel(SPEC, library)
    problem = launch.pack_problem(*(0 for _ in abi.INTEGERS), 0.0)
    code = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "code")
    code.value = 2
    try:
        with pytest.raises(LaunchError, match=rf"{SPEC.name}: out of memory \(cudaError 2\)"):
            kernel(launch.pack_pointers(*(0 for _ in abi.POINTERS)), problem, 0)
    finally:
        code.value = 0


def test_a_negative_workspace_is_an_error(library: Path) -> None:
    with pytest.raises(LaunchError, match="refuses this problem"):
        launch.Kernel(SPEC, library).workspace_bytes(launch.pack_problem(-1, *(0 for _ in abi.INTEGERS[1:]), 0.0))


def test_another_kernel_or_another_contract_is_refused(library: Path, tmp_path: Path) -> None:
    other = KernelSpec("forward", "sm90", "float16", 64, 64)
    with pytest.raises(LaunchError, match=f"expected {other.name}"):
        launch.Kernel(other, library)
    with pytest.raises(LaunchError, match=f"12 bytes of arguments; expected .* with {launch.ABI_BYTES}"):
        launch.Kernel(SPEC, compile_recorder(tmp_path, SPEC.name, abi_bytes=12))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x7fELF truncated"])
def test_a_file_that_is_no_library_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "kernel.so"
    path.write_bytes(content)
    with pytest.raises(LaunchError, match="can not be loaded"):
        launch.Kernel(SPEC, path)


def test_threads_that_ask_at_once_share_one_load(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ensure(spec: KernelSpec) -> Path:
        asked.append(spec)
        return library

    monkeypatch.setattr(build, "ensure", ensure)
    monkeypatch.setattr(launch, "_kernels", {})
    found: list[launch.Kernel] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.append(launch.kernel(SPEC))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [SPEC]
    assert len(found) == 8
    assert len({id(kernel) for kernel in found}) == 1


def test_the_struct_of_the_kernels_has_the_fields_of_abi() -> None:
    """One field order in two languages."""
    header = Path(__file__).parents[1] / "kernels_templates" / "include" / "params.cuh"
    text = header.read_text()
    pointers = text.partition("struct Pointers {")[2].partition("}")[0]
    names = [line.partition(";")[0].split()[-1] for line in pointers.splitlines() if ";" in line]
    assert tuple(names) == abi.POINTERS
    problem = text.partition("struct Problem {")[2].partition("}")[0]
    fields: list[str] = []
    for line in (line.strip() for line in problem.splitlines() if ";" in line):
        kind, _, declared = line.partition(";")[0].partition(" ")
        for name in declared.replace(" ", "").split(","):
            fields += [f"{name}_{axis}" for axis in "bhs"] if kind == "Stride" else [name]
    assert tuple(fields) == (*abi.INTEGERS, *abi.DOUBLES)


def test_the_struct_of_the_host_extension_has_the_fields_of_abi() -> None:
    text = (Path(launch.__file__).parent / "host.cpp").read_text()
    pointers = text.partition("struct Pointers {")[2].partition("}")[0]
    names = re.findall(r"(\w+)(?: = \w+)?[,;]", pointers)
    assert tuple(names) == abi.POINTERS
