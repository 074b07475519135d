"""The Hopper backward: which specs it serves, what is in shared memory, what ptxas makes of it, and its results."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accuracy import relative_error
from emulator import harness
from emulator.check import Problem, check, exact, specs, tensors_of
from sass import Cubin, compile_spec
from test_kernels_compile import needs_nvcc
from test_tiles import errors_of_claims

from cosattn.arch import ARCHS
from cosattn.families import family_of
from cosattn.spec import KernelSpec
from cosattn.tiles_sm90_backward import BLOCK_M, backward_tiles, serves, wgmma_columns

PLAIN = KernelSpec("backward", "sm90", "bfloat16", 64, 64)

PROBLEMS = [
    Problem(d=8, sq=70, heads=4, kv_heads=1),
    Problem(d=24, dv=16, sq=100, sk=270, causal=True),
    Problem(d=32, sq=300, sk=200),
    Problem(d=40, sq=129, sk=130, dtype="float16", dlse=True, scale=0),
    Problem(d=64, sq=130),
    Problem(d=64, sq=140, heads=4, kv_heads=2, causal=True, mask=True),
    Problem(d=64, sq=90, l2norm=False, causal=True),
    Problem(d=64, sq=90, groups=4, mask=True),
    Problem(d=64, sq=100, dtype="float16", causal=True, softmax="online"),
    Problem(d=64, sq=300, sk=100, causal=True),
    Problem(d=64, sq=70, sk=100, softmax="online"),
    Problem(d=64, sq=1, sk=300),
    Problem(d=72, sq=300, sk=70, dtype="float16", causal=True),
    Problem(d=80, sq=200, sk=140, heads=4, kv_heads=2),
    Problem(d=88, dv=24, sq=130, sk=200, causal=True, softmax="online", scale=60.0),
    Problem(d=96, sq=140, sk=150, causal=True, mask=True, groups=2),
    Problem(d=96, sq=200, sk=130, dtype="float16", mask=True),
    Problem(d=96, dv=128, sq=70, sk=200, causal=True),
    Problem(d=112, dv=80, sq=70, sk=200, strided=True),
    Problem(d=128, sq=200, heads=2, kv_heads=1),
    Problem(d=128, sq=130, sk=140, groups=16, causal=True),
    Problem(d=128, sq=70, sk=140, l2norm=False, causal=True),
    Problem(d=128, sq=65, softmax="online", scale=60.0),
    Problem(d=72, dv=176, sq=70, sk=140, causal=True),
    Problem(d=176, dv=136, sq=150, sk=90, causal=True, dlse=True, scale=0),
    Problem(d=184, dv=24, sq=64, heads=4, kv_heads=1, dtype="float16"),
    Problem(d=192, sq=130, sk=200, causal=True, mask=True, groups=3),
    Problem(d=192, sq=1, sk=65, dtype="float16", softmax="online"),
    Problem(d=256, sq=200, heads=2, kv_heads=1, mask=True),
    Problem(d=256, sq=140, causal=True, dtype="float16", strided=True),
    Problem(d=256, sq=65, l2norm=False, causal=True),
    Problem(d=256, sq=70, sk=65, softmax="online", scale=60.0, groups=4),
    Problem(d=32, sq=70, sk=500, deterministic=True),
    Problem(d=64, sq=200, sk=300, heads=4, kv_heads=2, causal=True, deterministic=True),
    Problem(d=96, sq=140, sk=300, causal=True, deterministic=True, dtype="float16"),
    Problem(d=128, sq=130, sk=400, mask=True, deterministic=True),
    Problem(d=256, sq=200, sk=150, heads=2, kv_heads=1, causal=True, deterministic=True),
    Problem(d=64, sq=130, sk=200, bias="bfloat16"),
    Problem(d=64, sq=131, sk=77, bias="float16", bias_shape="bhqk", causal=True, dtype="float16"),
    Problem(d=64, sq=70, sk=150, heads=4, kv_heads=2, bias="float32", bias_shape="qk", mask=True),
    Problem(d=64, sq=70, sk=300, bias="bfloat16", bias_grad=False, causal=True, deterministic=True),
    Problem(d=48, sq=70, sk=65, bias="float16", bias_shape="bqk", groups=2),
    Problem(d=96, sq=70, sk=201, bias="bfloat16", batch=4, bias_period=2, mask=True),
    Problem(d=128, sq=130, sk=140, bias="bfloat16", causal=True),
    Problem(d=128, sq=65, sk=150, bias="float32", bias_shape="qk", dtype="float16", dlse=True),
    Problem(d=192, sq=130, sk=75, bias="float32", causal=True, mask=True),
    Problem(d=256, sq=70, sk=130, bias="float16", bias_shape="bqk", heads=4, kv_heads=1),
    Problem(d=256, sq=66, sk=70, bias="bfloat16", bias_grad=False, deterministic=True),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results(problem: Problem) -> None:
    """Of the forward and the backward together."""
    problem = replace(problem, arch="sm90")
    assert {family_of(spec) for spec in specs(problem)} == {"sm90"}
    check(problem)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(d=32, causal=True),
        Problem(d=64, causal=True, dtype="float16"),
        Problem(d=64),
        Problem(d=96, causal=True),
        Problem(d=128, causal=True),
        Problem(d=256, causal=True),
        Problem(d=192, dtype="float16"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "row"), [("dout", 70), ("q", 70), ("v", 130)])
def test_what_is_not_finite_stays_with_those_that_see_it(problem: Problem, name: str, row: int) -> None:
    assert_not_finite_stays(problem, name, row)


def assert_not_finite_stays(problem: Problem, name: str, row: int) -> None:
    """NaN in a row of a tensor reaches the gradients of those that see it, and no others."""
    problem = replace(problem, sq=200, arch="sm90")
    t = tensors_of(problem)
    results = exact(problem, t)
    getattr(t, name)[0, 0, row, 3] = torch.nan
    forward, backward = specs(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v, scale=t.scale)
    found = harness.run_backward(backward, t.q, t.k, t.v, first.out, first.lse, t.dout, scale=t.scale)
    touched = {"dq": torch.zeros(200, dtype=torch.bool), "dk": torch.zeros(200, dtype=torch.bool)}
    rows = range(row, 200) if name == "v" and problem.causal else range(200) if name == "v" else [row]
    touched["dq"][list(rows)] = True
    touched["dk"][: 200 if name == "v" or not problem.causal else row + 1] = True
    for gradient, expected in (("dq", touched["dq"]), ("dk", touched["dk"])):
        x = getattr(found, gradient)
        assert torch.equal(~x[0, 0].isfinite().all(-1), expected), gradient
        assert relative_error(x[1], results[gradient][1]) < 0.01
        assert x[0, 1].isfinite().all()


CLEARED_AHEAD = [
    Problem(d=32, sq=710, sk=970, batch=1, heads=4),
    Problem(d=64, sq=720, sk=650, batch=1, heads=5, causal=True),
    Problem(d=64, sq=730, sk=660, mask=True),
    Problem(d=96, sq=250, sk=700, batch=1, heads=12, kv_heads=4, dtype="float16"),
    Problem(d=128, sq=740, sk=1700, batch=1, heads=3),  # more blocks of keys than tiles of queries
    Problem(d=128, sq=400, sk=660, batch=1, heads=8, kv_heads=4, causal=True),
    Problem(d=80, dv=48, sq=750, sk=650, batch=1, heads=3, groups=2),
    Problem(d=64, sq=200, sk=650, batch=1, heads=4),  # a short walk: by prepare
    Problem(d=64, sq=770, sk=100, batch=1, heads=8),  # a block a head: by prepare
]
"""More heads than prepare clears the sums of, for the three multiprocessors of the emulator."""


@pytest.mark.parametrize("problem", CLEARED_AHEAD, ids=str)
def test_sums_that_blocks_of_keys_clear(problem: Problem) -> None:
    problem = replace(problem, arch="sm90")
    check(problem)
    forward, spec = specs(problem)
    t = tensors_of(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v, mask=t.mask)
    workspace = harness.run_backward(spec, t.q, t.k, t.v, first.out, first.lse, t.dout, mask=t.mask).workspace
    blocks = -(-(problem.sk or problem.sq) // (64 * backward_tiles(spec).parts))
    heads = problem.batch * (problem.kv_heads or problem.heads)
    counts = torch.tensor([blocks] * heads, dtype=torch.int32).view(torch.uint8)
    assert torch.equal(workspace[-256:][: counts.numel()], counts)  # each share of each head


@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_bias_that_hides(d: int) -> None:
    """By minus infinity: nothing goes to what is hidden, and a row that sees nothing is zero."""
    problem = Problem(d=d, sq=70, sk=90, bias="bfloat16", arch="sm90")
    t = tensors_of(problem)
    assert t.bias is not None
    t.bias[..., 40:80] = -torch.inf
    t.bias[:, 0, 3] = -torch.inf
    expected = exact(problem, t)
    forward, backward = specs(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v, bias=t.bias)
    found = harness.run_backward(backward, t.q, t.k, t.v, first.out, first.lse, t.dout, bias=t.bias)
    assert first.lse[:, 0, 3].isneginf().all()
    assert not found.dq[:, 0, 3].any()
    assert found.dbias is not None
    assert not found.dbias[t.bias.isneginf()].any()
    assert not found.dk[:, :, 40:80].any()
    for name in ("dq", "dk", "dv"):
        assert relative_error(getattr(found, name), expected[name].nan_to_num()) < 0.01


def test_what_it_serves() -> None:
    assert serves(PLAIN)
    for change in (
        {"dtype": "float32"},
        {"bias": "bfloat16", "bias_grad": True, "deterministic": True},
        {"bias": "bfloat16", "head_dim": 32, "value_dim": 32},
        {"value_dim": 128},
        {"groups": 16},
    ):
        spec = replace(PLAIN, **change)  # type: ignore[arg-type]
        assert not serves(spec)
        assert family_of(spec) == "sm80"


def test_tiles_fit() -> None:
    for d, dv in itertools.product(range(8, 257, 8), repeat=2):
        for dtype, deterministic in itertools.product(("float16", "bfloat16"), (False, True)):
            spec = replace(PLAIN, dtype=dtype, head_dim=d, value_dim=dv, deterministic=deterministic)
            if serves(spec):
                assert_tiles_fit(spec)
                assert all(columns % 8 == 0 and columns <= 256 for columns in wgmma_columns(spec))
                assert BLOCK_M in wgmma_columns(spec)


def assert_tiles_fit(spec: KernelSpec) -> None:
    """Shared memory, and the registers that the launch gives."""
    tiles = backward_tiles(spec)
    assert tiles.shared_bytes(spec) <= ARCHS["sm90"].shared_memory
    shares = tiles.registers if tiles.by_gradient else (tiles.registers[0],) * tiles.parts + tiles.registers[1:]
    at_launch = 65536 // (128 * len(shares)) // 8 * 8
    assert sum(shares) <= at_launch * len(shares)


@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_shared_bytes_are_those_of_the_source(d: int, dtype: str, deterministic: bool, tmp_path: Path) -> None:
    spec = replace(PLAIN, dtype=dtype, head_dim=d, value_dim=d, deterministic=deterministic)  # type: ignore[arg-type]
    size = backward_tiles(spec).shared_bytes(spec)
    assert errors_of_claims(spec, {"SHARED_BYTES": size}, tmp_path) == ""
    assert "static assertion failed" in errors_of_claims(spec, {"SHARED_BYTES": size + 16}, tmp_path)


FEATURES: list[dict[str, object]] = [
    {},
    {"causal": True},
    {"softmax": "online"},
    {"mask": True},
    {"deterministic": True},
    {"causal": True, "deterministic": True},
    {"softmax": "online", "bias": "bfloat16", "bias_grad": True},
    {"softmax": "online", "bias": "float32", "bias_grad": True, "causal": True, "mask": True},
]


def featured_specs() -> list[KernelSpec]:
    """Every feature at every tuned head dim, but for the biases of windows (d 32), which are another family's."""
    found = [
        replace(PLAIN, dtype=dtype, head_dim=d, value_dim=d, **features)  # type: ignore[arg-type]
        for dtype, features, d in itertools.product(("float16", "bfloat16"), FEATURES, (32, 64, 96, 112, 128, 192, 256))
    ]
    found = [spec for spec in found if spec.head_dim <= 128 or not spec.deterministic]  # one kernel for both above
    left_out = [spec for spec in found if not serves(spec)]
    assert all(spec.bias and spec.head_dim == 32 for spec in left_out), left_out
    return [spec for spec in found if serves(spec)]


@needs_nvcc
@pytest.mark.parametrize("spec", featured_specs(), ids=lambda spec: spec.name)
def test_products_are_not_serialised(spec: KernelSpec, tmp_path: Path) -> None:
    assert_not_serialised(compile_spec(spec, tmp_path))


def assert_not_serialised(cubin: Cubin) -> None:
    """No spill, no stack, nothing that ptxas says about wgmma; and no tile given back before it has been read."""
    assert cubin.warnings == []
    for name in {"backward_keys", "backward_queries"} & set(cubin.kernels):
        kernel = cubin.kernels[name]
        assert kernel.stack == kernel.spilled == 0
        assert kernel.overtaking == []
        assert kernel.count("HGMMA") > 0
