"""``python -m cosattn.bench``: cosattn against PyTorch's attention on this machine. All benchmarks use its timing.

How a time is taken: every contender is called in turn within one loop, so that clocks and temperature are the same for
all of them; before each call the L2 cache is flushed and the GPU is kept busy for as long as the slowest host needs to
enqueue its call, so that the two CUDA events around it bound device work and nothing else. A call that the GPU reached
before the host was done does not count; it is repeated with more time for the host. The figure is the median.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosattn._version import __version__

Work = Callable[[], object]
Probe = Callable[[], tuple[float, float]]
"""Reads (SM clock in MHz, power in W) of the GPU as it is now."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SDPA_BACKENDS: dict[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


LONGEST_HEAD_START_S = 5e-3
"""The host gets at most so long before the GPU begins."""
TRIES = 4
"""For one sample. A call that waits for the GPU is always late; its last try counts."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One contender's result. ``milliseconds`` is None when it could not run; ``note`` then says why.

    Clock and power are medians of what a probe read while the contender ran, None without a probe.
    """

    milliseconds: float | None
    repeats: int = 0
    note: str = ""
    sm_clock_mhz: float | None = None
    power_w: float | None = None


class Stopwatch:
    """Times callables side by side on one device.

    Args:
        device: where the work runs.
        budget_s: seconds of measuring allowed for each contender (warm-up excluded).
        least: fewest timed repeats.
        most: most timed repeats.
        heat_s: seconds of untimed turns before the timed ones, for all contenders of a case together.
        probe: called up to five times for each contender, while its work runs.
    """

    def __init__(
        self,
        device: torch.device,
        budget_s: float = 0.3,
        least: int = 5,
        most: int = 50,
        heat_s: float = 0.0,
        probe: Probe | None = None,
    ) -> None:
        self.device = device
        self.budget_s = budget_s
        self.least = least
        self.most = most
        self.heat_s = heat_s
        self.probe = probe
        self._head_start_s = 0.0
        self._flush: Tensor | None = None
        if device.type == "cuda":
            l2_bytes = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
            self._flush = torch.empty(2 * l2_bytes, dtype=torch.int8, device=device)

    def compare(self, contenders: dict[str, Work]) -> dict[str, Timing]:
        """Median time of each contender, measured in one interleaved loop. One that fails is reported, not raised."""
        failed: dict[str, Timing] = {}
        host_s: dict[str, float] = {}
        longest_s = 0.0
        for name, work in contenders.items():
            try:
                host_s[name], seconds = self._warm_up(work)
            except Exception as error:  # a benchmark goes on without the contender and says why
                failed[name] = _failure(error)
            else:
                longest_s = max(longest_s, seconds)
        repeats = max(self.least, min(self.most, int(self.budget_s / max(longest_s, 1e-9))))
        self._head_start_s = min(1.5 * max(host_s.values(), default=0.0) + 50e-6, LONGEST_HEAD_START_S)
        samples: dict[str, list[float]] = {name: [] for name in host_s}
        readings: dict[str, list[tuple[float, float]]] = {name: [] for name in host_s}
        hot_at = time.perf_counter() + self.heat_s
        turn = 0
        while turn < repeats and len(failed) < len(contenders):
            heating = time.perf_counter() < hot_at
            names = [name for name in host_s if name not in failed]
            first = turn % len(names)
            probe = None if heating or turn % max(repeats // 4, 1) else self.probe
            for name in names[first:] + names[:first]:
                try:
                    milliseconds = self._sample(contenders[name], probe, readings[name])
                except Exception as error:
                    failed[name] = _failure(error)
                else:
                    if not heating:
                        samples[name].append(milliseconds)
            turn += not heating
        return {name: failed.get(name) or _timing(samples[name], readings[name]) for name in contenders}

    def _warm_up(self, work: Work) -> tuple[float, float]:
        """(host seconds, total seconds) of one call, after a first call that may compile."""
        work()
        self._synchronize()
        host, total = [], []
        for _ in range(3):
            start = time.perf_counter()
            work()
            host.append(time.perf_counter() - start)
            self._synchronize()
            total.append(time.perf_counter() - start)
            if sum(total) > self.budget_s:  # so slow that the next call would tell nothing new
                break
        return min(host), min(total)

    def _sample(self, work: Work, probe: Probe | None, readings: list[tuple[float, float]]) -> float:
        """Milliseconds of one call that the host had enqueued before the GPU began with it."""
        if self._flush is None:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        for _ in range(TRIES):
            milliseconds, late = self._once(self._flush, work, probe, readings)
            if not late:
                break
            self._head_start_s = min(2 * self._head_start_s, LONGEST_HEAD_START_S)
        return milliseconds

    def _once(
        self, flush: Tensor, work: Work, probe: Probe | None, readings: list[tuple[float, float]]
    ) -> tuple[float, bool]:
        """Milliseconds of one call, and whether the GPU reached it before the host was done with it."""
        cuda: Any = torch.cuda
        before, after = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        flush.zero_()
        cuda._sleep(int(self._head_start_s * 2e9))  # about 2e9 cycles a second
        before.record()
        work()
        after.record()
        late = bool(before.query())
        if probe is not None:
            readings.append(probe())
        after.synchronize()
        return float(before.elapsed_time(after)), late

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def host_microseconds(work: Work, device: torch.device, repeats: int = 2000, batch: int = 50) -> float:
    """Median host time of one call in microseconds, over batches that never fill the launch queue."""
    for _ in range(batch):
        work()
    samples = []
    for _ in range(max(1, repeats // batch)):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(batch):
            work()
        samples.append((time.perf_counter() - start) / batch * 1e6)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return statistics.median(samples)


def directions(attention: Callable[[], Tensor], inputs: Sequence[Tensor], direction: str) -> Work:
    """The work of one direction: ``forward`` (no grad), ``backward`` (of a graph built once) or ``both``."""
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return attention()

        return forward
    wanted = [x for x in inputs if x.requires_grad]
    if direction == "both":
        gradient: list[Tensor] = []

        def both() -> object:
            out = attention()
            if not gradient:
                gradient.append(torch.randn_like(out))
            return torch.autograd.grad(out, wanted, gradient[0])

        return both
    state: list[Tensor] = []

    def backward() -> object:
        if not state:
            out = attention()
            state.extend((out, torch.randn_like(out)))
        return torch.autograd.grad(state[0], wanted, state[1], retain_graph=True)

    return backward


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    attn_mask: Tensor | None = None,
    backend: str | None = None,
    normalize: bool = True,
) -> Tensor:
    """``F.scaled_dot_product_attention`` on (optionally normalised) inputs, with one named backend or PyTorch's choice.

    Args:
        q, k, v: ``(B, H, S, D)``.
        scale: factor on the logits.
        causal: PyTorch's ``is_causal`` (aligned top-left; equal to cosattn's where q and k are equally long).
        attn_mask: what PyTorch takes as ``attn_mask``.
        backend: key of ``SDPA_BACKENDS``.
        normalize: L2-normalise q and k first.
    """
    if normalize:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    chosen: AbstractContextManager[object] = sdpa_kernel([SDPA_BACKENDS[backend]]) if backend else nullcontext()
    with chosen:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal, scale=scale)


def environment(device: torch.device) -> dict[str, object]:
    """What the machine is: recorded with every result."""
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cosattn": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "device": device.type,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts |= _nvidia_smi()
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table that is also Markdown: first column left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        fitted = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(fitted) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def _nvidia_smi() -> dict[str, object]:
    fields = {
        "driver": "driver_version",
        "sm_clock_mhz": "clocks.sm",
        "sm_clock_max_mhz": "clocks.max.sm",
        "power_w": "power.draw",
    }
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return {}
    if done.returncode != 0 or not done.stdout.strip():
        return {}
    return dict(zip(fields, (cell.strip() for cell in done.stdout.splitlines()[0].split(",")), strict=False))


def _timing(samples: Sequence[float], readings: Sequence[tuple[float, float]]) -> Timing:
    clock, power = (statistics.median(values) for values in zip(*readings, strict=True)) if readings else (None, None)
    return Timing(statistics.median(samples), len(samples), sm_clock_mhz=clock, power_w=power)


def _failure(error: Exception) -> Timing:
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return Timing(None, note="out of memory")
    return Timing(None, note=_first_line(error))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}"


