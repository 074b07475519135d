"""``python -m cosattn.warmup``: build kernels before they are needed, in parallel, with or without a GPU.

Beside a torch that has CUDA the host extension is built too, unless COSATTN_DISABLE_EXTENSION is set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from cosattn import build, cache, env, host_build, selection, support
from cosattn.arch import ARCHS, arch_of
from cosattn.errors import CosattnError
from cosattn.spec import KernelSpec

_BYTES_PER_COMPILER = 2 << 30


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one kernel, or of the host extension."""

    name: str
    status: str
    """``cached``, ``compiled``, ``failed``, or for a dry run ``missing``."""
    seconds: float
    path: str | None = None
    error: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 all built, 1 something failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.prune:
            return _prune()
        if options.list:
            return _list(options.json)
        specs, refused = _select(options, parser)
        for name, reasons in refused:
            print(f"not supported: {name}: {'; '.join(reasons)}", file=sys.stderr)
        if not specs:
            print("cosattn.warmup: no supported kernel is selected", file=sys.stderr)
            return 1
        jobs = options.jobs or default_jobs()
        tasks = _tasks(specs, dry_run=options.dry_run)
    except CosattnError as error:
        print(f"cosattn.warmup: {error}", file=sys.stderr)
        return 1
    # Asking for a build on the command line overrides a setting that is meant for the program being served.
    os.environ.pop("COSATTN_DISABLE_JIT", None)
    began = time.perf_counter()
    progress = Progress(len(tasks), sys.stderr)
    results = []
    for result in _run(tasks, 1 if options.dry_run else jobs):
        if options.output is not None and result.path is not None:
            cache.export(Path(result.path), options.output)
        results.append(result)
        progress.advance(result)
    progress.close()
    _report(results, time.perf_counter() - began, options)
    return 1 if any(result.status == "failed" for result in results) else 0


def default_jobs() -> int:
    """Compilers to run at once: COSATTN_JOBS, else MAX_JOBS, else one per core with 2 GiB of free memory each."""
    if (jobs := env.number("COSATTN_JOBS")) is not None:
        return jobs
    if os.environ.get("MAX_JOBS", "").isdecimal():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, _available_memory() // _BYTES_PER_COMPILER))


class Progress:
    """A bar on a terminal, one line per kernel elsewhere."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._done = 0
        self._began = time.perf_counter()
        self._stream = stream
        self._terminal = stream.isatty()

    def advance(self, result: Result) -> None:
        self._done += 1
        line = f"{result.status:8} {result.seconds:6.1f} s  {result.name}"
        if not self._terminal:
            print(f"[{self._done}/{self._total}] {line}", file=self._stream, flush=True)
            return
        filled = 24 * self._done // self._total
        spent = time.perf_counter() - self._began
        left = spent / self._done * (self._total - self._done)
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] {self._done}/{self._total} {left:4.0f} s left  {line}"
        self._stream.write("\r\033[K" + bar[: os.get_terminal_size(self._stream.fileno()).columns - 1])
        self._stream.flush()

    def close(self) -> None:
        if self._terminal:
            print(file=self._stream)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cosattn.warmup", description=(__doc__ or "").partition("\n")[0])
    selection.add_arguments(parser)
    parser.add_argument("--jobs", type=_positive, metavar="N", help="compilers at once; default: from cores and memory")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="also copy the kernels there, for COSATTN_PREBUILT_DIR"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what is cached and what would be compiled")
    parser.add_argument("--list", action="store_true", help="list the kernels in the cache and stop")
    parser.add_argument("--prune", action="store_true", help="remove kernels of other versions and debris, and stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser


def _select(
    options: argparse.Namespace, parser: argparse.ArgumentParser
) -> tuple[list[KernelSpec], list[tuple[str, list[str]]]]:
    archs = options.arch
    if archs is None:
        found = [arch_of(torch.cuda.get_device_capability(index)) for index in range(torch.cuda.device_count())]
        archs = list(dict.fromkeys(arch.name for arch in found if arch is not None))
        if not archs:
            parser.error(f"no GPU that cosattn has kernels for is in this machine: give --arch ({', '.join(ARCHS)})")
    specs, refused = [], []
    for spec in selection.specs(options, archs):
        if reasons := support.reasons(spec):
            refused.append((spec.name, reasons))
        else:
            specs.append(spec)
    return specs, refused


def _tasks(specs: list[KernelSpec], *, dry_run: bool) -> dict[str, Callable[[], Result]]:
    """What is to be done, by name. The extension comes first: it takes longest."""
    tasks: dict[str, Callable[[], Result]] = {}
    if _wants_extension():
        tasks[host_build.NAME] = partial(_one, host_build.NAME, host_build.find, None if dry_run else host_build.ensure)
    for spec in specs:
        make = None if dry_run else partial(build.ensure, spec)
        tasks[spec.name] = partial(_one, spec.name, partial(build.find, spec), make)
    return tasks


def _wants_extension() -> bool:
    return torch.version.cuda is not None and not env.flag("COSATTN_DISABLE_EXTENSION")


def _run(tasks: dict[str, Callable[[], Result]], jobs: int) -> Iterator[Result]:
    if jobs == 1 or len(tasks) == 1:
        yield from (task() for task in tasks.values())
        return
    # forkserver: torch is imported once, and no thread of this process is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cosattn.build"])
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        waiting = {pool.submit(task): name for name, task in tasks.items()}
        try:
            for future in as_completed(waiting):
                try:
                    yield future.result()
                except BrokenProcessPool:
                    yield Result(waiting[future], "failed", 0.0, error="a build process was killed (out of memory?)")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one(name: str, find: Callable[[], Path | None], make: Callable[[], Path] | None) -> Result:
    """Look one thing up, and make it where it is missing and ``make`` says how."""
    began = time.perf_counter()
    try:
        found = find()
        if found is None and make is None:
            return Result(name, "missing", 0.0)
        made = found or (make and make())
    except CosattnError as error:
        return Result(name, "failed", time.perf_counter() - began, error=str(error))
    return Result(name, "cached" if found else "compiled", time.perf_counter() - began, str(made))


def _report(results: list[Result], seconds: float, options: argparse.Namespace) -> None:
    if options.json:
        kernels = [asdict(result) for result in sorted(results, key=lambda result: result.name)]
        json.dump({"seconds": seconds, "kernels": kernels}, sys.stdout, indent=2)
        print()
        return
    for result in results:
        if result.error is not None:
            print(f"\nFAILED {result.name}\n{result.error}", file=sys.stderr)
    counts = {status: sum(result.status == status for result in results) for status in _STATUSES}
    print(", ".join(f"{count} {status}" for status, count in counts.items() if count), f"in {seconds:.1f} s")
    if options.output is not None:
        print(f"kernels copied to {options.output}: set COSATTN_PREBUILT_DIR to it on the other machine")


_STATUSES = ("compiled", "cached", "missing", "failed")


def _list(as_json: bool) -> int:
    root = cache.configured_root()
    kernels = [] if root is None else cache.manifests(root)
    if as_json:
        json.dump({"root": str(root), "kernels": kernels}, sys.stdout, indent=2)
        print()
        return 0
    for kernel in kernels:
        size = kernel["size"] / 1024
        print(
            f"{kernel['cosattn']}  {size:8.0f} KiB  {kernel['seconds']:5.1f} s  {kernel['name']}  {kernel['compiler']}"
        )
    print(f"{len(kernels)} kernels in {root}")
    return 0


def _prune() -> int:
    removed = cache.prune()
    for path in removed:
        print(f"removed {path}")
    print(f"{len(removed)} removed")
    return 0


def _available_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
