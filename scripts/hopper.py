"""The suites for a Hopper GPU: the grid against its fastest kernels, what a user runs today, long sequences, and power.

hopper   raw q and k for cosattn, with the L2 norm inside its time; normalised inputs, and no norm, for the others, and
         in the forward for cosattn once more, which shows what its norm costs
today    the others normalise too, compiled by torch.compile, as they have to without cosattn
flat     cosattn alone from 64k to 1M tokens: a kernel that streams keeps its speed
product  beside a plain matrix product: what the tensor cores reach at the clock that the power limit leaves them
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from baselines import RIVALS, Rival
from cases import OURS, SCALE, Case, Inputs, cosattn_work, make_inputs, operations, row_of
from torch import Tensor

from cosattn import cosine_attention
from cosattn.bench import Stopwatch, directions, table

HEAD_DIMS = (32, 64, 96, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 65536)
SHORT_LENGTHS = (512, 1024, 2048, 4096)
PRODUCT_LENGTHS = (4096, 8192, 16384)
LONG_LENGTHS = (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
TOKENS, HIDDEN = 16384, 2048
LONG_WORK = 3e14
"""Operations of one call of ``flat``, about half a second; a single head of the longest may take more."""

NO_NORM = f"{OURS}, no norm"
PRODUCT = "matrix product"
PRODUCT_SIZE = 8192
"""Rows and columns of its operands: sixteen rounds of tiles for 132 multiprocessors, the last one nearly full."""

Row = dict[str, Any]


# Cases


def masks(args: argparse.Namespace) -> list[bool]:
    """Values of ``causal``."""
    return [False] * (not args.causal_only) + [True] * (not args.full_only)


def square_case(head_dim: int, length: int, causal: bool, direction: str) -> Case:
    """16k tokens, or one longer sequence, of hidden size 2048."""
    return Case(
        "bfloat16", max(1, TOKENS // length), round(HIDDEN / head_dim), head_dim, length, direction, causal=causal
    )


def grid(args: argparse.Namespace, lengths: Sequence[int], default_directions: Sequence[str]) -> list[Case]:
    """Every combination that the command line leaves."""
    return [
        square_case(head_dim, length, causal, direction)
        for direction in args.direction or default_directions
        for head_dim in args.head_dim or HEAD_DIMS
        for length in args.seq_len or lengths
        for causal in masks(args)
    ]


def hopper_cases(args: argparse.Namespace) -> list[Case]:
    return grid(args, LENGTHS, ["forward"])


def today_cases(args: argparse.Namespace) -> list[Case]:
    return grid(args, SHORT_LENGTHS, ["forward", "both"])


def flat_cases(args: argparse.Namespace) -> list[Case]:
    """As many heads, up to 16, as ``LONG_WORK`` allows."""
    return [
        Case("bfloat16", 1, heads, head_dim, length, "forward", causal)
        for head_dim in args.head_dim or (64, 128)
        for causal in masks(args)
        for length in args.seq_len or LONG_LENGTHS
        for heads in [max(1, min(16, int(LONG_WORK / (4 * length**2 * head_dim))))]
    ]


def product_cases(args: argparse.Namespace) -> list[Case]:
    return grid(args, PRODUCT_LENGTHS, ["forward"])


# Measuring one case


def run_hopper(case: Case, stopwatch: Stopwatch, rivals: Sequence[Rival]) -> Row:
    """Ours with the L2 norm; theirs, and our forward without, on inputs normalised beforehand. Tensors stored
    (B, S, H, D)."""
    x = make_inputs(case, stopwatch.device, heads_last=True)
    ours = {NO_NORM: no_norm_work(case, x)} if False in norms(case) else {}
    return compare(case, x, stopwatch, ours | bare_works(case, x, rivals))


def run_today(case: Case, stopwatch: Stopwatch, rivals: Sequence[Rival]) -> Row:
    """Theirs normalise: all of it compiled where torch.compile takes the kernel, else the normalisation alone."""
    x = make_inputs(case, stopwatch.device, heads_last=True)
    return compare(case, x, stopwatch, compiled_works(case, x, rivals))


def compile_today(case: Case, device: torch.device, rival: Callable[[], Rival] = RIVALS["cudnn"]) -> None:
    """Leave in the compiler's cache what ``run_today`` compiles of a case: a rival, and the normalisation alone."""
    x, whole = make_inputs(case, device, heads_last=True), rival()
    for work in compiled_works(case, x, [whole, replace(whole, name="norm alone", compiles=False)]).values():
        work()


