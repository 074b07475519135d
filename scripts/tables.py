#!/usr/bin/env python3
"""Write the generated parts of README.md and docs/: the support matrix, the environment variables and every result.

    python scripts/tables.py            rewrite what lies between the markers, and the plots
    python scripts/tables.py --check    change nothing; exit status 1 and a list when something is out of date

A generated part lies between `<!-- begin NAME -->` and `<!-- end NAME -->`, where NAME is a key of BLOCKS.
Results come from docs/results/*.json, which scripts/gpu_check writes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hopper import NO_NORM, best_rival, standings, summary_table
from plot import Line, Panel, figure
from short_sequences import BARE, COMPILED, EAGER, GRAPH

from cosattn import env, support
from cosattn.arch import ARCHS
from cosattn.bench import table
from cosattn.spec import HEAD_DIMS, Direction, DType, KernelSpec

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)
OURS = "cosattn"
DID_NOT_RUN = "did not run"
Result = dict[str, Any]


class Results:
    """The result files of one folder, as one page refers to them."""

    def __init__(self, folder: Path, page: Path) -> None:
        self.folder = folder
        self.page = page

    def get(self, name: str) -> Result | None:
        """One file's content, None when it was never measured."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def runs(self, name: str) -> dict[str, Result]:
        """``name.json`` and ``name_*.json``, other runs of other cases, by file name without its ending."""
        paths = [self.folder / f"{name}.json", *sorted(self.folder.glob(f"{name}_*.json"))]
        return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}

    def plot(self, name: str, title: str) -> list[str]:
        """The image of a result file, as Markdown; nothing when there is none."""
        folder = Path(os.path.relpath(self.folder, self.page.parent)).as_posix()
        return [f"![{title}]({folder}/{name}.svg)"] if (self.folder / f"{name}.json").exists() else []


def missing(part: str) -> str:
    return f"_Not measured yet: `scripts/gpu_check --only {part}` on a machine with a GPU writes these figures._"


def machine(result: Result) -> str:
    """Where and when a result was measured, in one sentence."""
    e = result["environment"]
    note = "" if result.get("complete", True) else " The time ran out: some cases are missing."
    where = e.get("gpu", f"CPU, {e.get('threads')} threads")
    driver = f", driver {e['driver']}" if "driver" in e else ""
    clock = f", {e['sm_clock_mhz']} MHz and {e['power_w']} W at the start" if "sm_clock_mhz" in e else ""
    versions = f"PyTorch {e['torch']}, cosattn {e['cosattn']} at `{e['commit']}`"
    return f"Measured on {where}{driver}{clock}, {versions}, {e['date']}.{note}"


def dimensions(served: Sequence[int]) -> str:
    """Head dims as ranges of multiples of 8."""
    if not served:
        return "-"
    ranges: list[list[int]] = []
    for d in served:
        if ranges and ranges[-1][1] == d - 8:
            ranges[-1][1] = d
        else:
            ranges.append([d, d])
    return ", ".join(f"{low}–{high}" if high > low else str(low) for low, high in ranges)


