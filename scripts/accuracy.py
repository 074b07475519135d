#!/usr/bin/env python3
"""Accuracy: the error of cosattn beside the error of PyTorch's attention, both against a float64 reference.

    python scripts/accuracy.py                  every dtype, d, causal, S on the GPU (small ones on a CPU)
    python scripts/accuracy.py --output docs/results/accuracy.json

An error is relative, in Frobenius norm: |x - x64| / |x64|, of the output and of the gradients of q, k and v, on random
normal inputs. The ratio is cosattn's error over that of `F.scaled_dot_product_attention` after `F.normalize` in the
same dtype. The limits are those of docs/semantics.md; the exit status is 1 when one is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark import needed_specs, prebuild
from cases import Case, relative_error
from machine import environment

from cosattn import cosine_attention
from cosattn.bench import DTYPES, sdpa, table
from cosattn.reference import cosine_attention_reference

NAMES = ("out", "dq", "dk", "dv")
LIMITS = {"float32": (2e-6, 5e-6), "float16": (1.0e-3, 1.5e-3), "bfloat16": (6e-3, 9e-3)}
"""dtype -> largest error of out, and of dq, dk, dv."""
LARGEST_RATIO = 1.25
SCALE = 8.0


def results_of(attention: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """out, dq, dk, dv in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype)))]


def errors_of(results: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """Relative Frobenius error of each result."""
    return {n: relative_error(x, t) for n, x, t in zip(NAMES, results, truth, strict=True)}


def measure(dtype: str, head_dim: int, causal: bool, length: int, device: torch.device) -> dict[str, Any]:
    """One row: both errors and their ratio. The truth is computed head by head, which keeps its O(S^2) memory small."""
    torch.manual_seed(head_dim * 100_003 + length)
    shape = (1, 4, length, head_dim)
    inputs = [torch.randn(shape, device=device, dtype=DTYPES[dtype]) for _ in range(3)]
    gradient = torch.randn(shape, device=device, dtype=DTYPES[dtype])

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cosine_attention_reference(q, k, v, scale=SCALE, causal=causal)

    heads = [
        results_of(reference, [x[:, h : h + 1].double() for x in inputs], gradient[:, h : h + 1].double())
        for h in range(shape[1])
    ]
    truth = [torch.cat(parts, dim=1) for parts in zip(*heads, strict=True)]
    ours = errors_of(
        results_of(lambda q, k, v: cosine_attention(q, k, v, scale=SCALE, causal=causal), inputs, gradient), truth
    )
    theirs = errors_of(results_of(lambda q, k, v: sdpa(q, k, v, scale=SCALE, causal=causal), inputs, gradient), truth)
    limit_out, limit_gradient = LIMITS[dtype]
    ratios = {name: ours[name] / theirs[name] for name in NAMES}
    limits = {name: limit_out if name == "out" else limit_gradient for name in NAMES}
    broken = [f"{name} error {ours[name]:.2e} > {limits[name]:.1e}" for name in NAMES if not ours[name] <= limits[name]]
    broken += [
        f"{name} ratio {ratios[name]:.2f} > {LARGEST_RATIO}" for name in NAMES if not ratios[name] <= LARGEST_RATIO
    ]
    case = {"dtype": dtype, "head_dim": head_dim, "causal": causal, "seq_len": length}
    return {"case": case, "cosattn": ours, "sdpa": theirs, "ratios": ratios, "broken": broken}


def measure_all(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of the whole grid."""
    for dtype in args.dtype:
        for head_dim in args.head_dim:
            for causal in (False, True):
                for length in args.seq_len:
                    yield measure(dtype, head_dim, causal, length, device)


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """Errors of ours and, in brackets, their ratio to SDPA's."""
    lines = []
    for row in rows:
        case = row["case"]
        label = f"{case['dtype']} d{case['head_dim']} S{case['seq_len']}{' causal' * case['causal']}"
        lines.append(
            [
                label,
                *(f"{row['cosattn'][n]:.1e} ({row['ratios'][n]:.2f})" for n in NAMES),
                "; ".join(row["broken"]) or "ok",
            ]
        )
    return table(["case", *NAMES, "limits"], lines)


def parser(on_gpu: bool) -> argparse.ArgumentParser:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--dtype", nargs="+", choices=list(LIMITS), default=list(LIMITS) if on_gpu else ["float32", "bfloat16"]
    )
    p.add_argument("--head-dim", nargs="+", type=int, default=[32, 64, 96, 128, 256] if on_gpu else [32, 64])
    p.add_argument("--seq-len", nargs="+", type=int, default=[128, 1000, 4096] if on_gpu else [100, 256])
    p.add_argument("--device", default="cuda" if on_gpu else "cpu")
    p.add_argument("--output", type=Path, help="JSON file")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a limit is broken."""
    args = parser(torch.cuda.is_available()).parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda":
        cases = [
            Case(t, 1, 4, d, 64, "both", causal) for t in args.dtype for d in args.head_dim for causal in (False, True)
        ]
        print(f"kernels ready after {prebuild(needed_specs(cases, device)):.1f} s", flush=True)
    rows = list(measure_all(args, device))
    print(accuracy_table(rows))
    worst = max(ratio for row in rows for ratio in row["ratios"].values())
    broken = sum(bool(row["broken"]) for row in rows)
    print(f"{len(rows)} cases, largest ratio to SDPA {worst:.2f}, {broken} cases break a limit")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        result = {"suite": "accuracy", "environment": environment(device), "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
