"""The Hopper backward whose dQ has a kernel of its own: which calls get it, what ptxas makes of it, and its results."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator.check import Problem, check, computed, specs, tensors_of
from sass import compile_spec
from test_backward_by_head import assert_right_and_repeatable, spec_of
from test_backward_sm90 import assert_not_finite_stays, assert_not_serialised, assert_tiles_fit
from test_kernels_compile import needs_nvcc
from test_tiles import errors_of_claims

from cosattn.arch import ARCHS
from cosattn.families import family_of, sized
from cosattn.render import render
from cosattn.spec import KernelSpec
from cosattn.tiles_sm90_backward import (
    APART_KEYS,
    apart,
    apart_class,
    backward_tiles,
    q_as_it_is,
    repeatable,
    serves,
)

PLAIN = KernelSpec("backward", "sm90", "bfloat16", 128, 128)
WIDE = replace(PLAIN, head_dim=256, value_dim=256)

PROBLEMS = [
    Problem(d=128, sq=130, sk=200),
    Problem(d=128, sq=300, sk=270, causal=True),
    Problem(d=128, sq=300, sk=100, causal=True),  # rows that see no key
    Problem(d=128, sq=70, sk=140, l2norm=False, causal=True),
    Problem(d=128, sq=65, softmax="online", scale=60.0),
    Problem(d=128, sq=1, sk=65, softmax="online", dlse=True),
    Problem(d=128, sq=130, sk=70, groups=4, scale=0, causal=True),
    Problem(d=128, sq=90, sk=140, dtype="float16", mask=True, causal=True),
    Problem(d=104, dv=128, sq=300, sk=100, causal=True, heads=4, kv_heads=2),
    Problem(d=128, dv=40, sq=200, sk=140, mask=True),
    Problem(d=120, sq=70, sk=300, mask=True, dtype="float16", strided=True),
    Problem(d=112, sq=66, sk=129, groups=7, batch=5, heads=1),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results(problem: Problem) -> None:
    """Blocks of the emulator's few multiprocessors take one tile of queries after another."""
    problem = replace(problem, arch="sm90", apart=True)
    _, backward = specs(problem)
    assert backward.short == APART_KEYS
    assert family_of(backward) == "sm90"
    check(problem)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(d=256, sq=300, sk=270, causal=True),
        Problem(d=256, sq=70, sk=70, groups=32),
        Problem(d=144, sq=70, sk=90, groups=6, scale=0, mask=True),
        Problem(d=192, sq=200, sk=60, causal=True, bias="bfloat16", bias_shape="bqk"),  # rows that see no key
        Problem(d=256, sq=70, sk=91, bias="float32", causal=True),
        Problem(d=160, sq=150, sk=140, dtype="float16", dlse=True),
        Problem(d=256, sq=300, sk=200, dlse=True, strided=True),
        Problem(d=224, dv=256, sq=130, sk=70, mask=True, scale=0, heads=4, kv_heads=2),
        Problem(d=256, dv=64, sq=65, sk=140, l2norm=False, softmax="online"),
        Problem(d=200, sq=1, sk=129, batch=3),
    ],
    ids=str,
)
def test_results_of_wide_heads(problem: Problem) -> None:
    check(replace(problem, arch="sm90"))


@pytest.mark.parametrize("causal", [False, True])
def test_any_order_of_threads_and_blocks(causal: bool) -> None:
    for seed in range(1, 4):
        check(Problem(d=128, sq=300, sk=260, causal=causal, arch="sm90", apart=True), seed)


@pytest.mark.parametrize(("name", "row"), [("dout", 70), ("q", 70), ("v", 130)])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_finite_stays_with_those_that_see_it(causal: bool, name: str, row: int) -> None:
    assert_not_finite_stays(Problem(d=128, causal=causal, apart=True), name, row)


