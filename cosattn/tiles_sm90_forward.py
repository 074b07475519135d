"""Tile shapes of the sm90 family's forward: (spec) -> how its work is cut, checked against shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec
from cosattn.tiles import pad16

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
    output_parts: int = 1
    """Finished rows leave through shared memory of their own, in so many parts; 0: they take their queries' place."""
    polynomial: int = 0
    """Of eight exponentials, how many are polynomials; none where a mask makes logits -inf."""
    key_factors: bool = False
    """1 / |k| multiplies the logits, by one more warpgroup beside them; else a pre-pass writes k_hat."""

    @property
    def block_m(self) -> int:
        """Query rows of a thread block."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that copies, and of one that attends."""
        if self.key_factors:
            return 24, 224
        return {2: (40, 232), 3: (32, 160), 4: (32, 112)}[self.warpgroups]

    @property
    def norm_registers(self) -> int:
        """Of a thread of the warpgroup that computes 1 / |k|, where there is one."""
        return 40 if self.key_factors else 0

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        d, dv = padded(spec.head_dim), padded(spec.value_dim)
        queries = self.query_buffers * self.block_m * (d if self.output_parts else max(d, dv))
        if self.output_parts:
            queries += self.block_m * dv // self.output_parts
        keys = self.stages * self.block_n * (d + dv)
        factors = 4 * self.stages * self.block_n if self.key_factors else 0
        return 2 * (queries + keys) + BARRIER_BYTES + factors + ALIGNMENT


def forward_tiles(spec: KernelSpec) -> ForwardTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    for tiles in _forward_candidates(spec):
        tiles = replace(tiles, key_factors=_key_factors(spec))
        if tiles.shared_bytes(spec) <= ARCHS[spec.arch].shared_memory:
            return tiles
    raise AssertionError(f"no forward tile fits {spec.name}")


def _key_factors(spec: KernelSpec) -> bool:
    """Where products take so long that one more multiplication a logit does not show, and registers are left."""
    plain = spec.l2norm and spec.groups == 1 and not spec.mask and spec.bias is None
    widest = max(spec.head_dim, spec.value_dim)
    return plain and 96 < widest <= (256 if spec.softmax == "bounded" else 192)


def _forward_candidates(spec: KernelSpec) -> list[ForwardTiles]:
    widest = max(spec.head_dim, spec.value_dim)
    if spec.bias is not None:  # it takes as many registers as the logits
        if widest <= 64:
            return [ForwardTiles(3, 64, 4, 2)]
        if widest <= 128:
            return [ForwardTiles(2, 64, 3, 2)]
        return [ForwardTiles(2, 64 if widest <= 192 else 32, 2, 1, output_parts=0)]
    if widest <= 32:
        return [ForwardTiles(3, 128, 4, 2, polynomial=0 if spec.mask else 1)]
    if widest <= 64:
        return [ForwardTiles(4, 64, 8, 2)]
    if widest <= 96:
        return [ForwardTiles(3, 64, 4, 2)]
    if widest <= 128:
        return [ForwardTiles(2, 128, 2, 2), ForwardTiles(2, 128, 2, 2, output_parts=0)]
    in_place = ForwardTiles(2, 96 if widest <= 192 else 64, 2, 1, output_parts=0)
    slabs = padded(spec.value_dim) // slab_columns(spec.value_dim)
    return [*(replace(in_place, output_parts=n) for n in range(1, slabs + 1) if slabs % n == 0), in_place]


def serves(spec: KernelSpec) -> bool:
    """Whether the family is the faster one: narrow heads with a bias are windows, too short for blocks of 192 rows."""
    return spec.dtype != "float32" and (spec.bias is None or max(spec.head_dim, spec.value_dim) > 32)


def value_columns(spec: KernelSpec) -> list[int]:
    """Columns of O of each product with V."""
    columns = pad16(spec.value_dim)
    return [128, columns - 128] if forward_tiles(spec).key_factors and columns > 192 else [columns]


def wgmma_columns(spec: KernelSpec) -> list[int]:
    """Columns of the accumulators that the kernel multiplies into."""
    tiles = forward_tiles(spec)
    return sorted({tiles.block_n, *value_columns(spec)})


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the templates of the family are given."""
    return {
        "tiles": forward_tiles(spec),
        "value_columns": value_columns(spec),
        "wgmma_columns": wgmma_columns(spec),
        "padded": padded,
        "slab_columns": slab_columns,
        "barrier_bytes": BARRIER_BYTES,
    }
