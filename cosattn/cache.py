"""The kernel cache: where built kernels live, when one may be trusted, how one is published.

Layout under the root::

    v<version>/cu<major>-<machine>/<arch>/<spec name>-<digest>/   kernel.so kernel.cu include/ build.log manifest.json
                                          .index/  .locks/  .failed/  .build-*  .broken-*
    v<version>/torch<version>-<python>/host/host-<digest>/       the host extension, likewise

An entry is complete or absent: it is made in a private ``.build-*`` folder and appears by one rename. It is loaded
only when size and SHA-256 of ``kernel.so`` are those of its manifest. ``docs/decisions.md``, "Cache key", says what
the path and the digest cover.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from cosattn import env
from cosattn._version import __version__
from cosattn.errors import CacheError

logger = logging.getLogger("cosattn")

FORMAT = 1
"""Of the manifest. Entries of another format are not read."""
LIBRARY = "kernel.so"
SOURCE = "kernel.cu"
LOG = "build.log"
MANIFEST = "manifest.json"

_FIRST_NOTICE = 2.0
_NEXT_NOTICE = 30.0


@dataclass(frozen=True, slots=True)
class Key:
    """What a kernel is looked up by."""

    arch: str
    name: str
    """``KernelSpec.name``."""
    digest: str

    @property
    def entry(self) -> str:
        return f"{self.name}-{self.digest}"


def configured_root() -> Path | None:
    """The cache root the environment names, made or not; None when there is no home directory."""
    if explicit := env.text("COSATTN_CACHE_DIR"):
        return Path(explicit).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "cosattn"
    try:
        return Path.home() / ".cache" / "cosattn"
    except RuntimeError:
        return None


def levels() -> list[Path]:
    """The roots a lookup goes through, in order: prebuilt, configured, this process's temporary one."""
    prebuilt = env.text("COSATTN_PREBUILT_DIR")
    temporary = [_temporary_root()] if _temporary_root.cache_info().currsize else []
    roots = [Path(prebuilt).expanduser().absolute() if prebuilt else None, configured_root(), *temporary]
    return [root for root in roots if root is not None and _is_folder(root)]


def cuda_runtime(major: int) -> str:
    """What a kernel shares with the process: ``libcudart.so.<major>`` of this machine type, and no symbol of torch."""
    return f"cu{major}-{platform.machine()}"


def folder(root: Path, runtime: str, arch: str) -> Path:
    """Where the entries of one runtime and GPU architecture live."""
    return root / f"v{__version__}" / runtime / arch


def folders(root: Path, runtime: str | None, arch: str) -> list[Path]:
    """The folders a lookup reads: one, or every CUDA major, newest first, when torch brings no CUDA runtime (None)."""
    if runtime is not None:
        return [folder(root, runtime, arch)]
    tags = (root / f"v{__version__}").glob(f"cu*-{platform.machine()}")
    majors = sorted((int(tag.name[2:].partition("-")[0]) for tag in tags), reverse=True)
    return [folder(root, cuda_runtime(major), arch) for major in majors]


def find(key: Key, runtime: str | None) -> Path | None:
    """The verified ``kernel.so`` of a key, None on a miss. A broken entry is a miss (``broken`` tells).

    Raises CacheError when a root can be written by others.
    """
    for root in levels():
        refuse_shared(root)
        for place in folders(root, runtime, key.arch):
            entry = place / key.entry
            if entry.is_dir() and broken(entry) is None:
                return entry / LIBRARY
    return None


def broken(entry: Path) -> str | None:
    """Why an existing entry must not be loaded, None when it is whole. Raises CacheError when others can write it."""
    refuse_shared(entry)
    try:
        manifest = json.loads((entry / MANIFEST).read_bytes())
        library = (entry / LIBRARY).read_bytes()
    except (OSError, ValueError) as error:
        return str(error)
    if manifest.get("format") != FORMAT:
        return f"its manifest has format {manifest.get('format')}, expected {FORMAT}"
    if len(library) != manifest["size"]:
        return f"{LIBRARY} has {len(library)} bytes, {manifest['size']} were written"
    if hashlib.sha256(library).hexdigest() != manifest["sha256"]:
        return f"{LIBRARY} is not what was written (SHA-256 differs)"
    return None


