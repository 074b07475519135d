"""Compiles the host extension (``host.cpp``), once for each torch and Python; ``python -m cosattn.host_build`` does it.

It is kept in the kernel cache, by the cache's rules. Unlike kernels it is bound to one build of torch and Python, so
both are in its path and in its digest; the compiler is not, for the reason kernels' is not (docs/decisions.md).
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from cosattn import build, cache, env, toolchain
from cosattn.errors import BuildError, CosattnError, ToolchainError

NAME = "host"
"""In the place of a kernel's name and of its architecture."""
SOURCE = Path(__file__).with_name("host.cpp")
FLAGS = ["-O2", "-fvisibility=hidden"]


@lru_cache(maxsize=1)
def key() -> cache.Key:
    """What the extension of this process is looked up by."""
    parts = [SOURCE.read_text(), *FLAGS, torch.__version__, str(torch.version.git_version), _python()]
    return cache.Key(NAME, NAME, hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16])


def runtime() -> str:
    """What the extension shares with the process: the folder it is kept in."""
    return f"torch{torch.__version__}-{_python()}"


def find() -> Path | None:
    """The built extension of this torch and Python. Raises CacheError when others can write the cache."""
    return cache.find(key(), runtime())


def ensure() -> Path:
    """The built extension, compiled if need be. Raises ToolchainError, BuildError, CacheError."""
    found = find()
    if found is not None:
        return found
    cxx, cxx_problem = toolchain.host_compiler()
    ninja, ninja_problem = toolchain.find_ninja()
    if cxx is None or ninja is None:
        raise ToolchainError(f"cannot compile the host extension: {cxx_problem or ninja_problem}")
    place = cache.writable_folder(runtime(), NAME)
    return build.once(place, key(), lambda private: _compile(private, cxx, ninja))


def why_not() -> str | None:
    """Why a missing extension is not built in the background, None when it is."""
    if env.flag("COSATTN_DISABLE_JIT"):
        return "the host extension is not built, and COSATTN_DISABLE_JIT is set"
    if not sys.executable:
        return "this process does not know its Python"
    for program, problem in (toolchain.host_compiler(), toolchain.find_ninja()):
        if program is None:
            return f"the host extension can not be compiled: {problem}"
    root = cache.configured_root()
    if root is None or not os.access(_existing(root), os.W_OK):
        return "the kernel cache can not be written"
    if (log := failure()) is not None:
        return f"the host extension did not compile before, and only warmup tries again (log: {log})"
    return None


def failure() -> Path | None:
    """The log of a build of just this extension that failed."""
    root = cache.configured_root()
    if root is None:
        return None
    log = cache.folder(root, runtime(), NAME) / ".failed" / key().entry / cache.LOG
    return log if log.exists() else None


@contextmanager
def only_one() -> Iterator[tuple[int, ...]]:
    """Wait for the turn to build: of all processes that found the extension missing, one starts a build.

    Yields the file descriptors that keep the turn; a build that inherits them keeps it when this process has ended.
    """
    import fcntl  # not on Windows

    place = cache.writable_folder(runtime(), NAME)
    descriptor = os.open(place / ".locks" / "background", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(1)
            except OSError:  # a file system without locks: a build more than needed
                break
        yield (descriptor,)
    finally:
        os.close(descriptor)


def _compile(private: Path, cxx: Path, ninja: Path) -> Path:
    began = time.perf_counter()
    identity = toolchain.identify(cxx)
    source = private / SOURCE.name
    source.write_bytes(SOURCE.read_bytes())
    # A name of its own for each attempt: load() skips a name that has failed once.
    name = "cosattn_" + private.name.rpartition("-")[2]
    path = os.pathsep.join([str(ninja.parent), os.environ.get("PATH", os.defpath)])
    try:
        with build.quiet("torch.utils.cpp_extension"):
            from torch.utils import cpp_extension
        with build.environment({"PATH": path, "CXX": str(cxx)}):
            cpp_extension.load(
                name,
                [str(source)],
                extra_cflags=FLAGS,
                build_directory=str(private),
                with_cuda=False,
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        build.explain(error, key(), private, identity)
    seconds = time.perf_counter() - began
    log = f"{identity}\n{seconds:.2f} s\n\n{(private / 'build.ninja').read_text()}"
    (private / f"{name}.so").rename(private / cache.LIBRARY)
    build.tidy(private, {cache.LIBRARY, SOURCE.name})
    (private / cache.LOG).write_text(log)
    facts: dict[str, object] = {
        "compiler": identity,
        "torch": torch.__version__,
        "python": _python(),
        "flags": FLAGS,
        "seconds": seconds,
    }
    return cache.publish(private, key(), facts)


def _python() -> str:
    """Version, implementation and machine, as in the names of extension modules."""
    return str(sysconfig.get_config_var("SOABI") or f"{sys.implementation.cache_tag}-{platform.machine()}")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def main() -> int:
    """Build, with low priority; the exit status: 0 built, 1 not, with the reason on standard error."""
    os.nice(10)
    try:
        ensure()
    except CosattnError as error:
        log = f" (log: {failure()})" if isinstance(error, BuildError) else ""
        print(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}{log}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
