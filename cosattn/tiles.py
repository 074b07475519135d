"""Tile shapes of the sm80 family: (spec) -> how the work of one kernel is cut, checked against shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec


@dataclass(frozen=True, slots=True)
class ForwardTiles:
    """How the forward kernel is cut."""

    block_m: int
    """Query rows of a thread block."""
    block_n: int
    """Keys of a tile."""
    chunk: int
    """Keys whose logits are held in registers at once."""
    warps: int
    stages: int
    """Key tiles in shared memory."""
    blocks_per_sm: int
    """Thread blocks the register allocation leaves room for."""
    q_in_registers: bool
    overlap: bool = True
    """Logits of the next chunk are computed with the exponentials of this one; it takes their registers twice."""

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        size = 4 if spec.dtype == "float32" else 2
        along = size * pad16(spec.head_dim) + 16
        across = size * pad16(spec.value_dim) + 16
        return max(self.block_m * along + self.stages * self.block_n * (along + across), self.block_m * across)


BLOCK_RESERVED = 1024
"""Bytes of shared memory that the machine keeps of each thread block, beside the most that a block may have."""


MULTIPROCESSORS = 132
"""Of an H200, where choices between kernels were measured: so many heads or tiles are under way at a time."""


def pad16(columns: int) -> int:
    """Columns of a tile in shared memory, and of what a product sums into."""
    return (columns + 15) // 16 * 16


def seen_keys(spec: KernelSpec, q_len: int, k_len: int) -> float:
    """Keys that a query sees on average, as far as causality says."""
    return k_len - min(q_len, k_len) / 2 if spec.causal else k_len


def forward_tiles(spec: KernelSpec) -> ForwardTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    limit = ARCHS[spec.arch].shared_memory
    for tiles in _forward_candidates(spec):
        if tiles.shared_bytes(spec) <= limit:
            return tiles
    raise AssertionError(f"no forward tile fits {spec.name}")


def _forward_candidates(spec: KernelSpec) -> list[ForwardTiles]:
    widest = max(spec.head_dim, spec.value_dim)
    online, bias = spec.softmax == "online", spec.bias is not None
    mask = spec.mask or spec.pair_mask
    plain = not (online or bias or mask)
    if spec.dtype == "float32":
        if widest <= 64:
            return [ForwardTiles(128, 32, 16, 4, 2, 2, False, overlap=False)]
        if widest <= 128:
            return [
                ForwardTiles(128, 32, 32, 8, 2, 1, False),
                ForwardTiles(64, 16, 16, 4, 2, 1, False),
            ]
        return [
            *([ForwardTiles(128, 32, 16, 8, 2, 1, False, overlap=False)] if widest <= 160 else []),
            ForwardTiles(128, 16, 16, 8, 2, 1, False),
            ForwardTiles(64, 32, 32, 4, 2, 1, False),
            ForwardTiles(32, 16, 16, 2, 2, 1, False),
        ]
    if widest <= 64 and bias:
        blocks = (3 if mask else 4) if widest <= 32 else (2 if mask else 3)
        return [ForwardTiles(64, 64, 64, 4, 2, blocks, True)]  # windows: few queries a head
    if widest <= 64:
        return [ForwardTiles(128, 64, 64 if online else 16, 4, 2, 2, True)]
    if widest <= 128:
        chunk = 16 if bias or (mask and (online or spec.causal)) else 32
        narrow = ForwardTiles(128, 32, chunk, 4, 2, 2, False, overlap=False)
        if limit_of(spec) > 200_000:  # room for two blocks
            return [ForwardTiles(128, 64, chunk, 4, 2, 2, False, overlap=plain and not spec.causal), narrow]
        return [narrow]
    wide = [
        ForwardTiles(128, 64, 32, 8, 2, 1, False),
        ForwardTiles(64, 32, 32, 4, 2, 1, False),
        ForwardTiles(64, 16, 16, 4, 2, 1, False),
    ]
    if plain and widest <= 192 and limit_of(spec) > 200_000:
        wide.insert(0, ForwardTiles(128, 32, 16, 4, 2, 2, False, overlap=widest <= 160))
    return wide


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward kernels are cut."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a thread block."""
    chunk: int
    """Queries whose logits are held in registers at once."""
    key_blocks: int
    """Blocks of 16 keys of a warp."""
    splits: int
    """Warps that share the same keys: each has its part of a tile's queries (P, dS) and of the columns (dK, dV)."""
    stages: int
    """Query tiles in shared memory."""
    ds_buffers: int
    """Tiles of dS in shared memory: with two, dQ of one step overlaps the next step."""
    blocks_per_sm: int
    k_in_registers: bool
    v_in_registers: bool

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.block_n // (16 * self.key_blocks) * self.splits

    def ds_tiles(self, spec: KernelSpec) -> int:
        """Tiles of dS in shared memory: none when nobody but the warp that computed it reads it."""
        if spec.deterministic:
            return 1 if self.splits > 1 else 0
        return self.ds_buffers

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        size = 4 if spec.dtype == "float32" else 2
        pitches = pad16(spec.head_dim) + pad16(spec.value_dim) + 16
        exchanged = self.ds_tiles(spec) + (1 if self.splits > 1 else 0)
        ds = exchanged * self.block_n * (pad16(self.block_m) + (4 if size == 4 else 8))
        tiles = size * (self.block_n * pitches + self.stages * self.block_m * pitches + ds)
        return max(
            tiles + self.stages * 2 * self.block_m * 4,
            4 * self.block_n * (pad16(spec.head_dim) + pad16(spec.value_dim) + 16),
        )


