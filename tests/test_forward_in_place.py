"""The Hopper forward of few keys, which blocks normalise where they meet them: which calls get it, ptxas, results."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import relative_error
from emulator import harness
from emulator.check import Problem, check, specs
from sass import compile_spec
from test_forward_sm90 import assert_tiles_fit
from test_kernels_compile import needs_nvcc
from test_tiles import errors_of_claims, pairs_of_dims

from cosattn import cosine_attention
from cosattn.families import family_of, sized
from cosattn.reference import cosine_attention_reference
from cosattn.render import render
from cosattn.spec import KernelSpec
from cosattn.tiles_sm90_forward import FEW_KEYS, FEWER_KEYS, forward_tiles, short_class

PLAIN = KernelSpec("forward", "sm90", "bfloat16", 96, 96)
FEW = replace(PLAIN, short=FEW_KEYS)

PROBLEMS = [
    Problem(d=8, sq=70, sk=200),
    Problem(d=24, dv=16, sq=100, sk=270, causal=True),
    Problem(d=32, sq=400, sk=500),
    Problem(d=40, dv=24, sq=77, strided=True, dtype="float16"),
    Problem(d=48, dv=96, sq=200, sk=129, causal=True),
    Problem(d=64, sq=130, sk=1, scale=0),
    Problem(d=64, sq=300, sk=520, heads=4, kv_heads=1, scale=0),
    Problem(d=64, sq=700, heads=5, causal=True),  # heads one after another, and the last ones in turns
    Problem(d=64, sq=500, sk=150, causal=True),  # rows that see no key
    Problem(d=64, sq=300, causal=True, softmax="online", scale=60.0),
    Problem(d=80, sq=66, sk=129, batch=5, heads=1),
    Problem(d=96, sq=200, sk=260, causal=True, heads=4, kv_heads=2),  # tiles of keys that only later rows see
    Problem(d=96, sq=197, sk=500, dtype="float16", softmax="online"),
    # Heads after heads, their k_hat made while the one before is worked on; d 96 and 128 have no room for two.
    Problem(d=32, sq=500, heads=10, causal=True),
    Problem(d=64, sq=512, heads=7),
    Problem(d=64, sq=300, sk=1000, heads=4, causal=True),
    Problem(d=96, sq=512, heads=4, causal=True),
    Problem(d=128, sq=512, heads=4, causal=True),
    Problem(d=128, dv=96, sq=260, sk=256, heads=6, kv_heads=3),
    Problem(d=112, dv=8, sq=100, sk=70, softmax="online", scale=60.0, dtype="float16"),
    Problem(d=128, sq=300, sk=256, heads=7, batch=1),  # two tiles of queries at a time
    Problem(d=128, sq=256, heads=5, causal=True),
    Problem(d=32, sq=600, sk=500, heads=5, dtype="float16"),
    Problem(d=24, dv=128, sq=150, sk=200),  # a past failure: more threads made k_hat than a tile has keys
    Problem(d=16, dv=72, sq=100, sk=200, causal=True, dtype="float16"),
    # More keys than there is room for. A past failure: warpgroups without rows kept all keys until they had seen all.
    Problem(d=96, sq=200, sk=700),
    Problem(d=128, sq=130, sk=700, heads=3, causal=True),
    Problem(d=64, sq=260, sk=1100, heads=1),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results(problem: Problem) -> None:
    problem = replace(problem, arch="sm90", in_place=True)
    forward, _ = specs(problem)
    wide, keys = max(forward.head_dim, forward.value_dim) > 96, problem.sk or problem.sq
    assert forward.short == (FEWER_KEYS if wide and keys <= FEWER_KEYS else FEW_KEYS)
    assert family_of(forward) == "sm90"
    check(problem)


def test_what_is_chosen() -> None:
    def chosen(d: int, q_len: int, k_len: int, heads: int = 1024, **options: object) -> int:
        return sized(replace(PLAIN, head_dim=d, value_dim=d, **options), q_len, k_len, heads=heads).short  # type: ignore[arg-type]

    for d, keys in ((24, 1024), (40, 1024), (96, 512), (104, 256)):
        assert chosen(d, 300, keys) == (FEW_KEYS if d <= 96 else FEWER_KEYS)
        assert chosen(d, 300, keys + 1) == 0
        assert (
            chosen(d, 300, 200, mask=True)
            == chosen(d, 300, 200, l2norm=False)
            == chosen(d, 300, 200, groups=d // 8)
            == 0
        )
    for d, keys in ((24, 2048), (40, 1024), (96, 1024), (128, 512)):
        assert chosen(d, keys, keys, causal=True) == FEW_KEYS
        assert chosen(d, keys + 2, keys + 2, causal=True) == 0
    assert chosen(40, 1024, 1024, heads=132) == chosen(40, 512, 512, heads=131) == FEW_KEYS
    assert chosen(40, 1024, 1024, heads=131) == 0  # multiprocessors would share heads
    assert chosen(136, 300, 200) == 0
    assert chosen(128, 256, 256, causal=True) == FEWER_KEYS
    assert chosen(128, 257, 257, causal=True) == chosen(128, 300, 256, heads=131) == FEW_KEYS
    assert sized(PLAIN, 300, 128, group=4).short == FEW_KEYS
    assert sized(PLAIN, 300, 129, group=4).short == 0
    assert chosen(64, 200, 200, heads=64) == 256  # of the kernels for short sequences
    assert chosen(64, 129, 129) == chosen(32, 193, 193) == FEW_KEYS
    assert chosen(128, 65, 65) == FEWER_KEYS
    for other in (
        {"bias": "float32"},
        {"pair_mask": True},
        {"dtype": "float32"},
        {"arch": "sm80"},
        {"direction": "backward"},
    ):
        assert short_class(replace(PLAIN, **other), 64) == 0, other


def test_tiles_fit(tmp_path: Path) -> None:
    for (d, dv), dtype in itertools.product(pairs_of_dims(), ("bfloat16", "float16")):
        spec = replace(PLAIN, head_dim=d, value_dim=dv, dtype=dtype)
        if not (size := short_class(spec, 64)):
            continue
        spec = replace(spec, short=size)
        assert forward_tiles(spec).keys_in_place
        assert not forward_tiles(spec).key_factors
        assert_tiles_fit(spec)
    for spec in (FEW, replace(FEW, head_dim=40, value_dim=24)):
        size = forward_tiles(spec).shared_bytes(spec)
        assert errors_of_claims(spec, {"SHARED_BYTES": size}, tmp_path) == ""
        assert "static assertion failed" in errors_of_claims(spec, {"SHARED_BYTES": size + 16}, tmp_path)


def test_no_pass_writes_keys() -> None:
    source = render(FEW).source
    assert "prepare_keys" not in source
    assert "T* k_hat" not in source


def compiled_specs() -> list[KernelSpec]:
    changes = ({}, {"softmax": "online"}, {"dtype": "float16"})
    found = [
        replace(FEW, head_dim=d, value_dim=d, causal=causal, **options)
        for d, causal, options in itertools.product((8, 32, 64, 96, 128), (False, True), changes)
    ]
    unequal = ((40, 96), (96, 64), (128, 32), (8, 128), (32, 96))
    found += [replace(FEW, head_dim=d, value_dim=dv, causal=d == 96) for d, dv in unequal]
    fewer = [replace(spec, short=FEWER_KEYS) for spec in found if max(spec.head_dim, spec.value_dim) > 96]
    return found + fewer


@needs_nvcc
@pytest.mark.parametrize("spec", compiled_specs(), ids=lambda spec: spec.name)
def test_machine_code(spec: KernelSpec, tmp_path: Path) -> None:
    cubin = compile_spec(spec, tmp_path)
    assert not [line for line in cubin.warnings if "C75" in line], "ptxas keeps products asynchronous"
    assert set(cubin.kernels) == {"prepare", "forward"}
    for name, kernel in cubin.kernels.items():
        assert kernel.spilled == 0, f"{name} moves {kernel.spilled} bytes through its stack"
        assert kernel.overtaking == []


@pytest.mark.parametrize("d", [32, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_those_of_the_pass(d: int, dtype: torch.dtype) -> None:
    """Keys are rounded to the same k_hat but for ties, as norms are summed in another order. Pairs of bfloat16 are
    multiplied in their own type, by factors in two parts: one of some hundreds is rounded to its other neighbour."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, d).to(dtype) for _ in range(3))
    k[0, 1, 70] = 0
    spec = harness.spec_of("forward", q, k, v, arch="sm90")
    with_pass = harness.run_forward(spec, q, k, v)
    in_place = harness.run_forward(replace(spec, short=FEW_KEYS), q, k, v)
    exact = cosine_attention_reference(*(x.double() for x in (q, k, v)))
    assert relative_error(in_place.out, with_pass.out.double()) < 1e-3
    assert relative_error(in_place.out, exact) < 1.02 * relative_error(with_pass.out, exact)
    bound = 1e-5 if dtype == torch.float16 else 2e-4
    assert ((in_place.lse - with_pass.lse).abs() > bound).double().mean() < 0.02
    for power in (-30, 59) if dtype == torch.bfloat16 else (3, 10):  # exact: nothing becomes subnormal
        assert torch.equal(harness.run_forward(replace(spec, short=FEW_KEYS), q, k * 2.0**power, v).out, in_place.out)