def same_rows(rows: Iterable[tuple[str, list[str]]]) -> list[list[str]]:
    """Merge rows whose cells agree, naming all of them in the first column."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows:
        merged.setdefault(tuple(cells), []).append(name)
    return [[", ".join(names), *cells] for cells, names in merged.items()]


def support_block(results: Results) -> str:
    """Head dims that support.py serves, for each architecture, dtype and direction."""

    def served(direction: Direction, arch: str, dtype: DType) -> str:
        return dimensions([d for d in HEAD_DIMS if not support.reasons(KernelSpec(direction, arch, dtype, d, d))])

    def cells(arch: str) -> list[str]:
        return [
            dimensions_of_both(served("forward", arch, dtype), served("backward", arch, dtype))
            for dtype in get_args(DType)
        ]

    rows = same_rows((arch, cells(arch)) for arch in ARCHS)
    return table(["GPU architecture", *get_args(DType)], rows)


def dimensions_of_both(forward: str, backward: str) -> str:
    return forward if forward == backward else f"forward {forward}; backward {backward}"


def environment_block(results: Results) -> str:
    """Every environment variable, from env.py."""
    rows = [[f"`{name}`", meaning] for name, meaning in env.VARIABLES.items()]
    return "\n".join(
        ["| variable | meaning |", "| --- | --- |", *(f"| {name} | {meaning} |" for name, meaning in rows)]
    )


def milliseconds(row: Result, name: str) -> float | None:
    timing = row["timings"].get(name)
    return timing["milliseconds"] if timing else None


def shown(row: Result, name: str) -> str:
    """A time in ms, or why there is none."""
    timing = row["timings"].get(name)
    if timing is None:
        return "-"
    if timing["milliseconds"] is None:
        return "out of memory" if timing["note"] == "out of memory" else DID_NOT_RUN
    return f"{timing['milliseconds']:.3g}"


def ratio(row: Result, name: str) -> str:
    value = row["ratios"].get(name)
    return f"{value:.2f}×" if value else "-"


def speed_block(results: Results) -> str:
    """TFLOP/s beside FlashAttention-2 and cuDNN (half precision) and memory-efficient attention (float32)."""
    result = results.get("speed")
    if result is None:
        return missing("speed")
    parts = []
    for dtype, names in (("bfloat16", ["SDPA flash", "SDPA cudnn"]), ("float32", ["SDPA efficient"])):
        rows = [row for row in result["rows"] if row["case"]["dtype"] == dtype]
        lines = []
        for row in rows:
            case = row["case"]
            label = f"d {case['head_dim']}, S {case['seq_len']}{', causal' * case['causal']}, {case['direction']}"
            rates = [f"{row['tflops'][n]:.0f}" if n in row["tflops"] else shown(row, n) for n in (OURS, *names)]
            lines.append([label, *rates, *(ratio(row, n) for n in names)])
        header = [f"{dtype}, TFLOP/s", OURS, *names, *(f"cosattn / {n.removeprefix('SDPA ')}" for n in names)]
        if lines:
            parts.append(table(header, lines))
    note = "cosattn's figures include its L2 norm (forward and backward); the others get inputs normalised beforehand."
    return "\n\n".join([*parts, f"{note} {machine(result)}", *results.plot("speed", "milliseconds over length")])


def hopper_results(results: Results) -> list[tuple[str, str, Result]]:
    """The grids of a Hopper GPU there are: direction, name of the file, content."""
    return [
        (direction, name, result)
        for direction in ("forward", "backward")
        for name, result in results.runs(f"hopper_{direction}").items()
    ]


def absent_and_machine(result: Result) -> str:
    """Rivals that could not be imported, and where and when the others were measured."""
    absent = f"Not measured: {', '.join(result['missing'])}. " if result["missing"] else ""
    return absent + machine(result)


def versions(result: Result) -> dict[str, str]:
    """Rivals that took part, as they or compiled with what is before them; FA3 has no backward."""
    ran = {name.partition(", ")[0] for row in result["rows"] for name in row["timings"]}
    return {name: version for name, version in result["rivals"].items() if name in ran}


def hopper_note(result: Result) -> str:
    rivals = ", ".join(f"{name} is {version}" for name, version in versions(result).items())
    return (
        "cosattn's figures include its L2 norm; the others get normalised inputs. "
        f"{rivals}. {absent_and_machine(result)}"
    )


def hopper_sizes(result: Result) -> dict[tuple[int, int], dict[bool, Result]]:
    """Rows by (head dim, length), then by causal."""
    sizes: dict[tuple[int, int], dict[bool, Result]] = {}
    for row in result["rows"]:
        case = row["case"]
        sizes.setdefault((case["head_dim"], case["seq_len"]), {})[case["causal"]] = row
    return sizes


def hopper_cells(row: Result | None) -> list[str]:
    """TFLOP/s of cosattn and of the best rival, their ratio, clock and power while cosattn ran."""
    if row is None:
        return ["-"] * 4
    best, timing = best_rival(row), row["timings"][OURS]
    others = {name: rate for name, rate in row["tflops"].items() if name not in (OURS, NO_NORM)}
    name = max(others, key=lambda n: others[n], default=None)
    return [
        f"{row['tflops'][OURS]:.0f}" if OURS in row["tflops"] else shown(row, OURS),
        f"{others[name]:.0f} {name}" if name else "-",
        f"{best[1]:.2f}×" if best else "-",
        f"{timing['sm_clock_mhz']:.0f} MHz {timing['power_w']:.0f} W" if timing.get("sm_clock_mhz") else "-",
    ]


def hopper_block(results: Results) -> str:
    """The whole grid of each direction, and its geometric means; nothing before it is measured."""
    parts = []
    for direction, name, result in hopper_results(results):
        columns = ("cosattn", "best other", "ratio", "clock, power")
        header = [f"{direction}, TFLOP/s", *columns, *(f"causal: {column}" for column in columns)]
        lines = [
            [f"d {head_dim}, S {length}", *hopper_cells(rows.get(False)), *hopper_cells(rows.get(True))]
            for (head_dim, length), rows in hopper_sizes(result).items()
        ]
        without = any(NO_NORM in row["timings"] for row in result["rows"])
        note = " Without its norm cosattn gets normalised inputs, too." if without else ""
        parts += [table(header, lines), summary_table(result["rows"]), hopper_note(result) + note]
        parts += results.plot(name, "TFLOP/s over length")
    return "\n\n".join(["## Against the kernels of a Hopper GPU", *parts] if parts else [])


def by_length(direction: str, result: Result) -> tuple[str, str]:
    """A table of one direction, a line for each head dim and mask: TFLOP/s and, in brackets, the ratio to the best
    rival; and a sentence with the geometric means."""
    rows = [row for row in result["rows"] if row["case"]["direction"] == direction]
    sizes = hopper_sizes({**result, "rows": rows})
    lengths = list(dict.fromkeys(length for _, length in sizes))

    def cell(row: Result | None) -> str:
        rate, _, ratio, _ = hopper_cells(row)
        return rate if ratio == "-" else f"{rate} ({ratio})"

    lines = [
        [f"d {d}{', causal' * causal}", *(cell(sizes.get((d, length), {}).get(causal)) for length in lengths)]
        for d in dict.fromkeys(d for d, _ in sizes)
        for causal in (False, True)
        if any(causal in rows for (size, _), rows in sizes.items() if size == d)
    ]
    means = ", ".join(f"{standing.group} {standing.mean:.3f}×" for standing in standings(rows))
    note = f"In brackets: times the best of {', '.join(versions({**result, 'rows': rows}))}; geometric means: {means}."
    return table([f"{direction}, TFLOP/s", *(f"S {length}" for length in lengths)], lines), note


def hopper_short_block(results: Results) -> str:
    """Each grid in short."""
    parts = []
    for direction, _, result in hopper_results(results):
        lines, note = by_length(direction, result)
        parts += [lines, f"{note} {hopper_note(result)}"]
    return "\n\n".join(["### Against the kernels of a Hopper GPU", *parts] if parts else [])


def today_block(results: Results) -> str:
    """Rivals that get what cosattn gets, and normalise it by torch.compile."""
    result = results.get("today")
    if result is None:
        return missing("today")
    directions = dict.fromkeys(row["case"]["direction"] for row in result["rows"])
    parts = [part for direction in directions for part in by_length(direction, result)]
    return "\n\n".join([*parts, absent_and_machine(result)])


def product_block(results: Results) -> str:
    """Beside a plain matrix product, under the same power limit."""
    result = results.get("product")
    if result is None:
        return missing("product")
    lines, _ = by_length("forward", {**result, "rivals": {}})
    note = f"In brackets: times the rate of the matrix product. {machine(result)}"
    return "\n\n".join([lines, note, *results.plot("product", "TFLOP/s over length")])


def flat_block(results: Results) -> str:
    """cosattn alone on very long sequences."""
    result = results.get("flat")
    if result is None:
        return missing("flat")
    lines, _ = by_length("forward", {**result, "rivals": {}})
    return "\n\n".join([lines, machine(result), *results.plot("flat", "TFLOP/s over length")])


def headline_block(results: Results) -> str:
    """The grids' geometric means and the training speed, in sentences; empty before they are measured."""
    grids = hopper_results(results)
    parts = []
    for direction in dict.fromkeys(direction for direction, _, _ in grids):
        rows = [row for found, _, result in grids if found == direction for row in result["rows"]]
        groups = [standing for standing in standings(rows) if standing.group != "all"]
        means = [f"{standing.mean:.2f}× at {standing.group}" for standing in groups]
        parts.append(f"{direction} {', '.join(means)}")
    sentences = []
    if parts:
        first = grids[0][2]
        speed = f"Speed on an {first['environment']['gpu']} in bfloat16, as a multiple of the best of "
        condition = (
            "geometric means over lengths from 512 on; cosattn's L2 norm is in its time, theirs was done beforehand"
        )
        sentences.append(f"{speed}{', '.join(versions(first))} ({condition}): {'; '.join(parts)}.")
    runs = train_runs(results)
    speeds = {name: run["tokens_per_second"] for name, run in runs.items()}
    if speeds.get(OURS) and speeds.get("sdpa"):
        gain = f"{speeds[OURS] / speeds['sdpa']:.2f}× as fast as with normalise + SDPA"
        how = ", both compiled" if all(runs[name]["config"]["compile"] for name in (OURS, "sdpa")) else ""
        sentences.append(f"A small language model on contexts of 8192 bytes trains {gain}{how}.")
    return "\n".join(sentences)


