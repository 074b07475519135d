// L2 normalisation of rows, in float32: x_hat = x / |x| per group of D / GROUPS columns; a group whose norm is at most
// EPSILON gives zeros. A row is held by row_lanes(D) neighbouring lanes, 8 columns a lane.
#pragma once
#include "matrix.cuh"
#include "params.cuh"

constexpr float EPSILON = 1e-12f;

constexpr int row_lanes(int columns) {
    int lanes = 1;
    while (lanes * 8 < columns) lanes *= 2;
    return lanes;
}

// Sum over `lanes` neighbouring lanes, lanes a power of two.
template <int LANES> __device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

// Sums per group of what each column contributes: out[i] is the sum over the group of this lane's column i.
// Lanes outside the row contribute zeros. Called by whole warps.
template <int D, int GROUPS>
__device__ __forceinline__ void sum_groups(float (&out)[8], const float (&x)[8], int lane_in_row) {
    constexpr int WIDTH = D / GROUPS;
    constexpr int LANES = row_lanes(D);
    constexpr int GROUP_LANES = WIDTH / 8;
    if constexpr (GROUPS == 1 || (WIDTH % 8 == 0 && (GROUP_LANES & (GROUP_LANES - 1)) == 0)) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += x[i];
        sum = sum_lanes<(GROUPS == 1 ? LANES : GROUP_LANES)>(sum);
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = sum;
    } else {
        for (int group = 0; group < GROUPS; ++group) {
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if ((lane_in_row * 8 + i) / WIDTH == group) sum += x[i];
            sum = sum_lanes<LANES>(sum);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if ((lane_in_row * 8 + i) / WIDTH == group) out[i] = sum;
        }
    }
}

// 1 / |x| for each of this lane's columns; 0 where |x| <= EPSILON.
template <int D, int GROUPS>
__device__ __forceinline__ void inverse_norms(float (&inverse)[8], const float (&x)[8], int lane_in_row) {
    float squares[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) squares[i] = x[i] * x[i];
    sum_groups<D, GROUPS>(inverse, squares, lane_in_row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (i > 0 && D / GROUPS % 8 == 0) inverse[i] = inverse[0];  // all of a lane's columns are in one group
        else inverse[i] = inverse[i] <= EPSILON * EPSILON ? 0.f : reciprocal_sqrt(inverse[i]);
    }
}

// Through the norm: given a row x and the gradient g of x_hat, g <- (g - x_hat (x_hat . g)) / |x| per group.
// Returns x_hat . g of the whole row. A group whose norm is at most EPSILON gets no gradient.
template <int D, int GROUPS>
__device__ __forceinline__ float normalize_backward(float (&g)[8], const float (&x)[8], int lane_in_row) {
    float inverse[8], products[8], dots[8], total = 0.f;
    inverse_norms<D, GROUPS>(inverse, x, lane_in_row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        products[i] = x[i] * inverse[i] * g[i];
        total += products[i];
    }
    sum_groups<D, GROUPS>(dots, products, lane_in_row);
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = (g[i] - x[i] * inverse[i] * dots[i]) * inverse[i];
    return sum_lanes<row_lanes(D)>(total);
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// x <- factor * x_hat (NORMALIZE), or factor * x, for eight columns of a row. FINITE: what is not becomes zero.
// `inverse` gets 1 / |x| for each column, or 1.
template <int D, int GROUPS, bool NORMALIZE, bool FINITE>
__device__ __forceinline__ void normalize8(float (&x)[8], float (&inverse)[8], float factor, int lane_in_row) {
    if constexpr (NORMALIZE) inverse_norms<D, GROUPS>(inverse, x, lane_in_row);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (!NORMALIZE) inverse[i] = 1.f;
        x[i] *= inverse[i] * factor;
        if (FINITE && !is_finite(x[i])) x[i] = 0.f;
    }
}
template <int D, int GROUPS, bool NORMALIZE, bool FINITE>
__device__ __forceinline__ void normalize8(float (&x)[8], float factor, int lane_in_row) {
    float inverse[8];
    normalize8<D, GROUPS, NORMALIZE, FINITE>(x, inverse, factor, lane_in_row);
}

// Rows of a tile in shared memory, in place; rows that keep(row) does not want become zeros.
struct KeepAll {
    __device__ __forceinline__ bool operator()(int) const { return true; }
};
template <int ROWS, int D, int GROUPS, bool NORMALIZE, int PITCH, int THREADS, bool FINITE = false, class T,
          class Keep = KeepAll>
