"""Fused cosine-similarity attention for PyTorch.

Every name is imported when it is first used: ``import cosattn`` starts no CUDA and no compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cosattn._version import __version__

if TYPE_CHECKING:
    from cosattn.compat import flash_cosine_sim_attention, l2norm_tensors, plain_cosine_sim_attention
    from cosattn.errors import (
        ArgumentError,
        BuildError,
        CacheError,
        CosattnError,
        LaunchError,
        MissingKernelError,
        ToolchainError,
        UnsupportedError,
    )
    from cosattn.functional import cosine_attention
    from cosattn.modules import CosineAttention
    from cosattn.reference import cosine_attention_reference

__all__ = [
    "ArgumentError",
    "BuildError",
    "CacheError",
    "CosattnError",
    "CosineAttention",
    "LaunchError",
    "MissingKernelError",
    "ToolchainError",
    "UnsupportedError",
    "__version__",
    "cosine_attention",
    "cosine_attention_reference",
    "flash_cosine_sim_attention",
    "l2norm_tensors",
    "plain_cosine_sim_attention",
]

_HOME = {
    "ArgumentError": "errors",
    "BuildError": "errors",
    "CacheError": "errors",
    "CosattnError": "errors",
    "CosineAttention": "modules",
    "LaunchError": "errors",
    "MissingKernelError": "errors",
    "ToolchainError": "errors",
    "UnsupportedError": "errors",
    "cosine_attention": "functional",
    "cosine_attention_reference": "reference",
    "flash_cosine_sim_attention": "compat",
    "l2norm_tensors": "compat",
    "plain_cosine_sim_attention": "compat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cosattn' has no attribute {name!r}")
    value = getattr(import_module(f"cosattn.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
