"""The Hopper backward whose blocks take a head each: which calls get it, what ptxas makes of it, and its results."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import relative_error
from emulator.check import Problem, check, specs
from sass import compile_spec
from test_backward_sm90 import assert_not_finite_stays, assert_not_serialised, assert_tiles_fit
from test_kernels_compile import needs_nvcc
from test_tiles import errors_of_claims

from cosattn import cosine_attention
from cosattn.families import family_of, sized
from cosattn.reference import cosine_attention_reference
from cosattn.render import render
from cosattn.spec import KernelSpec
from cosattn.tiles import MULTIPROCESSORS
from cosattn.tiles_sm90_backward import backward_tiles, by_head, head_class

PLAIN = KernelSpec("backward", "sm90", "bfloat16", 64, 64)

PROBLEMS = [
    Problem(d=64, sq=130),
    Problem(d=64, sq=64, sk=300, heads=3),
    Problem(d=64, sq=300, sk=270, causal=True),
    Problem(d=64, sq=512, sk=130, batch=1),
    Problem(d=64, sq=140, heads=4, kv_heads=2, causal=True, mask=True),
    Problem(d=64, sq=300, sk=100, causal=True),  # rows that see no key
    Problem(d=64, sq=130, sk=129, batch=5, heads=1, strided=True),
    Problem(d=40, sq=129, sk=130, dtype="float16", dlse=True, scale=0),
    Problem(d=64, sq=90, groups=4, mask=True, causal=True),
    Problem(d=64, sq=90, sk=140, l2norm=False, causal=True),
    Problem(d=64, sq=70, sk=100, softmax="online", scale=60.0),
    Problem(d=64, sq=100, dtype="float16", mask=True, softmax="online", dlse=True),
    Problem(d=48, sq=100, sk=140, dtype="float16", causal=True),
    Problem(d=64, dv=24, sq=70, sk=140, scale=0),
    Problem(d=48, dv=56, sq=1, sk=300),
    Problem(d=32, sq=300, sk=200),
    Problem(d=32, sq=600, sk=400, causal=True, heads=1),
    Problem(d=8, sq=70, heads=4, kv_heads=1),
    Problem(d=24, dv=16, sq=100, sk=270, causal=True),
    Problem(d=16, sq=100, sk=400, groups=2, mask=True, dtype="float16", scale=0),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_results(problem: Problem) -> None:
    """Blocks of the emulator's few multiprocessors take one head after another."""
    problem = replace(problem, arch="sm90", by_head=True)
    _, backward = specs(problem)
    assert backward.short
    assert family_of(backward) == "sm90"
    check(problem)


@pytest.mark.parametrize("causal", [False, True])
def test_any_order_of_threads_and_blocks(causal: bool) -> None:
    for seed in range(1, 4):
        check(Problem(d=64, sq=140, sk=260, causal=causal, arch="sm90", by_head=True), seed)


@pytest.mark.parametrize(("name", "row"), [("dout", 70), ("q", 70), ("v", 130)])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_finite_stays_with_those_that_see_it(causal: bool, name: str, row: int) -> None:
    assert_not_finite_stays(Problem(d=64, causal=causal, by_head=True), name, row)


def test_which_calls_get_it() -> None:
    for d, rows, causal, size in (
        (64, 256, False, 512),
        (64, 512, True, 512),
        (64, 513, True, 0),
        (32, 512, False, 512),
        (32, 700, True, 1024),
        (32, 700, False, 0),
        (40, 100, True, 512),
        (96, 300, False, 0),
    ):
        spec = replace(PLAIN, head_dim=d, value_dim=d, causal=causal, deterministic=True)
        assert by_head(spec, rows, 1, 1024) == size
        chosen = sized(spec, rows, rows, 1, 1024)
        assert (chosen.short, family_of(chosen)) == (size, "sm90")
        assert chosen.deterministic == (size == 0)
        assert by_head(replace(spec, deterministic=False), rows, 1, 1024) == (size if d > 32 else 0)
    assert by_head(PLAIN, 128, 4, 1024) == 512  # all query heads of a key head are one block's
    assert by_head(PLAIN, 128, 5, 1024) == 0
    # The last round is full, or nearly.
    for heads, chosen_size in ((64, 0), (110, 512), (132, 512), (140, 0), (230, 512)):
        assert by_head(PLAIN, 512, 1, heads) == chosen_size
    for other in (
        replace(PLAIN, direction="forward"),
        replace(PLAIN, arch="sm80"),
        replace(PLAIN, dtype="float32"),
        replace(PLAIN, bias="bfloat16"),
        replace(PLAIN, pair_mask=True),
        replace(PLAIN, groups=16),
        replace(PLAIN, dtype="float16", causal=True),
    ):
        assert head_class(other, 64) == 0


