"""The host extension: repeated calls in C++ (``host.cpp``), a quarter of the time they take in Python.

It is an accelerator and nothing depends on it. A process looks for it when it plans its first call. Where it is not
built, a process of its own builds it in the background while calls go on in Python, and it is taken up when it is
there; ``python -m cosattn.warmup`` builds it ahead of time. COSATTN_DISABLE_EXTENSION=1 does without.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cosattn import env
from cosattn.errors import CosattnError

logger = logging.getLogger("cosattn")

attend: Callable[..., Any] | None = None
"""Serves a call from the arguments of ``functional._direct``; its result is None for a call it does not know."""

_extension: Any = None
_begun = False
_lock = threading.Lock()


class Plan(Protocol):
    """What this module needs of ``plan.Plan``."""

    host: int

    def for_host(self) -> dict[str, Any] | None: ...

    def backward_for_host(self, *arguments: Any) -> tuple[Any, ...] | None: ...


def begin(gradients: Callable[..., Any]) -> None:
    """Load the extension, or have it built. Only the first call does anything, and nothing here is ever an error.

    ``gradients`` serves backward passes of calls that the extension served and that it can not serve themselves.
    """
    global _begun
    with _lock:
        if _begun:
            return
        _begun = True
    try:
        if env.flag("COSATTN_DISABLE_EXTENSION") or not _has_gil():
            return
        from cosattn import host_build  # a process that never attends on a GPU needs none of it

        path = host_build.find()
        if path is not None:
            connect(load(path), address_of_current_stream(), gradients)
        elif (why_not := host_build.why_not()) is not None:
            logger.info("cosattn: calls take the Python path: %s", why_not)
        else:
            threading.Thread(target=_build, args=(gradients,), name="cosattn host extension", daemon=True).start()
    except (CosattnError, OSError, ImportError, AttributeError) as error:
        _report(error)


def load(path: Path) -> Any:
    """The extension as a module."""
    spec = spec_from_file_location("cosattn_host", path, loader=ExtensionFileLoader("cosattn_host", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def connect(module: Any, current_stream: int, gradients: Callable[..., Any]) -> None:
    """Send calls through a loaded extension from now on."""
    global attend, _extension
    module.connect(current_stream, gradients)
    _extension, attend = module, module.attend


def disconnect() -> None:
    """Send calls through Python again."""
    global attend, _extension
    if _extension is not None:
        _extension.clear()
    _extension = attend = None


def offer(plan: Plan, *arguments: Any) -> None:
    """Let the extension serve calls that look like these arguments of ``attend``."""
    facts = plan.for_host()
    if facts is not None and _extension is not None:
        plan.host = _extension.add(*arguments, plan=plan, **facts)


def offer_backward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    dout: Tensor,
    deterministic: bool,
    bias_grad: bool,
) -> bool:
    """Let the extension serve backward passes that look like these tensors, and say whether it can."""
    facts = plan.backward_for_host(q, k, v, mask, bias, out, dout, deterministic, bias_grad)
    if facts is None or _extension is None:
        return False
    _extension.add_backward(plan.host, (q, k, v, mask, bias, out, dout), deterministic, bias_grad, *facts)
    return True


def forget(plan: Plan) -> None:
    """Drop a plan that Python drops."""
    if _extension is not None:
        _extension.forget(plan.host)


def address_of_current_stream() -> int:
    """Of ``int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream)``, which torch keeps stable."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
    return ctypes.cast(library.aoti_torch_get_current_cuda_stream, ctypes.c_void_p).value or 0


def _has_gil() -> bool:
    """The extension's table of plans relies on it."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _build(gradients: Callable[..., Any]) -> None:
    """Wait for the extension to be built, by another process or by one started here, and take it up."""
    try:
        from cosattn import host_build

        with host_build.only_one() as turn:
            if host_build.find() is None:
                # A process, because a build holds locks and changes the environment that calls may need meanwhile. It
                # outlives this one: whoever runs only short programs gets the extension too.
                package = str(Path(__file__).parent.parent)
                paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
                built = subprocess.run(
                    [sys.executable, "-m", "cosattn.host_build"],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                    pass_fds=turn,
                    check=False,
                )
                if built.returncode != 0:
                    return _report(built.stderr.strip())
        path = host_build.find()
        if path is not None:
            connect(load(path), address_of_current_stream(), gradients)
            logger.info("cosattn: the host extension is built; calls take the C++ path")
    except (CosattnError, OSError, ImportError, AttributeError) as error:
        _report(error)
    return None


def _report(error: object) -> None:
    logger.warning(
        "cosattn: no host extension, calls take the Python path, which computes the same and takes more host time: %s\n"
        "Ways out: python -m cosattn.warmup says more; COSATTN_DISABLE_EXTENSION=1 silences this",
        error,
    )
