"""Tile shapes of the kernels for short sequences: (spec) -> how one block's share of a head is cut.

``spec.short`` is the size class of a call, a multiple of 32: query rows of a block going forward, keys of a block going
backward. Which calls get one by themselves is ``measured``; ``size_class`` says what the kernels are able to serve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec
from cosattn.tiles import BLOCK_RESERVED, MULTIPROCESSORS, pad16
from cosattn.tiles_sm90_forward import ALIGNMENT, padded, slab_columns


@dataclass(frozen=True, slots=True)
class ForwardTiles:
    """How the forward kernel is cut: every warp has 32 rows, and all keys of the head lie in shared memory."""

    block_m: int
    """Query rows of a thread block at a time."""
    block_n: int
    """Keys of a tile: what a warp walks over in steps."""
    chunk: int
    """Keys whose logits are held in registers at once."""
    blocks_per_sm: int
    """Thread blocks the register allocation leaves room for."""
    q_in_registers: bool
    warp_rows: int = 32
    """Query rows of a warp."""

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.block_m // self.warp_rows

    def shared_bytes(self, spec: KernelSpec, k_len: int) -> int:
        """Shared memory of one thread block; the same sum as shared_bytes() in the template."""
        d, dv = pad16(spec.head_dim) + 8, pad16(spec.value_dim) + 8
        mask = 8 * self.block_m * -(-k_len // 64) if spec.pair_mask else 0
        return 2 * (self.block_m * max(d, dv) + _whole(k_len, self.chunk) * (d + dv)) + mask


def _whole(rows: int, step: int) -> int:
    return -(-rows // step) * step


@dataclass(frozen=True, slots=True)
class WarpgroupTiles:
    """How the forward kernel of warpgroups is cut: a head lies in shared memory as a whole."""

    warpgroups: int
    """Warpgroups of a block; each takes 64 query rows at a time."""
    block_n: int
    """Keys whose logits are held in registers at once."""
    stages: int
    """Heads in shared memory: with two, the next one arrives while this one is worked on."""
    blocks_per_sm: int
    """Thread blocks that shared memory and the register allocation leave room for."""
    by_slabs: bool = False
    """With one head in shared memory: all logits first, then O by slabs of columns, for wide heads."""
    norm_batch: int = 4
    """Rows of a thread that go through the norm together, at most."""

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        barriers = 3 * self.stages if self.stages > 1 else 4 + self.warpgroups
        return self.stages * 6 * spec.short * padded(spec.head_dim) + 8 * barriers + ALIGNMENT


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward kernel is cut: every warp has its keys and, of each tile of queries, its queries."""

    block_n: int
    """Keys of a thread block: all there are."""
    block_m: int
    """Queries of a tile."""
    key_blocks: int
    """Blocks of 16 keys of a warp."""
    k_in_registers: bool
    v_in_registers: bool
    bias_sums: bool
    """The gradient of the bias is summed in shared memory, over the batches that a block walks over."""
    blocks_per_sm: int = 1
    """Thread blocks that shared memory and the register allocation leave room for."""
    chunk: int = 16
    """Queries whose logits are held in registers at once."""
    splits: int = 1

    @property
    def warps(self) -> int:
        """Warps of a thread block."""
        return self.block_n // (16 * self.key_blocks)

    def ds_tiles(self, spec: KernelSpec) -> int:
        """Tiles of dS in shared memory."""
        return 1

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        d, dv = pad16(spec.head_dim), pad16(spec.value_dim)
        ds = max(self.block_n * (self.block_m + 8), self.block_m * (dv + 8))
        tiles = 2 * ((self.block_n + self.block_m) * (d + dv + 8) + ds)
        statistics = 4 * (self.block_m * (2 + spec.groups) + self.block_n * spec.groups)
        statistics += 8 * self.block_m * -(-self.block_n // 64) if spec.pair_mask else 0
        return tiles + statistics + (4 * self.block_n * self.block_m if self.bias_sums else 0)


def forward_tiles(spec: KernelSpec) -> ForwardTiles:
    """As many threads a multiprocessor as have room for their sums, in blocks of ``spec.short`` rows."""
    widest, narrow = max(spec.head_dim, spec.value_dim), spec.bias is None and spec.softmax == "bounded"
    if widest <= 32:
        threads, chunk = 512 if narrow else 384, 16 if spec.bias is None else 32
    elif widest <= 64:
        threads, chunk = 384 if narrow else 256, 16
    else:
        threads, chunk = 256, 32 if narrow and not (spec.causal or spec.mask) else 16
    return ForwardTiles(spec.short, 64, chunk, max(1, threads // spec.short), q_in_registers=widest <= 64)


def by_warpgroups(spec: KernelSpec) -> bool:
    """Whether the forward kernel of a size class multiplies by warpgroups; narrow heads gain by it up to 64 rows."""
    plain = not (spec.causal or spec.mask or spec.pair_mask or spec.bias)
    return (
        spec.direction == "forward"
        and spec.arch == "sm90"
        and plain
        and spec.value_dim == spec.head_dim
        and 32 <= spec.head_dim <= 128
        and spec.short % 64 == 0
        and (spec.head_dim > 32 or spec.short == 64)
    )


def forward_template(spec: KernelSpec) -> str:
    """The forward kernel of a size class."""
    if not by_warpgroups(spec):
        return "forward"
    return "forward_by_warpgroups" if warpgroup_tiles(spec).stages > 1 else "forward_in_turns"


def warpgroup_tiles(spec: KernelSpec) -> WarpgroupTiles:
    """Two heads in shared memory, or where they are large one, and with it twice the blocks a multiprocessor."""
    wide = spec.head_dim > 64
    if spec.softmax == "bounded" and spec.short == (128 if wide else 256):
        tiles = WarpgroupTiles(warpgroups=2, block_n=64, stages=1, blocks_per_sm=1, by_slabs=wide)
    else:
        tiles = WarpgroupTiles(spec.short // 64, block_n=64, stages=2, blocks_per_sm=1)
    by_memory = (ARCHS[spec.arch].shared_memory + BLOCK_RESERVED) // (tiles.shared_bytes(spec) + BLOCK_RESERVED)
    return replace(tiles, blocks_per_sm=max(1, min(by_memory, 4 // tiles.warpgroups)))


def backward_tiles(spec: KernelSpec) -> BackwardTiles:
    """A warp has 32 keys where that leaves enough warps and registers, else 16."""
    keys, widest = spec.short, max(spec.head_dim, spec.value_dim)
    key_blocks = 2 if 64 < keys <= 128 and widest <= 64 and spec.bias is None else 1
    tiles = BackwardTiles(
        block_n=keys,
        block_m=keys,
        key_blocks=key_blocks,
        k_in_registers=False,
        v_in_registers=False,
        bias_sums=spec.bias_grad and keys <= 64,
    )
    if key_blocks == 2:
        registers = 168 if widest <= 32 else 255
    else:
        few = keys > 128 and not (spec.causal or spec.mask or spec.pair_mask)  # of registers, for two blocks
        registers = (100 if few else 128) if widest <= 32 else 168 if widest <= 64 else 255
    by_memory = (ARCHS[spec.arch].shared_memory + BLOCK_RESERVED) // (tiles.shared_bytes(spec) + BLOCK_RESERVED)
    return replace(tiles, blocks_per_sm=max(1, min(by_memory, 65536 // (32 * tiles.warps * registers))))


def size_class(spec: KernelSpec, q_len: int, k_len: int) -> int:
    """``spec.short`` of a call with so many queries and keys; 0 where these kernels can not serve it.

    Forward: query rows of a block; a head's rows are taken in as few turns of up to four warps as there can be. Where
    warpgroups multiply: rows of a whole head.
    Backward: keys of a block, which holds all of them.
    """
    widest = max(spec.head_dim, spec.value_dim)
    if spec.dtype == "float32" or widest > 128 or max(q_len, k_len) > 256:
        return 0
    limit = ARCHS[spec.arch].shared_memory
    if spec.direction == "forward":
        whole = replace(spec, short=_whole(max(q_len, k_len), 64))
        if by_warpgroups(whole):
            return whole.short if warpgroup_tiles(whole).shared_bytes(whole) <= limit else 0
        least = 96 if by_warpgroups(replace(spec, short=64)) else 64
        turns = -(-q_len // 128)
        spec = replace(spec, short=max(least, _whole(-(-q_len // turns), 32)))
        return spec.short if forward_tiles(spec).shared_bytes(spec, k_len) <= limit else 0
    if spec.bias_grad and spec.deterministic:  # blocks add to it in no order
        return 0
    if spec.head_dim // spec.groups % 8:  # groups of columns that lanes of a product share
        return 0
    spec = replace(spec, short=max(64, _whole(max(q_len, k_len), 32)))
    tiles = backward_tiles(spec)
    sums = 8 * tiles.key_blocks * (pad16(spec.head_dim) + pad16(spec.value_dim)) // 16  # of a thread: dK and dV
    fits = tiles.shared_bytes(spec) <= limit and 32 * tiles.warps * (sums + 96) <= 65536
    return spec.short if fits else 0


FEW_HEADS = MULTIPROCESSORS
"""With fewer heads in all the batch, launches and the time of one block decide."""

MEASURED: dict[tuple[str, str], dict[int, tuple[int, int]]] = {
    ("forward", ""): {32: (256, 256), 64: (256, 256), 128: (128, 128)},
    ("forward", "online"): {32: (144, 256), 64: (0, 64), 128: (0, 64)},
    ("forward", "causal"): {32: (256, 256), 64: (144, 144), 128: (0, 64)},
    ("forward", "causal online"): {32: (144, 256), 64: (0, 64), 128: (0, 64)},
    ("forward", "mask"): {32: (256, 256), 64: (144, 144), 128: (128, 128)},
    ("forward", "mask online"): {32: (144, 256), 64: (128, 128), 128: (64, 128)},
    ("forward", "causal mask"): {32: (144, 256), 64: (128, 128), 128: (128, 64)},
    ("forward", "pair_mask"): {32: (256, 256), 64: (144, 144), 128: (128, 128)},
    ("forward", "pair_mask online"): {32: (256, 256), 64: (128, 128), 128: (128, 128)},
    ("forward", "bias"): {32: (0, 256), 64: (0, 64), 128: (0, 64)},
    ("forward", "bias pair_mask"): {32: (0, 256), 64: (0, 144), 128: (128, 128)},
    ("backward", ""): {32: (160, 256), 64: (160, 192), 128: (128, 128)},
    ("backward", "causal"): {32: (256, 256), 64: (192, 192), 128: (128, 128)},
    ("backward", "mask"): {32: (160, 256), 64: (160, 192), 128: (128, 128)},
    ("backward", "causal mask"): {32: (256, 256), 64: (192, 192), 128: (128, 128)},
    ("backward", "pair_mask"): {32: (256, 256), 64: (192, 192), 128: (128, 128)},
    ("backward", "bias"): {32: (160, 256), 64: (192, 192), 128: (128, 128)},
    ("backward", "bias pair_mask"): {32: (160, 256), 64: (192, 192), 128: (128, 128)},
}
"""By direction and features, by head dim: up to so many queries and keys these kernels ran on an H200, right and faster
than the others, with few heads and with more."""

NOT_MEASURED: dict[tuple[str, str, int], range] = {("forward", "", 64): range(129, 193)}
"""Lengths below those of ``MEASURED`` that did not run with more heads, by direction, features and head dim."""

TAKEN_OVER: dict[tuple[str, str, int], int] = {
    ("forward", "", 32): 192,
    ("forward", "", 64): 128,
    ("forward", "", 128): 64,
    ("forward", "causal", 32): 192,
}
"""Above so many queries, and keys, of more heads the sm90 kernel of few keys is faster. Calls whose query heads share
keys, to which that kernel is worth less, did not run, nor did fewer queries of more keys."""


def measured(spec: KernelSpec, q_len: int, k_len: int, group: int, heads: int) -> bool:
    """Whether a call is of those that ``MEASURED`` speaks of; ``heads`` are those of k and v in all the batch."""
    like = KernelSpec(
        spec.direction,
        "sm90",
        spec.dtype,
        spec.head_dim,
        spec.head_dim,
        causal=spec.causal,
        mask=spec.mask,
        pair_mask=spec.pair_mask,
        bias=spec.bias,
        softmax=spec.softmax,
        deterministic=spec.deterministic,
        bias_grad=spec.direction == "backward" and spec.bias is not None,
    )
    if like != spec or spec.dtype == "float32" or spec.bias not in (None, spec.dtype):
        return False
    masked = spec.causal or spec.mask or spec.pair_mask
    if spec.dtype == "float16" and (masked or (spec.direction == "forward" and spec.bias is None)):
        return False
    if spec.bias is not None and spec.softmax == "bounded":
        return False
    many = (heads if spec.direction == "backward" else heads * group) >= FEW_HEADS
    if spec.direction == "backward" and group > 1 and not many:  # a block has all queries of its keys
        return False
    features, length = _features(spec), max(q_len, k_len)
    key = spec.direction, features, spec.head_dim
    if many and length in NOT_MEASURED.get(key, ()):
        return False
    if many and group == 1 and min(q_len, k_len) > TAKEN_OVER.get(key, length):
        return False
    return length <= MEASURED.get((spec.direction, features), {}).get(spec.head_dim, (0, 0))[many]


def _features(spec: KernelSpec) -> str:
    """What decides which kernels are faster. A running maximum does forward; a bias always comes with one."""
    found = [name for name in ("causal", "mask", "bias", "pair_mask") if getattr(spec, name)]
    online = spec.softmax == "online" and spec.direction == "forward" and spec.bias is None
    return " ".join(found + ["online"] * online)


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the templates of the family are given."""
    if by_warpgroups(spec):
        tiles = warpgroup_tiles(spec)
        o_columns = slab_columns(spec.head_dim) if tiles.by_slabs else pad16(spec.head_dim)
        columns = sorted({tiles.block_n, o_columns})
        names = {"padded": padded, "slab_columns": slab_columns}
        return {"tiles": tiles, "wgmma_columns": columns, "o_columns": o_columns, **names}
    return {"tiles": forward_tiles(spec) if spec.direction == "forward" else backward_tiles(spec)}
