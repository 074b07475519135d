"""Finding tools: what counts as a toolkit, which one is chosen, and the one error when there is none."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from cosattn import toolchain
from cosattn.arch import ARCHS
from cosattn.errors import ToolchainError

SM80, SM90 = ARCHS["sm80"], ARCHS["sm90"]


def make_toolkit(home: Path, release: str = "13.0", *, headers: bool = True, runtime: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit; its nvcc only knows its version."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    if headers:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").touch()
    if runtime:
        (home / "lib").mkdir()
        (home / "lib" / f"libcudart.so.{release.split('.')[0]}").touch()
    return home


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_toolkits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with a host compiler and no nvcc, and nothing in the usual places. Returns the PATH's folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("c++", "ninja"):
        (folder / name).write_text("#!/bin/sh\necho fake 1.0\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    guesses = toolchain._guesses
    usual = (Path("/usr/local"), Path(sys.prefix))
    monkeypatch.setattr(
        toolchain, "_guesses", lambda: [g for g in guesses() if not any(g[1].is_relative_to(path) for path in usual)]
    )
    return folder


def test_cuda_home_is_the_only_place_when_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "a", "12.9")))
    monkeypatch.setenv("CUDA_PATH", str(make_toolkit(tmp_path / "b")))
    (toolkit,) = toolchain.toolkits()
    assert (toolkit.home, toolkit.version, toolkit.release) == (tmp_path / "a", (12, 9), "12.9.88")


def test_cuda_path_serves_without_cuda_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_PATH", str(make_toolkit(tmp_path / "b")))
    assert toolchain.find(SM90, None).cuda_home == tmp_path / "b"


def test_a_link_on_path_leads_to_the_toolkit(no_toolkits: Path, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "cuda-13.0")
    (no_toolkits / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert toolchain.find(SM90, None).cuda_home == home


def test_a_wrapper_script_is_no_toolkit(no_toolkits: Path, tmp_path: Path) -> None:
    shutil.copy(make_toolkit(tmp_path / "real") / "bin" / "nvcc", no_toolkits / "nvcc")
    with pytest.raises(ToolchainError, match=r"PATH .*: include/cuda_runtime\.h is missing"):
        toolchain.find(SM90, None)


def test_the_toolkit_from_pip_is_found(no_toolkits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_toolkit(tmp_path / "site" / "nvidia" / "cu13")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    tools = toolchain.find(SM90, "13.0")
    assert tools.cuda_home == home
    assert tools.cudart == home / "lib" / "libcudart.so.13"


def test_nothing_found_is_one_error_with_ways_out(no_toolkits: Path) -> None:
    with pytest.raises(ToolchainError) as caught:
        toolchain.find(SM90, None)
    text = str(caught.value)
    assert text.startswith("cannot compile a kernel for sm90: no usable nvcc.")
    for part in ("CUDA_HOME", "pip", "PATH", "/usr/local/cuda", str(no_toolkits / "c++"), "ninja"):
        assert part in text, part
    for way in toolchain.WAYS_OUT:
        assert f"  - {way}" in text
    assert "cuda-toolkit[nvcc,crt,nvvm,cccl,cudart]" in text


def test_everything_missing_is_still_one_error(no_toolkits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.importlib.metadata, "files", lambda name: None)
    for name in ("c++", "ninja"):
        (no_toolkits / name).unlink()
    with pytest.raises(ToolchainError) as caught:
        toolchain.find(SM90, None)
    text = str(caught.value)
    assert "no usable nvcc, no usable host C++ compiler, no usable ninja" in text
    assert "c++ / g++ / clang++ not found on PATH" in text
    assert "apt install g++" in text
    assert "pip install ninja" in text


def test_an_explicit_home_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ToolchainError) as caught:
        toolchain.find(SM90, None)
    assert f"CUDA_HOME {tmp_path}: bin/nvcc is missing" in str(caught.value)
    assert "unset CUDA_HOME" in str(caught.value)


def test_nvcc_too_old_for_the_architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "old", "11.8")))
    assert toolchain.find(SM80, None).cuda_version == (11, 8)
    with pytest.raises(ToolchainError, match=r"nvcc 11\.8\.88 \(sm90 needs CUDA 12\.0 or newer\)"):
        toolchain.find(SM90, None)


def test_pip_comes_first_and_a_newer_toolkit_is_chosen_where_needed(
    no_toolkits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = make_toolkit(tmp_path / "new", "13.0")
    (no_toolkits / "nvcc").symlink_to(new / "bin" / "nvcc")
    old = make_toolkit(tmp_path / "site" / "nvidia" / "cu11", "11.8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert toolchain.find(SM80, None).cuda_home == old
    assert toolchain.find(SM90, None).cuda_home == new


def test_the_major_version_must_be_torchs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "new", "13.0")))
    assert toolchain.find(SM90, "13.2").cuda_version == (13, 0)
    with pytest.raises(ToolchainError, match=r"torch brings CUDA 12\.8: the major versions must agree"):
        toolchain.find(SM90, "12.8")


def test_an_nvcc_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "broken")
    (home / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    monkeypatch.setenv("CUDA_HOME", str(home))
    with pytest.raises(ToolchainError, match="bin/nvcc does not run"):
        toolchain.find(SM90, None)


def test_a_toolkit_without_the_runtime_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "half", runtime=False)))
    with pytest.raises(ToolchainError, match=r"libcudart\.so is missing"):
        toolchain.find(SM90, None)


def test_the_users_compiler_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "my-c++"
    own.write_text("#!/bin/sh\necho mine 9.9\n")
    own.chmod(0o755)
    monkeypatch.setenv("CXX", str(own))
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda")))
    assert toolchain.find(SM90, None).identity == "nvcc 13.0.88; mine 9.9"
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(ToolchainError, match="no usable host C\\+\\+ compiler"):
        toolchain.find(SM90, None)


def test_ninja_from_pip_needs_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    program, problem = toolchain.find_ninja()
    assert program is not None, problem
    assert os.access(program, os.X_OK)
