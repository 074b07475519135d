// Tiles in shared memory, matrix fragments in registers, and the products of the two.
//
// A tile is rows of PITCH elements; pad() and PITCH keep the fragment loads free of bank conflicts without a swizzle.
// Products come in one form: fragments of 16 rows x STEP<T> (A) and STEP<T> x 16 columns (B). 16-bit types use one
// tensor-core product per 8 columns; float32 splits each operand into two TF32 parts, x = hi + lo, and adds
//     a b = hi_a hi_b + (hi_a lo_b + lo_a hi_b)                                            (3xTF32)
// with the small products summed apart, because tensor cores truncate every partial sum to the largest term.
#pragma once
#include "ptx.cuh"

constexpr int pad16(int columns) { return (columns + 15) / 16 * 16; }

// Depth of one product.
template <class T> constexpr int STEP = 16;
template <> constexpr int STEP<float> = 8;

// Row pitch of a tile, in elements, whose rows run along the summed dimension (logits) ...
constexpr int pitch_along(int columns) { return pad16(columns) + 8; }
// ... and across it (values).
template <class T> constexpr int pitch_across(int columns) { return pad16(columns) + (sizeof(T) == 4 ? 4 : 8); }

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / 32; }
// The same, and the compiler knows that all lanes agree: branches on it need no reconvergence. Called by whole warps.
__device__ __forceinline__ int uniform_warp_id() { return __shfl_sync(0xffffffffu, warp_id(), 0); }

// ---- copies -------------------------------------------------------------------------------------------------------