@pytest.mark.parametrize(("name", "row"), [("dout", 70), ("q", 70), ("v", 130)])
def test_what_is_not_finite_in_wide_heads(name: str, row: int) -> None:
    assert_not_finite_stays(Problem(d=256), name, row)


def test_rows_that_see_nothing_where_q_is_as_it_is() -> None:
    """Whatever q holds there."""
    problem = Problem(d=256, mask=True, arch="sm90")  # the last batch is hidden
    _, backward = specs(problem)
    assert q_as_it_is(backward)
    t = tensors_of(problem)
    t.q[-1, 0, 5, 3], t.q[-1, 1, 70] = torch.nan, torch.inf
    found = computed(problem, t)
    for gradient in ("dq", "dk", "dv"):
        assert found[gradient][0].isfinite().all()
        assert (found[gradient][-1] == 0).all()


def test_one_head_of_queries_for_all() -> None:
    problem = Problem(d=256, sq=70, sk=90, arch="sm90")
    t = tensors_of(problem)
    first = t.q[:, :1]
    expanded, repeated = (
        computed(problem, replace(t, q=q)) for q in (first.expand_as(t.q), first.repeat(1, problem.heads, 1, 1))
    )
    for gradient in ("dq", "dk", "dv"):
        assert torch.equal(expanded[gradient], repeated[gradient])


def test_where_q_is_an_operand_as_it_is() -> None:
    for spec, expected in (
        (WIDE, True),
        (replace(WIDE, mask=True, value_dim=64), True),
        (replace(WIDE, dtype="float16"), False),
        (replace(WIDE, causal=True), False),
        (replace(WIDE, groups=2), False),
        (replace(WIDE, bias="float32"), False),
        (replace(WIDE, head_dim=192), False),
        (replace(PLAIN, short=APART_KEYS), False),
    ):
        assert q_as_it_is(spec) == expected
        assert f"TensorMap k, v, {'q' if expected else 'q_hat'}," in render(spec).source


def test_which_calls_get_it() -> None:
    for d, q_len, k_len, causal, size in (
        (128, 512, 512, False, APART_KEYS),
        (128, 513, 513, False, 0),
        (128, 1024, 1024, True, APART_KEYS),
        (128, 1025, 1025, True, 0),
        (128, 100, 1024, True, 0),  # these rows see nearly all keys
        (104, 512, 512, False, APART_KEYS),
        (96, 512, 512, False, 0),
        (256, 512, 512, False, 0),
    ):
        spec = replace(PLAIN, head_dim=d, value_dim=d, causal=causal, deterministic=True)
        assert apart(spec, q_len, k_len, 1024) == size
        chosen = sized(spec, q_len, k_len, 2, 512)
        assert (chosen.short, family_of(chosen)) == (size, "sm90")
        assert chosen.deterministic == (size == 0 and d <= 128)
    assert apart(PLAIN, 512, 512, 131) == 0  # few blocks
    for other in (
        replace(PLAIN, direction="forward"),
        replace(PLAIN, arch="sm80"),
        replace(PLAIN, dtype="float32"),
        replace(PLAIN, bias="bfloat16"),
        replace(PLAIN, pair_mask=True),
        WIDE,
    ):
        assert apart_class(other, 64) == 0


def test_who_is_repeatable_anyway() -> None:
    assert repeatable(WIDE)
    assert repeatable(replace(PLAIN, short=APART_KEYS))
    assert not repeatable(PLAIN)
    wide = sized(replace(WIDE, deterministic=True), 4096, 4096)
    assert wide == sized(WIDE, 4096, 4096)


