"""Tile shapes of the sm90 family's backward: (spec) -> how its work is cut, checked against shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec
from cosattn.tiles import pad16

BLOCK_M = 64
"""Queries of a tile."""
DS_BUFFERS = 2
P_BUFFERS = 2
"""Tiles of P on their way from the warpgroup of dV to that of dK."""
ALIGNMENT = 1024 - 128
"""Bytes lost at most: shared memory begins at a multiple of 128, a swizzle pattern at one of 1024."""


def padded(columns: int) -> int:
    """Columns of a tile in shared memory: slabs of 32 or 64."""
    return 32 if columns <= 32 else (columns + 63) // 64 * 64


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward kernel is cut. A block owns parts of 64 keys and walks over tiles of queries.

    Either each part has a warpgroup, and one more brings the tiles; or (``by_gradient``, one part) dV, dK and dQ have
    a warpgroup each.
    """

    parts: int
    """Of 64 keys."""
    stages: int
    """Tiles of queries in shared memory."""
    registers: tuple[int, ...]
    """Of a thread that owns keys, and of the others; by gradient: for dV, dK and dQ."""
    by_gradient: bool = False
    resident: bool = False
    """By keys: k_hat and v are operands in registers."""
    query_warpgroup: bool = False
    """By keys: dQ is the work of the warpgroup that brings the tiles; else of the two that own keys."""
    fold: bool = False
    """-lse and -delta are added by the products, as three bfloat16 parts each."""

    @property
    def block_n(self) -> int:
        """Keys of a thread block."""
        return 64 * self.parts

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        d, dv = padded(spec.head_dim), padded(spec.value_dim)
        keys = self.block_n * ((1 if self.by_gradient else 2) * d + dv)
        queries = self.stages * BLOCK_M * (d + dv)
        ds = DS_BUFFERS * self.block_n * BLOCK_M
        if self.by_gradient:
            between = 2 * P_BUFFERS * self.block_n * BLOCK_M
            barriers = 8 * (1 + 2 * self.stages + 2 * P_BUFFERS + 2 * DS_BUFFERS)
        else:
            between = 0 if self.query_warpgroup else self.parts * 64 * 64 * 4
            barriers = 8 * (1 + 2 * self.stages + 2 * DS_BUFFERS + 2 * self.parts)
        statistics = self.stages * (32 if self.fold else 8) * BLOCK_M
        return 2 * (keys + queries + ds) + between + statistics + barriers + ALIGNMENT


def backward_tiles(spec: KernelSpec) -> BackwardTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    for tiles in _candidates(spec):
        if tiles.shared_bytes(spec) <= ARCHS[spec.arch].shared_memory:
            return tiles
    raise AssertionError(f"no backward tile fits {spec.name}")


def _candidates(spec: KernelSpec) -> list[BackwardTiles]:
    fold = spec.dtype == "bfloat16"  # float16 has no room for parts of delta
    if spec.head_dim <= 32 and spec.value_dim <= 32:
        return [BackwardTiles(3, 4, (144, 80), query_warpgroup=True)]
    if spec.head_dim <= 64:
        return [BackwardTiles(2, 4, (216, 72), resident=True, query_warpgroup=True, fold=fold)]
    registers: tuple[int, ...]
    if max(spec.head_dim, spec.value_dim) > 128:
        registers = (216, 208, 80) if spec.bias is not None and not spec.mask else (208, 216, 80)
        return [BackwardTiles(1, stages, registers, by_gradient=True) for stages in (3, 2)]
    registers = (240, 24) if spec.head_dim + spec.value_dim > 224 else (232, 40)
    return [BackwardTiles(2, stages, registers) for stages in (3, 2)]


def serves(spec: KernelSpec) -> bool:
    """Whether the family has a backward kernel for a spec.

    What it lacks are biases of narrow heads, which are windows, repeatable gradients of a bias, and wide values of
    narrow keys.
    """
    widest = max(spec.head_dim, spec.value_dim)
    return (
        spec.dtype != "float32"
        and (spec.bias is None or widest > 32)
        and not (spec.bias_grad and spec.deterministic)
        and widest <= (64 if spec.head_dim <= 64 else 256)
        and spec.head_dim // spec.groups % 8 == 0
    )


def wgmma_columns(spec: KernelSpec) -> list[int]:
    """Columns of the accumulators that the kernel multiplies into."""
    d, dv = pad16(spec.head_dim), pad16(spec.value_dim)
    return sorted({BLOCK_M, d, dv, min(d, 64)})


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the template is given."""
    return {"tiles": backward_tiles(spec), "wgmma_columns": wgmma_columns(spec)}
