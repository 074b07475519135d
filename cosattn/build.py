"""From a spec to the path of its built kernel: a lookup on a hit, render, compile and publish on a miss."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cosattn import cache, env, toolchain
from cosattn.arch import ARCHS, Arch
from cosattn.errors import BuildError, MissingKernelError, UnsupportedError
from cosattn.selection import command_for
from cosattn.spec import KernelSpec

if TYPE_CHECKING:
    from cosattn.render import Rendered

logger = logging.getLogger("cosattn")

_HINTS = (
    (r"Unsupported \.version", "nvcc stands beside a newer nvvm. " + toolchain.INSTALL),
    (r"unsupported GNU version|unsupported clang version", "set CC and CXX to an older host compiler"),
    (r"(?i)\bkilled\b|signal 9", "the compiler ran out of memory: compile fewer kernels at once (COSATTN_JOBS=1)"),
)

_failures: dict[cache.Key, str] = {}
"""Builds that failed in this process: asked for again they fail at once, without a compiler."""
_one_build = threading.Lock()  # cpp_extension and os.environ are global to the process


def ensure(spec: KernelSpec) -> Path:
    """The built kernel of a spec, an absolute path that ``ctypes.CDLL`` can load.

    A hit reads two files and starts nothing: no compiler, no ninja, no template engine. A miss renders and compiles,
    once for all processes that ask at the same time.

    Raises: UnsupportedError (unknown architecture), MissingKernelError (a miss that may not be compiled now),
    ToolchainError, BuildError (the compiler's words and the log's path), CacheError.
    """
    key, rendered, found = _look_up(spec)
    if found is not None:
        return found
    _refuse_if_not_allowed(spec)
    with _one_build:
        if key in _failures:
            raise BuildError(_failures[key])
        return _build(key, rendered or _render(spec), ARCHS[spec.arch])


def find(spec: KernelSpec) -> Path | None:
    """The built kernel of a spec, None when ``ensure`` would compile it. Raises UnsupportedError, CacheError."""
    return _look_up(spec)[2]


def _look_up(spec: KernelSpec) -> tuple[cache.Key, Rendered | None, Path | None]:
    """The key of a spec, its source where computing the key took rendering it, and the built kernel if there is one."""
    arch = ARCHS.get(spec.arch)
    if arch is None:
        raise UnsupportedError(
            f"no kernel for GPU architecture {spec.arch!r}: cosattn knows {', '.join(ARCHS)}.\n"
            "Way out: set COSATTN_FALLBACK=1 to use scaled_dot_product_attention on normalised inputs (slower)"
        )
    runtime = _runtime()
    digest = cache.indexed(spec.name, spec.arch, runtime, _fingerprint())
    rendered = None
    if digest is None:
        rendered = _render(spec)
        digest = _digest(rendered, arch)
    key = cache.Key(spec.arch, spec.name, digest)
    found = cache.find(key, runtime)
    if found is not None and rendered is not None:
        cache.index(found.parent.parent, key, _fingerprint())
    return key, rendered, found


def nvcc_flags(arch: Arch) -> list[str]:
    """What every kernel is compiled with, besides include paths."""
    # cpp_extension defines the four macros; without -U half-precision operators would work in every compiler but ours.
    undefine = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
    return [
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        f"-gencode={arch.gencode}",
        *(f"-U__CUDA_NO_{name}__" for name in undefine),
    ]


def _build(key: cache.Key, rendered: Rendered, arch: Arch) -> Path:
    tools = toolchain.find(arch, torch.version.cuda)
    place = cache.writable_folder(cache.cuda_runtime(tools.cuda_version[0]), arch.name)
    return once(place, key, lambda private: _compile(key, rendered, arch, tools, private))


def once(place: Path, key: cache.Key, compile_in: Callable[[Path], Path]) -> Path:
    """The entry of ``key`` in ``place``: that of the process this one had to wait for, else the one that is made now.

    ``compile_in`` is given a private folder, and publishes it.
    """
    with cache.lock(place, key.entry) as lock:
        entry = place / key.entry
        if entry.exists():
            why = cache.broken(entry)
            if why is None:  # built by the process this one waited for
                return entry / cache.LIBRARY
            cache.set_aside(entry, why)
        if (failure := lock.failure()) is not None:
            _failures[key] = failure
            raise BuildError(failure)
        try:
            with cache.private_folder(place, key.entry) as private:
                return compile_in(private)
        except BuildError as error:
            _failures[key] = str(error)
            lock.record(failure=str(error), failed_at=time.time())
            raise
        except OSError as error:
            raise cache.failed(place, error) from error


def _compile(key: cache.Key, rendered: Rendered, arch: Arch, tools: toolchain.Toolchain, private: Path) -> Path:
    logger.info("cosattn: building kernel %s with nvcc %s", key.name, tools.cuda_release)
    began = time.perf_counter()
    source = private / cache.SOURCE
    source.write_text(rendered.source)
    for name, text in rendered.headers.items():
        header = private / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    log = private / cache.LOG
    try:
        library = _load(source, arch, tools, private)
    except (RuntimeError, OSError) as error:
        explain(error, key, private, tools.identity)
    seconds = time.perf_counter() - began
    log.write_text(f"{tools.identity}\n{seconds:.2f} s\n\n{(private / 'build.ninja').read_text()}")
    library.rename(private / cache.LIBRARY)
    kept = {cache.LIBRARY, cache.SOURCE, cache.LOG, *(Path(name).parts[0] for name in rendered.headers)}
    tidy(private, kept)
    facts: dict[str, object] = {
        "compiler": tools.identity,
        "cuda": tools.cuda_release,
        "flags": nvcc_flags(arch),
        "seconds": seconds,
    }
    published = cache.publish(private, key, facts)
    cache.index(published.parent.parent, key, _fingerprint())
    logger.info("cosattn: built kernel %s in %.1f s", key.name, seconds)
    return published


def tidy(private: Path, kept: set[str]) -> None:
    """Remove what a build left beside what is kept."""
    for path in private.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _load(source: Path, arch: Arch, tools: toolchain.Toolchain, private: Path) -> Path:
    """Compile and link through ``torch.utils.cpp_extension.load``; the library's path."""
    with quiet("torch.utils.cpp_extension"):
        from torch.utils import cpp_extension
    link = private / "link"
    link.mkdir()
    # Toolkits from pip lack the unversioned name that the linker looks for.
    (link / "libcudart.so").symlink_to(tools.cudart)
    if torch.version.cuda is None:
        # load() links these two, a CPU build of torch has neither, and a kernel uses no symbol of them.
        for name in ("libc10_cuda.a", "libtorch_cuda.a"):
            (link / name).write_bytes(b"!<arch>\n")
    # A name of its own for each attempt: load() skips a name that has failed once, and renames one whose flags changed.
    name = private.name.rpartition("-")[2]
    changes = {
        "PATH": os.pathsep.join([str(tools.ninja.parent), os.environ.get("PATH", os.defpath)]),
        "CXX": str(tools.cxx),
        "CC": os.environ.get("CC") or str(tools.cxx),  # becomes nvcc's -ccbin
    }
    known = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = str(tools.cuda_home)
    try:
        with environment(changes):
            cpp_extension.load(
                f"cosattn_{name}",
                [str(source)],
                extra_cuda_cflags=nvcc_flags(arch),
                # as-needed: torch's libraries, which load() lists, do not become dependencies of the kernel.
                extra_ldflags=[
                    "-Wl,--as-needed",
                    f"-L{shlex.quote(str(link))}",
                    f"-Wl,-rpath,{shlex.quote(str(tools.cudart.parent))}",
                ],
                build_directory=str(private),
                with_cuda=True,
                is_python_module=False,
            )
    finally:
        cpp_extension.CUDA_HOME = known
    return private / f"cosattn_{name}.so"


