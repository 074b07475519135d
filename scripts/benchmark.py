#!/usr/bin/env python3
"""Benchmarks: prints a table, writes JSON, draws a plot.

    python scripts/benchmark.py                    three dtypes; batch 4, heads 8, d 64; S 128 ... 8192
    python scripts/benchmark.py --only-forwards    or --only-backwards, --causal, --mask-prob 0.25
    python scripts/benchmark.py --all --output docs/results/tables.json      every one of those tables
    python scripts/benchmark.py --suite speed      bf16, 16k tokens, hidden 2048, against FlashAttention-2 and cuDNN
    python scripts/benchmark.py --suite hopper     bf16, d 32 ... 256, S 512 ... 64k, against cuDNN, FA3 and FA4
    python scripts/benchmark.py --suite today      the same for S up to 4096, theirs normalising under torch.compile
    python scripts/benchmark.py --suite flat       cosattn alone, S 64k ... 1M
    python scripts/benchmark.py --suite product    beside a plain matrix product, under the same power limit
    python scripts/benchmark.py --suite windows    vision windows with bias and mask
    python scripts/benchmark.py --suite short      many heads of 64 ... 512 tokens, eager, compiled and as CUDA graphs
    python scripts/benchmark.py --suite memory     peak extra memory
    python scripts/benchmark.py --suite host       host time per call, first call cold and warm

In every suite cosattn's L2 norm is inside its time. `speed` and `hopper` give the others normalised inputs, so their
norm is not in theirs; the other suites compare with what a user would write, normalisation included. `hopper`, `today`,
`flat` and `product` take --head-dim, --seq-len, --causal-only and --full-only. FA3 and FA4 are found by their imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hopper
from baselines import RIVALS, load_rivals, original_triton, plain_attention, rival_names
from cases import OURS, SCALE, Case, Inputs, cosattn_work, make_inputs, row_of
from machine import environment
from plot import Line, Panel, figure
from sensor import sensor
from short_sequences import run_short, short_cases

from cosattn import cosine_attention
from cosattn.arch import arch_of
from cosattn.bench import DTYPES, Stopwatch, directions, host_microseconds, sdpa, table
from cosattn.families import sized
from cosattn.spec import KernelSpec, softmax_mode

SEED_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


def sdpa_mask(case: Case, x: Inputs) -> Callable[[], tuple[Tensor | None, bool]]:
    """What SDPA takes for the case's mask and bias: (attn_mask, is_causal). Biases are merged inside the timed call."""
    keys = x.mask[:, None, None, :] if x.mask is not None else None
    if x.bias is not None:
        bias = x.bias
        if keys is None:
            return lambda: (bias[None], case.causal)
        return lambda: (bias[None].masked_fill(~keys, float("-inf")), case.causal)
    if keys is not None and case.causal:
        visible = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool, device=keys.device).tril()
        return lambda: (keys & visible, False)
    return lambda: (keys, case.causal)


def best_sdpa_backend(case: Case, x: Inputs, device: torch.device) -> str | None:
    """The fastest SDPA backend for this case (None lets PyTorch choose, on CPU)."""
    if device.type != "cuda":
        return None
    build = sdpa_mask(case, x)

    def run(backend: str) -> Callable[[], Tensor]:
        def attention() -> Tensor:
            attn_mask, causal = build()
            return sdpa(x.q, x.k, x.v, scale=SCALE, causal=causal, attn_mask=attn_mask, backend=backend)

        return attention

    trial = Stopwatch(device, budget_s=0.02, least=3, most=5)
    names = ("flash", "cudnn", "efficient")
    timings = trial.compare({name: directions(run(name), x.all, case.direction) for name in names})
    ran = {name: t.milliseconds for name, t in timings.items() if t.milliseconds is not None}
    return min(ran, key=lambda name: ran[name]) if ran else "math"


# The seed's tables