def run_flat(case: Case, stopwatch: Stopwatch) -> Row:
    """cosattn alone."""
    return compare(case, make_inputs(case, stopwatch.device, heads_last=True), stopwatch, {})


def run_product(case: Case, stopwatch: Stopwatch) -> Row:
    """cosattn beside a product of two bfloat16 matrices of random normal numbers, whose time is that of as many
    operations as the case has."""
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device=stopwatch.device) for _ in range(2))
    x = make_inputs(case, stopwatch.device, heads_last=True)
    timings = stopwatch.compare({OURS: cosattn_work(case, x), PRODUCT: lambda: a @ b})
    product = timings[PRODUCT]
    if product.milliseconds is not None:
        ratio = operations(case) / (2 * PRODUCT_SIZE**3)
        timings[PRODUCT] = replace(product, milliseconds=product.milliseconds * ratio)
    return row_of(case, timings)


def compiled_works(case: Case, x: Inputs, rivals: Iterable[Rival]) -> dict[str, Callable[[], object]]:
    """The side of each rival that is able, on raw inputs."""
    torch.compiler.reset()

    def normalize(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)

    compiled = torch.compile(normalize, dynamic=False)

    def theirs(rival: Rival) -> Callable[[], object]:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return rival.attention(*(normalize if rival.compiles else compiled)(q, k), v, SCALE, case.causal)

        whole = torch.compile(attention, dynamic=False) if rival.compiles else attention
        return directions(lambda: whole(x.q, x.k, x.v), x.all, case.direction)

    return {f"{rival.name}, compiled": theirs(rival) for rival in able(rivals, case)}


def bare_works(case: Case, x: Inputs, rivals: Iterable[Rival]) -> dict[str, Callable[[], object]]:
    """The side of each rival that is able, on inputs normalised beforehand."""
    inputs = normalized(x)

    def theirs(rival: Rival) -> Callable[[], object]:
        return directions(lambda: rival.attention(*inputs, SCALE, case.causal), inputs, case.direction)

    return {rival.name: theirs(rival) for rival in able(rivals, case)}


def norms(case: Case) -> tuple[bool, ...]:
    """Whether the calls of cosattn that ``run_hopper`` times have the L2 norm."""
    return (True, False) if case.direction == "forward" else (True,)


def no_norm_work(case: Case, x: Inputs) -> Callable[[], object]:
    """Our side of a case on inputs normalised beforehand."""
    q, k, v = normalized(x)
    return directions(
        lambda: cosine_attention(q, k, v, scale=SCALE, causal=case.causal, l2norm_qk=False), (q, k, v), case.direction
    )


