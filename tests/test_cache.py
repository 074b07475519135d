"""The rules of the kernel cache that need no compiler: paths, trust, locks, publishing, pruning."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cosattn import cache
from cosattn.errors import CacheError

KEY = cache.Key("sm80", "forward_sm80_f16_d64", "0123456789abcdef")
RUNTIME = cache.cuda_runtime(13)
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("COSATTN_PREBUILT_DIR", raising=False)
    cache._temporary_root.cache_clear()
    return tmp_path / "cache"


def publish(content: bytes = b"library", key: cache.Key = KEY) -> Path:
    place = cache.writable_folder(RUNTIME, key.arch)
    with cache.lock(place, key.entry), cache.private_folder(place, key.entry) as private:
        (private / cache.LIBRARY).write_bytes(content)
        return cache.publish(private, key, {"compiler": "nvcc", "seconds": 1.0})


def test_the_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COSATTN_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.configured_root() == tmp_path / "home" / ".cache" / "cosattn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.configured_root() == tmp_path / "xdg" / "cosattn"
    monkeypatch.setenv("COSATTN_CACHE_DIR", str(tmp_path / "own"))
    assert cache.configured_root() == tmp_path / "own"


def test_nothing_is_made_by_looking(root: Path) -> None:
    assert cache.find(KEY, RUNTIME) is None
    assert cache.indexed(KEY.name, KEY.arch, RUNTIME, "f") is None
    assert not root.exists()


def test_published_and_found(root: Path) -> None:
    library = publish()
    assert library == cache.folder(root, RUNTIME, "sm80") / KEY.entry / "kernel.so"
    assert cache.find(KEY, RUNTIME) == library
    assert cache.find(KEY, None) == library, "a CPU build of torch reads every CUDA major"
    assert cache.find(KEY, cache.cuda_runtime(12)) is None
    assert cache.find(cache.Key("sm80", KEY.name, "f" * 16), RUNTIME) is None


def test_everything_is_private_to_the_user(root: Path) -> None:
    old = os.umask(0o000)
    try:
        library = publish()
    finally:
        os.umask(old)
    for path in [library.parent, *library.parent.parents]:
        if path.is_relative_to(root):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_no_debris_after_publishing() -> None:
    place = publish().parent.parent
    assert sorted(path.name for path in place.iterdir()) == [".locks", KEY.entry]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda entry: (entry / "kernel.so").write_bytes(b"lib"), "3 bytes, 7 were written"),
        (lambda entry: (entry / "kernel.so").write_bytes(b"garbage"), "SHA-256 differs"),
        (lambda entry: (entry / "kernel.so").unlink(), "No such file"),
        (lambda entry: (entry / "manifest.json").unlink(), "No such file"),
        (lambda entry: (entry / "manifest.json").write_text("{"), "Expecting property name"),
        (lambda entry: (entry / "manifest.json").write_text('{"format": 99}'), "format 99, expected 1"),
    ],
)
def test_a_damaged_entry_is_a_miss(damage, why: str) -> None:
    entry = publish().parent
    damage(entry)
    assert cache.find(KEY, RUNTIME) is None
    assert why in (cache.broken(entry) or "")


def test_set_aside_says_so_and_makes_room(caplog: pytest.LogCaptureFixture) -> None:
    entry = publish().parent
    cache.set_aside(entry, "for a test")
    assert "is broken (for a test): set aside as .broken-" in caplog.text
    assert not entry.exists()
    assert cache.find(KEY, RUNTIME) is None
    publish()
    assert cache.find(KEY, RUNTIME) is not None


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o1777])
@pytest.mark.parametrize("variable", ["COSATTN_CACHE_DIR", "COSATTN_PREBUILT_DIR"])
def test_a_root_that_others_can_write_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, mode: int
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    monkeypatch.setenv(variable, str(shared))
    with pytest.raises(CacheError, match=rf"can be changed by others \(mode {mode:o}.*\n.*\n.*chmod go-w {shared}"):
        cache.find(KEY, RUNTIME)
    if variable == "COSATTN_CACHE_DIR":
        with pytest.raises(CacheError, match="can be changed by others"):
            cache.writable_folder(RUNTIME, "sm80")


def test_an_entry_that_others_can_write_is_refused() -> None:
    entry = publish().parent
    entry.chmod(0o777)
    with pytest.raises(CacheError, match="can be changed by others"):
        cache.find(KEY, RUNTIME)


def test_a_root_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.chown(tmp_path, 54321, -1) if os.geteuid() == 0 else None
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CacheError, match="you are 12345"):
        cache.refuse_shared(tmp_path)


def test_the_prebuilt_folder_is_searched_first_and_never_written(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    library = publish()
    cache.index(library.parent.parent, KEY, "print")
    prebuilt = tmp_path / "elsewhere" / "prebuilt"
    cache.export(library, prebuilt)
    cache.export(library, prebuilt)  # again: nothing to do
    copied = prebuilt / library.relative_to(root)
    assert copied.read_bytes() == b"library"
    monkeypatch.setenv("COSATTN_PREBUILT_DIR", str(prebuilt))
    before = sorted(prebuilt.rglob("*"))
    assert cache.find(KEY, RUNTIME) == copied
    assert cache.indexed(KEY.name, "sm80", RUNTIME, "print") == KEY.digest
    cache.writable_folder(RUNTIME, "sm90")
    assert sorted(prebuilt.rglob("*")) == before
    (copied.parent / "kernel.so").write_bytes(b"x")
    assert cache.find(KEY, RUNTIME) == library, "a broken prebuilt entry falls through to the user's own"


def test_a_root_that_is_a_file(root: Path) -> None:
    root.write_text("")
    with pytest.raises(CacheError, match=r"(?i)not a directory.*\nWay out: set COSATTN_CACHE_DIR"):
        cache.writable_folder(RUNTIME, "sm80")


def test_a_read_only_root_gives_a_temporary_one_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real = cache._prepare

    def read_only(place: Path) -> Path:
        if place.is_relative_to(root):
            raise OSError(errno.EROFS, "Read-only file system", str(root))
        return real(place)

    monkeypatch.setattr(cache, "_prepare", read_only)
    library = publish()
    publish(key=cache.Key("sm80", "another", KEY.digest))
    assert not library.is_relative_to(root)
    assert cache.find(KEY, RUNTIME) == library
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith(f"cosattn: no kernel cache: {root} is not writable (Read-only file system).")
    assert warning.endswith("set COSATTN_CACHE_DIR to a writable directory.")


def test_the_temporary_root_goes_with_its_process() -> None:
    code = "from cosattn import cache; print(cache._temporary_root())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cosattn-" in ran.stdout
    assert not Path(ran.stdout.strip()).exists()


def _hold(place: Path, entry: str, pipe) -> None:
    with cache.lock(place, entry):
        pipe.send("held")
        pipe.poll(60)


@pytest.fixture
def held(root: Path):
    """A lock that another process holds until something is sent to it; yields (place, process, pipe)."""
    place = cache.writable_folder(RUNTIME, "sm80")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_hold, args=(place, KEY.entry, theirs))
    process.start()
    assert ours.poll(30)
    yield place, process, ours
    process.kill()
    process.join()


def test_waiting_for_a_lock_names_its_holder(held, caplog: pytest.LogCaptureFixture) -> None:
    place, process, pipe = held
    timer = threading.Timer(2.6, pipe.send, ["release"])
    timer.start()
    with cache.lock(place, KEY.entry):
        pass
    timer.join()
    (message,) = [record.message for record in caplog.records]
    assert f"waiting for kernel {KEY.entry}: process {process.pid} on " in message
    assert f"for 2 s, is building it ({place}/.locks/{KEY.entry}.lock)" in message


def test_waiting_ends_with_an_error(held, monkeypatch: pytest.MonkeyPatch) -> None:
    place, process, _ = held
    monkeypatch.setenv("COSATTN_LOCK_TIMEOUT", "1")
    with pytest.raises(CacheError, match=rf"(?s)held by process {process.pid}.*raise COSATTN_LOCK_TIMEOUT"):  # noqa: SIM117
        with cache.lock(place, KEY.entry):
            pytest.fail("the lock is held by another process")


def test_the_lock_of_a_killed_holder_is_free(held, monkeypatch: pytest.MonkeyPatch) -> None:
    place, process, _ = held
    monkeypatch.setenv("COSATTN_LOCK_TIMEOUT", "5")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with cache.lock(place, KEY.entry):
        pass


def test_a_failure_reaches_those_who_waited_and_nobody_later() -> None:
    place = cache.writable_folder(RUNTIME, "sm80")
    with cache.lock(place, KEY.entry) as first:
        assert first.failure() is None
        first.record(failure="the words", failed_at=time.time())
    with cache.lock(place, KEY.entry) as later:
        assert later.failure() is None
        later.record(failure="the words", failed_at=time.time() + 1)  # as if this one had begun to wait before it
    for _ in range(2):  # the first waiter passes it on to the second
        with cache.lock(place, KEY.entry) as waiter:
            assert waiter.failure() == "the words"


def test_a_lock_file_that_is_deleted_under_a_waiter_does_not_split_the_lock(held) -> None:
    place, _, _ = held
    path = place / ".locks" / f"{KEY.entry}.lock"
    path.unlink()
    with cache.lock(place, KEY.entry):  # a new file: free
        assert path.exists()


def test_orphans_are_swept_and_live_builds_are_not(held) -> None:
    place, _, _ = held
    live = place / f".build-{KEY.entry}-abcdefgh"
    orphan = place / ".build-other-0123456789abcdef-abcdefgh"
    live.mkdir()
    orphan.mkdir()
    third = cache.Key("sm80", "third", "0" * 16)
    with cache.lock(place, third.entry), cache.private_folder(place, third.entry):
        assert live.exists()
        assert not orphan.exists()


def _publish_and_die(point: str) -> None:
    """Kill this process inside ``publish``, at the call of ``point``."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if point == "rename":
        Path.rename = die  # type: ignore[method-assign, assignment]
    else:
        setattr(cache, point, die)
    publish()


