"""Hypothesis profiles, and the ``gpu`` marker that skips itself where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from cosattn.arch import arch_of

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
    if not config.getoption("--hypothesis-profile", default=None):
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


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
