"""Tile shapes of the sm90 family's forward: (spec) -> how its work is cut, checked against shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec
from cosattn.tiles import MULTIPROCESSORS, pad16, seen_keys

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
    """Tiles of values in shared memory, and of keys where nothing else is said."""
    query_buffers: int
    """Query tiles in shared memory: with two, the next one arrives while this one is worked on."""
    output_parts: int = 1
    """Finished rows leave through shared memory of their own, in so many parts; 0: they take their queries' place."""
    polynomial: int = 0
    """Of eight exponentials, how many are polynomials; none where a mask makes logits -inf."""
    key_factors: bool = False
    """1 / |k| multiplies the logits, by one more warpgroup beside them."""
    few_key_stages: int = 0
    """Tiles of keys in shared memory that become k_hat there and stay for all queries of a head, if all its keys fit.
    With neither this nor factors a pre-pass writes k_hat."""
    norm_registers: int = 0
    """Of a thread of one more warpgroup for the norms of keys; without it, two of the warps that copy make k_hat."""

    @property
    def keys_in_place(self) -> bool:
        """Whether keys become k_hat where they lie in shared memory."""
        return self.few_key_stages > 0

    @property
    def key_stages(self) -> int:
        """Tiles of keys in shared memory."""
        return self.few_key_stages or self.stages

    @property
    def barrier_bytes(self) -> int:
        """Room for barriers and for what is known of tiles."""
        return 2 * BARRIER_BYTES if self.keys_in_place or self.stages > 4 else BARRIER_BYTES

    @property
    def block_m(self) -> int:
        """Query rows of a thread block."""
        return 64 * self.warpgroups

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that copies, and of one that attends."""
        if self.key_factors:
            return 24, 224
        if self.norm_registers:  # and keys in place
            return (40, 208) if self.warpgroups == 2 else (32, 136)
        if self.keys_in_place and self.warpgroups == 3:
            return 56, 152
        return {2: (40, 232), 3: (32, 160), 4: (32, 112)}[self.warpgroups]

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        d, dv = padded(spec.head_dim), padded(spec.value_dim)
        queries = self.query_buffers * self.block_m * (d if self.output_parts else max(d, dv))
        if self.output_parts:
            queries += self.block_m * dv // self.output_parts
        keys = self.block_n * (self.key_stages * d + self.stages * dv)
        factors = 4 * self.stages * self.block_n if self.key_factors else 0
        return 2 * (queries + keys) + self.barrier_bytes + factors + ALIGNMENT


def forward_tiles(spec: KernelSpec) -> ForwardTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    for tiles in _forward_candidates(spec):
        if _key_factors(spec):
            tiles = replace(tiles, key_factors=True, norm_registers=40)
        if tiles.shared_bytes(spec) <= ARCHS[spec.arch].shared_memory:
            return tiles
    raise AssertionError(f"no forward tile fits {spec.name}")


def _plain(spec: KernelSpec) -> bool:
    return spec.l2norm and spec.groups == 1 and not spec.mask and spec.bias is None


def _key_factors(spec: KernelSpec) -> bool:
    """Where products take so long that one more multiplication a logit does not show, and registers are left."""
    widest = max(spec.head_dim, spec.value_dim)
    return _plain(spec) and not spec.short and 96 < widest <= (256 if spec.softmax == "bounded" else 192)


def _forward_candidates(spec: KernelSpec) -> list[ForwardTiles]:
    widest = max(spec.head_dim, spec.value_dim)
    if spec.short:
        if widest <= 32:
            if spec.dtype == "float16":  # the norms of its keys need more registers
                return [ForwardTiles(3, 128, 4, 2, polynomial=1, few_key_stages=16)]
            return [ForwardTiles(4, 64, 4, 2, polynomial=1, output_parts=0, few_key_stages=16)]
        if widest <= 64:
            return [ForwardTiles(4, 64, 4, 2, output_parts=0, few_key_stages=16)]
        if widest <= 96:
            return [ForwardTiles(3, 64, 4, 2, output_parts=0, few_key_stages=8, norm_registers=40)]
        if spec.short == FEWER_KEYS:
            return [ForwardTiles(2, 64, 4, 2, few_key_stages=4, norm_registers=56)]
        parts = 2 - padded(spec.value_dim) // slab_columns(spec.value_dim) % 2
        return [ForwardTiles(2, 64, 3, 1, output_parts=parts, few_key_stages=8, norm_registers=56)]
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


FEW_KEYS = 2048
"""``spec.short`` of calls of few keys, head dims up to 128, that become k_hat in shared memory: up to so many keys."""
FEWER_KEYS = 257
"""The same above head dim 96, where 256 leave room for a second tile of queries. One more, because up to 256 are the
classes of the kernels for short sequences."""
FEW = {32: (2048, 1024), 64: (1024, 1024), 96: (1024, 512), 128: (512, 256)}
"""By the widest head dim: that is faster than a pass over the keys, or than factors, for so many keys of which a query
sees so many on average. Tiles of grouped heads share a pass, so it is worth as many times less to them."""
FEW_HEADS_KEYS = 512
"""With fewer key heads than multiprocessors those that share one make its k_hat each: up to so many keys."""


def short_class(spec: KernelSpec, keys: int) -> int:
    """``spec.short`` of a call with so many keys that can become k_hat in shared memory; 0 else."""
    able = spec.direction == "forward" and spec.arch == "sm90" and not spec.pair_mask and serves(spec) and _plain(spec)
    widest = max(spec.head_dim, spec.value_dim)
    if not able or widest > max(FEW) or keys > FEW_KEYS:
        return 0
    return FEWER_KEYS if widest > 96 and keys <= FEWER_KEYS else FEW_KEYS


def in_place(spec: KernelSpec, q_len: int, k_len: int, group: int, heads: int) -> int:
    """``spec.short`` of a call that is faster if its keys become k_hat in shared memory; 0 elsewhere.

    ``group``: query heads to a key head. ``heads``: key heads of all the batch.
    """
    widest = max(spec.head_dim, spec.value_dim)
    most, seen = next((limits for size, limits in FEW.items() if widest <= size), (0, 0))
    if heads < MULTIPROCESSORS:
        most = min(most, FEW_HEADS_KEYS)
    if k_len > most or group * seen_keys(spec, q_len, k_len) > seen:
        return 0
    fewer = heads >= MULTIPROCESSORS and k_len < FEWER_KEYS  # with few heads a block has no second tile
    return short_class(spec, k_len if fewer else FEW_KEYS)


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
    }