def explain(error: Exception, key: cache.Key, private: Path, identity: str) -> None:
    """Raise the BuildError, or the OSError of a full disk, that a failed ``cpp_extension.load`` means."""
    words = str(error)
    free = shutil.disk_usage(private).free
    if "No space left on device" in words or free < 1 << 16 or getattr(error, "errno", None) == errno.ENOSPC:
        raise OSError(errno.ENOSPC, "No space left on device", str(private.parent)) from error
    with suppress(OSError):
        (private / cache.LOG).write_text(f"{identity}\n\n{words}\n")
    log = cache.keep_failure(private, key)
    hints = [f"  - {hint}" for pattern, hint in _HINTS if re.search(pattern, words)]
    advice = ["Ways out:", *hints] if hints else []
    tail = words[-4000:]
    raise BuildError("\n".join([f"kernel {key.name} did not compile (log: {log}):", tail, *advice])) from error


def _refuse_if_not_allowed(spec: KernelSpec) -> None:
    """Raise MissingKernelError where a miss must not compile."""
    if env.flag("COSATTN_DISABLE_JIT"):
        why = "COSATTN_DISABLE_JIT is set"
    elif torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        why = "a CUDA graph is being captured"
    else:
        return
    searched = ", ".join(map(str, cache.levels())) or "no cache directory exists"
    raise MissingKernelError(
        f"kernel {spec.name} is not built and may not be built now: {why} (searched: {searched}).\n"
        f"Way out: {command_for(spec)}"
    )


def _runtime() -> str | None:
    return None if torch.version.cuda is None else cache.cuda_runtime(int(torch.version.cuda.partition(".")[0]))


def _render(spec: KernelSpec) -> Rendered:
    from cosattn.render import render  # imports the template engine: only on a miss

    return render(spec)


def _digest(rendered: Rendered, arch: Arch) -> str:
    """Covers what the compiler is given, not which compiler it is: a hit must need none (docs/decisions.md)."""
    parts = [rendered.source, *nvcc_flags(arch)]
    for name in sorted(rendered.headers):
        parts += [name, rendered.headers[name]]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def _fingerprint() -> str:
    """Digest of the package's code and templates: equal code renders equal kernels, so an index may say which."""
    package = Path(__file__).parent
    checkout = package.parent / "kernels_templates"
    digest = hashlib.sha256()
    for root, pattern in ((package, "*.py"), (package / "_kernels_templates", "*"), (checkout, "*")):
        for path in sorted(root.rglob(pattern)):
            if path.is_file():
                data = path.read_bytes()
                digest.update(f"{path.relative_to(root)}\0{len(data)}\0".encode())
                digest.update(data)
    return digest.hexdigest()[:16]


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """These variables of the process, for as long as it takes."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Only errors of one logger: importing cpp_extension warns on every machine without a GPU."""
    noisy = logging.getLogger(name)
    before = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(before)
