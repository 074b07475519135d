"""Tile shapes of the split family: few queries, their keys split over blocks. (spec) -> how the work of one is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec
from cosattn.tiles import BLOCK_RESERVED, pad16

ROWS = (16, 32, 64, 128)
"""Rows of a tile: ``KernelSpec.split``."""
MINIMUM_KEYS = 1024
"""With fewer, the launch that merges costs as much as reading the keys."""


@dataclass(frozen=True, slots=True)
class SplitTiles:
    """How the forward kernel is cut."""

    block_m: int
    """Rows: queries of all heads that share a key head."""
    block_n: int
    """Keys of a tile."""
    key_warps: int
    """Warps that share the keys of a tile; the others share its rows, 16 each."""
    stages: int
    """Key tiles in shared memory."""
    blocks_per_sm: int
    q_in_registers: bool

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.block_m // 16 * self.key_warps

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        along, across = pad16(spec.head_dim) + 8, pad16(spec.value_dim) + 8
        tiles = 2 * (self.block_m * along + self.stages * self.block_n * (along + across))
        return max(tiles, 4 * 16 * self.warps * (across + 2))


def serves(spec: KernelSpec) -> bool:
    """Whether the family has a kernel for a spec: one factor a key does for a norm without groups, in 16-bit types."""
    return (
        spec.direction == "forward"
        and spec.split <= _most_rows(spec)
        and spec.dtype != "float32"
        and spec.groups == 1
        and spec.bias is None
        and not spec.pair_mask
    )


def _most_rows(spec: KernelSpec) -> int:
    """Beyond, the sums of wide heads fill a multiprocessor."""
    return 128 if max(spec.head_dim, spec.value_dim) <= 128 else 64


def tile_rows(spec: KernelSpec, q_len: int, k_len: int, group: int, heads: int) -> int:
    """Rows of the tile that serves a call, 0 where the keys are not split.

    Args:
        q_len, k_len: lengths.
        group: query heads to a key head.
        heads: key heads of all the batch.
    """
    rows = q_len * group
    if rows > _most_rows(spec) or not serves(spec):
        return 0
    if rows > 64:  # arithmetic counts, and sm90's is faster: only where its blocks would be few, or each key read again
        pays = group > 1 or (heads <= 32 and k_len >= 4 * MINIMUM_KEYS)
    elif rows > 32 and max(spec.head_dim, spec.value_dim) > 64:
        pays = k_len >= 2 * MINIMUM_KEYS
    else:
        pays = True
    return next(size for size in ROWS if rows <= size) if pays and k_len >= MINIMUM_KEYS else 0


def split_tiles(spec: KernelSpec) -> SplitTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    arch = ARCHS[spec.arch]
    for tiles in _candidates(spec):
        if tiles.blocks_per_sm * (tiles.shared_bytes(spec) + BLOCK_RESERVED) <= arch.shared_memory + BLOCK_RESERVED:
            return tiles
    raise AssertionError(f"no split tile fits {spec.name}")


def _candidates(spec: KernelSpec) -> list[SplitTiles]:
    rows, widest = spec.split, max(spec.head_dim, spec.value_dim)
    if widest <= 64:
        return [SplitTiles(rows, 128, 128 // rows, stages, blocks, True) for blocks, stages in ((2, 3), (2, 2), (1, 2))]
    key_warps = max(64 // rows, 1)
    if widest <= 128:
        wide = rows == 128  # eight warps of 64 sums a thread
        return [
            SplitTiles(rows, 64, key_warps, stages, blocks, True)
            for blocks, stages in ((2, 3), (2, 2), (1, 3), (1, 2))
            if not (wide and blocks == 2)
        ] + [SplitTiles(rows, 32, min(key_warps, 2), 2, 1, True)]
    return [
        SplitTiles(rows, block_n, min(key_warps, block_n // 16), stages, 1, False)
        for block_n, stages in ((64, 3), (64, 2), (32, 3), (32, 2), (16, 3), (16, 2))
    ]


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the template is given."""
    return {"tiles": split_tiles(spec)}
