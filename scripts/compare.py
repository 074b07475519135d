#!/usr/bin/env python3
"""Versions of cosattn beside each other, in turns within one process: what a change gains, and whether it is right.

    git worktree add /tmp/before HEAD~1
    python scripts/compare.py --with before=/tmp/before --head-dim 64 128 --seq-len 512 1024
    python scripts/compare.py --with before=/tmp/before --heads 64 --direction backward --rivals cudnn,fa3

Each folder holds another checkout (its ``cosattn`` and ``kernels_templates``), which is copied and imported under a
name of its own. A row has the microseconds of each version and rival (rivals get normalised inputs), then what the
results of each version are: the error of forward outputs against float64 (up to S 16384), else the largest difference
from what this checkout gives, and MOVES where three calls did not give the same bits.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from baselines import RIVALS, load_rivals, rival_names
from cases import SCALE, Case, Inputs, make_inputs, relative_error
from hopper import bare_works, grid
from torch import Tensor

import cosattn
from cosattn.bench import DTYPES, Stopwatch, directions, table
from cosattn.reference import cosine_attention_reference

HERE = "this"
REST_S = 0.1
"""Before each case, so that none is timed on what the one before has heated."""
BUILDERS = 14
"""Kernels that are built at a time."""
SAMPLES = 3
"""Heads whose outputs are computed in float64 ..."""
LONGEST_EXACT = 16384
"""... up to this length: it takes all logits of a head."""


def load(name: str, folder: Path, target: Path) -> ModuleType:
    """The package of another checkout, copied to ``target`` and imported as ``cosattn_<name>``."""
    package = f"cosattn_{name}"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(folder / "cosattn", target / name / package, ignore=ignored)
    shutil.copytree(folder / "kernels_templates", target / name / "kernels_templates", ignore=ignored)
    for path in (target / name).rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace("cosattn", package))
    sys.path.insert(0, str(target / name))
    return importlib.import_module(package)


def work_of(module: ModuleType, case: Case, x: Inputs) -> Callable[[], object]:
    """A version's side of a case."""
    torch.manual_seed(1)  # the gradient of the output
    return directions(
        lambda: module.cosine_attention(x.q, x.k, x.v, scale=SCALE, causal=case.causal), x.all, case.direction
    )


def tensors(result: object) -> list[Tensor]:
    """What one call gave: the output, or gradients."""
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]  # type: ignore[attr-defined]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative one."""
    pairs = zip(found, expected, strict=True)
    return max(relative_error(a, b) for a, b in pairs)


def error(out: Tensor, case: Case, x: Inputs) -> float:
    """Of some heads of an output, against float64."""
    heads = [(i * (case.batch - 1) // 2, i * (case.heads - 1) // 2) for i in range(SAMPLES)]

    def some(t: Tensor) -> Tensor:
        return torch.stack([t.detach()[b, h] for b, h in heads])[None]

    q, k, v = (some(t).double() for t in (x.q, x.k, x.v))
    return difference([some(out)], [cosine_attention_reference(q, k, v, scale=SCALE, causal=case.causal)])


def verdicts(case: Case, x: Inputs, versions: dict[str, ModuleType]) -> list[str]:
    """What is said of each version's results."""
    said, ours = [], None
    for module in versions.values():
        work = work_of(module, case, x)
        found = tensors(work())
        ours = ours or found
        exact = case.direction == "forward" and case.seq_len <= LONGEST_EXACT
        wrong = error(found[0], case, x) if exact else difference(found, ours)
        again = all(torch.equal(a, b) for _ in range(2) for a, b in zip(tensors(work()), found, strict=True))
        said.append(f"{wrong:.1e}{'' if again else ' MOVES'}")
    return said


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Every combination of the command line: 16k tokens of hidden size 2048, or so many heads of one sequence."""
    found = [replace(case, dtype=args.dtype) for case in grid(args, args.seq_len, args.direction)]
    return [replace(case, batch=1, heads=args.heads) for case in found] if args.heads else found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a version could not run a case."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--with", dest="others", nargs="+", default=[], metavar="NAME=DIR", help="other checkouts")
    p.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    p.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    p.add_argument("--seq-len", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    p.add_argument("--heads", type=int, help="of one sequence, instead of 16k tokens of hidden size 2048")
    p.add_argument("--direction", nargs="+", choices=["forward", "backward", "both"], default=["forward"])
    only = p.add_mutually_exclusive_group()
    only.add_argument("--causal-only", action="store_true")
    only.add_argument("--full-only", action="store_true")
    p.add_argument(
        "--rivals",
        type=rival_names,
        default=[],
        help=f"of {','.join(RIVALS)}; what can not be imported is left out",
    )
    p.add_argument("--budget", type=float, default=0.1, help="seconds of measuring for each contender of each case")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(arguments)
    device, cases = torch.device(args.device), cases_of(args)
    rivals, missing = load_rivals(args.rivals)
    if missing:
        print(f"missing: {missing}")
    stopwatch = Stopwatch(device, budget_s=args.budget)
    with tempfile.TemporaryDirectory() as folder:
        versions = {HERE: cosattn}
        for other in args.others:
            name, _, path = other.partition("=")
            if not name.isidentifier() or name in versions or not (Path(path) / "cosattn").is_dir():
                p.error(f"--with takes NAME=DIR, a new name and a folder that holds a checkout, not {other!r}")
            versions[name] = load(name, Path(path), Path(folder))

        def build(job: tuple[ModuleType, Case]) -> None:
            module, case = job
            work_of(module, case, make_inputs(case, device, heads_last=True))()

        with ThreadPoolExecutor(BUILDERS if device.type == "cuda" else 1) as builders:
            list(builders.map(build, [(module, case) for case in cases for module in versions.values()]))
        names = [*versions, *(rival.name for rival in rivals)]
        lines, failed = [], False
        for case in cases:
            x = make_inputs(case, device, heads_last=True)
            contenders = {name: work_of(module, case, x) for name, module in versions.items()}
            contenders |= bare_works(case, x, rivals)
            said = verdicts(case, x, versions)
            time.sleep(REST_S)
            timings = stopwatch.compare(contenders)
            failed |= any(timings[name].milliseconds is None for name in versions)
            times = {name: f"{t.milliseconds * 1e3:.1f}" for name, t in timings.items() if t.milliseconds is not None}
            lines.append([case.label, *(times.get(name, "-") for name in names), *said])
            print(" ".join(lines[-1]), file=sys.stderr, flush=True)
        print(table(["case", *(f"{name}, us" for name in names), *versions], lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