// Start copying ROWS rows of COLUMNS elements into a tile. Rows from rows_valid on, and the columns up to the next
// multiple of 16, become zeros.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T>
__device__ __forceinline__ void copy_rows_async(T* tile, const T* global, int64_t row_stride, int rows_valid,
                                                int thread = int(threadIdx.x)) {
    constexpr int VECTOR = 16 / int(sizeof(T));
    constexpr int PER_ROW = pad16(COLUMNS) / VECTOR;
    if constexpr (THREADS < PER_ROW) {  // a row is wider than the block
        for (int i = thread; i < ROWS * PER_ROW; i += THREADS) {
            const int row = i / PER_ROW, column = i % PER_ROW * VECTOR;
            copy_async16(tile + row * PITCH + column, global + row * row_stride + column,
                         row < rows_valid && column < COLUMNS);
        }
        return;
    }
    constexpr int ROWS_PER_PASS = THREADS < PER_ROW ? 1 : THREADS / PER_ROW;
    constexpr int PASSES = (ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
    const int column = thread % PER_ROW * VECTOR;
    int row = thread / PER_ROW;
    if (THREADS % PER_ROW != 0 && row == ROWS_PER_PASS) return;  // threads left over
    const T* source = global + row * row_stride + column;
    T* target = tile + row * PITCH + column;
#pragma unroll
    for (int pass = 0; pass < PASSES; ++pass) {
        if (ROWS % ROWS_PER_PASS == 0 || row < ROWS) copy_async16(target, source, row < rows_valid && column < COLUMNS);
        row += ROWS_PER_PASS;
        source += ROWS_PER_PASS * row_stride;
        target += ROWS_PER_PASS * PITCH;
    }
}

// The same for `rows` rows, known at run time, by all threads.
template <int COLUMNS, int PITCH, int THREADS, class T>
__device__ __forceinline__ void copy_head_async(T* tile, const T* global, int64_t row_stride, int rows_valid,
                                                int rows) {
    constexpr int VECTOR = 16 / int(sizeof(T)), PER_ROW = pad16(COLUMNS) / VECTOR, STEP_ROWS = THREADS / PER_ROW;
    static_assert(THREADS >= PER_ROW, "a row for all");
    int row = int(threadIdx.x) / PER_ROW;
    if (row == STEP_ROWS) return;  // threads left over
    const int column = int(threadIdx.x) % PER_ROW * VECTOR;
    const T* source = global + row * row_stride + column;
    T* target = tile + row * PITCH + column;
#pragma unroll 4
    for (; row < rows; row += STEP_ROWS, source += STEP_ROWS * row_stride, target += STEP_ROWS * PITCH)
        copy_async16(target, source, row < rows_valid && column < COLUMNS);
}

// Rows of a tile that keep(row) does not want become zeros.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T, class Keep>
__device__ __forceinline__ void clear_rows(T* tile, Keep keep) {
    constexpr int VECTOR = 16 / int(sizeof(T)), PER_ROW = COLUMNS / VECTOR;
    for (int i = int(threadIdx.x); i < ROWS * PER_ROW; i += THREADS) {
        const int row = i / PER_ROW, column = i % PER_ROW * VECTOR;
        if (!keep(row)) *reinterpret_cast<uint4*>(tile + row * PITCH + column) = make_uint4(0, 0, 0, 0);
    }
}

// Rows of a tile to global memory.
template <int ROWS, int COLUMNS, int PITCH, int THREADS, class T>
__device__ __forceinline__ void store_rows(T* global, int64_t row_stride, const T* tile, int rows_valid,
                                           int thread = int(threadIdx.x)) {
    constexpr int VECTOR = 16 / int(sizeof(T)), PER_ROW = COLUMNS / VECTOR;
    if constexpr (THREADS == 32 && 32 % PER_ROW == 0) {  // a warp with rows of its own: addresses in steps
        constexpr int STEP_ROWS = 32 / PER_ROW;
        const int column = thread % PER_ROW * VECTOR;
        T* to = global + thread / PER_ROW * row_stride + column;
        const T* from = tile + thread / PER_ROW * PITCH + column;
#pragma unroll
        for (int row = thread / PER_ROW, step = 0; step < (ROWS + STEP_ROWS - 1) / STEP_ROWS; ++step) {
            if (row < rows_valid && (ROWS % STEP_ROWS == 0 || row < ROWS))
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
            row += STEP_ROWS, to += STEP_ROWS * row_stride, from += STEP_ROWS * PITCH;
        }
    } else {
#pragma unroll 4
        for (int i = thread; i < ROWS * PER_ROW; i += THREADS) {
            const int row = i / PER_ROW, column = i % PER_ROW * VECTOR;
            if (row < rows_valid)
                *reinterpret_cast<uint4*>(global + row * row_stride + column) =
                    *reinterpret_cast<const uint4*>(tile + row * PITCH + column);
        }
    }
}

// ---- fragments ----------------------------------------------------------------------------------------------------

// 16 x STEP.
template <class T> struct FragmentA {
    uint32_t r[4];
};
template <> struct FragmentA<float> {
    float hi[4], lo[4];
    __device__ __forceinline__ void set(int i, float x) {
        hi[i] = tf32_nearest(x);
        lo[i] = x - hi[i];
    }
};

// STEP x 16: columns 0..7 in the first half of the registers, 8..15 in the second.
template <class T> struct FragmentB {
    uint32_t r[4];
};
template <> struct FragmentB<float> {
    float hi[4], lo[4];
    __device__ __forceinline__ void set(int i, float x) {
        hi[i] = tf32_nearest(x);
        lo[i] = x - hi[i];
    }
};

// 16 x 8 sums. Lane l holds (l / 4, 2 (l % 4) + {0, 1}) and the same 8 rows below.
template <class T> struct Accumulator {
    float c[4];
    __device__ __forceinline__ void fill(int i, float x) { c[i] = x; }
    __device__ __forceinline__ float value(int i) const { return c[i]; }
};
template <> struct Accumulator<float> {
    float c[4], small[4], aside[4];
    __device__ __forceinline__ void fill(int i, float x) {
        c[i] = 0.f;
        small[i] = 0.f;
        aside[i] = x;
    }
    __device__ __forceinline__ void put_aside() {
#pragma unroll
        for (int i = 0; i < 4; ++i) aside[i] += c[i], c[i] = 0.f;
    }
    __device__ __forceinline__ float value(int i) const { return aside[i] + (c[i] + small[i]); }
};
template <class T> __device__ __forceinline__ void clear(Accumulator<T>& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.fill(i, 0.f);
}

// A[m][k] = tile[m][k].
template <int PITCH, class T> __device__ __forceinline__ void load_a(FragmentA<T>& a, const T* tile) {
    const int l = lane_id();
    if constexpr (sizeof(T) == 2) {
        load_matrix_x4(a.r, tile + l % 16 * PITCH + l / 16 * 8);
    } else {
        // The summed index may be taken in any order: 2t and 2t+1 stand for t and t+4.
        const float2 top = *reinterpret_cast<const float2*>(tile + l / 4 * PITCH + l % 4 * 2);
        const float2 bottom = *reinterpret_cast<const float2*>(tile + (l / 4 + 8) * PITCH + l % 4 * 2);
        a.set(0, top.x), a.set(1, bottom.x), a.set(2, top.y), a.set(3, bottom.y);
    }
}

// A[m][k] = tile[k][m].
template <int PITCH, class T> __device__ __forceinline__ void load_a_transposed(FragmentA<T>& a, const T* tile) {
    const int l = lane_id();
    if constexpr (sizeof(T) == 2) {
        load_matrix_x4_transposed(a.r, tile + (l % 8 + l / 16 * 8) * PITCH + l / 8 % 2 * 8);
    } else {
        const T* first = tile + l % 4 * 2 * PITCH + l / 4;
        a.set(0, first[0]), a.set(1, first[8]), a.set(2, first[PITCH]), a.set(3, first[PITCH + 8]);
    }
}

// B[k][n] = tile[n][k].
template <int PITCH, class T> __device__ __forceinline__ void load_b_transposed(FragmentB<T>& b, const T* tile) {
    const int l = lane_id();
    if constexpr (sizeof(T) == 2) {
        load_matrix_x4(b.r, tile + (l % 8 + l / 16 * 8) * PITCH + l / 8 % 2 * 8);
    } else {
        const float2 left = *reinterpret_cast<const float2*>(tile + l / 4 * PITCH + l % 4 * 2);
        const float2 right = *reinterpret_cast<const float2*>(tile + (l / 4 + 8) * PITCH + l % 4 * 2);
        b.set(0, left.x), b.set(1, left.y), b.set(2, right.x), b.set(3, right.y);
    }
}

// B[k][n] = tile[k][n].
template <int PITCH, class T> __device__ __forceinline__ void load_b(FragmentB<T>& b, const T* tile) {
    const int l = lane_id();
    if constexpr (sizeof(T) == 2) {
        load_matrix_x4_transposed(b.r, tile + l % 16 * PITCH + l / 16 * 8);
    } else {
        const T* first = tile + l % 4 * 2 * PITCH + l / 4;
        b.set(0, first[0]), b.set(1, first[PITCH]), b.set(2, first[8]), b.set(3, first[PITCH + 8]);
    }
}

// (left, right) += a b.
template <class T> __device__ __forceinline__ void multiply_add(Accumulator<T>& left, Accumulator<T>& right,
                                                                const FragmentA<T>& a, const FragmentB<T>& b) {
    if constexpr (sizeof(T) == 2) {
        mma_m16n8k16<T>(left.c, a.r, b.r[0], b.r[1]);
        mma_m16n8k16<T>(right.c, a.r, b.r[2], b.r[3]);
    } else {
        mma_m16n8k8_tf32(left.small, a.lo, b.hi[0], b.hi[1]);
        mma_m16n8k8_tf32(right.small, a.lo, b.hi[2], b.hi[3]);
        mma_m16n8k8_tf32(left.small, a.hi, b.lo[0], b.lo[1]);
        mma_m16n8k8_tf32(right.small, a.hi, b.lo[2], b.lo[3]);
        mma_m16n8k8_tf32(left.c, a.hi, b.hi[0], b.hi[1]);
        mma_m16n8k8_tf32(right.c, a.hi, b.hi[2], b.hi[3]);
    }
}

// The columns of two neighbouring 16 x 8 blocks become the summed index of the next product: x(block, i) is element i
// of this lane, and no element changes lanes. Gives 16 / STEP fragments.
template <class T, class F> __device__ __forceinline__ void fragments_of(FragmentA<T> (&a)[16 / STEP<T>], F x) {
    if constexpr (sizeof(T) == 2) {
        a[0].r[0] = pack2<T>(x(0, 0), x(0, 1));
        a[0].r[1] = pack2<T>(x(0, 2), x(0, 3));
        a[0].r[2] = pack2<T>(x(1, 0), x(1, 1));
        a[0].r[3] = pack2<T>(x(1, 2), x(1, 3));
    } else {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
            a[block].set(0, x(block, 0)), a[block].set(1, x(block, 2));
            a[block].set(2, x(block, 1)), a[block].set(3, x(block, 3));
        }
    }
}