@pytest.mark.parametrize("point", ["_flush", "rename"])
def test_an_interrupted_publish_leaves_nothing_that_can_be_loaded(point: str) -> None:
    process = fork.Process(target=_publish_and_die, args=(point,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert cache.find(KEY, RUNTIME) is None
    place = publish().parent.parent
    assert cache.find(KEY, RUNTIME) is not None
    assert sorted(path.name for path in place.iterdir()) == [".locks", KEY.entry]


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(place))

    monkeypatch.setattr(cache, "_prepare", full)
    with pytest.raises(CacheError, match=r"(?s)no space left.*--prune.*COSATTN_CACHE_DIR"):
        cache.writable_folder(RUNTIME, "sm80")


def test_prune_removes_other_versions_and_debris_only(root: Path) -> None:
    library = publish()
    place = library.parent.parent
    cache.index(place, KEY, "print")
    (root / "v0.0.1" / "cu12-x86_64" / "sm80" / "old-0").mkdir(parents=True)
    (root / "notes.txt").write_text("not ours")
    for name in (".broken-x-0", ".failed", ".build-x-0123456789abcdef-abcdefgh"):
        (place / name).mkdir()
    assert {path.name for path in cache.prune()} == {
        "v0.0.1", ".index", ".broken-x-0", ".failed", ".build-x-0123456789abcdef-abcdefgh",
    }  # fmt: skip
    assert cache.find(KEY, RUNTIME) == library
    assert (root / "notes.txt").exists()
    assert cache.prune() == []


def test_manifests_lists_entries(root: Path) -> None:
    library = publish()
    (manifest,) = cache.manifests(root)
    assert manifest["path"] == str(library.parent)
    assert manifest == {**json.loads((library.parent / "manifest.json").read_text()), "path": manifest["path"]}
    assert (manifest["name"], manifest["digest"], manifest["arch"]) == (KEY.name, KEY.digest, KEY.arch)
