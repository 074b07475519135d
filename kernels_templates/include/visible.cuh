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