def windows_block(results: Results) -> str:
    """Windows with bias and mask, against the better of eager and compiled."""
    result = results.get("windows")
    if result is None:
        return missing("windows")
    lines = []
    for row in result["rows"]:
        case = row["case"]
        others = {n: ms for n in row["timings"] if n != OURS and (ms := milliseconds(row, n)) is not None}
        best = min(others, key=lambda n: others[n]) if others else ""
        label = (
            f"S {case['seq_len']}, {case['batch']}×{case['heads']}, {'bias and mask' if case['mask_prob'] else 'bias'}"
        )
        cells = [shown(row, OURS), shown(row, best), best.replace("normalize + SDPA", "eager").replace("eager, ", "")]
        lines.append([f"{label}, {case['direction']}", *cells, ratio(row, best)])
    header = ["bfloat16, d 32", "cosattn ms", "normalise + SDPA ms", "which", "cosattn is faster by"]
    plot = results.plot("windows", "milliseconds over length")
    return "\n\n".join([table(header, lines), machine(result), *plot])


def short_sequences_block(results: Results, most_heads: bool = False) -> str:
    """Short sequences: microseconds and times the rivals, one line a shape, and in how many the aims are reached.

    ``most_heads`` leaves out the lines of fewer heads, but not what the counts say of them.
    """
    result = results.get("short")
    if result is None:
        return missing("short")
    rivals = {
        "eager": ((EAGER,), 3.0),
        "compiled": (tuple(COMPILED.values()), 1.5),
        "bare": (tuple(BARE.values()), 1.0),
    }
    cells: dict[str, dict[str, str]] = {}
    reached: dict[str, list[bool]] = {name: [] for name in rivals}
    for row in result["rows"]:
        case, ms = row["case"], milliseconds(row, OURS)
        if ms is None:
            continue
        times = {
            name: min((row["ratios"][n] for n in names if n in row["ratios"]), default=None)
            for name, (names, _) in rivals.items()
        }
        for name, value in times.items():
            if value is not None:
                reached[name].append(value >= rivals[name][1])
        graph = milliseconds(row, GRAPH)
        shown = [f"{1e3 * ms:.1f}", *([f"graph {1e3 * graph:.1f}"] if graph else [])]
        ratios = [f"{value:.1f}×" if name != "bare" else f"{value:.2f}×" for name, value in times.items() if value]
        floor = f"{row['floor_ms'] / ms:.0%} of the copy rate"
        place = f"d {case['head_dim']}, S {case['seq_len']}, {case['batch'] * case['heads']} heads"
        cells.setdefault(place, {})[case["direction"]] = f"{', '.join(shown)} ({', '.join([*ratios, floor])})"
    names = ("forward", "backward", "both")
    most = max((row["case"]["batch"] * row["case"]["heads"] for row in result["rows"]), default=0)
    lines = [
        [place, *(found.get(name, "-") for name in names)]
        for place, found in cells.items()
        if not most_heads or place.endswith(f", {most} heads")
    ]
    note = (
        "Microseconds; in brackets times eager normalise + SDPA, the better of compiled normalise + cuDNN or FA2, and "
        "the better of these two with nothing to normalise. "
    )
    counts = ", ".join(
        f"{sum(found)} of {len(found)} at {rivals[name][1]:g}× {name} or more"
        for name, found in reached.items()
        if found
    )
    every = "Of all shapes: " if most_heads else ""
    return "\n\n".join([table(["bfloat16", *names], lines), f"{note}{every}{counts}. {machine(result)}"])


