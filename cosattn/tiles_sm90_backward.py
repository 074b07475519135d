"""Tile shapes of the sm90 family's backward: (spec) -> how its work is cut, checked against shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

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


def padded(columns: int, narrow: bool = False) -> int:
    """Columns of a tile in shared memory: slabs of 32 or 64. ``narrow``: of 32 also where two of 64 would hold less."""
    slab = 32 if columns <= 32 or (narrow and 64 < columns <= 96) else 64
    return (columns + slab - 1) // slab * slab


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
    resident: Literal["", "k", "kv"] = ""
    """By keys: which of k_hat and v are operands in registers."""
    query_warpgroup: bool = False
    """By keys: dQ is the work of the warpgroup that brings the tiles; else of the two that own keys."""
    slice: int = 64
    """By keys: columns of dQ of the first of these two, the second has the rest."""
    fold: bool = False
    """-lse and -delta are added by the products, as three bfloat16 parts each."""
    early: bool = False
    """By keys: dV begins before dS is there, and S^T of the next tile before dQ is stored."""

    @property
    def block_n(self) -> int:
        """Keys of a thread block."""
        return 64 * self.parts

    @property
    def in_place(self) -> bool:
        """By keys: k_hat takes the place of k, whose inverse norms are kept; else k stays beside it."""
        return not (self.by_gradient or self.query_warpgroup)

    @property
    def delta_begins(self) -> bool:
        """By keys: the sums of dP^T begin with -delta; else it is added to them."""
        return self.query_warpgroup or self.fold

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        d, dv = (padded(columns, narrow=not self.by_gradient) for columns in (spec.head_dim, spec.value_dim))
        k_columns = d if self.slice == 64 else 2 * self.slice
        keys = self.block_n * ((1 if self.by_gradient or self.in_place else 2) * k_columns + dv)
        queries = self.stages * BLOCK_M * (d + dv)
        ds = DS_BUFFERS * self.block_n * BLOCK_M
        if self.by_gradient:
            between = 2 * P_BUFFERS * self.block_n * BLOCK_M
            barriers = 8 * (1 + 2 * self.stages + 2 * P_BUFFERS + 2 * DS_BUFFERS)
        else:
            between = 0 if self.query_warpgroup else self.parts * 64 * self.slice * 4
            barriers = 8 * (1 + 2 * self.stages + 2 * DS_BUFFERS + 2 * self.parts)
            if self.in_place:
                barriers += self.block_n * spec.groups * 4
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
        return [BackwardTiles(3, 4, (144, 80), query_warpgroup=True, early=True)]
    if spec.head_dim <= 64:
        return [BackwardTiles(2, 4, (216, 72), resident="kv", query_warpgroup=True, fold=fold, early=True)]
    registers: tuple[int, ...]
    if max(spec.head_dim, spec.value_dim) > 128:
        registers = (216, 208, 80) if spec.bias is not None and not spec.mask else (208, 216, 80)
        return [BackwardTiles(1, stages, registers, by_gradient=True) for stages in (3, 2)]
    registers = (240, 24) if spec.head_dim + spec.value_dim > 224 else (232, 40)
    columns = 48 if spec.head_dim <= 96 else 64
    if columns == 48 and spec.value_dim <= 96 and spec.bias is None and fold:
        return [BackwardTiles(2, 3, registers, resident="k", slice=columns, fold=True, early=True)]
    return [BackwardTiles(2, stages, registers, slice=columns) for stages in (3, 2)]


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
    return sorted({BLOCK_M, d, dv, min(d, 64), backward_tiles(spec).slice})


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the template is given."""
    return {"tiles": backward_tiles(spec), "wgmma_columns": wgmma_columns(spec)}