__device__ __forceinline__ void normalize_tile(T* tile, float factor, Keep keep = Keep(),
                                               int thread = int(threadIdx.x)) {
    constexpr int LANES = row_lanes(D), ROWS_PER_PASS = THREADS / LANES,
                  PASSES = (ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
    constexpr int BATCH = PASSES % 4 == 0 ? 4 : 1;  // rows of a lane that are under way together
    const int lane = thread % LANES;
    for (int pass = 0; pass < PASSES; pass += BATCH) {
        const int first = pass * ROWS_PER_PASS + thread / LANES;
        const auto inside = [&](int i) {
            return lane * 8 < D && (ROWS % ROWS_PER_PASS == 0 || first + i * ROWS_PER_PASS < ROWS);
        };
        float x[BATCH][8] = {};
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int row = first + i * ROWS_PER_PASS;
            if (inside(i) && keep(row)) load8(x[i], tile + row * PITCH + lane * 8);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) normalize8<D, GROUPS, NORMALIZE, FINITE>(x[i], factor, lane);
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (inside(i)) store8(tile + (first + i * ROWS_PER_PASS) * PITCH + lane * 8, x[i]);
    }
}

// All keys of a head: `rows` rows, in place.
template <int D, int GROUPS, bool NORMALIZE, int PITCH, int THREADS, class T>
__device__ __forceinline__ void normalize_head_tile(T* tile, int rows) {
    constexpr int LANES = row_lanes(D), ROWS_PER_PASS = THREADS / LANES, BATCH = 4;  // rows of a lane at once
    const int lane = int(threadIdx.x) % LANES;
#pragma unroll 1
    for (int pass = 0; pass < rows; pass += BATCH * ROWS_PER_PASS) {
        const int first = pass + int(threadIdx.x) / LANES;
        const auto inside = [&](int i) { return lane * 8 < D && first + i * ROWS_PER_PASS < rows; };
        float x[BATCH][8] = {};
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (inside(i)) load8(x[i], tile + (first + i * ROWS_PER_PASS) * PITCH + lane * 8);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) normalize8<D, GROUPS, NORMALIZE, false>(x[i], 1.f, lane);
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (inside(i)) store8(tile + (first + i * ROWS_PER_PASS) * PITCH + lane * 8, x[i]);
    }
}

// Rows of a (batch, heads, length, D) tensor into contiguous rows: x_hat (NORMALIZE) or x, zeros for what is not
// finite. `mask` (may be null): rows of keys that nobody may attend become zeros.
template <int D, int GROUPS, bool NORMALIZE, int THREADS, class T>
__device__ __forceinline__ void normalize_rows(T* to, const T* from, Stride stride, int64_t rows, int heads, int length,
                                               const unsigned char* mask, int64_t mask_b, int64_t mask_s,
                                               int64_t block) {
    constexpr int LANES = row_lanes(D);
    constexpr int ROWS_PER_BLOCK = THREADS / LANES;
    const int lane = int(threadIdx.x) % LANES;
    const int64_t row = block * ROWS_PER_BLOCK + int(threadIdx.x) / LANES;
    const bool inside = row < rows && lane * 8 < D;
    const int64_t b = row / (int64_t(heads) * length);
    const int h = int(row / length % heads);
    const int s = int(row % length);
    float x[8] = {};
    if (inside && (mask == nullptr || mask[b * mask_b + s * mask_s]))
        load8(x, from + b * stride.b + h * stride.h + s * stride.s + lane * 8);
    normalize8<D, GROUPS, NORMALIZE, true>(x, 1.f, lane);
    if (inside) store8(to + row * D + lane * 8, x);
}

// ROWS rows of one head, from row `first` on: store(row, column, x) gets eight columns of x_hat (NORMALIZE) or x at a
// time. Rows that keep(row) does not want become zeros.
template <int ROWS, int D, int GROUPS, bool NORMALIZE, int THREADS, class T, class Keep, class Store>
__device__ __forceinline__ void normalize_head(const T* from, int64_t stride, int first, int length, Keep keep,
                                               Store store) {
    constexpr int LANES = row_lanes(D), ROWS_PER_PASS = THREADS / LANES, PASSES = ROWS / ROWS_PER_PASS;
    static_assert(ROWS % ROWS_PER_PASS == 0, "rows of a block");
    const int lane = int(threadIdx.x) % LANES;
    first += int(threadIdx.x) / LANES;
    float x[PASSES][8] = {};
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = first + pass * ROWS_PER_PASS;
        if (row < length && lane * 8 < D && keep(row)) load8(x[pass], from + row * stride + lane * 8);
    }
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        const int row = first + pass * ROWS_PER_PASS;
        if constexpr (NORMALIZE) {
            float inverse[8];
            inverse_norms<D, GROUPS>(inverse, x[pass], lane);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[pass][i] *= inverse[i];
        }
        if (row < length && lane * 8 < D) store(row, lane * 8, x[pass]);
    }
}
