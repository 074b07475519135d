#!/usr/bin/env python3
"""A spread of kernels on small shapes, checked against float64: what compute-sanitizer is run over.

    python scripts/sanitize_target.py --list
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python scripts/sanitize_target.py

Without the caching allocator every tensor is its own allocation, so a read past the end of one is seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import relative_error

from cosattn import cosine_attention
from cosattn.bench import DTYPES
from cosattn.reference import cosine_attention_reference

TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Target:
    """One call, forward and backward. Lengths sit beside tile edges on purpose."""

    dtype: str = "bfloat16"
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 65
    k_len: int = 129
    head_dim: int = 64
    value_dim: int = 64
    groups: int = 1
    causal: bool = False
    mask: bool = False
    windows: int = 0
    """A mask over queries and keys for each of so many windows, which divide the batch."""
    bias: bool = False
    tensor_scale: bool = False
    l2norm: bool = True
    deterministic: bool = False
    lse: bool = False

    @property
    def label(self) -> str:
        default = Target()
        changed = [
            f"{n}={getattr(self, n)}" for n in self.__dataclass_fields__ if getattr(self, n) != getattr(default, n)
        ]
        return ", ".join(changed) or "plain"


TARGETS = (
    Target(),
    Target(dtype="float16", causal=True),
    Target(dtype="float32"),
    Target(dtype="float32", causal=True, mask=True, head_dim=40, value_dim=40),
    Target(causal=True, mask=True, q_len=100, k_len=70),
    Target(bias=True, head_dim=32, value_dim=32, q_len=49, k_len=49, batch=3),
    Target(dtype="float16", bias=True, mask=True, head_dim=32, value_dim=32, q_len=144, k_len=144, batch=1),
    Target(heads=4, kv_heads=1, head_dim=128, value_dim=128, causal=True),
    Target(heads=4, kv_heads=2, head_dim=96, value_dim=64, deterministic=True),
    Target(tensor_scale=True, groups=8, causal=True, lse=True),
    Target(head_dim=256, value_dim=256, q_len=33, k_len=65),
    Target(head_dim=8, value_dim=8, q_len=1, k_len=7),
    Target(q_len=64, k_len=64, causal=True),  # the kernels for short sequences
    Target(q_len=100, k_len=128, head_dim=32, value_dim=32, mask=True, causal=True, heads=4, kv_heads=2),
    Target(q_len=150, k_len=150, head_dim=32, value_dim=32, bias=True, lse=True),
    Target(q_len=130, k_len=144, tensor_scale=True, groups=8),
    Target(q_len=50, k_len=64, head_dim=128, value_dim=96, dtype="float16"),
    Target(batch=40, heads=10, kv_heads=10, q_len=49, k_len=49, head_dim=32, value_dim=32, bias=True),
    Target(l2norm=False, deterministic=True, causal=True, k_len=200),
    Target(batch=4, heads=40, kv_heads=40, q_len=300, k_len=300, causal=True),  # several tiles a multiprocessor
    Target(batch=3, heads=60, kv_heads=60, q_len=200, k_len=100, head_dim=128, value_dim=128),
    Target(batch=1, heads=80, kv_heads=80, q_len=250, k_len=250, head_dim=256, value_dim=256, causal=True),
    Target(windows=2, bias=True, head_dim=32, value_dim=32, q_len=49, k_len=49, batch=4),
    Target(windows=2, dtype="float32", causal=True, deterministic=True),
    Target(q_len=1, k_len=2001, heads=8, kv_heads=2),  # keys split over blocks
    Target(q_len=50, k_len=5000, head_dim=128, value_dim=128, causal=True, mask=True),
    Target(heads=4, kv_heads=1, head_dim=192, value_dim=128, q_len=200, k_len=130, causal=True, mask=True),
    Target(batch=4, heads=50, kv_heads=50, q_len=120, k_len=125, head_dim=128, value_dim=128),  # short, a head a block
    Target(batch=4, heads=50, kv_heads=50, q_len=250, k_len=240),
    Target(heads=4, kv_heads=2, head_dim=96, value_dim=96, q_len=333, k_len=270, causal=True),
    Target(batch=5, heads=50, kv_heads=50, q_len=200, k_len=250, causal=True),  # backward: a head a block
    Target(batch=2, heads=120, kv_heads=60, head_dim=32, value_dim=32, q_len=250, k_len=300, mask=True),
    Target(batch=4, heads=80, kv_heads=40, head_dim=128, value_dim=128, q_len=200, k_len=270, causal=True),  # dQ apart
    Target(batch=3, heads=50, kv_heads=50, q_len=520, k_len=400, causal=True),  # forward: heads of keys that stay
    Target(batch=3, heads=100, kv_heads=50, head_dim=96, value_dim=96, q_len=200, k_len=210),
    Target(batch=3, heads=50, kv_heads=50, head_dim=128, value_dim=128, q_len=300, k_len=260, causal=True),
    Target(batch=3, heads=50, kv_heads=50, head_dim=32, value_dim=32, q_len=300, k_len=500, causal=True),
    Target(batch=1, heads=3, kv_heads=3, q_len=300, k_len=4200, lse=True),  # forward: tiles in parts
    Target(batch=1, head_dim=128, value_dim=128, q_len=200, k_len=3000),
    Target(batch=1, head_dim=256, value_dim=256, q_len=200, k_len=2900),
    Target(heads=4, kv_heads=4, head_dim=96, value_dim=96, q_len=333, k_len=333, causal=True),  # backward: tiles passed
    Target(heads=4, kv_heads=4, head_dim=128, value_dim=128, q_len=333, k_len=333, causal=True),
    Target(batch=1, heads=17, kv_heads=17, q_len=1600, k_len=1010),  # backward: blocks of keys in parts
    Target(batch=1, heads=17, kv_heads=17, head_dim=128, value_dim=128, q_len=1600, k_len=1010),
    Target(batch=1, heads=17, kv_heads=17, head_dim=256, value_dim=256, q_len=1600, k_len=500),
    Target(batch=2, heads=60, kv_heads=60, q_len=600, k_len=600, causal=True),  # backward: sums cleared ahead
    Target(batch=2, heads=40, kv_heads=40, head_dim=128, value_dim=128, q_len=300, k_len=600),
    Target(head_dim=256, value_dim=256, q_len=300, k_len=270, mask=True, tensor_scale=True),  # q as it is
)


def run(target: Target, device: torch.device) -> float:
    """Largest relative error of the outputs and gradients of one target. Raises when it is above the tolerance."""
    torch.manual_seed(1)
    t, dtype = target, DTYPES[target.dtype]

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=torch.float32).to(device, kind)

    q = normal(t.batch, t.heads, t.q_len, t.head_dim)
    k = normal(t.batch, t.kv_heads, t.k_len, t.head_dim)
    v = normal(t.batch, t.kv_heads, t.k_len, t.value_dim)
    if not t.l2norm:
        q, k = (torch.nn.functional.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
    leaves = {"q": q, "k": k, "v": v}
    if t.bias:
        leaves["attn_bias"] = normal(t.heads, t.q_len, t.k_len)
    if t.tensor_scale:
        leaves["scale"] = (torch.arange(t.heads, dtype=torch.float32) + 1).to(device)
    mask = (torch.rand(t.batch, t.k_len) < 0.7).to(device) if t.mask else None
    if t.windows:
        mask = (torch.rand(1, t.windows, 1, t.q_len, t.k_len) < 0.7).to(device)
    options = {"causal": t.causal, "groups": t.groups, "l2norm_qk": t.l2norm, "mask": mask}
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    out, lse = cosine_attention(**leaves, **options, deterministic=t.deterministic, return_lse=True)
    out64, lse64 = cosine_attention_reference(**exact, **options, return_lse=True)
    visible = lse64.isfinite()
    wanted, wanted64 = [out], [out64]
    if t.lse:
        wanted, wanted64 = [out, lse[visible]], [out64, lse64[visible]]
    gradients = [normal(*x.shape, kind=x.dtype) for x in wanted]
    got = torch.autograd.grad(wanted, list(leaves.values()), gradients)
    truth = torch.autograd.grad(wanted64, list(exact.values()), [g.double() for g in gradients])
    pairs = [(out, out64), (lse[visible], lse64[visible]), *zip(got, truth, strict=True)]
    worst = max(relative_error(a, b) for a, b in pairs)
    if not worst <= TOLERANCE[t.dtype]:
        raise AssertionError(f"{t.label}: relative error {worst:.2e} > {TOLERANCE[t.dtype]:.0e}")
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when a target failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--only", nargs="+", type=int, metavar="N", help="numbers of the targets to run")
    p.add_argument("--list", action="store_true", help="print the targets and stop")
    args = p.parse_args(arguments)
    failed = 0
    for number, target in enumerate(TARGETS):
        if args.only is not None and number not in args.only:
            continue
        if args.list:
            print(f"{number:2} {target.label}")
            continue
        try:
            print(f"{number:2} {target.label}: error {run(target, torch.device(args.device)):.1e}", flush=True)
        except Exception as error:  # the other targets still run
            failed += 1
            print(f"{number:2} {target.label}: FAILED: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
