"""The wheel holds the package, its type marker and every kernel template; an installed copy renders from it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what a source distribution holds, so that nothing is written into the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("cosattn", "kernels_templates"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_code_templates_and_type_marker(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {f"cosattn/{path.name}" for path in (ROOT / "cosattn").glob("*.py")}
    templates = {
        f"cosattn/_kernels_templates/{path.relative_to(ROOT / 'kernels_templates')}"
        for path in (ROOT / "kernels_templates").rglob("*")
        if path.is_file()
    }
    assert any(name.endswith(".cu.jinja") for name in templates)
    assert any(name.endswith(".cuh") for name in templates)
    assert names == code | templates | {"cosattn/py.typed", "cosattn/host.cpp"}


def test_the_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
    assert "Name: cosattn" in lines
    assert "Requires-Python: >=3.10" in lines
    assert "License-Expression: MIT" in lines
    required = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(required) == [f"Requires-Dist: {name}" for name in ("einops", "jinja2", "ninja", "torch>=2.10")]


def test_an_installed_copy_renders_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import cosattn.render as r, cosattn.spec as s\n"
        "assert r.templates_directory().name == '_kernels_templates', r.templates_directory()\n"
        "print(r.render(s.KernelSpec('forward', 'sm80', 'float16', 64, 64)).source)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "forward_sm80_f16_d64" in ran.stdout
