#!/usr/bin/env python3
"""Hardware counters of one attention call, by Nsight Compute: pipes, issue slots, memory, occupancy, why warps wait.

    python scripts/counters.py                                    forward, d 64, S 4096, full
    python scripts/counters.py --head-dim 64 128 --causal both --contender cosattn fa3
    python scripts/counters.py --direction backward --seq-len 1024 16384

16k tokens of hidden size 2048, as in the suite `hopper`; one column for each kernel of the call. Clocks are left alone.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baselines import RIVALS
from cases import OURS, SCALE, Case, cosattn_work, make_inputs
from hopper import place, square_case

from cosattn.bench import Work, directions, table

SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "ComputeWorkloadAnalysis")
MARKER = "spin_kernel"
"""Kernel of ``torch.cuda._sleep``, launched before each call to tell the calls apart."""
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
ACTIVE, ELAPSED = ".avg.pct_of_peak_sustained_active", ".avg.pct_of_peak_sustained_elapsed"


@dataclass(frozen=True)
class Counter:
    """One line of the table: the first of the metrics that this version of Nsight Compute has."""

    name: str
    metrics: Sequence[str]
    factor: float = 1.0
    digits: int = 1


COUNTERS = (
    Counter("time, µs", ("gpu__time_duration.sum",), 1e-3),
    Counter("SM clock, MHz", ("gpc__cycles_elapsed.avg.per_second", "sm__cycles_elapsed.avg.per_second"), 1e-6, 0),
    Counter(
        "tensor pipe, %",
        tuple(f"sm__pipe_tensor{kind}_cycles_active{ACTIVE}" for kind in ("", "_op_gmma", "_op_hmma")),
    ),
    Counter(
        "tensor instructions, %",
        tuple(f"sm__inst_executed_pipe_tensor{kind}{ACTIVE}" for kind in ("_op_gmma", "_op_hmma", "")),
    ),
    Counter("MUFU (XU), %", (f"sm__inst_executed_pipe_xu{ACTIVE}",)),
    Counter("ALU, %", (f"sm__inst_executed_pipe_alu{ACTIVE}",)),
    Counter("FMA, %", (f"sm__inst_executed_pipe_fma{ACTIVE}",)),
    Counter("issue, %", (f"smsp__issue_active{ACTIVE}",)),
    Counter(
        "shared memory, %",
        (f"l1tex__data_pipe_lsu_wavefronts_mem_shared{ELAPSED}", f"l1tex__data_pipe_lsu_wavefronts{ACTIVE}"),
    ),
    Counter("bank conflicts", ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",), 1, 0),
    Counter("L1, %", (f"l1tex__throughput{ACTIVE}",)),
    Counter("L2, %", (f"lts__throughput{ELAPSED}",)),
    Counter("L2 hits, %", ("lts__t_sector_hit_rate.pct",)),
    Counter("DRAM, %", (f"gpu__dram_throughput{ELAPSED}", f"dram__throughput{ELAPSED}")),
    Counter("registers a thread", ("launch__registers_per_thread",), 1, 0),
    Counter("shared memory a block, KiB", ("launch__shared_mem_per_block",), 1 / 1024),
    Counter("blocks", ("launch__grid_size",), 1, 0),
    Counter("occupancy, %", (f"sm__warps_active{ACTIVE}",)),
)
Kernel = dict[str, str]


# In the process that is profiled


def work_of(case: Case, contender: str) -> Work:
    """One call of cosattn on raw inputs, or of a rival on normalised ones."""
    x = make_inputs(case, torch.device("cuda"), heads_last=True)
    if contender == OURS:
        return cosattn_work(case, x)
    rival = RIVALS[contender]()
    q, k = (F.normalize(t.detach(), dim=-1).requires_grad_() for t in (x.q, x.k))
    return directions(lambda: rival.attention(q, k, x.v, SCALE, case.causal), (q, k, x.v), case.direction)


def profiled(calls: Iterable[tuple[Case, str]]) -> None:
    """Run every call, counters on for the last of three; a contender that fails leaves its marker alone."""
    for case, contender in calls:
        work: Work | None = None
        try:
            work = work_of(case, contender)
            for _ in range(2):
                work()
        except Exception as error:
            print(f"{contender}, {place(vars(case))}: {type(error).__name__}: {error}", file=sys.stderr)
            work = None
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        if work is not None:
            work()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


# What Nsight Compute says


def known(metrics: Iterable[str], listing: str) -> list[str]:
    """The metrics that ``ncu --query-metrics`` lists (all if it lists none); of the launch it never lists any."""
    names = {line.split()[0] for line in listing.splitlines() if "__" in line}
    return [m for m in metrics if not names or m.startswith("launch__") or m.partition(".")[0] in names]


def calls_of(report: str) -> list[list[Kernel]]:
    """The kernels of each marked call in the raw page as CSV: a line of names, a line of units, a line a kernel."""
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    calls: list[list[Kernel]] = []
    for kernel in csv.DictReader(lines[start:]):
        if not kernel["ID"]:
            continue
        if MARKER in kernel["Kernel Name"]:
            calls.append([])
        elif calls:
            calls[-1].append(kernel)
    return calls


def number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # n/a, or a unit this script does not know
        return None


def shown(counter: Counter, kernel: Kernel) -> str:
    """The first metric with a value."""
    for metric in counter.metrics:
        if (value := number(kernel.get(metric))) is not None:
            return f"{value * counter.factor:.{counter.digits}f}"
    return "-"


def stalls(kernel: Kernel) -> list[tuple[float, str]]:
    """Average number of warps that wait for each reason, per instruction issued, the largest first."""
    found = [
        (value, match[1])
        for name, text in kernel.items()
        if (match := STALL.fullmatch(name)) and match[1] != "selected" and (value := number(text)) is not None
    ]
    return sorted(found, reverse=True)


def short(name: str) -> str:
    """A kernel's name without its arguments and template parameters."""
    return re.split(r"[<(]", name.removeprefix("void "))[0].split("::")[-1][:36]


