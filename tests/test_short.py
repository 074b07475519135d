"""The kernels for short sequences: what they serve, their tiles, their results in the emulator, their machine code."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import harness
from emulator.check import Problem, check, check_repeats, computed, exact, relative_error, specs, tensors_of
from matrix import support_matrix
from sass import compile_spec, nvdisasm
from test_kernels_compile import FEW_REGISTERS, HMMA, needs_nvcc
from test_tiles import LARGEST_BLOCK, REGISTERS, errors_of_claims, pairs_of_dims

from cosattn.arch import ARCHS
from cosattn.families import family_of, sized
from cosattn.render import render
from cosattn.spec import KernelSpec
from cosattn.tiles_short import (
    FEW_HEADS,
    MEASURED,
    NOT_MEASURED,
    TAKEN_OVER,
    backward_tiles,
    by_warpgroups,
    forward_tiles,
    size_class,
    warpgroup_tiles,
)
from cosattn.tiles_sm90_forward import FEW_KEYS

FORWARD = KernelSpec("forward", "sm90", "bfloat16", 32, 32)
BACKWARD = replace(FORWARD, direction="backward")
BIASED: dict[str, Any] = {"bias": "bfloat16", "softmax": "online"}
LENGTHS = (1, 49, 50, 63, 64, 65, 96, 97, 128, 129, 144, 160, 161, 256, 257, 512)


def classed(spec: KernelSpec, length: int) -> KernelSpec:
    """With its size class, whether it was measured or not."""
    return replace(spec, short=size_class(spec, length, length))


# ---- what is served -------------------------------------------------------------------------------------------------


SHIFTED: dict[str, Any] = {**BIASED, "pair_mask": True}  # windows of SwinV2
MANY, FEW = FEW_HEADS, FEW_HEADS - 1


def named(direction: str, **features: Any) -> KernelSpec:
    bias_grad = direction == "backward" and "bias" in features
    return replace(FORWARD, direction=direction, bias_grad=bias_grad, **features)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("direction", "features", "name"),
    [
        ("forward", {}, ""),
        ("forward", {"softmax": "online"}, "online"),
        ("forward", {"causal": True}, "causal"),
        ("forward", {"causal": True, "softmax": "online"}, "causal online"),
        ("forward", {"mask": True}, "mask"),
        ("forward", {"mask": True, "softmax": "online"}, "mask online"),
        ("forward", {"causal": True, "mask": True}, "causal mask"),
        ("forward", {"pair_mask": True}, "pair_mask"),
        ("forward", {"pair_mask": True, "softmax": "online"}, "pair_mask online"),
        ("forward", BIASED, "bias"),
        ("forward", SHIFTED, "bias pair_mask"),
        ("backward", {}, ""),
        ("backward", {"softmax": "online"}, ""),
        ("backward", {"causal": True}, "causal"),
        ("backward", {"mask": True}, "mask"),
        ("backward", {"causal": True, "mask": True}, "causal mask"),
        ("backward", {"pair_mask": True}, "pair_mask"),
        ("backward", BIASED, "bias"),
        ("backward", SHIFTED, "bias pair_mask"),
    ],
)
def test_lengths_and_heads_decide(direction: str, features: dict[str, Any], name: str) -> None:
    for d, longest in MEASURED[direction, name].items():
        spec = named(direction, head_dim=d, value_dim=d, **features)
        for (q_len, k_len), (heads, most) in itertools.product(
            itertools.product(LENGTHS, repeat=2), zip((FEW, MANY), longest, strict=True)
        ):
            chosen = sized(spec, q_len, k_len, heads=heads)
            served = max(q_len, k_len) <= most
            if heads == MANY:
                served &= max(q_len, k_len) not in NOT_MEASURED.get((direction, name, d), ())
                served &= min(q_len, k_len) <= TAKEN_OVER.get((direction, name, d), 256)
            assert (family_of(chosen) == "short") == served, (d, q_len, k_len, heads)
            assert served == (0 < chosen.short <= 256), "larger classes are those of the sm90 family"
            assert replace(chosen, few=False, short=0, split=0) == spec
            if served or heads == FEW:
                continue
            shared = sized(spec, q_len, k_len, 2, heads)  # keys that heads share are not taken over
            taken_over = min(q_len, k_len) > TAKEN_OVER.get((direction, name, d), 256)
            measured = max(q_len, k_len) not in NOT_MEASURED.get((direction, name, d), ())
            assert (family_of(shared) == "short") == (taken_over and measured and max(q_len, k_len) <= most)
    spec = named(direction, **features)
    alone, grouped = sized(spec, 49, 49, 1, MANY), sized(spec, 49, 49, 4, MANY)
    assert alone == grouped
    if direction == "backward":
        assert not sized(spec, 49, 49, 2, FEW).short, "a block has all queries of its keys"
    else:
        assert sized(spec, 49, 49, 4, MANY // 4) == alone, "blocks share keys"


@pytest.mark.parametrize(
    "change",
    [
        {"arch": "sm80"},
        {"value_dim": 64},
        {"head_dim": 40, "value_dim": 40},
        {"groups": 2},
        {"l2norm": False},
        {"bias": "float32", "softmax": "online"},
        {"bias": "bfloat16"},
        {"dtype": "float16", "causal": True},
    ],
    ids=str,
)
def test_what_was_not_measured_is_not_chosen(change: dict[str, Any]) -> None:
    for spec in (FORWARD, BACKWARD):
        other = replace(spec, **change)
        assert sized(other, 49, 49, heads=MANY).short == 0
        assert family_of(sized(other, 49, 49, heads=MANY)) != "short"
        assert size_class(other, 49, 49) == 64, "able to serve it nevertheless"


def test_what_the_kernels_can_not_serve() -> None:
    for spec, change in [
        (FORWARD, {"dtype": "float32"}),
        (FORWARD, {"head_dim": 136}),
        (FORWARD, {"value_dim": 256}),
        (BACKWARD, {"bias": "float32", "bias_grad": True, "deterministic": True}),  # sums of blocks have no order
        (BACKWARD, {"groups": 8}),  # of 4 columns
    ]:
        assert size_class(replace(spec, **change), 49, 49) == 0  # type: ignore[arg-type]
    wide = replace(BACKWARD, head_dim=128, value_dim=128)
    assert [size_class(wide, n, n) for n in (64, 128, 129)] == [64, 128, 0], "sums fill the registers"


def test_few_classes_serve_all_lengths() -> None:
    """Every class is a kernel that somebody compiles."""
    assert {sized(FORWARD, n, n, heads=MANY).short for n in range(1, 257)} == {64, 96, 128, FEW_KEYS}
    assert {sized(BACKWARD, n, n, heads=MANY).short for n in range(1, 257)} == set(range(64, 257, 32))


# ---- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tiles_fit(arch: str, dtype: str) -> None:
    limit = ARCHS[arch].shared_memory
    for direction in ("forward", "backward"):
        for spec, length in itertools.product(support_matrix(direction, arch, dtype, pairs_of_dims()), LENGTHS):
            chosen = classed(spec, length)
            if not chosen.short:
                continue
            if by_warpgroups(chosen):
                whole = warpgroup_tiles(chosen)
                assert whole.shared_bytes(chosen) <= limit, chosen.name
                assert chosen.short >= length, "a block holds all of a head"
                assert chosen.short % whole.block_n == 0, chosen.name
                assert chosen.short % (64 * whole.warpgroups) == 0, "whole turns"
                assert 128 * whole.warpgroups * whole.blocks_per_sm * 128 <= REGISTERS, chosen.name
            elif direction == "forward":
                tiles = forward_tiles(chosen)
                assert tiles.shared_bytes(chosen, length) <= limit, chosen.name
                assert tiles.block_m % (16 * tiles.warps) == 0, chosen.name
                assert tiles.block_n % tiles.chunk == 0, chosen.name
                assert 32 * tiles.warps * tiles.blocks_per_sm * 128 <= REGISTERS, chosen.name
            else:
                keys = backward_tiles(chosen)
                assert keys.shared_bytes(chosen) <= limit, chosen.name
                assert keys.block_n == chosen.short >= length, "a block holds all keys"
                assert keys.block_m % (16 * keys.warps) == 0, "queries of a warp"
                assert keys.block_m >= length, chosen.name
                assert 32 * keys.warps * keys.blocks_per_sm * 96 <= REGISTERS, chosen.name
                assert 32 * keys.warps <= LARGEST_BLOCK, chosen.name


@pytest.mark.parametrize("d", [8, 32, 64, 128])
@pytest.mark.parametrize("length", [49, 64])
def test_shared_bytes_are_those_of_the_source(d: int, length: int, tmp_path: Path) -> None:
    for spec in (
        FORWARD,
        replace(FORWARD, pair_mask=True),
        BACKWARD,
        replace(BACKWARD, bias="float32", bias_grad=True, pair_mask=True),
    ):
        spec = classed(replace(spec, head_dim=d, value_dim=d), length)
        name = "SHARED_BYTES"
        if by_warpgroups(spec):
            size = warpgroup_tiles(spec).shared_bytes(spec)
        elif spec.direction == "backward":
            size = backward_tiles(spec).shared_bytes(spec)
        else:
            name, size = f"shared_bytes({length})", forward_tiles(spec).shared_bytes(spec, length)
        assert errors_of_claims(spec, {name: size}, tmp_path) == ""
        assert "static assertion failed" in errors_of_claims(spec, {name: size + 16}, tmp_path)


# ---- results --------------------------------------------------------------------------------------------------------

PROBLEMS = [
    Problem(sq=49),
    Problem(d=8, sq=17, sk=40, causal=True),
    Problem(d=24, dv=8, sq=200, causal=True, batch=1),  # two tiles of queries
    Problem(d=64, dv=32, sq=64, strided=True),
    Problem(d=16, dv=96, sq=64),
    Problem(d=64, sq=150, batch=1, heads=2, kv_heads=1),
    Problem(d=96, groups=3, sq=50, dlse=True, scale=0.0),
    Problem(d=128, sq=64, sk=33, causal=True),
    Problem(d=64, groups=8, sq=65, l2norm=True),
    Problem(l2norm=False, d=16, sq=30),
    Problem(sq=33, sk=130, causal=True),
    Problem(sq=130, sk=33, causal=True),  # rows that see nothing
    Problem(sq=129, sk=60, heads=6, kv_heads=2, causal=True, mask=True),
    Problem(sq=256, batch=1, heads=2, mask=True),
    Problem(d=40, groups=8, sq=40),  # groups of 5 columns: backward is another family's
    Problem(sq=49, batch=4, pair_mask=(2, False, True, True)),
    Problem(d=64, sq=80, sk=144, batch=2, pair_mask=(2, True, True, True)),
    Problem(sq=144, sk=80, batch=1, heads=2, kv_heads=1, pair_mask=(1, False, True, True), causal=True),
    Problem(d=16, sq=150, sk=256, batch=2, pair_mask=(2, True, False, True)),
    Problem(sq=70, sk=130, batch=2, pair_mask=(1, True, True, False)),  # keys are not side by side
    Problem(sq=64, bias="bfloat16", batch=6, pair_mask=(3, False, True, True), scale=0.0),  # shifted windows
    Problem(sq=144, bias="bfloat16", batch=2, pair_mask=(2, False, True, True), scale=0.0),
    Problem(sq=49, bias="bfloat16", batch=5),  # blocks walk over batches
    Problem(sq=49, bias="bfloat16", batch=6, bias_period=3, scale=30.0),
    Problem(sq=49, bias="float32", bias_shape="bhqk", batch=3),
    Problem(sq=40, bias="float16", bias_shape="bqk", batch=3, heads=4, kv_heads=2),
    Problem(d=64, sq=64, bias="bfloat16", bias_shape="qk", batch=3, heads=3, mask=True),
    Problem(sq=144, bias="bfloat16", batch=1),  # each block adds to the bias gradient
    Problem(sq=60, scale=60.0, softmax="online", causal=True),
    Problem(sq=70, deterministic=True, causal=True, dlse=True),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results(problem: Problem, dtype: str) -> None:
    problem = replace(problem, dtype=dtype, short=True)  # type: ignore[arg-type]
    assert any(family_of(spec) == "short" for spec in specs(problem))
    check(problem)


BY_WARPGROUPS = [
    Problem(d=64, sq=49, batch=5),  # a block takes one head after another
    Problem(d=64, sq=64, sk=33, scale=60.0, softmax="online"),
    Problem(d=128, sq=128, batch=3, heads=4, kv_heads=2),
    Problem(d=64, sq=100, sk=150, batch=4, strided=True),
    Problem(d=96, groups=3, sq=65, scale=0.0),
    Problem(d=64, groups=8, sq=130, sk=192),
    Problem(d=40, sq=40, batch=4, l2norm=False),
    Problem(d=64, sq=256, sk=200, batch=1, scale=60.0, softmax="online"),
    Problem(d=128, sq=100, sk=128, scale=60.0, softmax="online"),
    Problem(d=64, sq=256, sk=200, batch=2, heads=2),
    Problem(d=64, sq=200, sk=256, batch=1, heads=2),  # few heads: a block for each turn
    Problem(d=64, sq=193, sk=256, batch=1, heads=4, strided=True),  # a head's queries in two turns of a block
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("problem", BY_WARPGROUPS, ids=str)
def test_results_by_warpgroups(problem: Problem, dtype: str) -> None:
    problem = replace(problem, dtype=dtype, short=True, arch="sm90")  # type: ignore[arg-type]
    assert by_warpgroups(next(specs(problem)))
    check(problem)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(sq=70, causal=True, mask=True),
        Problem(sq=49, batch=3, pair_mask=(3, False, True, True), scale=0.0),
        Problem(sq=49, bias="bfloat16", batch=3),
        Problem(sq=144, bias="bfloat16", batch=1, heads=1),
        Problem(d=64, sq=64, dlse=True),
    ],
    ids=str,
)
def test_what_overlaps_the_previous_kernel_waits_for_it(problem: Problem) -> None:
    """The emulator takes all tensors for written by whatever ran before."""
    problem = replace(problem, short=True, arch="sm90")
    for spec in specs(problem):
        assert family_of(spec) == "short"
        assert not re.search(r"Launch\{[^}]*false\}|OVERLAP = false", render(spec).source.split("cosattn_launch")[1])
    check(problem)


def test_warpgroups_in_any_order() -> None:
    for seed in range(1, 4):
        check(Problem(d=64, sq=80, batch=4, short=True, arch="sm90"), seed)


@pytest.mark.parametrize("length", [31, 32, 33, 48, 49, 50, 63, 64, 65, 95, 96, 97, 127, 128, 129, 144, 160, 161])
def test_lengths_around_the_edges_of_classes(length: int) -> None:
    for other in (length, length - 1):
        check(Problem(d=16, sq=length, sk=other, causal=True, mask=True, batch=2, heads=1, short=True))


def test_any_order_of_threads_and_blocks() -> None:
    for seed in range(1, 4):
        check(Problem(sq=80, causal=True, mask=True, short=True), seed)
        check(Problem(sq=60, bias="float32", batch=4, short=True), seed)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_bitwise_repeatable_without_being_asked(deterministic: bool) -> None:
    """No sum has more than one order but that of the bias."""
    problem = Problem(sq=150, heads=4, kv_heads=2, deterministic=deterministic, short=True)
    check_repeats(problem)


def test_a_repeatable_bias_gradient_comes_from_another_family() -> None:
    problem = Problem(sq=49, bias="float32", batch=3, deterministic=True, short=True)
    forward, backward = specs(problem)
    assert (family_of(forward), family_of(backward)) == ("short", "sm80")
    check(problem)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_scale_of_zero_has_a_gradient(groups: int) -> None:
    problem = Problem(d=16, sq=40, groups=groups, scale=0.0, short=True)
    t = tensors_of(problem)
    assert isinstance(t.scale, torch.Tensor)
    t.scale[0] = 0.0
    expected, results = exact(problem, t), computed(problem, t)
    assert relative_error(results["dscale"], expected["dscale"]) < 0.02
    assert not results["dq"][:, 0].any()
    assert not results["dk"][:, 0].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [32, 64])
@pytest.mark.parametrize(("name", "row"), [("dout", 30), ("q", 30), ("v", 60), ("k", 60)])
def test_what_is_not_finite_stays_with_those_that_see_it(name: str, row: int, d: int, causal: bool) -> None:
    length = 100
    problem = Problem(d=d, sq=length, causal=causal, short=True)
    t = tensors_of(problem)
    clean = exact(problem, t)
    getattr(t, name)[0, 0, row, 3] = torch.nan
    forward, backward = specs(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v, scale=t.scale)
    found = harness.run_backward(backward, t.q, t.k, t.v, first.out, first.lse, t.dout, scale=t.scale)
    of_key = name in ("k", "v")
    rows = torch.arange(length) >= (row if causal else 0) if of_key else torch.arange(length) == row
    keys = torch.ones(length, dtype=torch.bool)
    if causal and not of_key:
        keys = torch.arange(length) <= row
    if name != "dout":
        assert torch.equal(~first.out[0, 0].isfinite().all(-1), rows), "out"
    for gradient, expected in (("dq", rows), ("dk", keys), ("dv", keys if name != "v" else None)):
        x = getattr(found, gradient)
        if expected is not None:
            assert torch.equal(~x[0, 0].isfinite().all(-1), expected), gradient
        assert relative_error(x[1], clean[gradient][1]) < 0.01
        assert x[0, 1].isfinite().all(), gradient


@pytest.mark.parametrize("d", [16, 32, 64, 128])
def test_one_launch_without_workspace_or_bank_conflicts(d: int) -> None:
    problem = Problem(d=d, sq=64, batch=1, heads=1, short=True)
    t = tensors_of(problem)
    forward, backward = specs(problem)
    first = harness.run_forward(forward, t.q, t.k, t.v)
    second = harness.run_backward(backward, t.q, t.k, t.v, first.out, first.lse, t.dout)
    for statistics in (first.statistics, second.statistics):
        assert statistics["blocks"] == 1, "one block for one head, in one launch"
        assert statistics["mma"] > 0
        assert statistics["ldmatrix_conflicts"] == 0


# ---- machine code ---------------------------------------------------------------------------------------------------

COMPILED = {
    sized(replace(spec, head_dim=d, value_dim=d, **features), length, length, heads=heads)  # type: ignore[arg-type]
    for spec in (FORWARD, BACKWARD)
    for d, length in ((32, 64), (32, 144), (64, 64), (64, 128), (64, 192), (64, 256), (128, 64), (128, 128))
    for heads in (FEW, MANY)
    for features in (
        {},
        {"softmax": "online"},
        {"causal": True},
        {"mask": True},
        {"pair_mask": True},
        {**BIASED, **({"bias_grad": True} if spec is BACKWARD else {})},
    )
}
"""What is chosen."""


@needs_nvcc
@pytest.mark.parametrize(
    "spec", sorted((s for s in COMPILED if family_of(s) == "short"), key=str), ids=lambda spec: spec.name
)
def test_registers_and_instructions(spec: KernelSpec, tmp_path: Path) -> None:
    assert spec.short
    cubin = compile_spec(spec, tmp_path)
    assert not [line for line in cubin.warnings if "C75" in line]
    kernel = cubin.kernels["forward" if spec.direction == "forward" else "backward_keys"]
    assert kernel.spilled <= FEW_REGISTERS
    assert kernel.overtaking == []
    if nvdisasm() is not None:
        if by_warpgroups(spec):
            assert kernel.count("HGMMA") > 0
            assert kernel.count("UTMALDG") > 0
        else:
            assert kernel.instructions[HMMA[spec.dtype]] > 0
            assert kernel.count("LDGSTS") > 0
            assert kernel.count("LDSM") > 0
        assert sum(kernel.instructions.values()) < 6000, "long code does not stay in the instruction cache"
        atomics = sum(kernel.count(opcode) for opcode in ("RED", "REDG", "ATOM", "ATOMG"))
        assert (atomics > 0) == spec.bias_grad
