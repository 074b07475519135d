"""``python -m cosattn.doctor``: what cosattn finds on this machine. Every probe is guarded; the exit status is 0."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cosattn import cache, env, toolchain
from cosattn._version import __version__
from cosattn.arch import ARCHS, arch_of
from cosattn.errors import CosattnError

Facts = dict[str, object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report, as text or with ``--json``."""
    parser = argparse.ArgumentParser(prog="python -m cosattn.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    report = examine()
    if options.json:
        json.dump(report, sys.stdout, indent=2, default=str)
        print()
        return 0
    for section, facts in report.items():
        print(section)
        for name, fact in facts.items():
            first, *more = fact if isinstance(fact, list) and fact else [fact]
            print(f"  {name:24} {_text(first)}")
            for line in more:
                print(f"  {'':24} {_text(line)}")
    return 0


def examine() -> dict[str, Facts]:
    """Section -> name -> fact. A probe that fails becomes a fact that says so."""
    probes: dict[str, Callable[[], Facts]] = {
        "system": _system,
        "torch": _torch,
        "GPUs": _gpus,
        "compiler": _compiler,
        "kernel cache": _cache,
        "environment": _environment,
        "verdict": _verdict,
    }
    return {section: _guarded(probe) for section, probe in probes.items()}


def _guarded(probe: Callable[[], Facts]) -> Facts:
    try:
        return probe()
    except Exception as error:  # a broken machine is what this command is for
        return {"probe failed": f"{type(error).__name__}: {error}"}


def _system() -> Facts:
    return {
        "cosattn": __version__,
        "installed at": Path(__file__).parent,
        "Python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _torch() -> Facts:
    import torch

    return {
        "version": torch.__version__,
        "built with CUDA": torch.version.cuda or "no (a CPU build: tensors on a GPU are impossible)",
        "CUDA available": torch.cuda.is_available(),
        "driver": _driver() or "none found",
    }


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
    except OSError:
        return None


def _gpus() -> Facts:
    import torch

    gpus: Facts = {}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        arch = arch_of(capability)
        served = f"kernels: {arch.name}" if arch else f"no kernels (cosattn knows {', '.join(ARCHS)})"
        gpus[f"cuda:{index}"] = (
            f"{torch.cuda.get_device_name(index)}, capability {capability[0]}.{capability[1]}, {served}"
        )
    return gpus or {"found": "none"}


def _compiler() -> Facts:
    cxx, cxx_problem = toolchain.host_compiler()
    ninja, ninja_problem = toolchain.find_ninja()
    kits = toolchain.toolkits()
    return {
        "nvcc, in order of choice": [kit.describe() for kit in kits]
        or "none (searched CUDA_HOME, CUDA_PATH, pip's nvidia packages, PATH, /usr/local/cuda*)",
        "host compiler": cxx or cxx_problem,
        "ninja": ninja or ninja_problem,
    }


def _cache() -> Facts:
    root = cache.configured_root()
    facts: Facts = {
        "root": root or "none: there is no home directory",
        "searched": list(map(str, cache.levels())) or "-",
    }
    if root is None:
        return facts
    parent = next(path for path in (root, *root.parents) if path.exists())
    facts["writable"] = os.access(parent, os.W_OK)
    facts["free"] = f"{shutil.disk_usage(parent).free / 2**30:.1f} GiB on {_file_system(parent)}"
    try:
        cache.refuse_shared(root)
    except CosattnError as error:
        facts["refused"] = str(error).partition("\n")[0]
    kernels = cache.manifests(root)
    facts["kernels"] = f"{len(kernels)}, {sum(kernel['size'] for kernel in kernels) / 2**20:.1f} MiB"
    return facts


def _file_system(path: Path) -> str:
    """Type of the file system of a path: locks and renames behave differently on network ones."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, mount_kind, *_ = line.split()
        if len(mount) >= len(best) and path.resolve().is_relative_to(mount):
            best, kind = mount, mount_kind
    return kind


def _environment() -> Facts:
    facts: Facts = {name: env.text(name) or f"unset. {meaning}" for name, meaning in env.VARIABLES.items()}
    for name in ("CUDA_HOME", "CUDA_PATH", "CC", "CXX", "MAX_JOBS", "XDG_CACHE_HOME"):
        facts[name] = os.environ.get(name) or "unset"
    if names := env.unknown():
        facts["unknown"] = f"{', '.join(names)}: not a variable of cosattn"
    return facts


def _verdict() -> Facts:
    """Whether this machine can run kernels, and whether it can build them, with the reason for each no."""
    import torch

    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    archs = [arch for capability in capabilities if (arch := arch_of(capability))]
    facts: Facts = {
        "runs kernels": "yes" if archs else "no: no GPU with a kernel; CPU tensors use the CPU path",
    }
    target = archs[0] if archs else ARCHS["sm80"]
    try:
        tools = toolchain.find(target, torch.version.cuda)
        facts["builds kernels"] = f"yes, for {target.name}: {tools.identity}"
    except CosattnError as error:
        facts["builds kernels"] = ["no:", *str(error).splitlines()]
    facts["host extension"] = _host_extension()
    if env.flag("COSATTN_DISABLE_JIT"):
        facts["just-in-time builds"] = "switched off (COSATTN_DISABLE_JIT)"
    return facts


def _host_extension() -> str:
    """Whether calls take C++ or Python on their way to the kernels, and why."""
    import torch

    from cosattn import host_build

    if env.flag("COSATTN_DISABLE_EXTENSION"):
        return "switched off (COSATTN_DISABLE_EXTENSION)"
    if torch.version.cuda is None:
        return "not used: torch is a CPU build"
    try:
        if (found := host_build.find()) is not None:
            return f"built: {found.parent}"
        return host_build.why_not() or "not built: the first call on a GPU builds it in the background, or warmup"
    except CosattnError as error:
        return f"no: {str(error).partition(chr(10))[0]}"


def _text(fact: object) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    return str(fact)


if __name__ == "__main__":
    sys.exit(main())
