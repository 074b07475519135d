// NaN and Inf stay where they belong. A product sums over queries or keys, and causal rows do not see all of them: what
// a row does not see has a zero in A, but 0 * NaN is NaN. So tiles on the diagonal are looked at, and what is not
// finite is cleared from them; the caller sees to it that rows that see it become NaN all the same.
#pragma once
#include "matrix.cuh"
#include "norm.cuh"

// A tile without what is not finite; row(r) is called where there was some.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T, class Row>
__device__ __forceinline__ void clear_broken(T* tile, Row row) {
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
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T>
__device__ __forceinline__ void clear_broken(T* tile) {
    clear_broken<ROWS, COLUMNS, PITCH, THREADS>(tile, [](int) {});
}