def normalized(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of unit length, as leaves of their own, and v."""
    q, k = (F.normalize(t.detach(), dim=-1).requires_grad_() for t in (x.q, x.k))
    return q, k, x.v


def able(rivals: Iterable[Rival], case: Case) -> list[Rival]:
    """Those that have what the direction takes."""
    return [rival for rival in rivals if rival.backward or case.direction == "forward"]


def compare(case: Case, x: Inputs, stopwatch: Stopwatch, theirs: dict[str, Callable[[], object]]) -> Row:
    return row_of(case, stopwatch.compare({OURS: cosattn_work(case, x)} | theirs))


# What the rows say


def best_rival(row: Row) -> tuple[str, float] | None:
    """The fastest of the others, and how many times faster cosattn is. None when either side is missing."""
    ratios: dict[str, float] = {name: ratio for name, ratio in row["ratios"].items() if name != NO_NORM}
    name = min(ratios, key=lambda n: ratios[n], default=None)
    return None if name is None else (name, ratios[name])


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def place(case: Row) -> str:
    return f"d {case['head_dim']} S {case['seq_len']}{' causal' * case['causal']}"


@dataclass(frozen=True)
class Standing:
    """Of cosattn beside the best of the others, over the cases of a direction and a group of head dims."""

    direction: str
    group: str
    ratios: list[float]
    wheres: list[str]
    """The case of each ratio, and who was best."""
    no_norm: list[float]
    """The ratios that cosattn has without its norm, where it was timed without."""

    @property
    def mean(self) -> float:
        return geometric_mean(self.ratios)

    @property
    def mean_without(self) -> float | None:
        """None unless all cases were timed without the norm."""
        return geometric_mean(self.no_norm) if len(self.no_norm) == len(self.ratios) else None


def standings(rows: Iterable[Row]) -> list[Standing]:
    """By direction, then by head dim as they were measured, then all of them."""
    found: dict[tuple[str, str], Standing] = {}
    for row in rows:
        if (best := best_rival(row)) is None:
            continue
        case, (name, ratio) = row["case"], best
        for group in (f"d {case['head_dim']}" if case["head_dim"] > 64 else "d ≤ 64", "all"):
            standing = found.setdefault((case["direction"], group), Standing(case["direction"], group, [], [], []))
            standing.ratios.append(ratio)
            standing.wheres.append(f"{place(case)}, {name}")
            if NO_NORM in row["ratios"]:
                standing.no_norm.append(ratio / row["ratios"][NO_NORM])
    return sorted(found.values(), key=lambda standing: (standing.direction, standing.group == "all"))


def summary_table(rows: Iterable[Row]) -> str:
    """A line for each standing, with a column for the mean without the norm where that was timed; empty without any."""
    header = ["cosattn / best rival", "cases", "geometric mean", "minimum", "where"]
    found = standings(rows)
    lines = []
    for standing in found:
        least, where = min(zip(standing.ratios, standing.wheres, strict=True))
        name = f"{standing.direction}, {standing.group}"
        lines.append([name, str(len(standing.ratios)), f"{standing.mean:.3f}×", f"{least:.3f}×", where])
    if any(standing.mean_without for standing in found):
        header.append("mean without its norm")
        for line, standing in zip(lines, found, strict=True):
            line.append(f"{standing.mean_without:.3f}×" if standing.mean_without else "-")
    return table(header, lines) if lines else ""


def summary(rows: Sequence[Row]) -> str:
    """The ratios in brief, then what failed and how often."""
    failures = Counter(
        f"{name}: {timing['note']}"
        for row in rows
        for name, timing in row["timings"].items()
        if timing["milliseconds"] is None
    )
    lines = [f"failed in {count} of {len(rows)} cases: {what}" for what, count in failures.items()]
    return "\n".join([summary_table(rows) or "no case has both sides", *lines])


def flat_summary(rows: Sequence[Row]) -> str:
    """How far the speeds of one head dim and mask lie apart."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if OURS in row["tflops"]:
            case = row["case"]
            groups.setdefault(f"d {case['head_dim']}{' causal' * case['causal']}", []).append(row["tflops"][OURS])
    lines = [
        [name, f"{min(rates):.0f}", f"{max(rates):.0f}", f"{1 - min(rates) / max(rates):.1%}"]
        for name, rates in groups.items()
    ]
    return table(["TFLOP/s", "least", "most", "spread"], lines) if lines else "nothing was measured"


def rates_line(row: Row) -> str:
    """TFLOP/s of each contender, the ratio to the best rival, clock and power while cosattn ran."""
    rates = [
        f"{name} {row['tflops'][name]:.0f}" if name in row["tflops"] else f"{name} failed ({timing['note'][:60]})"
        for name, timing in row["timings"].items()
    ]
    ours, best = row["timings"][OURS], best_rival(row)
    ratio = f"; {best[1]:.2f}× {best[0]}" if best else ""
    heat = f"; {ours['sm_clock_mhz']:.0f} MHz {ours['power_w']:.0f} W" if ours["sm_clock_mhz"] else ""
    return f"{place(row['case'])} {row['case']['direction']}: {', '.join(rates)} TFLOP/s{ratio}{heat}"
