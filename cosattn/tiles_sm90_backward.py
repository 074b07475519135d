"""Tile shapes of the sm90 family's backward: (spec) -> how its work is cut, checked against shared memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec
from cosattn.tiles import MULTIPROCESSORS, pad16, seen_keys

BLOCK_M = 64
"""Queries of a tile."""
P_BUFFERS = 2
"""Tiles of P on their way from the warpgroup of dV to that of dK."""
ALIGNMENT = 1024 - 128
"""Bytes lost at most: shared memory begins at a multiple of 128, a swizzle pattern at one of 1024."""


def padded(columns: int, narrow: bool = False) -> int:
    """Columns of a tile in shared memory: slabs of 32 or 64. ``narrow``: of 32 also where two of 64 would hold less."""
    slab = 32 if columns <= 32 or (narrow and 64 < columns <= 96) else 64
    return (columns + slab - 1) // slab * slab


KEYS = 64
"""Of a step of the walk over keys, where dQ has a kernel of its own."""


def q_as_it_is(spec: KernelSpec) -> bool:
    """Whether q is an operand as it is, and its norm a factor of logits: then nobody writes q_hat.

    dS carries that factor, for which float16 has no range, and which dbias must not. If causal, what is not finite in q
    would reach keys that do not see it. Below head dim 200 the factors take longer than q_hat.
    """
    plain = spec.groups == 1 and spec.dtype == "bfloat16" and spec.bias is None
    return plain and spec.head_dim > 192 and not spec.causal


EARLY_TERMS = 192
"""By gradient: the widest head whose -lse and -delta are loaded beside the products. ptxas makes wider ones slower."""


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """How the kernel of dQ is cut, where it has one of its own. A block owns ``warpgroups`` times 64 queries."""

    buffers: int
    """Tiles of queries in shared memory."""
    k_stages: int
    v_stages: int
    """Tiles of k_hat and of v."""
    warpgroups: int = 2
    registers: tuple[int, int] = (240, 24)
    """Of a thread that owns queries, and of one that brings."""

    def shared_bytes(self, spec: KernelSpec, narrow: bool) -> int:
        """Shared memory of one thread block; the same sum as of_queries::SHARED_BYTES in the template."""
        d, dv = (padded(columns, narrow) for columns in (spec.head_dim, spec.value_dim))
        shares = self.buffers * self.warpgroups  # each of a warpgroup
        keys = KEYS * (self.k_stages * d + self.v_stages * dv)
        barriers = 8 * (4 * shares + 2 * (self.k_stages + self.v_stages))
        row_values = BLOCK_M * ((12 if q_as_it_is(spec) else 8) + (8 if spec.groups == 1 else 0))
        return 2 * (shares * BLOCK_M * (d + dv) + keys) + -(-barriers // 16) * 16 + shares * (row_values + 16)


@dataclass(frozen=True, slots=True)
class BackwardTiles:
    """How the backward kernel is cut. A block owns parts of 64 keys and walks over tiles of queries.

    Either each part has a warpgroup, others bring the tiles, and the block takes parts after parts of keys, of one head
    where ``by_head``; or (``by_gradient``, one part) dV and dK have a warpgroup each.
    """

    parts: int
    """Of 64 keys."""
    stages: int
    """Tiles of queries in shared memory."""
    registers: tuple[int, ...]
    """Of a thread that owns keys, one that has dQ, and one that brings, where these are not one warpgroup; by gradient:
    one of dV, one of dK, and one that brings."""
    by_gradient: bool = False
    resident: Literal["", "k", "kv"] = ""
    """By keys: which of k_hat and v are operands in registers."""
    query_warpgroup: bool = False
    """By keys: dQ is the work of one more warpgroup; else of the two that own keys."""
    slice: int = 64
    """By keys: columns of dQ of the first of these two, the second has the rest."""
    fold: bool = False
    """-lse and -delta are added by the products, as three bfloat16 parts each."""
    early: bool = False
    """By keys: dV begins before dS is there, and S^T of the next tile before dQ is stored."""
    ds_buffers: int = 2
    """Tiles of dS in shared memory."""
    queries: QueryTiles | None = None
    """dQ has a kernel of its own, which computes S and dP again."""
    sum_tiles: int = 0
    """By head: the sums of dQ of so many tiles of queries stay in shared memory."""

    @property
    def block_n(self) -> int:
        """Keys of a thread block."""
        return 64 * self.parts

    @property
    def by_head(self) -> bool:
        """By keys: a block takes the keys of a head one part after another."""
        return self.sum_tiles > 0

    @property
    def apart(self) -> bool:
        """Whether dQ has a kernel of its own."""
        return self.queries is not None

    @property
    def sliced(self) -> bool:
        """By keys: dQ is the work of the two warpgroups that own keys, a slice of its columns each."""
        return not (self.by_gradient or self.query_warpgroup or self.apart)

    @property
    def delta_begins(self) -> bool:
        """By keys: the sums of dP^T begin with -delta; else it is added to them."""
        return not self.sliced or self.fold

    def shared_bytes(self, spec: KernelSpec) -> int:
        """Shared memory of one thread block; the same sum as SHARED_BYTES in the template."""
        d, dv = (padded(columns, narrow=not self.by_gradient) for columns in (spec.head_dim, spec.value_dim))
        ds_buffers = 0 if self.apart else self.ds_buffers
        ds = ds_buffers * self.block_n * BLOCK_M
        statistics = self.stages * (32 if self.fold else 16 if q_as_it_is(spec) else 8) * BLOCK_M
        barriers = 8 * 2 * (self.stages + ds_buffers)
        if self.by_gradient:
            queries = self.stages * BLOCK_M * (d + dv)
            between = 2 * P_BUFFERS * self.block_n * BLOCK_M
            barriers += 8 * (7 + 2 * P_BUFFERS)
            barriers = -(-barriers // 16) * 16 + 16  # and what is told of blocks of keys
            return 2 * (self.block_n * (d + dv) + queries) + between + statistics + barriers
        k_columns = d if self.slice == 64 else 2 * self.slice
        keys = self.block_n * (k_columns + (0 if self.resident == "kv" else dv))
        stage = max(BLOCK_M * (d + dv), self.block_n * k_columns, self.block_n * dv)  # of queries, of k, or of v
        inverses = self.block_n * spec.groups * 4
        total = 2 * (keys + self.stages * stage + ds) + statistics + inverses
        if self.by_head:
            through = self.stages * BLOCK_M * 8 * spec.groups
            return total + self.sum_tiles * BLOCK_M * pad16(spec.head_dim) * 4 + through + barriers + ALIGNMENT
        barriers += 24
        if not self.sliced:
            out = 2 * self.block_n * (d + (0 if self.apart else dv))  # dk and dv
        else:
            out = self.parts * 64 * self.slice * 4  # dQ
            barriers += 16 * self.parts
        told = 16 * (self.stages + 1)  # of blocks of keys, at a multiple of 16
        return total + out + -(-barriers // 16) * 16 + told


def _apart(tiles: BackwardTiles, spec: KernelSpec) -> list[BackwardTiles]:
    """With a kernel of its own for dQ, whose tiles are the largest that fit."""
    limit = ARCHS[spec.arch].shared_memory
    sizes = ((2, 3, 3), (2, 3, 2), (2, 2, 2), (1, 3, 2), (1, 2, 1))
    candidates = [QueryTiles(buffers, k_stages, v_stages) for buffers, k_stages, v_stages in sizes]
    fitting = [queries for queries in candidates if queries.shared_bytes(spec, not tiles.by_gradient) <= limit]
    return [replace(tiles, queries=queries) for queries in fitting[:1]]


def backward_tiles(spec: KernelSpec) -> BackwardTiles:
    """The first candidate, fastest first, that fits the architecture's shared memory."""
    if tiles := _fitting(spec):
        return tiles
    raise AssertionError(f"no backward tile fits {spec.name}")


