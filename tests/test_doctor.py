"""The doctor reports, and nothing on a broken machine makes it fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosattn import cache, doctor, env, host_build, toolchain

SECTIONS = ["system", "torch", "GPUs", "compiler", "kernel cache", "environment", "verdict"]


def test_text_has_every_section_and_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == SECTIONS
    text = "\n".join(lines)
    for name in (*env.VARIABLES, "nvcc", "ninja", "host compiler", "runs kernels", "builds kernels"):
        assert name in text
    assert "probe failed" not in text


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == SECTIONS
    assert report["system"]["cosattn"]


def test_every_probe_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("broken machine")

    monkeypatch.setattr(toolchain, "toolkits", broken)
    monkeypatch.setattr(toolchain, "find", broken)
    monkeypatch.setattr(cache, "configured_root", broken)
    report = doctor.examine()
    assert list(report) == SECTIONS
    for section in ("compiler", "kernel cache", "verdict"):
        assert report[section] == {"probe failed": "OSError: broken machine"}


def test_an_unusable_machine(tmp_path: Path) -> None:
    """No compiler, no home, a cache that is refused, a typing error: a full report and status 0."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    environment = {
        "PATH": "/nowhere",
        "CUDA_HOME": "/nowhere",
        "COSATTN_CACHE_DIR": str(shared),
        "COSATTN_CACHEDIR": "typing error",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "cosattn.doctor"], capture_output=True, text=True, check=False, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    assert "CUDA_HOME /nowhere: bin/nvcc is missing" in ran.stdout
    assert "can be changed by others" in ran.stdout
    assert "COSATTN_CACHEDIR: not a variable of cosattn" in ran.stdout
    assert "cannot compile a kernel for" in ran.stdout
    assert "probe failed" not in ran.stdout


@pytest.mark.parametrize(
    ("variable", "cuda", "found", "words"),
    [
        ("COSATTN_DISABLE_EXTENSION", "13.0", None, "switched off"),
        ("COSATTN_DISABLE_JIT", "13.0", None, "not built, and COSATTN_DISABLE_JIT is set"),
        ("COSATTN_DISABLE_JIT", "13.0", Path("/cache/host-1/kernel.so"), "built: /cache/host-1"),
        (None, "13.0", None, "the first call on a GPU builds it"),
        (None, None, None, "torch is a CPU build"),
    ],
)
def test_which_way_calls_take(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variable: str | None,
    cuda: str | None,
    found: Path | None,
    words: str,
) -> None:
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path))
    for name in ("COSATTN_DISABLE_EXTENSION", "COSATTN_DISABLE_JIT"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(host_build, "find", lambda: found)
    assert words in str(doctor.examine()["verdict"]["host extension"])


def test_two_toolkits_are_both_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kits = [toolchain.Toolkit("PATH", Path("/a"), "include/cuda_runtime.h is missing"),
            toolchain.Toolkit("pip", Path("/b"), None, (13, 0), "13.0.88")]  # fmt: skip
    monkeypatch.setattr(toolchain, "toolkits", lambda: kits)
    doctor.main([])
    out = capsys.readouterr().out
    assert "PATH /a: include/cuda_runtime.h is missing" in out
    assert "pip /b: nvcc 13.0.88" in out
