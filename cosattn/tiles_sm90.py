"""Tile shapes of the sm90 family: (spec) -> how the work of one kernel is cut, checked against shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec

BARRIER_BYTES = 512
ALIGNMENT = 1024
"""Bytes; where a swizzle pattern of 128 bytes starts."""


def slab_columns(columns: int) -> int:
    """Columns of a slab: tiles in shared memory are cut into slabs of rows of 64 or 128 bytes, the swizzle's width."""
    return 32 if (columns + 31) // 32 % 2 else 64


def padded(columns: int) -> int:
    """Columns of a tile in shared memory: whole slabs."""
    slab = slab_columns(columns)
    return (columns + slab - 1) // slab * slab


@dataclass(frozen=True, slots=True)
class ForwardTiles:
    """How the forward kernel is cut."""

    warpgroups: int
    """Consumer warpgroups, each with 64 query rows of its own; one more brings the tiles."""
    block_n: int
    """Keys of a tile."""
    stages: int
    """Key tiles in shared memory."""
    query_buffers: int
    """Query tiles in shared memory: with two, the next one arrives while this one is worked on."""
    normalize_warpgroup: bool = True
    """A warpgroup of its own normalises queries, ahead of those that attend to them; else these do it."""
    own_outputs: bool = True
    """Finished rows have shared memory of their own; else they take the place of their queries."""

    @property
    def block_m(self) -> int:
        """Query rows of a thread block."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of a thread that copies, that normalises, that attends."""
        if self.normalize_warpgroup:
            return {2: (32, 96, 192), 3: (24, 72, 128)}[self.warpgroups]
        return {2: (24, 0, 240), 3: (32, 0, 160), 4: (32, 0, 112)}[self.warpgroups]

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        d, dv = padded(spec.head_dim), padded(spec.value_dim)
        if self.own_outputs:
            queries = self.block_m * (self.query_buffers * d + dv)
        else:
            queries = self.block_m * self.query_buffers * max(d, dv)
        keys = self.stages * self.block_n * (d + dv)
        return 2 * (queries + keys) + BARRIER_BYTES + ALIGNMENT


def forward_tiles(spec: KernelSpec) -> ForwardTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    for tiles in _forward_candidates(spec):
        if tiles.shared_bytes(spec) <= ARCHS[spec.arch].shared_memory:
            return tiles
    raise AssertionError(f"no forward tile fits {spec.name}")


def _forward_candidates(spec: KernelSpec) -> list[ForwardTiles]:
    widest = max(spec.head_dim, spec.value_dim)
    if spec.bias is not None and widest <= 128:  # it takes as many registers as the logits
        return [ForwardTiles(3, 64, 4, 2, False)] if widest <= 64 else [ForwardTiles(2, 64, 3, 2, False)]
    if widest <= 64:
        return [ForwardTiles(4, 64, 8, 2, False)]
    if widest <= 96:
        return [ForwardTiles(3, 64, 4, 2, False)]
    if widest <= 128:
        return [ForwardTiles(2, 128, 2, 2, False), ForwardTiles(2, 128, 2, 2, False, False)]
    if widest <= 192:
        return [ForwardTiles(2, 64 if spec.bias else 96, 2, 1, False, False)]
    return [ForwardTiles(2, 32 if spec.bias else 64, 2, 1, False, False)]


def wgmma_columns(spec: KernelSpec) -> list[int]:
    """Columns of the accumulators that the kernel multiplies into."""
    tiles = forward_tiles(spec)
    return sorted({tiles.block_n, (spec.value_dim + 15) // 16 * 16})


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the templates of the family are given."""
    return {
        "tiles": forward_tiles(spec),
        "wgmma_columns": wgmma_columns(spec),
        "padded": padded,
        "slab_columns": slab_columns,
        "barrier_bytes": BARRIER_BYTES,
    }
