"""How the last tiles of a call are cut into parts: all steps once, as many parts as blocks, and something saved."""

from __future__ import annotations

import ctypes
import itertools
from functools import cache

from emulator import build
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cosattn.render import templates_directory

HEADER = "include/tile_shares.cuh"
SOURCE = f"""
#include "{HEADER}"
// Of each item its tile, part and parts; then of each tile that is not whole the first item and their number.
extern "C" int shares(unsigned tiles, unsigned blocks, unsigned steps, unsigned worth, unsigned* out) {{
    const TileShares shares(tiles, blocks, steps, worth);
    for (unsigned item = 0; item < shares.items; ++item) {{
        const auto [tile, part, parts] = shares.at(item);
        *out++ = tile, *out++ = part, *out++ = parts;
    }}
    for (unsigned tile = shares.whole; tile < tiles; ++tile) {{
        const auto [first, count] = shares.parts_of(tile - shares.whole);
        *out++ = shares.whole + first, *out++ = count;
    }}
    return int(shares.items) - int(shares.parts()) == int(shares.whole) ? int(shares.items) : -1;
}}
"""


@cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build.library(SOURCE, {HEADER: (templates_directory() / HEADER).read_text()})))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 700), st.integers(1, 140), st.integers(0, 300), st.integers(1, 20))
@example(2048, 132, 64, 8)  # 66 tiles in halves, and two in more
@example(64, 132, 32, 8)  # less than a tile for each block
@example(199, 132, 128, 8)  # one more than half a round
@example(5, 1, 100, 1)
def test_all_steps_of_all_tiles_once(tiles: int, blocks: int, steps: int, worth: int) -> None:
    out = (ctypes.c_uint * (3 * (tiles + 2 * blocks) + 2 * blocks))()
    items = library().shares(tiles, blocks, steps, worth, out)
    assert tiles <= items <= tiles + 2 * blocks
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(tiles)]
    for item in range(items):
        tile, part, parts = out[3 * item : 3 * item + 3]
        found[tile].append((item, part, parts))
    left = iter(out[3 * items : 3 * items + 2 * blocks])
    rounds: dict[int, int] = {}  # by the number of parts, how many items
    for shares in found:
        parts = len(shares)
        assert [(part, of) for _, part, of in shares] == [(part, parts) for part in range(parts)]
        if items == tiles:
            assert parts == 1
            continue
        if shares[0][0] < tiles - tiles % blocks:
            assert parts == 1, "whole rounds of whole tiles come first"
            continue
        assert (next(left), next(left)) == (shares[0][0], parts)
        ends = [steps * part // parts for part in range(parts + 1)]
        assert all(a < b for a, b in itertools.pairwise(ends)), "no part is empty"
        rounds[parts] = rounds.get(parts, 0) + parts
    if items > tiles:
        assert sum(rounds.values()) <= 2 * blocks
        assert sum(-(-steps // parts) * -(-count // blocks) + worth for parts, count in rounds.items()) <= steps


def test_what_is_shared_out() -> None:
    out = (ctypes.c_uint * 20_000)()
    assert library().shares(2048, 132, 64, 8, out) == 1980 + 2 * 66 + 11 * 2
    assert library().shares(2048, 132, 16, 8, out) == 2048  # 8 + 4 steps, and two rounds of parts, for 16
    assert library().shares(66, 132, 16, 8, out) == 132
    assert library().shares(66, 132, 15, 8, out) == 66
    assert library().shares(264, 132, 1000, 8, out) == 264