def test_tiles_fit() -> None:
    for d, dv, dtype in itertools.product(range(72, 257, 8), range(8, 257, 8), ("float16", "bfloat16")):
        for groups in (1, d // 8):
            spec = replace(PLAIN, head_dim=d, value_dim=dv, dtype=dtype, groups=groups)  # type: ignore[arg-type]
            if max(d, dv) <= 128:
                spec = replace(spec, short=apart_class(spec, 64))
            if not serves(spec) or (max(d, dv) <= 128 and not spec.short):
                continue
            tiles = backward_tiles(spec)
            assert tiles.queries is not None
            assert tiles.queries.shared_bytes(spec, narrow=not tiles.by_gradient) <= ARCHS["sm90"].shared_memory
            assert_tiles_fit(spec)


@pytest.mark.parametrize("d", [104, 128, 136, 192, 256])
@pytest.mark.parametrize("groups", [1, 2])
def test_shared_bytes_are_those_of_the_source(d: int, groups: int, tmp_path: Path) -> None:
    spec = replace(PLAIN, head_dim=d, value_dim=d, groups=groups if d % 16 == 0 else 1)
    spec = replace(spec, short=apart_class(spec, 64))
    tiles = backward_tiles(spec)
    assert tiles.queries is not None
    claims = {
        "SHARED_BYTES": tiles.shared_bytes(spec),
        "of_queries::SHARED_BYTES": tiles.queries.shared_bytes(spec, narrow=not tiles.by_gradient),
    }
    assert errors_of_claims(spec, claims, tmp_path) == ""
    claims["of_queries::SHARED_BYTES"] += 16
    assert "static assertion failed" in errors_of_claims(spec, claims, tmp_path)


FEATURES: list[dict[str, object]] = [
    {},
    {"causal": True},
    {"softmax": "online"},
    {"causal": True, "mask": True},
    {"causal": True, "groups": 4},
]
TUNED = [
    *(replace(PLAIN, short=APART_KEYS, **features) for features in FEATURES),  # type: ignore[arg-type]
    *(replace(PLAIN, dtype="float16", short=APART_KEYS, **features) for features in FEATURES[2:]),  # type: ignore[arg-type]
    replace(PLAIN, l2norm=False, short=APART_KEYS),
    replace(PLAIN, head_dim=112, value_dim=112, causal=True, short=APART_KEYS),
    replace(WIDE, groups=4, causal=True),
    replace(WIDE, l2norm=False),
]


@needs_nvcc
@pytest.mark.parametrize("spec", TUNED, ids=lambda spec: spec.name)
def test_products_are_not_serialised(spec: KernelSpec, tmp_path: Path) -> None:
    cubin = compile_spec(spec, tmp_path)
    assert_not_serialised(cubin)
    in_parts = {"add_parts"} if spec.head_dim > 128 and not (spec.causal or spec.mask) else set()
    assert set(cubin.kernels) == {"prepare", "backward_keys", "backward_queries"} | in_parts
    # S, dP and dQ of a step, and of the first one S and dP.
    steps = spec.head_dim // 16
    assert cubin.kernels["backward_queries"].count("HGMMA") >= 2 * 2 * steps + 4


def test_no_sums_in_memory() -> None:
    for spec in (replace(PLAIN, short=APART_KEYS), WIDE, replace(WIDE, causal=True, deterministic=True)):
        source = render(spec).source
        assert "dq_sum" not in source
        assert "reduce_" not in source
        assert "turn" not in source.replace("return", "").replace("take turns", "")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "q_len", "k_len", "options"),
    [
        (128, 512, 512, {}),
        (128, 512, 300, {"deterministic": True}),
        (128, 1000, 1000, {"causal": True}),
        (128, 400, 130, {"causal": True}),
        (104, 300, 200, {"groups": 13}),
        (256, 700, 500, {"causal": True, "deterministic": True}),
        (192, 300, 1100, {"groups": 3}),
        (136, 200, 130, {"causal": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(d: int, q_len: int, k_len: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Right, and equal bit by bit from run to run; blocks take more than one tile."""
    heads, group = 200, 2
    assert repeatable(sized(spec_of(d, dtype, options), q_len, k_len, group, heads))
    assert_right_and_repeatable((heads, group, q_len, k_len), d, dtype, options)
