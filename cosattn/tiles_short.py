"""Tile shapes of the kernels for short sequences: (spec) -> how one block's share of a head is cut.

``spec.short`` is the size class of a call, a multiple of 32: query rows of a block going forward, keys of a block going
backward. Which calls get one by themselves is ``measured``; ``size_class`` says what the kernels are able to serve.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec
from cosattn.tiles import BLOCK_RESERVED, pad16


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
        return 2 * (self.block_m * max(d, dv) + _whole(k_len, self.chunk) * (d + dv))


def _whole(rows: int, step: int) -> int:
    return -(-rows // step) * step


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward kernel is cut: every warp has its keys and, of each tile of queries, its queries."""

    block_n: int
    """Keys of a thread block: all there are."""
    block_m: int
    """Queries of a tile."""
    key_blocks: int
    """Blocks of 16 keys of a warp."""
    stages: int
    """Query tiles in shared memory."""
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
        tiles = 2 * ((self.block_n + self.stages * self.block_m) * (d + max(d, dv) + 8) + ds)
        return tiles + 8 * self.block_m + (4 * self.block_n * self.block_m if self.bias_sums else 0)


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


def backward_tiles(spec: KernelSpec) -> BackwardTiles:
    """A warp has 16 keys where few warps would be left or its sums fill the registers, else 32."""
    keys, widest = spec.short, max(spec.head_dim, spec.value_dim)
    halves = keys > 128 and widest <= 32  # two tiles of queries
    key_blocks = 1 if keys <= 64 or widest > 64 or (keys > 128 and not halves) else 2
    tiles = BackwardTiles(
        block_n=keys,
        block_m=keys // 2 if halves else keys,
        key_blocks=key_blocks,
        stages=2 if halves else 1,
        k_in_registers=False,
        v_in_registers=False,
        bias_sums=spec.bias_grad and keys <= 64,
    )
    registers = (128, 168, 255) if key_blocks == 1 else (168, 255, 255)
    a_block = 32 * tiles.warps * registers[0 if widest <= 32 else 1 if widest <= 64 else 2]
    by_memory = (ARCHS[spec.arch].shared_memory + BLOCK_RESERVED) // (tiles.shared_bytes(spec) + BLOCK_RESERVED)
    return replace(tiles, blocks_per_sm=max(1, min(by_memory, 65536 // a_block)))


def size_class(spec: KernelSpec, q_len: int, k_len: int) -> int:
    """``spec.short`` of a call with so many queries and keys; 0 where these kernels can not serve it.

    Forward: query rows of a block; a head's rows are taken in as few turns of up to four warps as there can be.
    Backward: keys of a block, which holds all of them.
    """
    widest = max(spec.head_dim, spec.value_dim)
    if spec.dtype == "float32" or spec.pair_mask or widest > 128 or max(q_len, k_len) > 256:
        return 0
    limit = ARCHS[spec.arch].shared_memory
    if spec.direction == "forward":
        turns = -(-q_len // 128)
        spec = replace(spec, short=max(64, _whole(-(-q_len // turns), 32)))
        return spec.short if forward_tiles(spec).shared_bytes(spec, k_len) <= limit else 0
    if spec.bias_grad and spec.deterministic:  # blocks add to it in no order
        return 0
    spec = replace(spec, short=max(64, _whole(max(q_len, k_len), 32)))
    tiles = backward_tiles(spec)
    sums = 8 * tiles.key_blocks * (pad16(spec.head_dim) + pad16(spec.value_dim)) // 16  # of a thread: dK and dV
    fits = tiles.shared_bytes(spec) <= limit and 32 * tiles.warps * (sums + 112) <= 65536
    return spec.short if fits else 0


MEASURED = {
    ("forward", 32): (256, 256),
    ("forward", 64): (128, 0),
    ("forward", 128): (64, 0),
    ("backward", 32): (256, 160),
    ("backward", 64): (160, 0),
    ("backward", 128): (64, 0),
}
"""By direction and head dim: up to so many queries and keys these kernels ran on an H200, right and faster than the
others; without a bias, and with one that has a gradient."""


def measured(spec: KernelSpec, q_len: int, k_len: int) -> bool:
    """Whether a call is of those that ``MEASURED`` speaks of: bfloat16, full attention, no options."""
    longest, longest_biased = MEASURED.get((spec.direction, spec.head_dim), (0, 0))
    plain = KernelSpec(spec.direction, "sm90", "bfloat16", spec.head_dim, spec.head_dim)
    biased = replace(plain, bias="bfloat16", softmax="online", bias_grad=spec.direction == "backward")
    return max(q_len, k_len) <= {plain: longest, biased: longest_biased}.get(spec, 0)


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the templates of the family are given."""
    return {"tiles": forward_tiles(spec) if spec.direction == "forward" else backward_tiles(spec)}
