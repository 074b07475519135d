// In which order blocks take the tiles of all heads.
#pragma once

// Head after head, or wave after wave of heads, so that keys stay in L2. Causal: the longest tiles first. The heads of
// a wave take turns, and so do all of the last heads, so that nobody begins with a long tile when the others are done.
template <bool CAUSAL> struct TileOrder {
    unsigned tiles, tiles_of_head;
    unsigned wave_tiles;
    unsigned first_mixed, mixed_heads;  // from that tile on, the rest of the heads take turns

    // About so many tiles take turns at the end.
    TileOrder(unsigned heads, unsigned tiles_of_head, unsigned mixed_tiles, unsigned wave = 1)
        : tiles(heads * tiles_of_head), tiles_of_head(tiles_of_head), wave_tiles(wave * tiles_of_head) {
        const unsigned wanted = (mixed_tiles + tiles_of_head - 1) / tiles_of_head;
        mixed_heads = wanted < heads ? wanted : heads;
        mixed_heads += (heads - mixed_heads) % wave;
        first_mixed = (heads - mixed_heads) * tiles_of_head;
    }

    struct Place {
        unsigned head, tile;
    };
    // A tile of keys: the first ones are seen by the most queries.
    __device__ __forceinline__ Place keys_at(unsigned index) const {
        if (!CAUSAL) return {index / tiles_of_head, index % tiles_of_head};
        unsigned first = first_mixed, together = mixed_heads;  // of those that take turns
        if (index < first_mixed) first = index - index % wave_tiles, together = wave_tiles / tiles_of_head;
        return {first / tiles_of_head + (index - first) % together, (index - first) / together};
    }
    // A tile of queries: the last ones see the most keys.
    __device__ __forceinline__ Place queries_at(unsigned index) const {
        const auto [head, rank] = keys_at(index);
        return {head, CAUSAL ? tiles_of_head - 1 - rank : rank};
    }
};