def few_short_sequences_block(results: Results) -> str:
    """The lines of the most heads alone."""
    return short_sequences_block(results, most_heads=True)


def memory_block(results: Results) -> str:
    """Peak extra memory of forward and backward."""
    result = results.get("memory")
    if result is None:
        return missing("memory")
    cases: dict[tuple[str, int], dict[str, Result]] = {}
    for row in result["rows"]:
        cases.setdefault((row["case"]["dtype"], row["case"]["seq_len"]), {})[row["contender"]] = row
    names = list(dict.fromkeys(row["contender"] for row in result["rows"]))
    lines = []
    for (dtype, length), by_name in cases.items():
        mib = next(iter(by_name.values()))["qkv_bytes"] / 2**20
        sizes = [f"{by_name[n]['peak_extra_bytes'] / 2**20:.1f} MiB ({by_name[n]['times_qkv']:.1f}×)" for n in names]
        lines.append([f"{dtype}, S {length}", f"{mib:.1f} MiB", *sizes])
    header = ["one head, d 64, forward + backward", "q, k, v", *names]
    return "\n\n".join([table(header, lines), f"In brackets: times the size of q, k and v together. {machine(result)}"])


def host_block(results: Results) -> str:
    """Host time per call and seconds to the first result."""
    result = results.get("host")
    if result is None:
        return missing("host")
    calls = [row for row in result["rows"] if "microseconds" in row]
    names = list(calls[0]["microseconds"]) if calls else []
    lines = [[row["measure"], *(f"{row['microseconds'][n]:.1f} µs" for n in names)] for row in calls]
    firsts = [
        [row["measure"], *(f"{row[key]:.2f} s" for key in ("context_s", "first_forward_s", "first_backward_s"))]
        for row in result["rows"]
        if "context_s" in row
    ]
    header = ["new process", "CUDA's own start", "then the first forward", "then the first forward + backward"]
    tables = [table(["tiny shape (1, 8, 64, 64)", *names], lines)] * bool(lines)
    return "\n\n".join([*tables, *[table(header, firsts)] * bool(firsts), machine(result)])


