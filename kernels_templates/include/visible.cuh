// Which keys a block of query rows sees: bottom-right aligned causal, or all.
#pragma once
#include <stdint.h>

// Keys [0, visible_keys) are visible to query row `row`.
template <bool CAUSAL> __device__ __forceinline__ int visible_keys(int row, int q_len, int k_len) {
    if constexpr (CAUSAL) {
        const int limit = row + 1 + (k_len - q_len);
        return limit < 0 ? 0 : (limit < k_len ? limit : k_len);
    } else {
        return k_len;
    }
}

// Key-mask bytes of this lane's columns in `BLOCKS` 8-column blocks: bit 2 block + e is column
// 8 block + 2 (lane % 4) + e.
template <int BLOCKS>
__device__ __forceinline__ uint32_t mask_bits(const unsigned char* mask, int64_t stride, int key, int k_len) {
    static_assert(BLOCKS <= 16, "one 32-bit word");
    uint32_t bits = 0;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int column = key + 8 * block + 2 * (int(threadIdx.x) % 4) + e;
            if (column < k_len && mask[column * stride]) bits |= 1u << (2 * block + e);
        }
    }
    return bits;
}

// A mask over pairs as bits in shared memory, one bit a key, 64 keys a word: word tile * TILE_ROWS + row. By one warp,
// for ROWS rows from `mask` on; rows from rows_valid on and keys from k_len on are invisible.
template <int ROWS, int TILE_ROWS> __device__ __forceinline__ void pack_mask(uint64_t* words, const unsigned char* mask,
                                                                             int64_t row_stride, int64_t stride,
                                                                             int rows_valid, int k_len) {
    const bool aligned =
        stride == 1 && (reinterpret_cast<uintptr_t>(mask) | uint64_t(row_stride) | uint64_t(k_len)) % 16 == 0;
    const int piece = int(threadIdx.x) % 4 * 16;  // 16 keys a lane at a time
#pragma unroll 1
    for (int first = 0; first < k_len; first += 64, words += TILE_ROWS) {
#pragma unroll
        for (int pass = 0; pass < ROWS / 8; ++pass) {
            const int row = pass * 8 + int(threadIdx.x) % 32 / 4, key = first + piece;
            const unsigned char* const from = mask + row * row_stride + key * stride;
            uint32_t bits = 0;
            if (row < rows_valid && key < k_len) {
                if (aligned) {
                    const uint4 bytes = *reinterpret_cast<const uint4*>(from);  // each 0 or 1
                    const auto nibble = [](uint32_t x) { return x * 0x01020408u >> 24; };
                    bits = nibble(bytes.x) | nibble(bytes.y) << 4 | nibble(bytes.z) << 8 | nibble(bytes.w) << 12;
                } else {
#pragma unroll 4
                    for (int i = 0; i < 16; ++i)
                        if (key + i < k_len && from[i * stride]) bits |= 1u << i;
                }
            }
            reinterpret_cast<uint16_t*>(words + row)[piece / 16] = uint16_t(bits);
        }
    }
}

// Of such a word: this lane's columns, as mask_bits gives them for eight blocks.
__device__ __forceinline__ uint32_t own_bits(uint64_t word) {
    const int shift = 2 * (int(threadIdx.x) % 4);
    const auto pack = [&](uint32_t x) {  // of each byte the lowest two bits
        x = x >> shift & 0x03030303u;
        return (x | x >> 6 | x >> 12 | x >> 18) & 0xffu;
    };
    return pack(uint32_t(word)) | pack(uint32_t(word >> 32)) << 8;
}
