"""The package's imports: arrows go one way, and importing it starts no CUDA and no compiler."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cosattn

PACKAGE = Path(cosattn.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(module: str) -> set[str]:
    """The modules of the package that one of them imports when it runs, wherever in the file; not those for types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom) and node.module == "cosattn":
            found.update(name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cosattn."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(name.name.split(".")[1] for name in node.names if name.name.startswith("cosattn."))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((PACKAGE / f"{module}.py").read_text()))
    return found


GRAPH = {module: imports(module) for module in MODULES}


def reachable(module: str) -> set[str]:
    seen: set[str] = set()
    pending = [module]
    while pending:
        for target in GRAPH[pending.pop()] - seen:
            seen.add(target)
            pending.append(target)
    return seen


def test_the_graph_is_read() -> None:
    assert {"cache", "toolchain", "spec"} <= GRAPH["build"]
    assert "render" in GRAPH["build"], "imports inside functions count"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_itself_through_others(module: str) -> None:
    assert module not in reachable(module)


PIPELINE = ["functional", "ops", "launch", "build", "render", "tiles", "spec"]


def test_the_pipeline_goes_one_way() -> None:
    for later, earlier in [(b, a) for i, a in enumerate(PIPELINE) for b in PIPELINE[i + 1 :]]:
        assert earlier not in reachable(later), f"{later} must not need {earlier}"


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("errors", set()),
        ("arch", set()),
        ("abi", set()),
        ("_version", set()),
        ("env", {"errors"}),
        ("spec", set()),
        ("reference", {"errors"}),
        ("cpu", {"errors", "reference"}),
        ("toolchain", {"arch", "errors"}),
        ("cache", {"_version", "env", "errors"}),
    ],
)
def test_the_ground_floor(module: str, allowed: set[str]) -> None:
    assert reachable(module) <= allowed


def run(code: str) -> str:
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_importing_starts_no_cuda_no_compiler_no_template_engine() -> None:
    out = run(
        "import subprocess, sys\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "def refuse(*a, **k): raise AssertionError('the import started a process')\n"
        "subprocess.Popen.__init__ = refuse\n"
        "import cosattn\n"
        "for name in cosattn.__all__: getattr(cosattn, name)\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*(set(sys.modules) - before))"
    )
    new = set(out.split())
    assert "cosattn.functional" in new
    for name in ("torch.utils.cpp_extension", "jinja2", "cosattn.build", "cosattn.render"):
        assert name not in new, f"{name} is imported before a kernel is needed"


@pytest.mark.parametrize("module", ["spec", "render", "toolchain", "cache", "selection"])
def test_what_needs_no_torch_imports_none(module: str) -> None:
    assert run(f"import sys, cosattn.{module}\nprint('torch' in sys.modules)") == "False\n"
