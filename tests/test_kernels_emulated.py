"""Rendered kernels, run by the CPU emulator, against float64: every dtype with every feature, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulator import harness
from emulator.check import Problem, check, check_repeats, computed, specs, tensors_of, visible

from cosattn.spec import DTYPES, DType

FEATURES = [
    Problem(),
    Problem(d=8, sq=17, sk=40),
    Problem(d=24, causal=True),
    Problem(d=40, dv=16),
    Problem(d=64, dv=96, strided=True),
    Problem(d=128, sq=129, sk=65, causal=True),
    Problem(d=48, groups=3),  # groups of 16 columns, whole lanes
    Problem(d=40, groups=8),  # groups of 5 columns, across lanes
    Problem(l2norm=False, d=16),
    Problem(causal=True, sq=33, sk=130),
    Problem(causal=True, sq=130, sk=33),  # rows that see nothing
    Problem(mask=True, sk=150, heads=4, kv_heads=2),
    Problem(mask=True, causal=True, heads=3, kv_heads=1, deterministic=True),
    Problem(bias="float32", causal=True, mask=True),
    Problem(bias="bfloat16", bias_shape="bqk", deterministic=True),
    Problem(bias="float16", bias_shape="qk", sq=49),
    Problem(bias="float32", bias_shape="bhqk", bias_grad=False, sk=31),
    Problem(scale=30.0, softmax="online", strided=True),
    Problem(scale=0.0, heads=4, kv_heads=1, dlse=True),
    Problem(deterministic=True, causal=True, sq=100, heads=4, kv_heads=2, dlse=True),
    Problem(sq=1, sk=1),
    Problem(sq=128, sk=64, d=64),
    Problem(pair_mask=(2, False, True, True), bias="float32", batch=4, sq=49),  # windows of images
    Problem(pair_mask=(2, False, True, True), bias="float32", batch=4, bias_period=2, sq=70, deterministic=True),
    Problem(pair_mask=(1, True, True, False), causal=True, sq=33, sk=130, l2norm=False),
    Problem(pair_mask=(2, True, False, True), softmax="online", d=128, dlse=True, heads=4, kv_heads=2),
    Problem(pair_mask=(2, False, True, True), causal=True, sk=90, l2norm=False, deterministic=True),
    Problem(bias="bfloat16", bias_shape="bhqk", bias_period=2, batch=4),
    Problem(d=64, sq=65, sk=129, causal=True, arch="sm90"),
    Problem(d=96, arch="sm89", deterministic=True),
]
LARGE = [
    Problem(d=256, sq=40, batch=1, arch="sm89"),
    Problem(d=8, dv=256, sq=40, batch=1, causal=True),
    Problem(d=192, dv=64, sq=70, causal=True, batch=1, deterministic=True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", FEATURES + LARGE, ids=str)
def test_against_float64(problem: Problem, dtype: DType) -> None:
    check(replace(problem, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_over_pairs_keeps_nan_where_it_is_seen(dtype: DType, deterministic: bool, causal: bool) -> None:
    """A key, a value, a query and a row of dout that are NaN: everything that does not see them is as without them."""
    problem = Problem(
        dtype=dtype, pair_mask=(1, False, True, True), sq=70, sk=90, batch=1, heads=1, causal=causal,
        deterministic=deterministic,
    )  # fmt: skip
    t = tensors_of(problem)
    clean = computed(problem, t)
    seen = visible(problem, t)[0, 0]
    for name, row in (("k", 20), ("v", 7), ("q", 31), ("dout", 66)):
        broken = getattr(t, name).clone()
        broken[0, 0, row, 3] = float("nan")
        results = computed(problem, replace(t, **{name: broken}))
        if name in "kv":
            rows, keys = seen[:, row], seen[seen[:, row]].any(0)
            assert results["out"][0, 0, rows].isnan().any(-1).all()
        else:
            rows = torch.arange(70) == row
            keys = seen[row]
        for result, reached in (("out", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            if (name, result) == ("dout", "out"):
                reached = torch.zeros_like(rows)
            torch.testing.assert_close(results[result][0, 0, ~reached], clean[result][0, 0, ~reached])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [15, 16, 31, 32, 33, 63, 64, 127, 128, 192])
def test_lengths_around_tile_edges(length: int, dtype: DType) -> None:
    for other in (length, length + 1):
        check(Problem(dtype=dtype, d=16, sq=length, sk=other, causal=True, mask=True, batch=2, heads=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_of_threads_and_blocks(dtype: DType) -> None:
    for seed in range(1, 5):
        check(Problem(dtype=dtype, causal=True, mask=True, sq=150), seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [{}, {"bias": "float32", "bias_shape": "qk"}], ids=["plain", "bias"])
def test_deterministic_means_bitwise(dtype: DType, features: dict[str, str]) -> None:
    problem = Problem(dtype=dtype, sq=200, heads=4, kv_heads=2, deterministic=True, **features)  # type: ignore[arg-type]
    check_repeats(problem)


def test_atomic_sums_do_depend_on_the_order() -> None:
    """So the test above can fail."""
    problem = Problem(dtype="float32", sq=200, deterministic=False)
    tensors = tensors_of(problem)
    first, *others = (computed(problem, tensors, seed)["dq"] for seed in (1, 2, 3))
    assert any(not torch.equal(dq, first) for dq in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 40, 64, 128])
def test_fragment_loads_have_no_bank_conflicts(dtype: DType, d: int) -> None:
    problem = Problem(dtype=dtype, d=d, sq=100, batch=1, heads=1)
    tensors = tensors_of(problem)
    forward, backward = specs(problem)
    first = harness.run_forward(forward, tensors.q, tensors.k, tensors.v)
    second = harness.run_backward(backward, tensors.q, tensors.k, tensors.v, first.out, first.lse, tensors.dout)
    for statistics in (first.statistics, second.statistics):
        assert statistics["mma"] > 0
        assert statistics["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nothing_to_launch(direction: str) -> None:
    """Empty grids reach the machine as success."""
    tensors = tensors_of(Problem())
    empty = [x[:0] for x in (tensors.q, tensors.k, tensors.v)]
    spec = dict(zip(("forward", "backward"), specs(Problem()), strict=True))[direction]
    if direction == "forward":
        assert harness.run_forward(spec, *empty).out.numel() == 0
    else:
        lse = torch.empty(empty[0].shape[:-1])
        assert harness.run_backward(spec, *empty, empty[2], lse, empty[2]).dq.numel() == 0