def _fitting(spec: KernelSpec) -> BackwardTiles | None:
    limit = ARCHS[spec.arch].shared_memory
    return next((tiles for tiles in _candidates(spec) if tiles.shared_bytes(spec) <= limit), None)


def _candidates(spec: KernelSpec) -> list[BackwardTiles]:
    fold = spec.dtype == "bfloat16"  # float16 has no room for parts of delta
    if spec.short and max(spec.head_dim, spec.value_dim) <= 64:
        tiles = BackwardTiles(3, 4, (144, 80), query_warpgroup=True, early=True, sum_tiles=spec.short // BLOCK_M)
        if max(spec.head_dim, spec.value_dim) > 32:
            tiles = replace(tiles, parts=2, registers=(200, 104), resident="kv", fold=fold)
        return [tiles, replace(tiles, stages=3, ds_buffers=1)]
    if spec.head_dim <= 32 and spec.value_dim <= 32:
        return [BackwardTiles(3, 6, (136, 48, 24), query_warpgroup=True, early=True)]
    if spec.head_dim <= 64:
        return [BackwardTiles(2, 6, (208, 72, 24), resident="kv", query_warpgroup=True, fold=fold, early=True)]
    if max(spec.head_dim, spec.value_dim) > 128:
        tiles = BackwardTiles(1, 3, (232, 232, 40), by_gradient=True)
        return [cut for stages in (3, 2) for cut in _apart(replace(tiles, stages=stages), spec)]
    if spec.short:
        tiles = BackwardTiles(2, 4, (240, 24), early=True)
        return [cut for stages in (4, 3, 2) for cut in _apart(replace(tiles, stages=stages), spec)]
    registers = (240, 24) if spec.head_dim + spec.value_dim > 224 else (232, 40)
    columns = 48 if spec.head_dim <= 96 else 64
    if columns == 48 and spec.value_dim <= 96 and spec.bias is None and fold:
        return [
            BackwardTiles(2, stages, registers, resident="k", slice=columns, fold=True, early=True) for stages in (4, 3)
        ]
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


HEAD_ROWS = {32: (512, 1024), 64: (512,)}
"""By the widest head dim: size classes of calls whose blocks take a head each, in rows of queries whose sums of dQ fit
in shared memory. They are ``spec.short`` of such a call; those of the family ``short`` are smaller."""


def head_class(spec: KernelSpec, rows: int) -> int:
    """``spec.short`` of a call whose key heads have so many rows of queries; 0 where no block can take a head."""
    widest = max(spec.head_dim, spec.value_dim)
    if spec.direction != "backward" or spec.arch != "sm90" or spec.bias is not None or spec.pair_mask or widest > 64:
        return 0
    if not serves(spec) or (spec.dtype == "float16" and spec.causal and widest > 48):  # ptxas has no registers for it
        return 0
    size = next((size for size in HEAD_ROWS[32 if widest <= 32 else 64] if rows <= size), 0)
    return size if size and _fitting(replace(spec, short=size)) else 0


def by_head(spec: KernelSpec, q_len: int, group: int, heads: int) -> int:
    """``spec.short`` of a call that is faster with a head a block; 0 elsewhere.

    ``heads``: of k and v, in all the batch, ``group`` query heads each. They are taken in rounds, the last of which
    must not leave many multiprocessors idle. Narrow heads gain only where the others' sums would have to take turns,
    above 512 rows if causal, too.
    """
    size = head_class(spec, group * (-(-q_len // BLOCK_M) * BLOCK_M))
    rounds = -(-heads // MULTIPROCESSORS)
    full = heads >= 0.8 * rounds * MULTIPROCESSORS
    faster = spec.deterministic or max(spec.head_dim, spec.value_dim) > 32
    return size if full and faster and (size <= 512 or spec.causal) else 0


APART_KEYS = 1024
"""``spec.short`` of calls of few keys, head dims above 96, whose dQ has a kernel of its own: up to so many keys."""


def apart_class(spec: KernelSpec, keys: int) -> int:
    """``spec.short`` of a call with so many keys whose dQ can have a kernel of its own up to head dim 128; 0 else."""
    widest = max(spec.head_dim, spec.value_dim)
    able = spec.direction == "backward" and spec.arch == "sm90" and spec.bias is None and not spec.pair_mask
    return APART_KEYS if able and serves(spec) and 96 < widest <= 128 and keys <= APART_KEYS else 0


def apart(spec: KernelSpec, q_len: int, k_len: int, heads: int) -> int:
    """``spec.short`` of a call that is faster with a kernel of its own for dQ; 0 elsewhere.

    ``heads``: of q, in all the batch. Two products more for each pair of query and key save what is read and written
    of dQ, so that it is faster where a query sees at most 512 keys on average.
    """
    blocks = heads * -(-q_len // 128)
    return apart_class(spec, k_len) if seen_keys(spec, q_len, k_len) <= 512 and blocks >= 4 * MULTIPROCESSORS else 0


def short_class(spec: KernelSpec, rows: int) -> int:
    """``spec.short`` of an sm90 kernel for so many rows; 0 where it is none."""
    return head_class(spec, rows) or apart_class(spec, rows)


def repeatable(spec: KernelSpec) -> bool:
    """Whether the kernel's gradients of q, k and v are bitwise repeatable anyway: nobody adds to what others have."""
    tiles = backward_tiles(spec)
    return tiles.by_head or tiles.apart


def wgmma_columns(spec: KernelSpec) -> list[int]:
    """Columns of the accumulators that the kernel multiplies into."""
    d, dv = pad16(spec.head_dim), pad16(spec.value_dim)
    tiles = backward_tiles(spec)
    return sorted({BLOCK_M, d, dv} | ({tiles.slice} if tiles.sliced else set()))


def cuts(spec: KernelSpec) -> dict[str, Any]:
    """What the template is given."""
    return {
        "tiles": backward_tiles(spec),
        "wgmma_columns": wgmma_columns(spec),
        "q_as_it_is": q_as_it_is(spec),
        "early_terms": max(spec.head_dim, spec.value_dim) <= EARLY_TERMS,
        "multiprocessors": MULTIPROCESSORS,
    }
