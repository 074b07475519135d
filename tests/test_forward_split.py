"""Few queries with their keys split over blocks: when, how it is cut, numbers on the emulator, machine code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import harness
from emulator.check import Problem, exact, specs, tensors_of
from sass import compile_spec
from test_kernels_compile import needs_nvcc
from torch import Tensor

from cosattn import support
from cosattn.arch import ARCHS
from cosattn.families import family_of, sized
from cosattn.reference import cosine_attention_reference
from cosattn.spec import HEAD_DIMS, DType, KernelSpec
from cosattn.tiles_split import MINIMUM_KEYS, ROWS, serves, split_tiles

PLAIN = KernelSpec("forward", "sm90", "bfloat16", 64, 64)
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3}


@pytest.mark.parametrize(
    ("q_len", "group", "rows"),
    [(1, 1, 16), (16, 1, 16), (1, 17, 32), (8, 8, 64), (65, 1, 128), (128, 1, 128), (129, 1, 0)],
)
def test_the_rows_of_a_tile_are_the_queries_of_a_group(q_len: int, group: int, rows: int) -> None:
    k_len = 4 * MINIMUM_KEYS
    found = sized(PLAIN, q_len, k_len, group)
    assert found.split == rows
    assert family_of(found) == ("split" if rows else "sm90")
    assert sized(found, q_len, MINIMUM_KEYS - 1, group).split == 0
    backward = replace(found, direction="backward")
    assert sized(backward, q_len, k_len, group).split == 0


def test_where_it_pays() -> None:
    """As measured: always for few rows, for more where the other kernels leave multiprocessors idle."""
    wide = replace(PLAIN, head_dim=128, value_dim=128)
    assert sized(PLAIN, 64, MINIMUM_KEYS, 1, 1000).split == 64
    assert sized(wide, 32, MINIMUM_KEYS, 1, 1000).split == 32
    assert [sized(wide, 64, keys).split for keys in (2 * MINIMUM_KEYS - 1, 2 * MINIMUM_KEYS)] == [0, 64]
    assert [sized(PLAIN, 128, keys).split for keys in (4 * MINIMUM_KEYS - 1, 4 * MINIMUM_KEYS)] == [0, 128]
    assert [sized(PLAIN, 128, 1 << 20, 1, heads).split for heads in (32, 33)] == [128, 0]
    assert sized(PLAIN, 16, MINIMUM_KEYS, 8, 1000).split == 128, "grouped heads share the keys"


def test_one_row_sees_every_key() -> None:
    causal = replace(PLAIN, causal=True)
    assert sized(causal, 1, 4096) == sized(PLAIN, 1, 4096)
    assert sized(causal, 2, 4096).causal


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "float32"}, {"groups": 2}, {"bias": "float32"}, {"pair_mask": True}, {"direction": "backward"}],
)
def test_what_is_left_to_other_kernels(changes: dict[str, Any]) -> None:
    spec = replace(PLAIN, **changes)
    assert sized(spec, 1, 1 << 20).split == 0
    assert any("split their keys" in reason for reason in support.reasons(replace(spec, split=16)))


def test_every_served_shape_has_a_tile() -> None:
    for arch in ARCHS.values():
        for d in HEAD_DIMS:
            for rows in ROWS:
                spec = KernelSpec("forward", arch.name, "float16", d, HEAD_DIMS[-1 - HEAD_DIMS.index(d)], split=rows)
                if serves(spec):
                    tiles = split_tiles(spec)
                    assert tiles.shared_bytes(spec) <= arch.shared_memory
                    assert tiles.warps * 32 <= 1024
                else:
                    assert rows == 128
                    assert support.reasons(spec)


PROBLEMS = [
    (16, Problem(d=64, sq=1, sk=700)),
    (16, Problem(d=64, sq=1, sk=1)),
    (16, Problem(d=64, sq=3, sk=127, heads=4, kv_heads=1, scale=0.0)),
    (16, Problem(d=32, sq=5, sk=900, heads=4, kv_heads=2, causal=True, strided=True)),
    (16, Problem(d=8, sq=16, sk=300, mask=True)),
    (32, Problem(d=24, dv=40, sq=30, sk=500, mask=True, causal=True)),
    (64, Problem(d=128, sq=64, sk=700, causal=True, mask=True, softmax="online", scale=30.0)),
    (64, Problem(d=96, dv=80, sq=40, sk=65)),
    (128, Problem(d=64, sq=100, sk=130, causal=True)),
    (128, Problem(d=128, sq=128, sk=64, causal=True, arch="sm80")),  # rows that see nothing
    (64, Problem(d=256, sq=60, sk=100, l2norm=False, softmax="online")),
    (16, Problem(d=192, dv=256, sq=2, sk=200, arch="sm86")),
]


def attend(problem: Problem, rows: int, t: Any, seed: int = 0) -> harness.Forward:
    forward, _ = specs(problem)
    return harness.run_forward(replace(forward, split=rows), t.q, t.k, t.v, mask=t.mask, scale=t.scale, seed=seed)


def hidden_as_nan(t: Any) -> Any:
    if t.mask is None:
        return t
    hidden = ~t.mask[:, None, :, None]
    return replace(t, k=t.k.masked_fill(hidden, float("nan")), v=t.v.masked_fill(hidden, float("nan")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "problem"), PROBLEMS, ids=lambda x: str(x))
def test_against_float64(rows: int, problem: Problem, dtype: DType) -> None:
    problem = replace(problem, dtype=dtype)
    t = tensors_of(problem)
    results, expected = attend(problem, rows, hidden_as_nan(t)), exact(problem, t)
    sees = expected["lse"].isfinite()
    assert torch.equal(results.lse.isneginf(), ~sees)
    assert not results.out[~sees].any()
    error = (results.out.double() - expected["out"]).norm() / expected["out"].norm()
    assert error <= TOLERANCE[dtype] * (1 if problem.softmax is None else 2)
    largest = t.scale.max().item() if isinstance(t.scale, Tensor) else t.scale
    torch.testing.assert_close(
        results.lse[sees].double(), expected["lse"][sees], rtol=0, atol=torch.finfo(t.q.dtype).eps * largest
    )


def test_the_number_of_slices_follows_the_work() -> None:
    """Few heads share the multiprocessors (three in the emulator); many have one slice each, and no merge."""
    few, many = (tensors_of(Problem(d=64, sq=1, sk=1500, batch=batch, heads=1)) for batch in (1, 12))
    single = attend(Problem(d=64), 16, many).statistics
    sliced = attend(Problem(d=64), 16, few).statistics
    assert single["blocks"] == 12
    assert sliced["blocks"] > 2


def test_any_order_of_blocks_gives_the_same_bits() -> None:
    problem = Problem(d=64, sq=4, sk=1500, batch=1)
    t = tensors_of(problem)
    first = attend(problem, 16, t)
    for seed in (1, 2, 3):
        again = attend(problem, 16, t, seed)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.lse, first.lse)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("mask", [False, True])
def test_a_broken_key_reaches_only_the_rows_that_see_it(name: str, mask: bool) -> None:
    problem = Problem(d=32, sq=20, sk=400, batch=1, causal=True, mask=mask)
    t = hidden_as_nan(tensors_of(problem))
    clean = attend(problem, 32, t)
    for key in (10, 385, 399):
        broken = getattr(t, name).clone()
        broken[0, 0, key, 3] = float("nan")
        results = attend(problem, 32, replace(t, **{name: broken}))
        seen = torch.arange(20) + 380 >= key
        if t.mask is not None:
            seen &= t.mask[0, key]
        assert results.out[0, 0, seen].isnan().any(-1).all()
        assert torch.equal(results.out[0, 0, ~seen], clean.out[0, 0, ~seen])
        assert torch.equal(results.out[0, 1], clean.out[0, 1])


def test_without_lse() -> None:
    t = tensors_of(Problem(d=64, sq=1, sk=300))
    forward, _ = specs(Problem(d=64, sq=1, sk=300))
    spec = replace(forward, split=16)
    some, none = (harness.run_forward(spec, t.q, t.k, t.v, want_lse=want) for want in (True, False))
    assert torch.equal(some.out, none.out)


COMPILED = [
    *(replace(PLAIN, split=rows, head_dim=d, value_dim=d) for rows in ROWS for d in (64, 128)),
    replace(PLAIN, split=16, dtype="float16", causal=True, mask=True),
    replace(PLAIN, split=64, head_dim=256, value_dim=256, softmax="online"),
    replace(PLAIN, split=16, arch="sm80", mask=True, softmax="online"),
]


@needs_nvcc
@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_no_spills_and_room_for_the_blocks(spec: KernelSpec, tmp_path: Path) -> None:
    cubin = compile_spec(spec, tmp_path)
    assert set(cubin.kernels) == {"forward", "merge"}
    assert not cubin.warnings
    tiles = split_tiles(spec)
    for kernel in cubin.kernels.values():
        assert (kernel.spilled, kernel.stack) == (0, 0)
    registers = cubin.kernels["forward"].registers
    assert (registers + 7) // 8 * 8 * tiles.warps * 32 * tiles.blocks_per_sm <= 65536


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "causal"), [(4, 4, 1, False), (8, 1, 2, True), (4, 2, 20, True), (2, 2, 100, True)]
)
def test_on_the_gpu(d: int, heads: int, kv_heads: int, q_len: int, causal: bool) -> None:
    """Against float64 at lengths that give many slices, and bit by bit again."""
    from cosattn import cosine_attention

    torch.manual_seed(0)
    for k_len in (MINIMUM_KEYS, 4999, 100_000):
        shapes = (2, heads, q_len, d), (2, kv_heads, k_len, d), (2, kv_heads, k_len, d)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
        options: dict[str, Any] = {"causal": causal, "return_lse": True}
        out, lse = cosine_attention(q, k, v, **options)
        exact_out, exact_lse = cosine_attention_reference(q.double(), k.double(), v.double(), **options)
        assert (out.double() - exact_out).norm() <= 6e-3 * exact_out.norm()
        assert (lse - exact_lse).abs().max() <= 5e-2
        for _ in range(5):
            again = cosine_attention(q, k, v, **options)
            assert torch.equal(again[0], out)
            assert torch.equal(again[1], lse)