def table_of(kernels: Sequence[Kernel], reasons: int = 5) -> str:
    """One column a kernel; what no kernel has is left out."""
    lines = [[counter.name, *(shown(counter, kernel) for kernel in kernels)] for counter in COUNTERS]
    ranked = [stalls(kernel) for kernel in kernels]
    for rank in range(reasons):
        lines.append(
            [f"stall {rank + 1}", *(f"{s[rank][1]} {s[rank][0]:.2f}" if rank < len(s) else "-" for s in ranked)]
        )
    lines = [line for line in lines if set(line[1:]) != {"-"}]
    return table(["", *(short(kernel["Kernel Name"]) for kernel in kernels)], lines)


def find_ncu() -> str | None:
    return shutil.which("ncu") or next((str(p) for p in sorted(Path("/usr/local").glob("cuda*/bin/ncu"))), None)


def profile(ncu: str, arguments: Sequence[str]) -> str:
    """The CSV of all calls of the command line."""
    query = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True, check=False)
    metrics = known([m for counter in COUNTERS for m in counter.metrics], query.stdout)
    with tempfile.TemporaryDirectory(prefix="cosattn-ncu-") as folder:
        log = Path(folder) / "report.csv"
        command = [
            ncu,
            "--profile-from-start",
            "off",
            "--clock-control",
            "none",
            "--target-processes",
            "application-only",
        ]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--metrics", ",".join(metrics), "--csv", "--page", "raw", "--print-units", "base"]
        command += ["--log-file", str(log), sys.executable, __file__, "--profiled", *arguments]
        subprocess.run(command, check=False)
        return log.read_text() if log.exists() else ""


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--head-dim", nargs="+", type=int, default=[64])
    p.add_argument("--seq-len", nargs="+", type=int, default=[4096])
    p.add_argument("--causal", choices=["no", "yes", "both"], default="no")
    p.add_argument("--direction", choices=["forward", "backward"], default="forward")
    p.add_argument("--contender", nargs="+", choices=[OURS, *RIVALS], default=[OURS])
    p.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    return p


def calls_asked(args: argparse.Namespace) -> list[tuple[Case, str]]:
    return [
        (square_case(head_dim, length, causal, args.direction), contender)
        for head_dim in args.head_dim
        for length in args.seq_len
        for causal in {"no": [False], "yes": [True], "both": [False, True]}[args.causal]
        for contender in args.contender
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a call has no counters."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(words)
    asked = calls_asked(args)
    if args.profiled:
        profiled(asked)
        return 0
    ncu = find_ncu()
    if ncu is None or not torch.cuda.is_available():
        print("counters take a GPU and Nsight Compute (ncu)", file=sys.stderr)
        return 2
    report = profile(ncu, words)
    calls = calls_of(report)
    if len(calls) != len(asked):
        print(f"Nsight Compute reported {len(calls)} of {len(asked)} calls:\n{report[-2000:]}")
    for (case, contender), kernels in zip(asked, calls, strict=False):
        print(f"\n{contender}, {place(vars(case))}, {case.direction}")
        print(table_of(kernels) if kernels else "did not run")
    return 0 if len(calls) == len(asked) and all(calls) else 1


if __name__ == "__main__":
    sys.exit(main())
