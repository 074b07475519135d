// How the last tiles of a call are cut into parts, so that no multiprocessor is idle while others have a whole tile
// before them.
#pragma once

struct TileShares {
    unsigned items;  // whole tiles, and then parts of the others
    unsigned whole;  // tiles
    unsigned early;  // of the others; these are cut into early_parts each, and the rest into late_parts
    unsigned early_parts = 1, late_parts = 1;

    // Tiles of so many steps, for so many blocks. Where `worth` steps less are not saved for each round of parts, all
    // stay whole.
    TileShares(unsigned tiles, unsigned blocks, unsigned steps, unsigned worth) : items(tiles), whole(tiles), early(0) {
        const unsigned others = tiles % blocks, half = blocks / 2;
        if (others == 0 || half == 0) return;
        // A part for each block. One more shortens the others less and less, and has to be added up as they have.
        const auto cut = [&](unsigned count) {
            unsigned parts = blocks / count;
            while (parts > 1 && parts * parts > 2 * steps) --parts;
            return parts;
        };
        const auto longest = [&](unsigned parts) { return (steps + parts - 1) / parts; };
        const unsigned first = others < half ? others : half, rest = others - first;
        const unsigned first_parts = cut(first), rest_parts = rest > 0 ? cut(rest) : 1;
        const unsigned time = longest(first_parts) + worth + (rest > 0 ? longest(rest_parts) + worth : 0);
        if (time > steps) return;
        whole = tiles - others, early = first, early_parts = first_parts, late_parts = rest_parts;
        items = whole + first * first_parts + rest * rest_parts;
    }

    unsigned parts() const { return items - whole; }

    struct Share {
        unsigned tile, part, parts;
    };
    __device__ __forceinline__ Share at(unsigned item) const {
        if (item < whole) return {item, 0, 1};
        item -= whole;
        const unsigned early_items = early * early_parts;
        if (item < early_items) return {whole + item / early_parts, item % early_parts, early_parts};
        item -= early_items;
        return {whole + early + item / late_parts, item % late_parts, late_parts};
    }

    struct Parts {
        unsigned first, count;
    };
    // Of a tile, both counted from the first tile that is not whole.
    __device__ __forceinline__ Parts parts_of(unsigned tile) const {
        if (tile < early) return {tile * early_parts, early_parts};
        return {early * early_parts + (tile - early) * late_parts, late_parts};
    }
};
