"""The suite ``short``: sequences of 64 to 512 tokens, many heads, against what a user writes today.

Eager figures hide the host (``cosattn.bench``); replays of a CUDA graph stand beside them. Every figure has its norm,
but for those of the bare kernels, whose inputs are normalised beforehand.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from cases import SCALE, Case, cosattn_work, make_inputs, row_of
from torch import Tensor

from cosattn.bench import Stopwatch, Work, directions, sdpa

HEAD_DIMS = (32, 64, 128)
LENGTHS = (64, 128, 256, 512)
HEADS = (64, 1024, 8192)
"""Batch times heads."""
GRAPH = "cosattn, CUDA graph"
EAGER = "normalize + SDPA"
BARE = {"cudnn": "cuDNN", "flash": "FA2"}
COMPILED = {backend: f"normalize, compiled + {name}" for backend, name in BARE.items()}
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
            with torch.cuda.graph(graph, stream=aside):  # where a backward's forward ran, so that autograd stays there
                work()
            graphs.append(graph)
        return graphs[0].replay()

    return replay


def normalize(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


functorch.donated_buffer = False  # a backward that keeps its graph, as ``directions`` times it, wants that
compiled_normalize = torch.compile(normalize)
"""One compilation serves all batches and lengths. Attention would stay a call of its own in a larger graph, too."""


def run_short(case: Case, stopwatch: Stopwatch) -> dict[str, Any]:
    """Ours, eager and as a graph, eager normalise + SDPA, compiled normalise + cuDNN and FA2, and these two alone."""
    x = make_inputs(case, stopwatch.device)
    for tensor in (x.q, x.k):
        for axis in (0, 2):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
    q, k = (F.normalize(tensor.detach(), dim=-1).requires_grad_() for tensor in (x.q, x.k))
    # Leaves of its own: autograd ends on the stream that a leaf was first used on, which must be the captured one.
    captured = make_inputs(case, stopwatch.device)
    contenders: dict[str, Work] = {"cosattn": cosattn_work(case, x), GRAPH: replayed(cosattn_work(case, captured))}

    def bare(q: Tensor, k: Tensor, backend: str) -> Tensor:
        return sdpa(q, k, x.v, scale=SCALE, causal=case.causal, backend=backend, normalize=False)

    contenders[EAGER] = directions(lambda: sdpa(x.q, x.k, x.v, scale=SCALE, causal=case.causal), x.all, case.direction)
    for backend, name in BARE.items():
        contenders[COMPILED[backend]] = directions(
            lambda backend=backend: bare(*compiled_normalize(x.q, x.k), backend), x.all, case.direction
        )
        contenders[name] = directions(lambda backend=backend: bare(q, k, backend), (q, k, x.v), case.direction)
    return row_of(case, stopwatch.compare(contenders), floor_ms=floor_ms(case))


def floor_ms(case: Case) -> float:
    """Every input read once and every result written once: q, k, v, o; backward q, k, v, o, do, dq, dk, dv."""
    tensors = {"forward": 4, "backward": 8, "both": 12}[case.direction]
    return 1e3 * tensors * 2 * case.batch * case.heads * case.seq_len * case.head_dim / COPY_RATE