def table_cases(args: argparse.Namespace) -> list[Case]:
    """Cases of the seed's tables; all five variants with ``--all``."""
    direction = "forward" if args.only_forwards else "backward" if args.only_backwards else "both"
    variants = [(direction, args.causal, args.mask_prob)]
    if args.all:
        variants = [
            ("forward", False, 0.0),
            ("backward", False, 0.0),
            ("both", False, 0.0),
            ("both", True, 0.0),
            ("both", False, 0.25),
        ]
    return [
        Case(dtype, args.batch, args.heads, head_dim, length, direction, causal, mask_prob)
        for direction, causal, mask_prob in variants
        for dtype in args.dtype
        for head_dim in args.head_dim or [64]
        for length in args.seq_len or SEED_LENGTHS
    ]


def run_table(case: Case, stopwatch: Stopwatch) -> dict[str, Any]:
    """cosattn, plain einsum attention, normalise + SDPA (best backend), the original's Triton path."""
    device = stopwatch.device
    x = make_inputs(case, device)
    backend, build = best_sdpa_backend(case, x, device), sdpa_mask(case, x)

    def theirs() -> Tensor:
        attn_mask, causal = build()
        return sdpa(x.q, x.k, x.v, scale=SCALE, causal=causal, attn_mask=attn_mask, backend=backend)

    def plain() -> Tensor:
        return plain_attention(x.q, x.k, x.v, scale=SCALE, causal=case.causal, mask=x.mask)

    def original() -> Tensor:
        return original_triton()(x.q, x.k, x.v, mask=x.mask, scale=SCALE, causal=case.causal)

    contenders = {
        OURS: cosattn_work(case, x),
        "plain": directions(plain, x.all, case.direction),
        "normalize + SDPA": directions(theirs, x.all, case.direction),
    }
    if device.type == "cuda":
        contenders["original (Triton)"] = directions(original, x.all, case.direction)
    return row_of(case, stopwatch.compare(contenders), sdpa_backend=backend)


# Speed against the best attention kernels PyTorch ships