def refuse_shared(path: Path) -> None:
    """Code is loaded from here, so nobody else may write here. Raises CacheError."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # nothing that could be loaded
    foreign = os.geteuid() != 0 and status.st_uid not in (0, os.geteuid())
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or foreign:
        raise CacheError(
            f"the kernel cache {path} can be changed by others (mode {stat.S_IMODE(status.st_mode):o}, owner "
            f"{status.st_uid}, you are {os.geteuid()}), and code is loaded from it.\nWays out:\n"
            f"  - if you trust what is in it: chmod go-w {path} (and own it)\n"
            "  - set COSATTN_CACHE_DIR to a directory of your own"
        )


def writable_folder(runtime: str, arch: str) -> Path:
    """The folder new entries go to, made with mode 0700; in a temporary root when the configured one is read-only.

    Raises CacheError when the root can be written by others, is no directory, or the disk is full.
    """
    root = configured_root()
    if root is not None:
        refuse_shared(root)
        try:
            return _prepare(folder(root, runtime, arch))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise failed(root, error) from error
            reason = f"{root} is not writable ({error.strerror})"
    else:
        reason = "there is no home directory"
    if not _temporary_root.cache_info().currsize:
        logger.warning(
            "cosattn: no kernel cache: %s. Kernels are built into a temporary folder and lost when this process ends; "
            "set COSATTN_CACHE_DIR to a writable directory.",
            reason,
        )
    return _prepare(folder(_temporary_root(), runtime, arch))


def failed(path: Path, error: OSError) -> CacheError:
    """The CacheError for an operating system error under ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CacheError(
            f"no space left for a kernel under {path}: {error}.\nWays out:\n"
            "  - free some space: python -m cosattn.warmup --prune removes kernels of other versions\n"
            "  - set COSATTN_CACHE_DIR to a directory on another disk"
        )
    return CacheError(
        f"the kernel cache {path} can not be used: {error}.\nWay out: set COSATTN_CACHE_DIR to a directory of your own"
    )


@dataclass(slots=True)
class Lock:
    """A held lock. Its file says who holds it, and after a failed build, why that failed."""

    descriptor: int
    began_waiting: float
    previous: dict[str, Any] = field(default_factory=dict)

    def failure(self) -> str | None:
        """The words of a build that failed while this process was waiting for it."""
        if self.previous.get("failed_at", 0.0) >= self.began_waiting:
            return str(self.previous["failure"])
        return None

    def record(self, **facts: object) -> None:
        """Replace the file's content. A lock works without one, so a full disk is no error here."""
        with suppress(OSError):
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(facts).encode(), 0)