def accuracy_block(results: Results) -> str:
    """Largest error and largest ratio to SDPA, for each dtype and head dim."""
    result = results.get("accuracy")
    if result is None:
        return missing("accuracy")
    groups: dict[tuple[str, int], list[Result]] = {}
    for row in result["rows"]:
        groups.setdefault((row["case"]["dtype"], row["case"]["head_dim"]), []).append(row)
    names = ("out", "dq", "dk", "dv")
    lines = [
        [
            f"{dtype}, d {d}",
            *(f"{max(r[OURS][n] for r in rows):.1e} ({max(r['ratios'][n] for r in rows):.2f})" for n in names),
        ]
        for (dtype, d), rows in groups.items()
    ]
    lengths = sorted({row["case"]["seq_len"] for row in result["rows"]})
    note = f"Largest over causal and not, S in {lengths}; in brackets the largest ratio to SDPA's error. "
    return "\n\n".join([table(["relative error", *names], lines), note + machine(result)])


def all_accuracy_block(results: Results) -> str:
    """Every row of the accuracy run."""
    result = results.get("accuracy")
    if result is None:
        return missing("accuracy")
    names = ("out", "dq", "dk", "dv")
    lines = []
    for row in result["rows"]:
        case = row["case"]
        label = f"{case['dtype']}, d {case['head_dim']}, S {case['seq_len']}{', causal' * case['causal']}"
        lines.append([label, *(f"{row[OURS][n]:.1e} ({row['ratios'][n]:.2f})" for n in names)])
    return "\n\n".join([table(["error (ratio to SDPA's)", *names], lines), machine(result)])


def variant_of(case: Result) -> str:
    """A name for one of the seed's tables."""
    direction = {"forward": "forward", "backward": "backward", "both": "forward + backward"}[case["direction"]]
    return direction + ", causal" * case["causal"] + (f", {case['mask_prob']:.0%} masked" if case["mask_prob"] else "")


def tables_block(results: Results, variants: Callable[[str], bool] = lambda variant: True) -> str:
    """The seed's tables."""
    result = results.get("tables")
    if result is None:
        return missing("tables")
    rows = result["rows"]
    named = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    names = [name for name in named if any(shown(row, name) != DID_NOT_RUN for row in rows)]
    others = [name for name in names if name != OURS]
    parts = []
    for variant in dict.fromkeys(variant_of(row["case"]) for row in rows):
        if not variants(variant):
            continue
        lines = []
        for row in result["rows"]:
            if variant_of(row["case"]) == variant:
                cells = [shown(row, OURS), *(f"{shown(row, n)} ({ratio(row, n)})".removesuffix(" (-)") for n in others)]
                lines.append([f"{row['case']['dtype']}, S {row['case']['seq_len']}", *cells])
        parts.append(table([f"{variant}, ms", *names], lines))
    case = result["rows"][0]["case"]
    shape = (
        f"Batch {case['batch']}, heads {case['heads']}, d {case['head_dim']}; every column includes its L2 norm; in "
    )
    shape += "brackets how many times longer than cosattn. "
    if absent := [name for name in named if name not in names]:
        shape += f"Not measured: {', '.join(absent)}. "
    return "\n\n".join([*parts, shape + machine(result), *results.plot("tables", "milliseconds over length")])


