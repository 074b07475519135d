#!/usr/bin/env python
"""Where the host time of a call goes: microseconds of each part, on both host paths, beside SDPA in the same run.

Parts are what leaving them out saves: a kernel that does nothing in the place of the launches, a call the extension
does not know in the place of one it does, views in the place of attention.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cosattn import autograd, host, host_build, plan
from cosattn.functional import cosine_attention

Candidate = Callable[[], object]
NOTHING = "int launch(const void* pointers, const void* problem, void* stream) { return 0; }"
WITHOUT_LAUNCHES = 8.5
"""The scale of the calls whose kernels do nothing: other calls for the plans, the same to everything else."""


class Nothing:
    """A kernel that does nothing, with the workspace of the real one."""

    def __init__(self, real: Any, library: ctypes.CDLL) -> None:
        self.spec = real.spec
        self.launch = library.launch
        self.launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self.address = ctypes.cast(self.launch, ctypes.c_void_p).value
        self.workspace_bytes = real.workspace_bytes


def nothing(folder: str) -> ctypes.CDLL:
    source, library = Path(folder, "nothing.c"), Path(folder, "nothing.so")
    source.write_text(NOTHING)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


def microseconds(candidates: dict[str, Candidate], calls: int, rounds: int) -> dict[str, float]:
    """Median over rounds in which the candidates take turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            call()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - began) / calls * 1e6)
            torch.cuda.synchronize()
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=[1, 4, 128, 64], metavar=("B", "H", "S", "D"))
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    module = host.load(host_build.ensure())
    host._begun = True
    q, k, v = (torch.randn(*options.shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    views = [x.flatten(0, 1) for x in (dout, dout, dout)]
    rest = (1, False, False, True, None, None, False, None)

    def attention(scale: float, *, grad: bool = False) -> Candidate:
        tensors = leaves if grad else (q, k, v)
        return lambda: cosine_attention(*tensors, scale=scale)

    def step(scale: float) -> Candidate:
        return lambda: torch.autograd.grad(cosine_attention(*leaves, scale=scale), leaves, dout)

    def sdpa_step() -> object:
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, dout)

    def alone(call: Candidate) -> Candidate:
        def run() -> object:
            with torch.autograd.set_multithreading_enabled(False):
                return call()

        return run

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        library, real_load = nothing(folder), plan.load
        for way in ("python", "extension"):
            plan.plans.clear()
            if way == "extension":
                host.connect(module, host.address_of_current_stream(), autograd.gradients_for_host)
            step(8.0)()
            plan.load = lambda spec: Nothing(real_load(spec), library)
            step(WITHOUT_LAUNCHES)()
            plan.load = real_load
            candidates: dict[str, Candidate] = {
                "forward": attention(8.0),
                "forward without launches": attention(WITHOUT_LAUNCHES),
                "forward, recorded": attention(8.0, grad=True),
                "forward, recorded, without launches": attention(WITHOUT_LAUNCHES, grad=True),
                "SDPA forward": lambda: F.scaled_dot_product_attention(q, k, v),
                "SDPA forward, recorded": lambda: F.scaled_dot_product_attention(*leaves),
                "step": step(8.0),
                "step without launches": step(WITHOUT_LAUNCHES),
                "step, engine in the calling thread": alone(step(8.0)),
                "SDPA step": sdpa_step,
                "SDPA step, engine in the calling thread": alone(sdpa_step),
                "engine: a view": lambda: torch.autograd.grad(leaves[0].flatten(0, 1), leaves[0], views[0]),
                "engine: three views": lambda: torch.autograd.grad([x.flatten(0, 1) for x in leaves], leaves, views),
                "empty_like": lambda: torch.empty_like(q),
            }
            if way == "extension":
                candidates["attend"] = lambda: host.attend(q, k, v, None, None, 8.0, *rest)
                candidates["attend, unknown"] = lambda: host.attend(q, k, v, None, None, 7.5, *rest)
            found[way] = microseconds(candidates, options.calls, options.rounds)
    for name in found["extension"]:
        print(f"{name:42}", *(f"{found[way].get(name, float('nan')):8.2f}" for way in found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
