"""The warmup command: selection, the command printed for a kernel, running with and without a pool, its outputs."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_kernels
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosattn import build, cache, host_build, selection, tiles_split, toolchain, warmup
from cosattn.arch import ARCHS
from cosattn.errors import ToolchainError
from cosattn.families import sized
from cosattn.spec import DIRECTIONS, DTYPES, HEAD_DIMS, SOFTMAX_MODES, KernelSpec


def _has_compiler() -> bool:
    try:
        toolchain.find(ARCHS["sm80"], torch.version.cuda)
    except ToolchainError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _has_compiler(), reason="no CUDA compiler here")
ONE = ["--arch", "sm80", "--direction", "forward", "--dtype", "float16", "--causal", "no"]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache and the tiny kernel; returns the cache's root."""
    for name in ("COSATTN_PREBUILT_DIR", "COSATTN_DISABLE_JIT", "COSATTN_JOBS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "cosattn.render", None)
    fake_kernels.install()
    build._failures.clear()
    monkeypatch.setattr(build, "_fingerprint", lambda: tmp_path.name)
    monkeypatch.setattr(warmup.support, "reasons", lambda spec: [])
    return tmp_path / "cache"


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    selection.add_arguments(parser)
    return parser.parse_args(arguments)


@st.composite
def kernel_specs(draw: st.DrawFn) -> KernelSpec:
    direction = draw(st.sampled_from(DIRECTIONS))
    backward = direction == "backward"
    bias = draw(st.none() | st.sampled_from(DTYPES))
    l2norm = draw(st.booleans())
    spec = KernelSpec(
        direction=direction,
        arch=draw(st.sampled_from(sorted(ARCHS))),
        dtype=draw(st.sampled_from(DTYPES)),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        value_dim=draw(st.sampled_from(HEAD_DIMS)),
        groups=draw(st.sampled_from([1, 2, 8])) if l2norm else 1,
        l2norm=l2norm,
        causal=draw(st.booleans()),
        mask=draw(st.booleans()),
        pair_mask=draw(st.booleans()),
        bias=bias,
        softmax=draw(st.sampled_from(SOFTMAX_MODES)),
        deterministic=backward and draw(st.booleans()),
        bias_grad=backward and bias is not None and draw(st.booleans()),
    )
    splits = [rows for rows in tiles_split.ROWS if tiles_split.serves(replace(spec, split=rows))]
    return replace(spec, split=draw(st.sampled_from([0, *splits])))


@given(kernel_specs())
def test_the_command_for_a_kernel_selects_exactly_that_kernel(spec: KernelSpec) -> None:
    words = shlex.split(selection.command_for(spec))
    assert words[:3] == ["python", "-m", "cosattn.warmup"]
    options = parse(*words[3:])
    assert selection.specs(options, options.arch) == [spec]


def test_several_values_select_every_combination() -> None:
    options = parse(
        *("--dtype", "float16", "float32", "--head-dim", "32", "64", "--causal", "both", "--mask", "--short", "0")
    )
    found = selection.specs(options, ["sm80", "sm90"])
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 2 * 2
    assert all(spec.mask for spec in found)


def test_all_lengths_above_those_of_the_short_kernels_are_built() -> None:
    for head_dim, causal in ((32, "yes"), (64, "no"), (96, "yes"), (128, "yes")):
        options = parse("--dtype", "bfloat16", "--head-dim", str(head_dim), "--causal", causal)
        found = selection.specs(options, ["sm90"])
        for spec in [spec for spec in found if not spec.short]:
            for length in (257, 512, 513, 1024, 1025, 4096):
                assert sized(spec, length, length, heads=1024) in found
    options = parse("--dtype", "bfloat16", "--head-dim", "64")
    assert not any(spec.short for spec in selection.specs(options, ["sm80"]))


def test_what_names_no_kernel_collapses() -> None:
    options = parse("--deterministic", "both", "--bias-grad", "both", "--causal", "no", "--dtype", "float16")
    found = selection.specs(options, ["sm80"])
    assert [(spec.direction, spec.deterministic, spec.bias_grad) for spec in found] == [
        ("forward", False, False),
        ("backward", False, False),
        ("backward", True, False),
    ]


def test_a_bias_means_the_online_softmax_unless_asked() -> None:
    (forward, *_) = selection.specs(parse("--bias", "float32"), ["sm80"])
    assert forward.softmax == "online"
    (forward, *_) = selection.specs(parse("--bias", "float32", "--softmax", "bounded"), ["sm80"])
    assert forward.softmax == "bounded"


@pytest.mark.parametrize("arguments", [["--head-dim", "12"], ["--arch", "sm70"], ["--dtype", "int8"], ["--jobs", "0"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        warmup.main(arguments)
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_an_architecture_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        warmup.main([])
    assert "give --arch (sm80, " in capsys.readouterr().err


@needs_nvcc
def test_compiled_then_cached(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warmup.main([*ONE, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("1 missing")
    assert warmup.main(ONE) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("1 compiled in ")
    assert captured.err.startswith("[1/1] compiled ")
    assert captured.err.rstrip().endswith("forward_sm80_f16_d64")
    assert warmup.main([*ONE, "--json"]) == 0
    (kernel,) = json.loads(capsys.readouterr().out)["kernels"]
    assert kernel["status"] == "cached"
    assert Path(kernel["path"]).is_relative_to(fresh)
    assert warmup.main(["--list"]) == 0
    assert capsys.readouterr().out.endswith(f"1 kernels in {fresh}\n")
    assert warmup.main(["--list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"][0]["name"] == "forward_sm80_f16_d64"


@needs_nvcc
def test_a_failure_is_status_1_with_the_logs_path(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_kernels.install(fake_kernels.BAD)
    assert warmup.main(ONE) == 1
    captured = capsys.readouterr()
    (log,) = fresh.glob("v*/*/*/.failed/*/build.log")
    assert f"(log: {log})" in captured.err
    assert captured.out.startswith("1 failed in ")


@needs_nvcc
def test_a_folder_for_machines_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    assert warmup.main([*ONE, "--output", str(output)]) == 0
    assert f"kernels copied to {output}" in capsys.readouterr().out
    moved = output.rename(tmp_path / "moved")
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path / "unused"))
    monkeypatch.setenv("COSATTN_PREBUILT_DIR", str(moved))
    monkeypatch.setenv("COSATTN_DISABLE_JIT", "1")
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.ensure(fake_kernels.SPEC).is_relative_to(moved)
    assert not (tmp_path / "unused").exists()


def test_asked_for_on_the_command_line_the_switch_does_not_count(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSATTN_DISABLE_JIT", "1")
    built = []
    monkeypatch.setattr(build, "ensure", lambda spec: built.append(os.environ.get("COSATTN_DISABLE_JIT")) or "path")
    assert warmup.main(ONE) == 0
    assert built == [None]


@pytest.mark.parametrize(("jobs", "way_out"), [("1", False), ("2", False), ("1", True)])
def test_the_host_extension_is_built_where_torch_has_cuda(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], jobs: str, way_out: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("COSATTN_DISABLE_EXTENSION", "1" if way_out else "0")
    tasks = warmup._tasks([fake_kernels.SPEC], dry_run=False)
    assert list(tasks) == ([] if way_out else ["host"]) + ["forward_sm80_f16_d64"]
    assert warmup.main([*ONE, "--dry-run", "--jobs", jobs]) == 0
    assert capsys.readouterr().out.startswith("1 missing" if way_out else "2 missing")
    if way_out:
        return

    def fail() -> Path:
        raise ToolchainError("no compiler")

    monkeypatch.setattr(build, "find", lambda spec: Path("/kernel.so"))
    monkeypatch.setattr(host_build, "ensure", fail)
    if jobs == "1":  # a pool has its own modules
        assert warmup.main([*ONE, "--jobs", jobs]) == 1
        captured = capsys.readouterr()
        assert "FAILED host\nno compiler" in captured.err
        assert captured.out.startswith("1 cached, 1 failed")


def test_what_is_not_supported_is_said(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warmup.support, "reasons", lambda spec: ["too wide", "too deep"])
    assert warmup.main(ONE) == 1
    assert "not supported: forward_sm80_f16_d64: too wide; too deep" in capsys.readouterr().err


def test_prune(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fresh / "v0.0.0").mkdir(parents=True)
    fresh.chmod(0o700)
    assert warmup.main(["--prune"]) == 0
    assert capsys.readouterr().out == f"removed {fresh / 'v0.0.0'}\n1 removed\n"


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(warmup, "_available_memory", lambda: 7 << 30)
    for name in ("COSATTN_JOBS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    assert warmup.default_jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "5")
    assert warmup.default_jobs() == 5
    monkeypatch.setenv("COSATTN_JOBS", "7")
    assert warmup.default_jobs() == 7


def test_the_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 0

    stream = Terminal()
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((100, 24)))
    bar = warmup.Progress(2, stream)
    bar.advance(warmup.Result("one", "compiled", 1.5))
    bar.advance(warmup.Result("two", "cached", 0.0))
    bar.close()
    first, second = stream.getvalue().split("\r\033[K")[1:]
    assert first.startswith("[############............] 1/2 ")
    assert second.startswith("[########################] 2/2    0 s left  cached      0.0 s  two")


@needs_nvcc
@pytest.mark.slow
def test_real_kernels_in_parallel_without_a_gpu(tmp_path: Path) -> None:
    """The command as a user runs it, on the real templates, with two build processes."""
    command = [sys.executable, "-m", "cosattn.warmup", *ONE, "--head-dim", "32", "64", "--jobs", "2", "--json"]
    environment = {**os.environ, "COSATTN_CACHE_DIR": str(tmp_path / "cache")}
    for status in ("compiled", "cached"):
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert ran.returncode == 0, ran.stderr
        kernels = json.loads(ran.stdout)["kernels"]
        assert [(kernel["name"], kernel["status"]) for kernel in kernels] == [
            ("forward_sm80_f16_d32", status),
            ("forward_sm80_f16_d64", status),
        ]
    assert len(cache.manifests(tmp_path / "cache")) == 2