def short_tables_block(results: Results) -> str:
    """The seed's forward + backward table alone."""
    return tables_block(results, lambda variant: variant == "forward + backward")


def train_runs(results: Results) -> dict[str, Result]:
    """The training runs there are, by attention."""
    return {name: run for name in ("cosattn", "sdpa", "plain") if (run := results.get(f"train-{name}")) is not None}


def train_block(results: Results) -> str:
    """Loss at the same steps and tokens/s of the three attentions."""
    runs = train_runs(results)
    if not runs:
        return missing("train")
    steps = sorted({point["step"] for run in runs.values() for point in run["curve"]})
    lines = []
    for step in steps:
        losses = [{p["step"]: p["validation_loss"] for p in run["curve"]}.get(step) for run in runs.values()]
        lines.append([f"validation loss, step {step}", *("-" if loss is None else f"{loss:.4f}" for loss in losses)])
    lines.append(
        ["tokens/s", *(f"{r['tokens_per_second']:,.0f}" if r["tokens_per_second"] else "-" for r in runs.values())]
    )
    peaks = [f"{r['peak_memory_bytes'] / 2**30:.1f} GiB" if r["peak_memory_bytes"] else "-" for r in runs.values()]
    lines += [["peak memory", *peaks], ["outcome", *(r["outcome"] for r in runs.values())]]
    first = next(iter(runs.values()))
    c = first["config"]
    compiled = [name for name, run in runs.items() if run["config"]["compile"]]
    model = f"Depth {c['depth']}, dim {c['dim']}, {c['heads']} heads of {c['head_dim']}, {c['groups']} groups, "
    model += f"batch {c['batch']} × {c['seq_len']} bytes, {c['dtype']}; same seed, data and steps. "
    model += f"Compiled: {', '.join(compiled) or 'none'}. "
    image = Path(os.path.relpath(results.folder, results.page.parent)).as_posix()
    plot = f"![validation loss]({image}/train.svg)"
    return "\n\n".join([table(["", *runs], lines), model + machine(first), plot])


BLOCKS: dict[str, Callable[[Results], str]] = {
    "support": support_block,
    "environment": environment_block,
    "speed": speed_block,
    "hopper": hopper_block,
    "hopper-short": hopper_short_block,
    "today": today_block,
    "product": product_block,
    "flat": flat_block,
    "headline": headline_block,
    "windows": windows_block,
    "short-sequences": short_sequences_block,
    "short-sequences-most-heads": few_short_sequences_block,
    "memory": memory_block,
    "host": host_block,
    "accuracy": accuracy_block,
    "accuracy-all": all_accuracy_block,
    "tables": tables_block,
    "tables-short": short_tables_block,
    "train": train_block,
}


def train_plot(results: Results) -> str | None:
    """Validation loss over steps."""
    runs = train_runs(results)
    lines = [Line(n, [(p["step"], p["validation_loss"]) for p in r["curve"]]) for n, r in runs.items() if r["curve"]]
    if not lines:
        return None
    return figure([Panel("validation loss", "step", "nats a byte", lines, log_x=False, log_y=False)])


def generated(files: Iterable[Path], folder: Path) -> dict[Path, str]:
    """What every marked file and the training plot should hold. Raises ValueError for a marker nothing fills."""
    texts: dict[Path, str] = {}
    for path in files:
        text = path.read_text()

        def fill(match: re.Match[str], path: Path = path) -> str:
            if match["name"] not in BLOCKS:
                raise ValueError(f"{path}: nothing generates {match['name']!r}; there are {', '.join(BLOCKS)}")
            return f"{match[1]}{BLOCKS[match['name']](Results(folder, path))}\n{match[3]}"

        texts[path] = MARKED.sub(fill, text)
    if (plot := train_plot(Results(folder, folder))) is not None:
        texts[folder / "train.svg"] = plot
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when --check finds something out of date."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="change nothing, report what is out of date")
    p.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    p.add_argument("files", nargs="*", type=Path, default=[ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    args = p.parse_args(arguments)
    stale = []
    for path, text in generated(args.files, args.results).items():
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if not args.check:
                path.write_text(text)
    for path in stale:
        print(f"{'out of date' if args.check else 'written'}: {path}")
    if args.check and stale:
        print("run: python scripts/tables.py")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