def test_every_size_class_fits() -> None:
    for d, dv, dtype in itertools.product(range(8, 65, 8), range(8, 65, 8), ("float16", "bfloat16")):
        for groups in (groups for groups in range(1, d // 8 + 1) if d // groups % 8 == 0 and d % groups == 0):
            spec = replace(PLAIN, head_dim=d, value_dim=dv, dtype=dtype, groups=groups)  # type: ignore[arg-type]
            size = head_class(spec, 512)
            if not size:
                assert groups > 4
                continue
            tiles = backward_tiles(replace(spec, short=size))
            assert tiles.by_head
            assert tiles.sum_tiles * 64 == size
            assert_tiles_fit(replace(spec, short=size))


CLASSES = [(64, 512), (40, 512), (32, 512), (32, 1024), (16, 1024)]


@pytest.mark.parametrize(("d", "size"), CLASSES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_shared_bytes_are_those_of_the_source(d: int, size: int, dtype: str, tmp_path: Path) -> None:
    spec = replace(PLAIN, dtype=dtype, head_dim=d, value_dim=d, short=size)  # type: ignore[arg-type]
    tiles = backward_tiles(spec)
    claims = {"SHARED_BYTES": tiles.shared_bytes(spec), "SUM_TILES": size // 64}
    assert errors_of_claims(spec, claims, tmp_path) == ""
    claims["SHARED_BYTES"] += 16
    assert "static assertion failed" in errors_of_claims(spec, claims, tmp_path)


FEATURES: list[dict[str, object]] = [{}, {"causal": True}, {"mask": True}, {"causal": True, "mask": True}]
TUNED = [
    replace(PLAIN, dtype=dtype, head_dim=d, value_dim=d, short=size, **features)  # type: ignore[arg-type]
    for dtype, (d, size), features in itertools.product(
        ("float16", "bfloat16"), ((64, 512), (48, 512), (32, 512), (32, 1024)), FEATURES
    )
    if head_class(replace(PLAIN, dtype=dtype, head_dim=d, value_dim=d, **features), size)  # type: ignore[arg-type]
    and (size <= 512 or "causal" in features)
] + [replace(PLAIN, l2norm=False, causal=True, short=512)]


@needs_nvcc
@pytest.mark.parametrize("spec", TUNED, ids=lambda spec: spec.name)
def test_products_are_not_serialised(spec: KernelSpec, tmp_path: Path) -> None:
    cubin = compile_spec(spec, tmp_path)
    assert_not_serialised(cubin)
    assert set(cubin.kernels) == {"prepare", "backward_keys"}  # dq needs no kernel of its own


def test_no_sums_in_memory() -> None:
    source = render(replace(PLAIN, short=512)).source
    assert "dq_sum" not in source
    assert "reduce_" not in source


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "q_len", "k_len", "options"),
    [
        (64, 512, 512, {}),
        (64, 130, 1000, {"deterministic": True}),
        (48, 300, 437, {"causal": True}),
        (48, 200, 130, {"causal": True}),
        (32, 512, 500, {"deterministic": True}),
        (32, 1000, 900, {"causal": True, "deterministic": True}),
        (40, 100, 100, {"groups": 5}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(d: int, q_len: int, k_len: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Right, and equal bit by bit from run to run; blocks take more than one head."""
    heads, group = MULTIPROCESSORS + 100, 2 if q_len <= 256 else 1
    assert by_head(spec_of(d, dtype, options), q_len, group, heads)
    assert_right_and_repeatable((heads, group, q_len, k_len), d, dtype, options)


def spec_of(d: int, dtype: torch.dtype, options: dict[str, Any]) -> KernelSpec:
    name = "bfloat16" if dtype == torch.bfloat16 else "float16"
    spec = replace(PLAIN, dtype=name, head_dim=d, value_dim=d)  # type: ignore[arg-type]
    known = {name: options[name] for name in ("causal", "groups", "deterministic") if name in options}
    return replace(spec, **known)


def assert_right_and_repeatable(
    sizes: tuple[int, int, int, int], d: int, dtype: torch.dtype, options: dict[str, Any], device: str = "cuda"
) -> None:
    """The gradients of a batch of key heads, of a group of query heads each: equal bit by bit from run to run, too."""
    heads, group, q_len, k_len = sizes
    torch.manual_seed(0)
    q, dout = (torch.randn(heads, group, q_len, d, dtype=dtype, device=device) for _ in range(2))
    k, v = (torch.randn(heads, 1, k_len, d, dtype=dtype, device=device) for _ in range(2))
    size = 8.0 / options.get("groups", 1)
    scale = torch.full((group,), size, device=device)
    tensors = [x.requires_grad_() for x in (q, k, v, scale)]
    out = cosine_attention(q, k, v, scale=scale, scale_max=size, **options)
    found = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(out, tensors, dout, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    options = {name: value for name, value in options.items() if name != "deterministic"}
    few = [x[:3].detach().double().requires_grad_() for x in (q, k, v)]
    reference = cosine_attention_reference(*few, scale=size, **options)
    expected = torch.autograd.grad(reference, few, dout[:3].double())
    for x, y in zip(found[:3], expected, strict=True):
        assert relative_error(x[:3], y) < (1e-2 if dtype == torch.bfloat16 else 2e-3)
