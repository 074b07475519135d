// NaN and Inf stay where they belong. A product sums over queries or keys, and causal rows do not see all of them: what
// a row does not see has a zero in A, but 0 * NaN is NaN. So where B holds an element that is not finite, the product is
// taken without it, and rows that do see it become NaN afterwards. This costs a look at tiles on the diagonal, and the
// rest only when something is broken.
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
        if constexpr (sizeof(T) == 4)
            broken = broken || (word & 0x7f800000u) == 0x7f800000u;
        else
            broken = broken || (word & EXPONENT<T>) == EXPONENT<T> || (word >> 16 & EXPONENT<T>) == EXPONENT<T>;
    }
    return broken;
}

// Whether this thread finds anything in its share of a tile that is not finite.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T> __device__ __forceinline__ bool finds_broken(const T* tile) {
    constexpr int VECTOR = 16 / int(sizeof(T)), PER_ROW = COLUMNS / VECTOR;
    bool broken = false;
    for (int i = int(threadIdx.x); i < ROWS * PER_ROW; i += THREADS)
        broken = broken || is_broken16(tile + i / PER_ROW * PITCH + i % PER_ROW * VECTOR);
    return broken;
}

// A tile without its broken elements; row(r) is called where there were some.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T, class Row>
__device__ __forceinline__ void clear_broken_rows(T* tile, Row row) {
    constexpr int PER_ROW = COLUMNS / 8;
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

// B without its broken elements ...
template <class T> __device__ __forceinline__ void clear_broken(FragmentB<T>& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            if (!is_finite(b.hi[i])) b.hi[i] = b.lo[i] = 0.f;
        } else {
            if ((b.r[i] & EXPONENT<T>) == EXPONENT<T>) b.r[i] &= 0xffff0000u;
            if ((b.r[i] >> 16 & EXPONENT<T>) == EXPONENT<T>) b.r[i] &= 0x0000ffffu;
        }
    }
}
// ... and 1 where they are, 0 elsewhere.
template <class T> __device__ __forceinline__ void mark_broken(FragmentB<T>& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
            b.hi[i] = is_finite(b.hi[i]) ? 0.f : 1.f, b.lo[i] = 0.f;
        else
            b.r[i] = pack2<T>((b.r[i] & EXPONENT<T>) == EXPONENT<T> ? 1.f : 0.f,
                              (b.r[i] >> 16 & EXPONENT<T>) == EXPONENT<T> ? 1.f : 0.f);
    }
}

// For multiply_columns(): B as it is, or without its broken elements.
struct ClearBroken {
    bool broken;
    template <class B> __device__ __forceinline__ void operator()(B& b, int, int) const {
        if (broken) clear_broken(b);
    }
};

// c = NaN where a row sees a broken element of its column. sees(m, k, block, i): as in fragments_of(), whether a row
// sees a row of the tile.
template <int PITCH, int K, int M, int N, class T, class Sees>
__device__ __forceinline__ void spread_broken(float (&c)[M][N][4], const T* tile, int columns, Sees sees) {
    FragmentA<T> a[M][K][16 / STEP<T>];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int k = 0; k < K; ++k)
            fragments_of<T>(a[m][k], [&](int block, int i) { return sees(m, k, block, i) ? 1.f : 0.f; });
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
        if (n * 16 >= columns) break;
        Accumulator<T> count[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m) clear(count[m][0]), clear(count[m][1]);
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int step = 0; step < 16 / STEP<T>; ++step) {
                FragmentB<T> b;
                load_b<PITCH>(b, tile + (k * 16 + step * STEP<T>) * PITCH + n * 16);
                mark_broken(b);
#pragma unroll
                for (int m = 0; m < M; ++m) multiply_add(count[m][0], count[m][1], a[m][k][step], b);
            }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (count[m][half].value(i) > 0.f) c[m][2 * n + half][i] = NAN;
    }
}