@pytest.mark.parametrize(
    ("d", "dtype"), [(32, torch.bfloat16), (64, torch.bfloat16), (96, torch.float16), (128, torch.bfloat16)]
)
def test_what_is_not_finite_stays_with_those_that_see_it(d: int, dtype: torch.dtype) -> None:
    # A past failure: rows that are looked at again, as another's v is not finite, saw keys without their norm.
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 300, d, dtype=torch.float32).to(dtype) for _ in range(3))
    v[0, 0, 170, 3] = torch.nan
    k[0, 1, 34] = torch.nan
    k[0, 2, 0, 5] = torch.inf
    spec = replace(harness.spec_of("forward", q, k, v, arch="sm90", causal=True), short=FEW_KEYS)
    out = harness.run_forward(spec, q, k, v).out
    broken = torch.zeros_like(out, dtype=torch.bool)
    broken[0, 0, 170:, 3] = True
    broken[0, 1, 34:] = True
    broken[0, 2] = True
    assert torch.equal(~out.isfinite(), broken)
    clean = harness.run_forward(spec, *(x.nan_to_num(0.0, 0.0, 0.0) for x in (q, k, v))).out
    assert relative_error(out[~broken], clean[~broken].double()) < 1e-3


REPEATED = [
    (32, False, 500),
    (32, True, 512),
    (32, True, 2000),
    (64, False, 500),
    (64, True, 512),
    (64, False, 1000),
    (96, False, 500),
    (96, True, 512),
    (96, True, 1000),
    (128, False, 250),
    (128, True, 512),
]
"""Head dims, whether causal, and lengths that run again and again."""


def test_what_is_repeated_is_of_few_keys() -> None:
    for d, causal, length in REPEATED:
        spec = replace(PLAIN, head_dim=d, value_dim=d, causal=causal)
        assert sized(spec, length, length, heads=800).short == (FEWER_KEYS if (d, length) == (128, 250) else FEW_KEYS)


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "causal", "length"), REPEATED)
def test_results_on_a_gpu_repeat(d: int, causal: bool, length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 200, length, d, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    first = cosine_attention(q, k, v, causal=causal)
    for _ in range(20):
        assert torch.equal(cosine_attention(q, k, v, causal=causal), first)
    some = [x[1:2, 3:9].double() for x in (q, k, v)]
    expected = cosine_attention_reference(*some, causal=causal)
    assert relative_error(first[1:2, 3:9], expected) < 6e-3