// ---- products -----------------------------------------------------------------------------------------------------

// c += A tile^T, the summed index running along the columns of the tile: c is M x N blocks of 16 x 8, the tile's first
// 8 N rows are used. load(a, m, step) provides A.
// float32 sums start afresh every few steps and are added with full rounding: over a long sum tensor cores would
// truncate.
constexpr int FRESH_STEPS = 4;
template <int STEPS, int PITCH, int M, int N, class T, class LoadA>
__device__ __forceinline__ void multiply_rows(Accumulator<T> (&c)[M][N], LoadA load, const T* tile) {
    constexpr int UNROLL =
        sizeof(T) == 4 && STEPS > 8 ? FRESH_STEPS : STEPS;  // long float32 sums would fill the registers with loads
#pragma unroll UNROLL
    for (int step = 0; step < STEPS; ++step) {
        FragmentA<T> a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) load(a[m], m, step);
        if constexpr (sizeof(T) == 4)
            if (step > 0 && step % FRESH_STEPS == 0) {
#pragma unroll
                for (int i = 0; i < M * N; ++i) c[i / N][i % N].put_aside();
            }
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            FragmentB<T> b;
            load_b_transposed<PITCH>(b, tile + n * 16 * PITCH + step * STEP<T>);
#pragma unroll
            for (int m = 0; m < M; ++m) multiply_add(c[m][2 * n], c[m][2 * n + 1], a[m], b);
        }
    }
}

