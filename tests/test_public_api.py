"""What ``import cosattn`` offers, what it costs, and which module may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cosattn

PACKAGE = Path(cosattn.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_public_name_exists_and_the_list_is_sorted() -> None:
    assert cosattn.__all__ == sorted(cosattn.__all__)
    for name in cosattn.__all__:
        assert getattr(cosattn, name) is not None
    assert set(cosattn.__all__) <= set(dir(cosattn))
    assert set(cosattn._HOME) == set(cosattn.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'flash_attention'"):
        cosattn.flash_attention  # noqa: B018
    with pytest.raises(ImportError, match="flash_attention"):
        exec("from cosattn import flash_attention")


def test_the_typing_marker_is_there() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_import_is_light() -> None:
    heavy = ("torch", "jinja2", "einops")
    code = f"import sys, cosattn; print(cosattn.__version__, [m for m in {heavy} if m in sys.modules])"
    assert run(code) == f"{cosattn.__version__} []"


def test_using_the_cpu_starts_no_cuda_and_no_compiler() -> None:
    code = (
        "import sys, torch, cosattn\n"
        "x = torch.randn(1, 2, 3, 8, requires_grad=True)\n"
        "cosattn.cosine_attention(x, x, x).sum().backward()\n"
        "cosattn.CosineAttention(8, heads=1, dim_head=8)\n"
        "unwanted = ('torch.utils.cpp_extension', 'jinja2', 'ninja', 'triton')\n"
        "print(torch.cuda.is_initialized(), [m for m in unwanted if m in sys.modules])"
    )
    assert run(code) == "False []"


def imports(module: str) -> set[str]:
    """Modules of cosattn, and top-level packages, that a module imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "cosattn":
            names = [f"cosattn.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        found |= {name if name.startswith("cosattn.") else name.partition(".")[0] for name in names}
    return {name.removeprefix("cosattn.") for name in found}


def test_imports_go_one_way() -> None:
    graph = {module: imports(module) & set(MODULES) for module in MODULES if module != "__init__"}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle
    pipeline = ["spec", "tiles", "render", "build", "launch", "plan", "ops", "functional", "compat", "modules"]
    assert [module for module in order if module in pipeline] == pipeline


@pytest.mark.parametrize("module", ["_version", "abi", "arch", "env", "errors", "render", "spec", "support", "tiles"])
def test_the_description_of_kernels_knows_no_torch(module: str) -> None:
    assert "torch" not in imports(module)


@pytest.mark.parametrize("module", ["reference", "cpu"])
def test_the_formula_knows_nothing_of_kernels(module: str) -> None:
    assert imports(module) & set(MODULES) <= {"errors", "reference"}
    assert imports(module) - set(MODULES) - set(sys.stdlib_module_names) <= {"torch", "einops"}
