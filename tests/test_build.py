"""Just-in-time builds, with a real nvcc on a tiny kernel and with real processes that are killed, raced and starved."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_kernels
import pytest
import torch
from fake_kernels import SPEC

from cosattn import build, cache, toolchain
from cosattn.arch import ARCHS
from cosattn.errors import BuildError, CacheError, CosattnError, MissingKernelError, ToolchainError, UnsupportedError

fork = multiprocessing.get_context("fork")


def _real_cuda_home() -> Path | None:
    try:
        return toolchain.find(ARCHS["sm80"], torch.version.cuda).cuda_home
    except ToolchainError:
        return None


CUDA_HOME = _real_cuda_home()
needs_nvcc = pytest.mark.skipif(CUDA_HOME is None, reason="no CUDA compiler here")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, the tiny kernel, no memory of failures."""
    for name in ("COSATTN_PREBUILT_DIR", "COSATTN_DISABLE_JIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "cosattn.render", None)
    fake_kernels.install()
    build._failures.clear()
    cache._temporary_root.cache_clear()
    # Each test has its own fake kernels, so the index must not survive from one source to the next.
    monkeypatch.setattr(build, "_fingerprint", lambda: tmp_path.name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The real toolkit behind an nvcc that writes one line per compilation into the returned file."""
    assert CUDA_HOME is not None
    home, log = tmp_path / "counted-cuda", tmp_path / "nvcc.log"
    (home / "bin").mkdir(parents=True)
    for part in CUDA_HOME.iterdir():
        if part.name != "bin":
            (home / part.name).symlink_to(part)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo compiled >> "{log}" ;; esac\nexec "{CUDA_HOME}/bin/nvcc" "$@"\n'
    )
    nvcc.chmod(0o755)
    log.touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    return log


def value(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).cosattn_value())


def place() -> Path:
    (found,) = Path(os.environ["COSATTN_CACHE_DIR"]).glob("v*/*/sm80")
    return found


@needs_nvcc
def test_a_miss_compiles_and_a_hit_does_not(counted: Path) -> None:
    library = build.ensure(SPEC)
    assert value(library) == 1
    assert sorted(path.name for path in library.parent.iterdir()) == [
        "build.log",
        "include",
        "kernel.cu",
        "kernel.so",
        "manifest.json",
    ]
    manifest = json.loads((library.parent / "manifest.json").read_text())
    assert manifest["name"] == SPEC.name
    assert manifest["compiler"].startswith("nvcc ")
    assert "-gencode=arch=compute_80,code=sm_80" in (library.parent / "build.log").read_text()
    assert build.ensure(SPEC) == library == build.find(SPEC)
    assert counted.read_text() == "compiled\n"


@needs_nvcc
def test_a_kernel_depends_on_the_cuda_runtime_and_not_on_torch() -> None:
    library = build.ensure(SPEC)
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libcudart.so" in needed
    for name in ("torch", "c10"):
        assert f"lib{name}" not in needed


@needs_nvcc
def test_paths_with_spaces_and_the_word_arch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """cpp_extension drops its architecture flags when any flag holds "arch", so the path must not matter."""
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path / "my research"))
    library = build.ensure(SPEC)
    assert value(library) == 1
    assert b"sm_80" in library.read_bytes()


@needs_nvcc
def test_source_and_headers_decide_what_is_found(counted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.ensure(SPEC)
    fake_kernels.install(value=2)
    monkeypatch.setattr(build, "_fingerprint", lambda: "another")
    second = build.ensure(SPEC)
    assert (value(first), value(second)) == (1, 2)
    assert counted.read_text() == "compiled\n" * 2


def test_the_digest_covers_source_headers_and_flags() -> None:
    def digest(source: str, headers: dict[str, str], arch: str = "sm80") -> str:
        return build._digest(fake_kernels.Rendered(SPEC, source, headers), ARCHS[arch])

    digests = [
        digest("a", {"h": "b"}),
        digest("ab", {"h": ""}),
        digest("a", {"hb": ""}),
        digest("a", {"h": "c"}),
        digest("a", {}),
        digest("a", {"h": "b", "i": ""}),
        digest("a", {"h": "b"}, "sm90"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest("a", {"x": "1", "y": "2"}) == digest("a", {"y": "2", "x": "1"})


@needs_nvcc
def test_a_hit_needs_no_compiler_ninja_or_renderer(tmp_path: Path) -> None:
    library = build.ensure(SPEC)
    code = (
        "import subprocess, sys, time, torch\n"
        "def refuse(*a, **k): raise AssertionError('a hit started a process')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "sys.modules['cosattn.render'] = None\n"
        "from cosattn import build\n"
        f"build._fingerprint = lambda: {tmp_path.name!r}\n"
        "from cosattn.spec import KernelSpec\n"
        "began = time.perf_counter()\n"
        f"print(build.ensure({SPEC!r}))\n"
        "print(time.perf_counter() - began)\n"
        "assert 'torch.utils.cpp_extension' not in sys.modules and 'jinja2' not in sys.modules\n"
    )
    environment = {**os.environ, "PATH": "/nowhere", "CUDA_HOME": "/nowhere", "COSATTN_DISABLE_JIT": "1"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    path, seconds = ran.stdout.split("\n")[:2]
    assert path == str(library)
    assert float(seconds) < 0.1


def test_the_fingerprint_is_cheap_and_stable() -> None:
    code = (
        "import time, torch\nfrom cosattn import build\nbegan = time.perf_counter()\n"
        "print(build._fingerprint())\nprint(time.perf_counter() - began)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "ab"]
    (first, seconds), (second, _) = (run.stdout.split() for run in runs)
    assert first == second
    assert float(seconds) < 0.1


@needs_nvcc
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_broken_library_is_rebuilt_once_with_a_message(
    counted: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    library = build.ensure(SPEC)
    content = library.read_bytes()
    library.unlink()  # a new file: the old one is mapped into this process
    library.write_bytes(content[: len(content) // 2] if damage == "truncated" else os.urandom(len(content)))
    again = build.ensure(SPEC)
    assert again == library
    assert value(again) == 1
    assert counted.read_text() == "compiled\n" * 2
    (message,) = [record.message for record in caplog.records if "broken" in record.message]
    assert "set aside as .broken-" in message
    assert build.ensure(SPEC) == library
    assert counted.read_text() == "compiled\n" * 2


@needs_nvcc
def test_a_compiler_error_is_told_once_and_remembered(counted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels.install(fake_kernels.BAD)
    with pytest.raises(BuildError, match="this is not C") as caught:
        build.ensure(SPEC)
    log = place() / ".failed"
    (kept,) = log.glob("*/build.log")
    assert f"(log: {kept})" in str(caught.value)
    assert "this is not C++" in kept.read_text()
    assert (kept.parent / "kernel.cu").exists()
    with pytest.raises(BuildError) as again:
        build.ensure(SPEC)
    assert str(again.value) == str(caught.value)
    assert counted.read_text() == "compiled\n"
    fake_kernels.install()
    assert value(build.ensure(SPEC)) == 1, "another source is another key"


def _ensure_and_report(pipe) -> None:
    try:
        pipe.send(str(build.ensure(SPEC)))
    except CosattnError as error:
        pipe.send(error)


def race(count: int) -> list[object]:
    """What ``count`` processes get that ask for one cold kernel at the same time."""
    pairs = [fork.Pipe() for _ in range(count)]
    processes = [fork.Process(target=_ensure_and_report, args=(theirs,)) for _, theirs in pairs]
    for process in processes:
        process.start()
    answers = []
    for ours, _ in pairs:
        assert ours.poll(120), "a process got no answer"
        answers.append(ours.recv())
    for process in processes:
        process.join()
    return answers


@needs_nvcc
def test_32_processes_compile_once(counted: Path) -> None:
    answers = race(32)
    assert len(set(answers)) == 1
    assert value(Path(str(answers[0]))) == 1
    assert counted.read_text() == "compiled\n"


@needs_nvcc
def test_processes_that_waited_for_a_failed_build_do_not_repeat_it(counted: Path) -> None:
    fake_kernels.install(fake_kernels.BAD)
    answers = race(4)
    assert all(isinstance(answer, BuildError) and "this is not C" in str(answer) for answer in answers)
    assert counted.read_text() == "compiled\n"


@needs_nvcc
def test_kill_in_the_middle_of_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: Path) -> None:
    nvcc = Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"
    script = nvcc.read_text()
    started = tmp_path / "started"
    nvcc.write_text(script.replace("exec", f'case "$*" in *" -c "*) touch "{started}"; sleep 60 ;; esac\nexec'))
    _, theirs = fork.Pipe()
    process = fork.Process(target=_ensure_and_report, args=(theirs,))
    process.start()
    deadline = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    compilers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    for child in compilers.split():  # ninja, orphaned; nvcc's sleep ends by itself
        os.kill(int(child), signal.SIGKILL)
    assert [path.name[:7] for path in place().iterdir() if path.is_dir() and path.name != ".locks"] == [".build-"]
    assert build.find(SPEC) is None
    nvcc.write_text(script)
    began = time.monotonic()
    assert value(build.ensure(SPEC)) == 1
    assert time.monotonic() - began < 30
    assert not list(place().glob(".build-*"))


@needs_nvcc
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("size", ["16k", "64k"])
def test_a_full_disk_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.setenv("COSATTN_CACHE_DIR", str(small))
        with pytest.raises(CacheError, match=r"(?s)no space left for a kernel under .*Ways out:.*COSATTN_CACHE_DIR"):
            build.ensure(SPEC)
        assert not list(small.glob("v*/*/*/.build-*"))
        assert build.find(SPEC) is None
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        assert value(build.ensure(SPEC)) == 1, "with space again, the same process succeeds"
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@needs_nvcc
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a read-only file system needs root")
def test_a_read_only_home_still_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", home], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        monkeypatch.delenv("COSATTN_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(home))
        library = build.ensure(SPEC)
        assert value(library) == 1
        assert build.ensure(SPEC) == library
        (warning,) = [record.message for record in caplog.records]
        assert f"{home}/.cache/cosattn is not writable (Read-only file system)" in warning
    finally:
        subprocess.run(["umount", "-l", home], check=True)
        shutil.rmtree(cache._temporary_root())


def test_a_cache_that_others_can_write_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(CacheError, match="can be changed by others"):
        build.ensure(SPEC)


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"(?s)no usable nvcc.*Searched:.*Ways out:"):
        build.ensure(SPEC)
    assert not (tmp_path / "cache").exists(), "nothing is made before a build can start"


def test_an_unknown_architecture() -> None:
    with pytest.raises(UnsupportedError, match="no kernel for GPU architecture 'sm70': cosattn knows sm80,"):
        build.ensure(replace(SPEC, arch="sm70"))


def test_switched_off_a_miss_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSATTN_DISABLE_JIT", "1")
    with pytest.raises(MissingKernelError) as caught:
        build.ensure(SPEC)
    assert "COSATTN_DISABLE_JIT is set" in str(caught.value)
    assert str(caught.value).endswith(
        "Way out: python -m cosattn.warmup --arch sm80 --direction forward --dtype float16 --head-dim 64 "
        "--softmax bounded --causal no"
    )


def test_no_build_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        MissingKernelError, match=r"a CUDA graph is being captured.*\nWay out: python -m cosattn.warmup"
    ):
        build.ensure(SPEC)


@needs_nvcc
def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    build.ensure(SPEC)
    assert dict(os.environ) == before
