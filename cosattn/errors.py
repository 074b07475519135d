"""One family of errors. Every message says what was wrong, what was found, and the way out."""

from __future__ import annotations


class CosattnError(Exception):
    """Base class of every error cosattn raises on purpose."""


class ArgumentError(CosattnError, ValueError):
    """An argument of a public function is wrong. Raised before anything is launched; lists every problem."""


class UnsupportedError(CosattnError, RuntimeError):
    """No kernel serves this request on this device. Lists the reasons and the ways out."""


class ToolchainError(CosattnError, RuntimeError):
    """nvcc, ninja or the host compiler is missing or unusable. Lists what was searched and what was found."""


class BuildError(CosattnError, RuntimeError):
    """The compiler failed on a rendered kernel. Holds the compiler's words and the path of the log."""


class CacheError(CosattnError, RuntimeError):
    """The kernel cache can not be used safely."""


class MissingKernelError(CosattnError, RuntimeError):
    """A kernel is not built and may not be built now (JIT disabled, or a CUDA graph is being captured)."""


class LaunchError(CosattnError, RuntimeError):
    """CUDA refused a kernel launch."""