def backward_tiles(spec: KernelSpec) -> BackwardTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    limit = limit_of(spec)
    for tiles in _backward_candidates(spec):
        if tiles.shared_bytes(spec) <= limit:
            return tiles
    raise AssertionError(f"no backward tile fits {spec.name}")


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """How the deterministic gradient of q is cut: 16 query rows a warp, two stages of keys."""

    block_m: int
    block_n: int

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as QUERY_SHARED_BYTES in the template."""
        size = 4 if spec.dtype == "float32" else 2
        return size * (self.block_m + 2 * self.block_n) * (pad16(spec.head_dim) + pad16(spec.value_dim) + 16)


def query_tiles(spec: KernelSpec) -> QueryTiles:
    """The largest candidate that fits the architecture's shared memory."""
    for block_m, block_n in ((64, 64), (64, 32), (64, 16), (32, 32), (32, 16), (16, 16)):
        tiles = QueryTiles(block_m, block_n)
        if tiles.shared_bytes(spec) <= limit_of(spec) and backward_tiles(spec).block_m % block_m == 0:
            return tiles
    raise AssertionError(f"no query tile fits {spec.name}")


def _backward_candidates(spec: KernelSpec) -> list[BackwardTiles]:
    widest = max(spec.head_dim, spec.value_dim)
    biased = spec.bias is not None
    plain = not (biased or spec.mask or spec.pair_mask or spec.deterministic) and limit_of(spec) > 200_000
    if spec.dtype == "float32":
        if widest <= 64:
            tiles = [
                BackwardTiles(64, 64, 16, 1, 2, 1, 1, 1, False, False),
                BackwardTiles(32, 64, 16, 1, 2, 1, 1, 1, False, False),
            ]
            return tiles if biased else [BackwardTiles(64, 64, 16, 2, 2, 1, 1, 2, False, False), *tiles]
        if widest <= 128:
            keys = (2, 4) if widest > 112 and not biased else (1, 2)  # four warps divide 128 columns, not 80 or 96
            return [
                BackwardTiles(64, 64, 16, *keys, 1, 1, 1, False, False),
                BackwardTiles(32, 64, 16, 1, 2, 1, 1, 1, False, False),
                BackwardTiles(32, 32, 16, 1, 2, 1, 1, 1, False, False),
            ]
        return [
            BackwardTiles(64, 32, 16, 1, 4, 1, 1, 1, False, False),
            BackwardTiles(32, 32, 16, 1, 2, 1, 1, 1, False, False),
            BackwardTiles(32, 16, 16, 1, 2, 1, 1, 1, False, False),
            BackwardTiles(16, 16, 16, 1, 1, 1, 1, 1, False, False),
        ]
    if widest <= 32 and biased:
        return [BackwardTiles(64, 64, 16, 1, 1, 2, 1, 2, False, False)]  # windows: few keys a head
    if widest <= 64:
        return [
            BackwardTiles(64, 128, 16, 2, 1, 2, 1, 2, plain, False),
            BackwardTiles(64, 128, 16, 2, 1, 1, 1, 1, plain, False),
        ]
    if widest <= 128:
        chunk = 16 if biased or spec.pair_mask else 32
        return [
            BackwardTiles(64, 128, chunk, 2, 2, 2, 2, 1, False, False),
            BackwardTiles(64, 128, chunk, 2, 2, 1, 1, 1, False, False),
            BackwardTiles(64, 64, 16, 1, 1, 1, 1, 1, False, False),
        ]
    return [
        BackwardTiles(64, 64, 16, 2, 4, 2, 1, 1, False, False),
        BackwardTiles(64, 64, 16, 2, 4, 1, 1, 1, False, False),
        BackwardTiles(32, 32, 16, 1, 2, 1, 1, 1, False, False),
        BackwardTiles(16, 32, 16, 1, 1, 1, 1, 1, False, False),
    ]


def limit_of(spec: KernelSpec) -> int:
    """Shared memory per thread block of the spec's architecture."""
    return ARCHS[spec.arch].shared_memory


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the templates of the family are given."""
    return {
        "tiles": forward_tiles(spec) if spec.direction == "forward" else backward_tiles(spec),
        "query_tiles": query_tiles(spec) if spec.deterministic else None,
    }
