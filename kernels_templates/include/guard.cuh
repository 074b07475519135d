// NaN and Inf stay where they belong. A product sums over queries or keys, and causal rows do not see all of them: what
// a row does not see has a zero in A, but 0 * NaN is NaN. So tiles on the diagonal are looked at, and what is not
// finite is cleared from them; the caller sees to it that rows that see it become NaN all the same.
#pragma once
#include "matrix.cuh"
#include "norm.cuh"

template <class T> constexpr uint32_t EXPONENT = 0x7f80u;
template <> constexpr uint32_t EXPONENT<f16> = 0x7c00u;

// Whether 16 bytes of a tile hold anything that is not finite.
template <class T> __device__ __forceinline__ bool is_broken16(const T* from) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    bool broken = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
        if constexpr (sizeof(T) == 4) broken = broken || (word & 0x7f800000u) == 0x7f800000u;
        else broken = broken || (word & EXPONENT<T>) == EXPONENT<T> || (word >> 16 & EXPONENT<T>) == EXPONENT<T>;
    }
    return broken;
}

// Whether this thread finds anything in its share of a tile that is not finite.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T>
__device__ __forceinline__ bool finds_broken(const T* tile) {
    constexpr int VECTOR = 16 / int(sizeof(T)), PER_ROW = COLUMNS / VECTOR;
    bool broken = false;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < ROWS * PER_ROW; i += THREADS)
        broken = broken || is_broken16(tile + i / PER_ROW * PITCH + i % PER_ROW * VECTOR);
    return broken;
}

// A tile without its broken elements; row(r) is called where there were some.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T, class Row>
__device__ __forceinline__ void clear_broken_rows(T* tile, Row row) {
    constexpr int PER_ROW = COLUMNS / 8;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < ROWS * PER_ROW; i += THREADS) {
        T* const at = tile + i / PER_ROW * PITCH + i % PER_ROW * 8;
        float x[8];
        load8(x, at);
        bool broken = false;
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (!is_finite(x[e])) x[e] = 0.f, broken = true;
        if (!broken) continue;
        store8(at, x);
        row(i / PER_ROW);
    }
}
