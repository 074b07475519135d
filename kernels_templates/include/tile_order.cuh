// In which order blocks take the tiles of all heads.
#pragma once

// Head after head, so that a head's keys stay in L2. Causal: the longest tiles of a head first, but the last heads take
// turns, so that nobody begins with a long tile when the others are done.
template <bool CAUSAL> struct TileOrder {
    unsigned tiles, tiles_of_head;
    unsigned first_mixed, mixed_heads;  // from that tile on, the rest of the heads take turns

    // About so many tiles take turns.
    TileOrder(unsigned heads, unsigned tiles_of_head, unsigned mixed_tiles)
        : tiles(heads * tiles_of_head), tiles_of_head(tiles_of_head) {
        const unsigned wanted = (mixed_tiles + tiles_of_head - 1) / tiles_of_head;
        mixed_heads = wanted < heads ? wanted : heads;
        first_mixed = (heads - mixed_heads) * tiles_of_head;
    }

    struct Place {
        unsigned head, tile;
    };
    // A tile of keys: the first ones are seen by the most queries.
    __device__ __forceinline__ Place keys_at(unsigned index) const {
        if (!CAUSAL || index < first_mixed) return {index / tiles_of_head, index % tiles_of_head};
        const unsigned rest = index - first_mixed;
        return {first_mixed / tiles_of_head + rest % mixed_heads, rest / mixed_heads};
    }
    // A tile of queries: the last ones see the most keys.
    __device__ __forceinline__ Place queries_at(unsigned index) const {
        const auto [head, rank] = keys_at(index);
        return {head, CAUSAL ? tiles_of_head - 1 - rank : rank};
    }
};
