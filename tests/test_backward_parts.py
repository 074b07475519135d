"""The last blocks of keys of the Hopper backward in parts over the queries: how many, their memory, and results."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import relative_error
from emulator import harness
from emulator.check import Problem, check, specs, tensors_of
from sass import compile_spec
from test_kernels_compile import needs_nvcc

from cosattn import cosine_attention
from cosattn.reference import cosine_attention_reference
from cosattn.render import render
from cosattn.spec import KernelSpec
from cosattn.tiles_sm90_backward import BLOCK_M, backward_tiles, q_as_it_is

PLAIN = KernelSpec("backward", "sm90", "bfloat16", 64, 64)

IN_PARTS = [
    (Problem(d=64, sq=1600, sk=850, batch=1, heads=1), 3),  # a block too many for rounds of the emulator's three
    (Problem(d=32, sq=2100, sk=300, batch=1), 3),
    (Problem(d=40, dv=24, sq=2900, sk=100, batch=1, heads=1, scale=0), 3),
    (Problem(d=80, sq=1600, sk=250, batch=1, groups=2, strided=True), 3),
    (Problem(d=104, dv=72, sq=1600, sk=880, batch=1, heads=1, dtype="float16", dlse=True), 3),
    (Problem(d=128, sq=1600, sk=1250, batch=1, heads=1), 3),
    (Problem(d=136, sq=1900, sk=100, batch=1, l2norm=False), 3),
    (Problem(d=192, dv=128, sq=1600, sk=250, batch=1, heads=1), 3),
    (Problem(d=256, sq=4000, sk=300, batch=1, heads=1, softmax="online"), 6),  # two rounds of parts
    (Problem(d=64, sq=600, sk=850, batch=1, heads=1), 0),  # few tiles of queries
    (Problem(d=128, sq=1600, sk=100, batch=1, heads=1), 0),  # sums would be larger than half of q, k and v
    (Problem(d=64, sq=1600, sk=850, batch=1, kv_heads=1), 0),  # keys that two heads share
]
"""Full attention, and into how many parts the last blocks of keys are cut."""


def whole_bytes(spec: KernelSpec, problem: Problem) -> int:
    """Of a workspace without parts."""
    tiles = backward_tiles(spec)
    rows = problem.batch * problem.heads * -(-problem.sq // BLOCK_M) * BLOCK_M
    keys = problem.batch * (problem.kv_heads or problem.heads) * (problem.sk or problem.sq)
    statistics = 32 if tiles.fold else 20 if q_as_it_is(spec) else 8  # of a row
    sizes = [rows * statistics, 4]  # and how many blocks were taken
    if tiles.apart:
        sizes += [rows * spec.groups * 8, keys * spec.head_dim * 2, 4]  # through the norm, k_hat, blocks of queries
    else:
        sizes += [rows * -(-spec.head_dim // 16) * 64, 4 * problem.batch * (problem.kv_heads or problem.heads)]
    return sum(-(-size // 256) * 256 for size in sizes)


@pytest.mark.parametrize(("problem", "parts"), IN_PARTS, ids=str)
def test_results(problem: Problem, parts: int) -> None:
    problem = replace(problem, arch="sm90")
    check(problem)
    forward, spec = specs(problem)
    t = tensors_of(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v, scale=t.scale)
    found = harness.run_backward(spec, t.q, t.k, t.v, first.out, first.lse, t.dout, scale=t.scale)
    sums = 4 * backward_tiles(spec).parts * 64 * (spec.head_dim + spec.value_dim)  # of a part
    assert found.workspace.numel() == whole_bytes(spec, problem) + -(-parts * sums // 256) * 256


def test_what_is_not_finite() -> None:
    """In parts, too, it stays with those that see it."""
    problem = replace(IN_PARTS[0][0], arch="sm90")
    t = tensors_of(problem)
    t.dout[0, 0, 700, 3] = torch.nan
    forward, spec = specs(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v)
    found = harness.run_backward(spec, t.q, t.k, t.v, first.out, first.lse, t.dout)
    assert torch.equal(found.dq[0, 0].isnan().any(-1), torch.arange(1600) == 700)
    assert found.dk.isnan().all()
    assert found.dv[..., 3].isnan().all()


def test_the_same_bits_in_any_order() -> None:
    problem = Problem(d=136, sq=1900, sk=100, batch=1, arch="sm90")
    t, (forward, spec) = tensors_of(problem), specs(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v)
    one, *others = (
        harness.run_backward(spec, t.q, t.k, t.v, first.out, first.lse, t.dout, seed=seed) for seed in range(3)
    )
    for name, other in itertools.product(("dq", "dk", "dv"), others):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_which_kernels_have_it() -> None:
    for d in (32, 64, 96, 128, 192, 256):
        spec = replace(PLAIN, head_dim=d, value_dim=d)
        assert "add_parts" in render(spec).source
        for change in ({"causal": True}, {"mask": True}, {"softmax": "online", "bias": "bfloat16"}, {"short": 128}):
            assert "add_parts" not in render(replace(spec, **change)).source  # type: ignore[arg-type]
    assert "add_parts" not in render(replace(PLAIN, deterministic=True)).source  # blocks take turns there


@needs_nvcc
@pytest.mark.parametrize("spec", [PLAIN, replace(PLAIN, head_dim=256, value_dim=128)], ids=lambda spec: spec.name)
def test_what_adds_them_up(spec: KernelSpec, tmp_path: Path) -> None:
    kernel = compile_spec(spec, tmp_path).kernels["add_parts"]
    assert kernel.spilled == kernel.stack == 0
    assert kernel.registers <= 64  # four blocks a multiprocessor


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "heads", "length"),
    [(32, 40, 8200), (64, 20, 8000), (96, 12, 8000), (128, 15, 8000), (192, 9, 8000), (256, 8, 8200)],
)
def test_on_a_gpu(d: int, heads: int, length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, d, dtype=torch.bfloat16, device="cuda").requires_grad_() for _ in range(3))
    dout = torch.randn_like(q)
    out = cosine_attention(q, k, v)
    found = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    for _ in range(20):
        again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again[1:], found[1:], strict=True))
    for head in (0, heads - 1):  # whole, and in parts
        one = slice(head, head + 1)
        exact = [x.detach()[:, one].double().requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad(cosine_attention_reference(*exact), exact, dout[:, one].double())
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a[:, one], b) < 1e-2
