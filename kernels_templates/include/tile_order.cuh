// In which order blocks take the tiles of queries of all heads.
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
    __device__ __forceinline__ Place at(unsigned index) const {
        if constexpr (CAUSAL) {
            const bool mixed = index >= first_mixed;
            const unsigned rest = index - first_mixed;
            const unsigned head = mixed ? first_mixed / tiles_of_head + rest % mixed_heads : index / tiles_of_head;
            const unsigned rank = mixed ? rest / mixed_heads : index % tiles_of_head;
            return {head, tiles_of_head - 1 - rank};
        } else {
            return {index / tiles_of_head, index % tiles_of_head};
        }
    }
};
