"""Hypothesis profiles, and the ``gpu`` marker that skips itself where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated_kernel import EmulatedKernel, emulated_kernels, extension_in_use
from hypothesis import HealthCheck, Phase, settings

from cosattn import host, host_build
from cosattn.arch import arch_of
from cosattn.spec import KernelSpec

# A first example compiles kernels, so no deadline; drawing is never slow, computing may be.
_COMMON = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
settings.register_profile("dev", parent=_COMMON, max_examples=10)
settings.register_profile("ci", parent=_COMMON, max_examples=30, derandomize=True, database=None, print_blob=True)
settings.register_profile("thorough", parent=_COMMON, max_examples=40, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    """``--hypothesis-profile`` wins; else HYPOTHESIS_PROFILE; else ``ci`` where CI is set; else ``dev``."""
    os.environ.setdefault("COSATTN_DISABLE_EXTENSION", "1")  # tests that want it say so, and none starts a build
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(scope="session")
def extension() -> Any:
    """The host extension, built where it is not there yet."""
    return host.load(host_build.ensure())


@pytest.fixture(autouse=True)
def calls_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """They take the C++ way, as a user's do; what tests both ways has a fixture ``way``."""
    if "gpu" not in request.keywords or "way" in request.fixturenames:
        yield
        return
    with extension_in_use(request.getfixturevalue("extension"), host.address_of_current_stream()):
        yield


@pytest.fixture(params=["python", "extension"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What serves the calls, and those of processes that a test starts."""
    if request.param == "python":
        yield request.param
        return
    stream = host.address_of_current_stream() if "gpu" in request.keywords else None
    with extension_in_use(request.getfixturevalue("extension"), stream):
        monkeypatch.setenv("COSATTN_DISABLE_EXTENSION", "0")
        yield request.param


@pytest.fixture
def kernels(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[KernelSpec, EmulatedKernel]]:
    with emulated_kernels(monkeypatch) as found:
        yield found


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if arch_of(capability) is None:
        return f"cosattn has no kernel for compute capability {capability[0]}.{capability[1]}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where they can not run, with the reason."""
    marked = [item for item in items if "gpu" in item.keywords]
    reason = _why_no_gpu() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
