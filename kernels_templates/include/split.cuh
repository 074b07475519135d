// Floats as two f16 parts, x = (hi + lo) / SPLIT_SCALE, for rows whose norm is about 1.
//
// A product of two such numbers is hi_a hi_b + (hi_a lo_b + lo_a hi_b): three f16 products, which cost half of what
// three TF32 products do, and the parts lie in shared memory ready for use. They keep 22 bits of x; SPLIT_SCALE keeps
// lo of small numbers above the smallest step of f16, and leaves room for |x| up to 4000.
#pragma once
#include "matrix.cuh"
#include "norm.cuh"

constexpr float SPLIT_SCALE = 16.f;

// An element of a row that holds all hi parts and, half a row later, all lo parts.
struct Split {
    uint16_t bits;
};

constexpr int split_pitch(int columns) { return 2 * pad16(columns) + 8; }
constexpr int split_half(int pitch) { return (pitch - 8) / 2; }

template <> struct FragmentA<Split> {
    FragmentA<f16> hi, lo;
};
template <> struct FragmentB<Split> {
    FragmentB<f16> hi, lo;
};
// Sums of SPLIT_SCALE^2 a b.
template <> struct Accumulator<Split> {
    float c[4], small[4];
    __device__ __forceinline__ void fill(int i, float x) {
        c[i] = x;
        small[i] = 0.f;
    }
    __device__ __forceinline__ float value(int i, float factor) const { return (c[i] + small[i]) * factor; }
};

template <int PITCH> __device__ __forceinline__ void load_a(FragmentA<Split>& a, const Split* tile) {
    load_a<PITCH>(a.hi, reinterpret_cast<const f16*>(tile));
    load_a<PITCH>(a.lo, reinterpret_cast<const f16*>(tile) + split_half(PITCH));
}
template <int PITCH> __device__ __forceinline__ void load_b_transposed(FragmentB<Split>& b, const Split* tile) {
    load_b_transposed<PITCH>(b.hi, reinterpret_cast<const f16*>(tile));
    load_b_transposed<PITCH>(b.lo, reinterpret_cast<const f16*>(tile) + split_half(PITCH));
}

__device__ __forceinline__ void multiply_add(Accumulator<Split>& left, Accumulator<Split>& right,
                                             const FragmentA<Split>& a, const FragmentB<Split>& b) {
    mma_m16n8k16<f16>(left.small, a.lo.r, b.hi.r[0], b.hi.r[1]);
    mma_m16n8k16<f16>(right.small, a.lo.r, b.hi.r[2], b.hi.r[3]);
    mma_m16n8k16<f16>(left.c, a.hi.r, b.hi.r[0], b.hi.r[1]);
    mma_m16n8k16<f16>(right.c, a.hi.r, b.hi.r[2], b.hi.r[3]);
    mma_m16n8k16<f16>(left.small, a.hi.r, b.lo.r[0], b.lo.r[1]);
    mma_m16n8k16<f16>(right.small, a.hi.r, b.lo.r[2], b.lo.r[3]);
}

// Eight columns of a row whose lo parts begin HALF elements after its hi parts.
template <int HALF> __device__ __forceinline__ void store_columns(Split* row, int column, const float (&x)[8]) {
    uint32_t hi[4], lo[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float a = x[2 * i] * SPLIT_SCALE, b = x[2 * i + 1] * SPLIT_SCALE;
        hi[i] = pack2<f16>(a, b);
        const float2 rounded = unpack2<f16>(hi[i]);
        lo[i] = pack2<f16>(a - rounded.x, b - rounded.y);
    }
    *reinterpret_cast<uint4*>(row + column) = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    *reinterpret_cast<uint4*>(row + HALF + column) = make_uint4(lo[0], lo[1], lo[2], lo[3]);
}

// Rows of floats in shared memory, PITCH / 2 floats apart, become rows of x_hat (NORMALIZE) or x, in their place.
template <int ROWS, int D, int GROUPS, bool NORMALIZE, int PITCH, int THREADS>
__device__ __forceinline__ void split_tile(Split* tile) {
    constexpr int LANES = row_lanes(D);
    constexpr int ROWS_PER_PASS = THREADS / LANES;
    const int lane = int(threadIdx.x) % LANES;
#pragma unroll 4
    for (int first = 0; first < ROWS; first += ROWS_PER_PASS) {
        const int row = first + int(threadIdx.x) / LANES;
        const bool inside = lane * 8 < D && (ROWS % ROWS_PER_PASS == 0 || row < ROWS);
        Split* const to = tile + row * PITCH;
        float x[8] = {}, inverse[8];
        if (inside) load8(x, reinterpret_cast<const float*>(to) + lane * 8);
        if constexpr (NORMALIZE) {
            inverse_norms<D, GROUPS>(inverse, x, lane);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] *= inverse[i];
        }
        __syncwarp();  // every lane of the row has read its floats
        if (inside) store_columns<split_half(PITCH)>(to, lane * 8, x);
        if (D % 16 != 0 && inside && lane * 8 + 8 == D) {
            const float zeros[8] = {};
            store_columns<split_half(PITCH)>(to, D, zeros);
        }
    }
}