// c += A tile, the summed index running down 16 K rows of the tile: c is M x N blocks of 16 x 8; blocks from `columns`
// (elements) on are left out. prepare(b, k, step) may change B first.
// float32 sums start afresh here, too.
template <int PITCH, int M, int K, int N, class T, class Prepare>
__device__ __forceinline__ void multiply_columns(float (&c)[M][N][4], const FragmentA<T> (&a)[M][K][16 / STEP<T>],
                                                 const T* tile, int columns, Prepare prepare) {
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
        if (n * 16 >= columns) break;
        Accumulator<T> sum[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) sum[m][half].fill(i, sizeof(T) == 4 ? 0.f : c[m][2 * n + half][i]);
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
            for (int step = 0; step < 16 / STEP<T>; ++step) {
                FragmentB<T> b;
                load_b<PITCH>(b, tile + (k * 16 + step * STEP<T>)*PITCH + n * 16);
                prepare(b, k, step);
#pragma unroll
                for (int m = 0; m < M; ++m) multiply_add(sum[m][0], sum[m][1], a[m][k][step], b);
            }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    c[m][2 * n + half][i] =
                        sizeof(T) == 4 ? c[m][2 * n + half][i] + sum[m][half].value(i) : sum[m][half].value(i);
    }
}
struct Unchanged {
    template <class B> __device__ __forceinline__ void operator()(B&, int, int) const {}
};

// ---- 8 consecutive elements ---------------------------------------------------------------------------------------

__device__ __forceinline__ void load8(float (&x)[8], const float* from) {
    const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
template <class T> __device__ __forceinline__ void load8(float (&x)[8], const T* from) {
    const uint4 a = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(words[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
}
__device__ __forceinline__ void store8(float* to, const float (&x)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
template <class T> __device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}
// As they are in memory, to hold on to.
template <class T> struct Packed8 {
    uint4 words[sizeof(T) / 2];
};
template <class T> __device__ __forceinline__ void load_packed8(Packed8<T>& x, const T* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; ++i) x.words[i] = reinterpret_cast<const uint4*>(from)[i];
}
template <class T> __device__ __forceinline__ void unpack8(float (&x)[8], const Packed8<T>& from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; ++i) {
        const uint32_t words[4] = {from.words[i].x, from.words[i].y, from.words[i].z, from.words[i].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            if constexpr (sizeof(T) == 4) {
                x[4 * i + w] = __uint_as_float(words[w]);
            } else {
                const float2 pair = unpack2<T>(words[w]);
                x[2 * w] = pair.x, x[2 * w + 1] = pair.y;
            }
        }
    }
}
// Two neighbours.
__device__ __forceinline__ float2 load2(const float* from) { return *reinterpret_cast<const float2*>(from); }
template <class T> __device__ __forceinline__ float2 load2(const T* from) {
    return unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
}
__device__ __forceinline__ void store2(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
template <class T> __device__ __forceinline__ void store2(T* to, float x, float y) {
    *reinterpret_cast<uint32_t*>(to) = pack2<T>(x, y);
}

// Rows of B (the summed index) that nobody may see become zeros, so that 0 * NaN never happens. `visible`: bits 0, 1
// are this lane's rows 2t, 2t + 1, and for 16-bit types bits 2, 3 the rows 8 below.
template <class T> __device__ __forceinline__ void hide_rows(FragmentB<T>& b, uint32_t visible) {
    if constexpr (sizeof(T) == 2) {
        const uint32_t upper = (visible & 1 ? 0xffffu : 0u) | (visible & 2 ? 0xffff0000u : 0u);
        const uint32_t lower = (visible & 4 ? 0xffffu : 0u) | (visible & 8 ? 0xffff0000u : 0u);
        b.r[0] &= upper, b.r[2] &= upper, b.r[1] &= lower, b.r[3] &= lower;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (!(visible >> (i % 2) & 1)) b.hi[i] = b.lo[i] = 0.f;
    }
}
