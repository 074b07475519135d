"""The suite ``short``: sequences of 49 to 512 tokens, many heads, against what a user writes today.

Eager figures hide the host (``cosattn.bench``); replays of a CUDA graph stand beside them. Every figure has its norm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import SCALE, Case, Inputs, cosattn_work, make_inputs, row_of
from torch import Tensor

from cosattn.bench import Stopwatch, Work, directions, sdpa

HEAD_DIMS = (32, 64, 128)
LENGTHS = (49, 64, 128, 144, 256, 512)
HEADS = (64, 1024, 8192)
"""Batch times heads."""
GRAPH = "cosattn, CUDA graph"
EAGER = "normalize + SDPA"
COMPILED = {"cudnn": "normalize + cuDNN, compiled", "flash": "normalize + FA2, compiled"}
COPY_RATE = 4.3e12
"""Bytes a second an H200 copies."""


def short_cases(args: argparse.Namespace) -> list[Case]:
    """Every combination that the command line leaves, eight heads an entry of the batch."""
    return [
        Case("bfloat16", heads // 8, 8, head_dim, length, direction, causal=causal)
        for head_dim in args.head_dim or HEAD_DIMS
        for length in args.seq_len or LENGTHS
        for heads in HEADS
        for causal in ([True] if args.causal_only else [False])
        for direction in args.direction or ("forward", "backward", "both")
    ]


def replayed(work: Work) -> Work:
    """The work as the replay of a CUDA graph, captured by the first call."""
    graphs: list[torch.cuda.CUDAGraph] = []

    def replay() -> object:
        if not graphs:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    work()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            graphs.append(graph)
        return graphs[0].replay()

    return replay


def run_short(case: Case, stopwatch: Stopwatch) -> dict[str, Any]:
    """Ours, eager normalise + SDPA, compiled normalise + cuDNN and FA2. A backward alone has no graph of its own."""
    x = make_inputs(case, stopwatch.device)
    contenders: dict[str, Work] = {"cosattn": cosattn_work(case, x)}
    if case.direction != "backward":
        contenders[GRAPH] = replayed(cosattn_work(case, x))
    contenders[EAGER] = directions(lambda: sdpa(x.q, x.k, x.v, scale=SCALE, causal=case.causal), x.all, case.direction)
    torch.compiler.reset()
    for backend, name in COMPILED.items():
        contenders[name] = directions(compiled(case, x, backend), x.all, case.direction)
    return row_of(case, stopwatch.compare(contenders), floor_ms=floor_ms(case))


def compiled(case: Case, x: Inputs, backend: str) -> Callable[[], Tensor]:
    """Normalise + one backend of SDPA under torch.compile."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return sdpa(q, k, v, scale=SCALE, causal=case.causal, backend=backend, normalize=False)

    whole = torch.compile(attention, dynamic=False)
    return lambda: whole(x.q, x.k, x.v)


def floor_ms(case: Case) -> float:
    """Every input read once and every result written once: q, k, v, o; backward q, k, v, o, do, dq, dk, dv."""
    tensors = {"forward": 4, "backward": 8, "both": 12}[case.direction]
    return 1e3 * tensors * 2 * case.batch * case.heads * case.seq_len * case.head_dim / COPY_RATE