def speed_cases(args: argparse.Namespace) -> list[Case]:
    """bf16, 16k tokens, hidden 2048; float32 at batch 4, heads 8, d 64, S 8192."""
    half = [
        Case("bfloat16", 16384 // length, 2048 // head_dim, head_dim, length, direction, causal)
        for head_dim in (64, 128)
        for length in (1024, 4096, 16384)
        for causal in (False, True)
        for direction in ("forward", "backward")
    ]
    single = [
        Case("float32", 4, 8, 64, 8192, direction, causal)
        for causal in (False, True)
        for direction in ("forward", "backward")
    ]
    return half + single


def run_speed(case: Case, stopwatch: Stopwatch) -> dict[str, Any]:
    """Ours with the L2 norm, theirs on inputs normalised beforehand."""
    x = make_inputs(case, stopwatch.device, heads_last=True)
    q, k = (F.normalize(t.detach(), dim=-1).requires_grad_() for t in (x.q, x.k))
    backends = ("efficient",) if case.dtype == "float32" else ("flash", "cudnn")

    def theirs(backend: str) -> Callable[[], object]:
        def attention() -> Tensor:
            return sdpa(q, k, x.v, scale=SCALE, causal=case.causal, backend=backend, normalize=False)

        return directions(attention, (q, k, x.v), case.direction)

    contenders = {OURS: cosattn_work(case, x)} | {f"SDPA {backend}": theirs(backend) for backend in backends}
    return row_of(case, stopwatch.compare(contenders))


# Vision windows


def window_cases(args: argparse.Namespace) -> list[Case]:
    """SwinV2-like windows: d 32, thousands of batch * heads, a learned bias, with and without a key mask."""
    return [
        Case("bfloat16", batch, 8, 32, length, direction, mask_prob=mask_prob, bias=True)
        for length, batch in ((49, 1024), (64, 1024), (144, 512), (256, 256), (576, 128))
        for mask_prob in (0.0, 0.25)
        for direction in ("forward", "backward")
    ]


def run_windows(case: Case, stopwatch: Stopwatch) -> dict[str, Any]:
    """Ours against normalise + SDPA with the same bias, eager and compiled."""
    x = make_inputs(case, stopwatch.device)
    keys = x.mask[:, None, None, :] if x.mask is not None else None

    def theirs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        merged = bias[None] if keys is None else bias[None].masked_fill(~keys, float("-inf"))
        return F.scaled_dot_product_attention(
            F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, attn_mask=merged, scale=SCALE
        )

    bias = x.bias
    assert bias is not None
    torch.compiler.reset()
    compiled = torch.compile(theirs, dynamic=False)
    contenders = {
        OURS: cosattn_work(case, x),
        "normalize + SDPA": directions(lambda: theirs(x.q, x.k, x.v, bias), x.all, case.direction),
        "normalize + SDPA, compiled": directions(lambda: compiled(x.q, x.k, x.v, bias), x.all, case.direction),
    }
    return row_of(case, stopwatch.compare(contenders))


# Memory


NORMALIZED = "SDPA, normalized beforehand"


def run_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Peak extra memory of one forward + backward, one head, d 64, beside the size of q, k and v."""
    for dtype in ("bfloat16", "float32"):
        for length in (16384, 32768, 65536):
            case = Case(dtype, 1, 1, 64, length, "both")
            for name, attention in {
                OURS: lambda q, k, v: cosine_attention(q, k, v, scale=SCALE),
                "normalize + SDPA": lambda q, k, v: sdpa(q, k, v, scale=SCALE),
                NORMALIZED: lambda q, k, v: sdpa(q, k, v, scale=SCALE, normalize=False),
            }.items():
                x = make_inputs(case, device)
                if name == NORMALIZED:
                    q, k = (F.normalize(t.detach(), dim=-1).requires_grad_() for t in (x.q, x.k))
                    x = replace(x, q=q, k=k)
                gradient = torch.randn_like(x.q)
                torch.autograd.grad(attention(x.q, x.k, x.v), x.all, gradient)
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                torch.autograd.grad(attention(x.q, x.k, x.v), x.all, gradient)
                torch.cuda.synchronize(device)
                extra = torch.cuda.max_memory_allocated(device) - before
                inputs = sum(t.numel() * t.element_size() for t in (x.q, x.k, x.v))
                yield {
                    "case": asdict(case),
                    "contender": name,
                    "peak_extra_bytes": extra,
                    "qkv_bytes": inputs,
                    "times_qkv": extra / inputs,
                }


# Host


FIRST_CALL = """
import json, time
import torch
start = time.perf_counter()
torch.zeros(1, device="cuda"); torch.cuda.synchronize()
context = time.perf_counter()
from cosattn import cosine_attention
q, k, v = (torch.randn(1, 8, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
with torch.no_grad():
    cosine_attention(q, k, v); torch.cuda.synchronize()
forward = time.perf_counter()
cosine_attention(q, k, v).sum().backward(); torch.cuda.synchronize()
backward = time.perf_counter()
seconds = {"context_s": context - start, "first_forward_s": forward - context, "first_backward_s": backward - forward}
print(json.dumps(seconds))
"""


def first_calls() -> Iterator[dict[str, Any]]:
    """Seconds to the first results of a new process, with an empty and then with a filled kernel cache."""
    with tempfile.TemporaryDirectory(prefix="cosattn-cold-") as folder:
        root = Path(__file__).resolve().parent.parent
        variables = os.environ | {
            "COSATTN_CACHE_DIR": folder,
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        }
        for state in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL],
                env=variables,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            if done.returncode != 0:
                raise RuntimeError(f"the {state} first call failed:\n{done.stderr[-3000:]}")
            yield {"measure": f"first call, {state} cache", **json.loads(done.stdout.splitlines()[-1])}


def run_host(device: torch.device) -> Iterator[dict[str, Any]]:
    """Host microseconds a call at a tiny shape, then first calls."""
    case = Case("bfloat16", 1, 8, 64, 64, "forward")
    x = make_inputs(case, device)
    contenders: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: cosine_attention(x.q, x.k, x.v),
        "SDPA": lambda: F.scaled_dot_product_attention(x.q, x.k, x.v),
        "normalize + SDPA": lambda: sdpa(x.q, x.k, x.v, scale=SCALE),
    }
    for direction in ("forward", "both"):
        rounds: dict[str, list[float]] = {name: [] for name in contenders}
        works = {name: directions(attention, x.all, direction) for name, attention in contenders.items()}
        for _ in range(5):  # in turn, so that the machine's mood is shared
            for name, work in works.items():
                rounds[name].append(host_microseconds(work, device, repeats=400, batch=40))
        microseconds = {name: sorted(values)[len(values) // 2] for name, values in rounds.items()}
        yield {"measure": f"host time per call, {direction}", "microseconds": microseconds}
    yield from first_calls()


# Building what a suite needs, all kernels at once


def normalized(_: Case) -> tuple[bool, ...]:
    """Every call of cosattn has the L2 norm."""
    return (True,)


def needed_specs(
    cases: Iterable[Case], device: torch.device, norms: Callable[[Case], Sequence[bool]] = normalized
) -> list[KernelSpec]:
    """The kernel specs the cases will ask for, so that they are compiled in parallel before anything is timed."""
    arch = arch_of(torch.cuda.get_device_capability(device))
    if arch is None:
        return []
    specs: dict[KernelSpec, None] = {}
    calls = [(case, l2norm) for case in cases for l2norm in norms(case)]
    for case, l2norm in calls:
        dtype: Any = case.dtype
        forward = KernelSpec(
            "forward",
            arch.name,
            dtype,
            case.head_dim,
            case.head_dim,
            l2norm=l2norm,
            causal=case.causal,
            mask=case.mask_prob > 0,
            bias=dtype if case.bias else None,
            softmax=softmax_mode(case.dtype, None if case.bias else SCALE),
        )
        heads = case.batch * case.heads
        specs[sized(forward, case.seq_len, case.seq_len, heads=heads)] = None
        if case.direction != "forward":
            backward = replace(forward, direction="backward", bias_grad=case.bias)
            specs[sized(backward, case.seq_len, case.seq_len, heads=heads)] = None
    return list(specs)


def in_processes(work: Callable[[Any], object], items: Iterable[Any], label: Callable[[Any], str]) -> float:
    """Work on several items at a time; returns the seconds it took. Failures are printed, not raised."""
    from cosattn.warmup import default_jobs

    start = time.perf_counter()
    context = get_context("forkserver")  # a clean process, whatever this one has done with CUDA
    context.set_forkserver_preload(["cosattn.build"])
    with ProcessPoolExecutor(default_jobs(), mp_context=context) as pool:
        jobs = {pool.submit(work, item): item for item in items}
        for job in as_completed(jobs):
            if (error := job.exception()) is not None:
                print(f"{label(jobs[job])} failed: {str(error)[:500]}", flush=True)
    return time.perf_counter() - start


def prebuild(specs: Sequence[KernelSpec]) -> float:
    """Compile the kernels that are missing."""
    from cosattn.build import ensure

    return in_processes(ensure, specs, lambda spec: spec.name)


# Output


def times_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a case: milliseconds and ratios."""
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    header = ["case", *(f"{name} ms" for name in names), *(f"x {name}" for name in names if name != OURS)]
    lines = []
    for row in rows:
        cells = [cell_of(row["timings"].get(name)) for name in names]
        ratios = [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-" for name in names if name != OURS]
        lines.append([Case(**row["case"]).label, *cells, *ratios])
    return table(header, lines)


def times_line(row: dict[str, Any]) -> str:
    """Our milliseconds and the ratios of one case."""
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
    return f"{Case(**row['case']).label}: {cell_of(row['timings'][OURS])} ms; {ratios}"


def cell_of(timing: dict[str, Any] | None) -> str:
    """A time, or a short reason."""
    if timing is None:
        return "-"
    if timing["milliseconds"] is None:
        return str(timing["note"])[:24]
    return f"{timing['milliseconds']:.3f}"


def plot_of(rows: Sequence[dict[str, Any]], rates: bool = False) -> str:
    """Milliseconds, or TFLOP/s, over sequence length, one panel for each variant and dtype."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        case = Case(**row["case"])
        features = ["causal"] * case.causal + [f"mask {case.mask_prob:g}"] * bool(case.mask_prob) + ["bias"] * case.bias
        title = ", ".join(
            [case.dtype, f"d {case.head_dim}", case.direction.replace("both", "forward + backward"), *features]
        )
        lines = panels.setdefault(title, {})
        for name, timing in row["timings"].items():
            if timing["milliseconds"] is not None:
                value = row["tflops"][name] if rates else timing["milliseconds"]
                lines.setdefault(name, []).append((case.seq_len, value))
    unit = "TFLOP/s" if rates else "milliseconds"
    return figure(
        [
            Panel(title, "sequence length", unit, [Line(*line) for line in lines.items()], log_y=not rates)
            for title, lines in panels.items()
        ]
    )


@dataclass(frozen=True)
class Suite:
    """Cases that are timed one by one, and how they are shown."""

    cases: Callable[[argparse.Namespace], list[Case]]
    run: Callable[..., dict[str, Any]]
    """Of a case and a stopwatch; also of the rivals where ``rivals`` says so."""
    rivals: bool = False
    norms: Callable[[Case], Sequence[bool]] = normalized
    """Whether the calls of cosattn that a case times have the L2 norm."""
    line: Callable[[dict[str, Any]], str] = times_line
    summary: Callable[[Sequence[dict[str, Any]]], str] = times_table
    rates: bool = False
    """TFLOP/s in the plot, clock and power in the rows."""
    budget_s: float = 0.25
    least: int = 5
    most: int = 50
    heat_s: float = 0.0
    ahead: Callable[[Case, torch.device], None] | None = None
    """Leaves in a cache what ``run`` would compile of a case one after another."""


GRID = partial(Suite, line=hopper.rates_line, summary=hopper.summary, rates=True, budget_s=0.2, most=100, heat_s=0.1)
TIMED: dict[str, Suite] = {
    "tables": Suite(table_cases, run_table),
    "speed": Suite(speed_cases, run_speed),
    "windows": Suite(window_cases, run_windows),
    "short": Suite(short_cases, run_short, budget_s=0.015, least=5),
    "hopper": GRID(hopper.hopper_cases, hopper.run_hopper, rivals=True, norms=hopper.norms),
    "today": GRID(hopper.today_cases, hopper.run_today, rivals=True, ahead=hopper.compile_today),
    "flat": GRID(hopper.flat_cases, hopper.run_flat, summary=hopper.flat_summary, least=3, heat_s=1.5),
    "product": GRID(hopper.product_cases, hopper.run_product),
}
OTHER: dict[str, Callable[[torch.device], Iterator[dict[str, Any]]]] = {"memory": run_memory, "host": run_host}


def run_suite(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every row of a suite, until the time limit or until the GPU no longer answers."""
    deadline = time.monotonic() + 60 * args.minutes
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"suite": args.suite, "environment": environment(device), "complete": False, "rows": rows}
    if args.suite in OTHER:
        for row in OTHER[args.suite](device):
            rows.append(row)
            print(json.dumps(row), flush=True)
        return result | {"complete": True}
    suite = TIMED[args.suite]
    cases, run = suite.cases(args), suite.run
    if suite.rivals:
        rivals, result["missing"] = load_rivals(args.rivals)
        result["rivals"] = {rival.name: rival.version for rival in rivals}
        run = partial(run, rivals=rivals)
        print(f"against {result['rivals'] or 'nobody'}; missing: {result['missing'] or 'none'}", flush=True)
    if device.type == "cuda":
        result["prebuild_s"] = prebuild(needed_specs(cases, device, suite.norms))
        print(f"kernels ready after {result['prebuild_s']:.1f} s", flush=True)
        if suite.ahead is not None and result["rivals"]:
            result["ahead_s"] = in_processes(partial(suite.ahead, device=device), cases, lambda case: case.label)
            print(f"the others compiled after {result['ahead_s']:.1f} s", flush=True)
    stopwatch = Stopwatch(
        device,
        budget_s=args.budget or suite.budget_s,
        least=args.least or suite.least,
        most=suite.most,
        heat_s=suite.heat_s,
        probe=sensor(device) if suite.rates else None,
    )
    for number, case in enumerate(cases, 1):
        if time.monotonic() > deadline:
            print(f"time limit: {len(cases) - number + 1} of {len(cases)} cases not measured", flush=True)
            break
        try:
            row = run(case, stopwatch)
        except Exception as error:  # outside the stopwatch: after a fault of the GPU nothing works any more
            print(f"stopped at {case.label}: {type(error).__name__}: {error}", flush=True)
            break
        rows.append(row)
        print(f"[{number}/{len(cases)}] {suite.line(row)}", flush=True)
        save(result, args.output)  # a contender may end the process
        if device.type == "cuda":
            torch.cuda.empty_cache()
    else:
        result["complete"] = True
    return result


def save(result: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", choices=[*TIMED, *OTHER], default="tables")
    p.add_argument("--only-forwards", action="store_true")
    p.add_argument("--only-backwards", action="store_true")
    p.add_argument("--causal", action="store_true")
    p.add_argument("--mask-prob", type=float, default=0.0, help="share of keys masked out")
    p.add_argument(
        "--all", action="store_true", help="tables: forward, backward, both, causal and mask 0.25 in one run"
    )
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    p.add_argument("--seq-len", nargs="+", type=int, help="default: those of the suite")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--head-dim", nargs="+", type=int, help="default: those of the suite, 64 for the tables")
    three = ["forward", "backward", "both"]
    p.add_argument("--direction", nargs="+", choices=three, help="hopper, today, product, short")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--causal-only", action="store_true", help="hopper, today, flat, product, short")
    only.add_argument("--full-only", action="store_true", help="hopper, today, flat, product")
    p.add_argument(
        "--rivals",
        type=rival_names,
        default=["cudnn", "fa3", "fa4"],
        help=f"hopper, today: of {','.join(RIVALS)}, or '' for none; what can not be imported is left out",
    )
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--budget", type=float, help="seconds of measuring for each contender of each case")
    p.add_argument("--least", type=int, help="fewest timed repeats")
    p.add_argument("--minutes", type=float, default=9.0, help="stop after this long and say what is missing")
    p.add_argument("--output", type=Path, help="JSON file; the plot goes beside it as .svg")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when nothing of ours could be measured or the time ran out."""
    p = parser()
    args = p.parse_args(arguments)
    if args.only_forwards and args.only_backwards:
        p.error("--only-forwards and --only-backwards exclude each other")
    device = torch.device(args.device)
    if device.type != "cuda" and args.suite != "tables":
        p.error(f"--suite {args.suite} measures a GPU, and there is none here; --suite tables also runs on a CPU")
    result = run_suite(args, device)
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()))
    rows = result["rows"]
    if not rows:
        print("nothing was measured")
    elif args.suite in TIMED:
        print(TIMED[args.suite].summary(rows))
    save(result, args.output)
    if args.output is not None and args.suite in TIMED:
        args.output.with_suffix(".svg").write_text(plot_of(rows, TIMED[args.suite].rates))
    failed = [row for row in rows if "timings" in row and row["timings"][OURS]["milliseconds"] is None]
    return 0 if rows and result["complete"] and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