def measure(
    stopwatch: Stopwatch, batch: int, heads: int, head_dim: int, length: int, dtype: str, causal: bool, direction: str
) -> dict[str, Any]:
    """One row of ``python -m cosattn.bench``: cosattn against normalise + SDPA (PyTorch's own choice of backend)."""
    from cosattn import cosine_attention

    device = stopwatch.device
    shape = (batch, heads, length, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=DTYPES[dtype], requires_grad=True) for _ in range(3))
    contenders = {
        "cosattn": directions(lambda: cosine_attention(q, k, v, causal=causal), (q, k, v), direction),
        "normalize + SDPA": directions(lambda: sdpa(q, k, v, scale=8.0, causal=causal), (q, k, v), direction),
    }
    timings = stopwatch.compare(contenders)
    return {
        "case": {
            "dtype": dtype,
            "batch": batch,
            "heads": heads,
            "head_dim": head_dim,
            "seq_len": length,
            "causal": causal,
        },
        "direction": direction,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cosattn.bench", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seq-len", type=int, nargs="+", help="default: 1024 4096 on a GPU, 256 512 on a CPU")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--direction", choices=["forward", "backward", "both"], default="both")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry. Returns the exit status."""
    args = _parser().parse_args(arguments)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    stopwatch = Stopwatch(device)
    rows = [
        measure(stopwatch, args.batch, args.heads, args.head_dim, length, dtype, args.causal, args.direction)
        for dtype in args.dtype or (["bfloat16"] if on_gpu else ["float32"])
        for length in args.seq_len or ([1024, 4096] if on_gpu else [256, 512])
    ]
    facts = environment(device)
    if args.json:
        print(json.dumps({"environment": facts, "rows": rows}, indent=1))
        return 0
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(
        f"batch {args.batch}, heads {args.heads}, head dim {args.head_dim}, {args.direction}{', causal' * args.causal}"
    )
    lines = []
    for row in rows:
        ours, theirs = (row["timings"][name] for name in ("cosattn", "normalize + SDPA"))
        cells = [t["note"] if t["milliseconds"] is None else f"{t['milliseconds']:.3f} ms" for t in (ours, theirs)]
        both = ours["milliseconds"] and theirs["milliseconds"]
        ratio = f"{theirs['milliseconds'] / ours['milliseconds']:.2f}x" if both else "-"
        lines.append([f"{row['case']['dtype']} S={row['case']['seq_len']}", *cells, ratio])
    print(table(["case", "cosattn", "normalize + SDPA", "cosattn is faster by"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
