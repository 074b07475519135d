"""Tile shapes over the whole support matrix: they fit the machine, and the templates agree about their memory."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from emulator import build
from matrix import FEATURES, support_matrix

from cosattn.arch import ARCHS
from cosattn.render import render
from cosattn.spec import DTYPES, HEAD_DIMS, KernelSpec
from cosattn.tiles import backward_tiles, forward_tiles, query_tiles

LARGEST_BLOCK = 1024
REGISTERS = 65536  # of a multiprocessor, in 32-bit words


def pairs_of_dims() -> Iterator[tuple[int, int]]:
    """Every head dim with itself and with the smallest and the widest."""
    for d in HEAD_DIMS:
        yield d, d
        yield from ((d, other) for other in (HEAD_DIMS[0], HEAD_DIMS[-1]) if other != d)


def pad16(columns: int) -> int:
    return -(-columns // 16) * 16


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_tiles_fit(arch: str, dtype: str) -> None:
    for spec in support_matrix("forward", arch, dtype, pairs_of_dims()):
        tiles = forward_tiles(spec)
        assert tiles.shared_bytes(spec) <= ARCHS[arch].shared_memory, spec.name
        assert tiles.block_m % (16 * tiles.warps) == 0, spec.name
        assert tiles.block_n % tiles.chunk == 0, spec.name
        assert tiles.chunk % 16 == 0, spec.name
        assert 1 <= tiles.warps <= 16, spec.name
        assert tiles.blocks_per_sm * tiles.warps * 32 * 128 <= REGISTERS, spec.name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_tiles_fit(arch: str, dtype: str) -> None:
    for spec in support_matrix("backward", arch, dtype, pairs_of_dims()):
        tiles = backward_tiles(spec)
        assert tiles.shared_bytes(spec) <= ARCHS[arch].shared_memory, spec.name
        assert tiles.block_n % (16 * tiles.key_blocks) == 0, spec.name
        assert tiles.block_m % (tiles.splits * tiles.chunk) == 0, spec.name
        assert tiles.chunk % 16 == 0, spec.name
        assert 1 <= tiles.warps <= 16, spec.name
        assert tiles.block_n // (16 * tiles.key_blocks) <= 15 or tiles.splits == 1, "named barriers 1 to 15"
        assert tiles.stages >= 1, spec.name
        assert tiles.ds_buffers in (1, 2), spec.name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_a_thread_leave_registers(arch: str, dtype: str) -> None:
    """The sums a thread holds are what spills come from. One corner has no smaller tile."""
    for spec in support_matrix("backward", arch, dtype, pairs_of_dims()):
        tiles = backward_tiles(spec)
        slices = sum(-(-pad16(d) // 16 // tiles.splits) for d in (spec.head_dim, spec.value_dim))
        sums = 8 * tiles.key_blocks * slices
        threads = 32 * tiles.warps * tiles.blocks_per_sm
        assert threads * 128 <= REGISTERS, spec.name
        narrow = dtype == "float32" and ARCHS[arch].shared_memory < 110_000 and max(spec.head_dim, spec.value_dim) > 240
        assert sums <= (256 if narrow else 128), f"{spec.name}: {sums} of 255 registers"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_query_tiles_fit(arch: str, dtype: str) -> None:
    """Statistics are padded to tiles of backward_keys: tiles of backward_queries must divide those."""
    for spec in support_matrix("backward", arch, dtype, pairs_of_dims(), [{"deterministic": True}]):
        tiles = query_tiles(spec)
        assert tiles.shared_bytes(spec) <= ARCHS[arch].shared_memory, spec.name
        assert backward_tiles(spec).block_m % tiles.block_m == 0, spec.name
        assert tiles.block_m % 16 == tiles.block_n % 16 == 0, spec.name
        assert 2 * tiles.block_m <= LARGEST_BLOCK, spec.name


def test_the_tiles_that_were_measured_are_used() -> None:
    spec = KernelSpec("backward", "sm90", "bfloat16", 64, 64)
    tiles = backward_tiles(spec)
    assert (tiles.block_m, tiles.block_n, tiles.key_blocks, tiles.splits, tiles.blocks_per_sm) == (64, 128, 2, 1, 2)
    tiles = backward_tiles(replace(spec, head_dim=128, value_dim=128))
    assert (tiles.block_m, tiles.block_n, tiles.key_blocks, tiles.splits, tiles.ds_buffers) == (64, 128, 2, 2, 2)


def test_a_smaller_machine_gets_smaller_tiles() -> None:
    for d, dtype in itertools.product((128, 256), DTYPES):
        large, small = (KernelSpec("backward", arch, dtype, d, d) for arch in ("sm90", "sm86"))
        assert backward_tiles(small).shared_bytes(small) < backward_tiles(large).shared_bytes(large)


SIZED = [
    spec
    for direction, arch, dtype, dims in [
        ("forward", "sm90", "float32", (64, 64)),
        ("forward", "sm80", "bfloat16", (40, 128)),
        ("backward", "sm90", "float32", (64, 64)),
        ("backward", "sm80", "bfloat16", (128, 128)),
        ("backward", "sm86", "float16", (72, 8)),
        ("backward", "sm86", "float32", (8, 256)),
    ]
    for spec in support_matrix(direction, arch, dtype, [dims], FEATURES[:1])
]

SIZED += [replace(spec, deterministic=True) for spec in SIZED if spec.direction == "backward"]


@pytest.mark.parametrize("spec", SIZED, ids=lambda spec: spec.name)
def test_shared_bytes_are_those_of_the_source(spec: KernelSpec, tmp_path: Path) -> None:
    tiles = forward_tiles(spec) if spec.direction == "forward" else backward_tiles(spec)
    expected = {"SHARED_BYTES": tiles.shared_bytes(spec)}
    if spec.deterministic:
        expected["QUERY_SHARED_BYTES"] = query_tiles(spec).shared_bytes(spec)
    assert errors_of_claims(spec, expected, tmp_path) == ""
    wrong = {name: size + 16 for name, size in expected.items()}
    assert errors_of_claims(spec, wrong, tmp_path).count("static assertion failed") == len(wrong)


def errors_of_claims(spec: KernelSpec, claims: dict[str, int], folder: Path) -> str:
    """What the host compiler says about the rendered source with a claim about each constant behind it."""
    rendered = render(spec)
    emulator = build.HERE / "include"
    for name, text in build.replaced(rendered.headers).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    source = folder / "kernel.cpp"
    source.write_text(
        rendered.source + "".join(f'static_assert({name} == {size}, "{name}");\n' for name, size in claims.items())
    )
    flags = ["-std=c++17", "-fsyntax-only", "-w", f"-I{emulator}", f"-I{folder}", "-include", "cuda_runtime.h"]
    return subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True).stderr