@contextmanager
def lock(place: Path, entry: str) -> Iterator[Lock]:
    """Hold the lock of one entry. flock: the kernel of the operating system drops it when the holder dies.

    Says who holds it after two seconds of waiting. Raises CacheError after COSATTN_LOCK_TIMEOUT seconds.
    """
    import fcntl  # not on Windows, where the CPU path must still import

    path = place / ".locks" / f"{entry}.lock"
    timeout = env.number("COSATTN_LOCK_TIMEOUT") or 600
    began, notice = time.time(), _FIRST_NOTICE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_json(descriptor)
            os.close(descriptor)
            waited = time.time() - began
            if waited > timeout:
                raise CacheError(
                    f"waited {waited:.0f} s for {path}, held by {_who(holder)}.\nWays out:\n"
                    "  - end that process\n  - raise COSATTN_LOCK_TIMEOUT (seconds)\n"
                    "  - set COSATTN_CACHE_DIR to another directory"
                ) from None
            if waited >= notice:
                logger.warning("cosattn: waiting for kernel %s: %s is building it (%s)", entry, _who(holder), path)
                notice += _NEXT_NOTICE
            time.sleep(0.1)
            continue
        except OSError as error:  # some network file systems have no locks; publishing is atomic without one too
            logger.warning("cosattn: no lock on %s (%s): several processes may build the same kernel", path, error)
        try:
            replaced = path.stat().st_ino != os.fstat(descriptor).st_ino
        except FileNotFoundError:
            replaced = True
        if not replaced:
            break
        os.close(descriptor)
    try:
        held = Lock(descriptor, began, _read_json(descriptor))
        # A failure stays readable for those that are still waiting behind this one.
        held.record(**{**held.previous, "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def private_folder(place: Path, entry: str) -> Iterator[Path]:
    """A new folder to build an entry in, removed unless it was published. The entry's lock must be held.

    So any other private folder of the entry was left by a builder that was killed; those go first, and those of other
    entries whose lock nobody holds.
    """
    for orphan in place.glob(f".build-{entry}-*"):
        shutil.rmtree(orphan, ignore_errors=True)
    _sweep(place)
    private = Path(tempfile.mkdtemp(prefix=f".build-{entry}-", dir=place))
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def publish(private: Path, key: Key, facts: dict[str, object]) -> Path:
    """Turn a private folder that holds ``kernel.so`` into the entry, and return the path of its ``kernel.so``.

    The manifest is written last, everything is on disk before the rename, and the rename is atomic: a crash at any
    point leaves either the whole entry or none.
    """
    library = (private / LIBRARY).read_bytes()
    manifest = {
        "format": FORMAT,
        "name": key.name,
        "digest": key.digest,
        "arch": key.arch,
        "cosattn": __version__,
        "size": len(library),
        "sha256": hashlib.sha256(library).hexdigest(),
        **facts,
    }
    (private / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*private.rglob("*"), private]:
        _flush(path)
    entry = private.parent / key.entry
    try:
        private.rename(entry)
    except OSError as error:
        # Without locks another process can have published first: its entry serves as well.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or broken(entry) is not None:
            raise
    _flush(entry.parent)
    return entry / LIBRARY


def set_aside(entry: Path, why: str) -> None:
    """Rename a broken entry out of the way, with a message. The entry's lock must be held."""
    aside = entry.with_name(f".broken-{entry.name}-{time.time_ns()}")
    entry.rename(aside)
    logger.warning("cosattn: kernel %s is broken (%s): set aside as %s, building it again", entry.name, why, aside.name)


def keep_failure(private: Path, key: Key) -> Path:
    """Keep source and log of a failed build where a person can read them; returns the log's path."""
    kept = private.parent / ".failed" / key.entry
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(mode=0o700, exist_ok=True)
    private.rename(kept)
    return kept / LOG


def indexed(spec_name: str, arch: str, runtime: str | None, fingerprint: str) -> str | None:
    """The digest that this very code once computed for a spec, so that a warm process need not render it."""
    for root in levels():
        for place in folders(root, runtime, arch):
            with suppress(OSError):
                return (place / ".index" / f"{spec_name}-{fingerprint}").read_text()
    return None


def index(place: Path, key: Key, fingerprint: str) -> None:
    """Remember a digest for ``indexed``. Only an accelerator, so failing to write it is no error."""
    with suppress(OSError):
        target = place / ".index" / f"{key.name}-{fingerprint}"
        target.parent.mkdir(mode=0o700, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        partial.write_text(key.digest)
        partial.replace(target)


def manifests(root: Path) -> list[dict[str, Any]]:
    """The manifests of every entry under a root, of every version, each with its ``path``."""
    found = []
    for path in sorted(root.glob(f"v*/*/*/*/{MANIFEST}")):
        if not path.parent.name.startswith("."):
            with suppress(OSError, ValueError):
                found.append({**json.loads(path.read_bytes()), "path": str(path.parent)})
    return found


def export(library: Path, output: Path) -> None:
    """Copy the entry of ``library`` below another root, same layout, for COSATTN_PREBUILT_DIR on other machines."""
    entry = library.parent
    target = output.joinpath(*entry.parts[-4:])
    if target.is_dir() and broken(target) is None:
        return
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".build-", dir=target.parent))
    try:
        shutil.copytree(entry, partial / "entry")
        (partial / "entry").rename(target)
        for known in (entry.parent / ".index").glob(f"{entry.name.rpartition('-')[0]}-*"):
            (target.parent / ".index").mkdir(exist_ok=True)
            shutil.copy(known, target.parent / ".index")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def prune() -> list[Path]:
    """Remove what this version can not use from the configured root: other versions, broken, failed, orphaned.

    Returns what was removed. Never called but on request.
    """
    root = configured_root()
    if root is None or not root.is_dir():
        return []
    refuse_shared(root)
    doomed = [path for path in root.glob("v*") if path.name != f"v{__version__}"]
    for place in root.glob(f"v{__version__}/*/*"):
        doomed += [*place.glob(".broken-*"), *place.glob(".failed"), *place.glob(".index"), *_orphans(place)]
    for path in doomed:
        shutil.rmtree(path)
    return doomed


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:
        return False


def _prepare(place: Path) -> Path:
    """Make a folder and its parents, those that are new with mode 0700, and prove that it can be written."""
    for path in [*reversed(place.parents), place, place / ".locks"]:
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            if not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path)) from None
        except OSError:
            if not path.is_dir():
                raise
    with tempfile.TemporaryFile(dir=place):
        return place


@lru_cache(maxsize=1)
def _temporary_root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="cosattn-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    return root


def _orphans(place: Path) -> list[Path]:
    """Private folders whose entry nobody holds the lock of: their builder was killed."""
    import fcntl

    orphans = []
    for private in place.glob(".build-*"):
        entry = private.name.removeprefix(".build-").rpartition("-")[0]
        try:
            descriptor = os.open(place / ".locks" / f"{entry}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphans.append(private)
        except OSError:
            pass  # held: its builder lives
        finally:
            os.close(descriptor)
    return orphans


def _sweep(place: Path) -> None:
    for orphan in _orphans(place):
        shutil.rmtree(orphan, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(descriptor, 1 << 20, 0))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, for {time.time() - holder['since']:.0f} s,"
