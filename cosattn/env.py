"""Every environment variable cosattn reads, in one table."""

from __future__ import annotations

import os

from cosattn.errors import ArgumentError

VARIABLES: dict[str, str] = {
    "COSATTN_CACHE_DIR": "Where built kernels are kept. Default: $XDG_CACHE_HOME/cosattn, else ~/.cache/cosattn.",
    "COSATTN_PREBUILT_DIR": "A folder written by `python -m cosattn.warmup --output`: searched first, never written.",
    "COSATTN_COMMIT": "Commit that benchmark results name where git can not tell it.",
    "COSATTN_DISABLE_EXTENSION": "1: do without the host extension; every call takes the Python path.",
    "COSATTN_DISABLE_JIT": "1: never compile; a kernel that is not built is an error naming the warmup command.",
    "COSATTN_FALLBACK": "1: where no kernel can serve a call, normalise and use scaled_dot_product_attention.",
    "COSATTN_JOBS": "Kernels that `python -m cosattn.warmup` compiles at once. Default: from cores and free memory.",
    "COSATTN_LOCK_TIMEOUT": "Seconds to wait for another process that is building the same kernel. Default: 600.",
}
"""Name -> meaning. An empty value counts as unset."""

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def text(name: str) -> str | None:
    """The value of a variable of ``VARIABLES``, None when unset or empty."""
    if name not in VARIABLES:
        raise KeyError(f"{name} is not in cosattn.env.VARIABLES")
    return os.environ.get(name) or None


def flag(name: str) -> bool:
    """Whether a switch is on. Raises ArgumentError for a value that is neither yes nor no."""
    value = (text(name) or "0").lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ArgumentError(f"{name}={value!r} is not a switch: use 1 or 0")


def number(name: str) -> int | None:
    """A whole number of at least 1, None when unset. Raises ArgumentError for anything else."""
    value = text(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ArgumentError(f"{name}={value!r} is not a whole number of at least 1")
    return int(value)


def unknown() -> list[str]:
    """Names that look like cosattn's and are not: most likely typing errors."""
    return sorted(name for name in os.environ if name.startswith("COSATTN_") and name not in VARIABLES)
