// Rings of buffers in shared memory, and addresses in them.
#pragma once
#include "hopper.cuh"

// A place in a ring; parity changes with every round, as that of the buffers' barriers does.
template <int SIZE> struct Ring {
    int at = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        if (++at == SIZE) at = 0, parity ^= 1;
    }
};

// The place of what comes so manieth into a ring of 2^n.
template <int SIZE> __device__ __forceinline__ Ring<SIZE> place_in_ring(int number) {
    static_assert((SIZE & (SIZE - 1)) == 0, "a power of two");
    return {number & (SIZE - 1), uint32_t(number / SIZE) & 1};
}

// One arrival for a warp.
__device__ __forceinline__ void warp_arrive(uint32_t barrier) {
    __syncwarp();
    if (lane_id() == 0) mbarrier_arrive(barrier);
}

// Further on in shared memory, in units of 16 bytes.
__device__ __forceinline__ Descriptor further(Descriptor d, uint32_t by) {
    return (d & 0xffffffff00000000u) | uint32_t(uint32_t(d) + by);
}

// Where a 16-byte chunk of a row is in a slab: what the swizzle of that pitch does.
template <int PITCH_BYTES> __device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * PITCH_BYTES + ((chunk ^ (PITCH_BYTES == 128 ? row : row >> 1)) % (PITCH_BYTES / 16)) * 16;
}
