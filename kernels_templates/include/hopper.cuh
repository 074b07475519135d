// What compute capability 9.0 adds, behind names: asynchronous products of a warpgroup, the copy engine, barriers in
// shared memory. Addresses of shared memory are 32-bit (shared_address). The emulator replaces this header too.
#pragma once
#include "ptx.cuh"
#include "tensor_map.cuh"

constexpr int WARPGROUP = 128;  // threads

// The same value in all lanes, known to the compiler to be so.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// 2^x for |x| < 120, to a relative error of 8.8e-5, without the unit that exp2_fast() uses: x = i + f with i =
// floor(x), a polynomial of degree 3 for 2^f, and i added to its exponent.
__device__ __forceinline__ float exp2_polynomial(float x) {
    constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it leaves floor(x) in the low bits
    float shifted;
    asm("add.rm.ftz.f32 %0, %1, %2;" : "=f"(shifted) : "f"(x), "f"(MAGIC));
    const float f = x - (shifted - MAGIC);
    const float power = fmaf(fmaf(fmaf(f, 0.0771190897f, 0.227564394f), f, 0.695146143f), f, 1.f);
    return __uint_as_float((__float_as_uint(shifted) << 23) + __float_as_uint(power));
}

// ---- registers ----------------------------------------------------------------------------------------------------

// Called by all warps of a warpgroup: how many registers each of its threads has from now on.
template <int N> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- barriers -----------------------------------------------------------------------------------------------------

// Come to a named barrier (ptx.cuh: barrier_sync) without waiting.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Barriers in shared memory, 8 bytes each. A phase ends when all arrivals have come and all announced bytes are there;
// phases count from 0, and waiting for parity p ends as soon as the latest completed phase has parity p. So on a fresh
// barrier a wait for parity 1 passes at once.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, by the thread that made them, before the block's next __syncthreads().
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive, and announce that so many bytes will be copied in this phase.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
// Whether a wait would pass now. A true answer counts as a wait.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// ---- pairs of elements --------------------------------------------------------------------------------------------

// What pairs are multiplied by: they are rounded once, but for 2^-9 of a unit in the last place.
template <class T> struct PairFactor;
template <> struct PairFactor<bf16> {
    uint32_t high, low;  // their sum is the factor

    __device__ __forceinline__ explicit PairFactor(float factor) : high(pack2<bf16>(factor, factor)) {
        const float rest = factor - unpack2<bf16>(high).x;
        low = pack2<bf16>(rest, rest);
    }
    __device__ __forceinline__ uint32_t times(uint32_t x) const {
        uint32_t y;
        asm("{\n"
            ".reg .b32 rest;\n"
            "mul.rn.bf16x2 rest, %1, %3;\n"
            "fma.rn.bf16x2 %0, %1, %2, rest;\n"
            "}"
            : "=r"(y)
            : "r"(x), "r"(high), "r"(low));
        return y;
    }
};
template <> struct PairFactor<f16> {
    float factor;  // may be out of the range of f16

    __device__ __forceinline__ explicit PairFactor(float factor) : factor(factor) {}
    __device__ __forceinline__ uint32_t times(uint32_t x) const {
        const float2 y = unpack2<f16>(x);
        return pack2<f16>(y.x * factor, y.y * factor);
    }
};

// ---- the copy engine ----------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// One box, global to shared; its bytes count towards the barrier's phase.
__device__ __forceinline__ void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row,
                                         int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
        : "memory");
}
// Bytes side by side, a multiple of 16 at multiples of 16, global to shared; they count towards the barrier's phase.
__device__ __forceinline__ void load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// One box, shared to global.
__device__ __forceinline__ void store_box(const TensorMap& map, uint32_t from, int column, int row, int head,
                                          int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(from), "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}
// Floats side by side, shared to global; their bytes are a multiple of 16.
__device__ __forceinline__ void store_floats(float* to, uint32_t from, int floats) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(floats * 4)
                 : "memory");
}
// The same, but global += shared, in no defined order.
__device__ __forceinline__ void reduce_floats(float* to, uint32_t from, int floats) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(floats * 4)
                 : "memory");
}
__device__ __forceinline__ void store_box_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Wait until the shared memory of this thread's stores, all but the N newest groups, may be used again.
template <int N> __device__ __forceinline__ void store_box_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Wait until what this thread's stores have written is there for everyone.
__device__ __forceinline__ void store_box_finish() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// What this thread has written to shared memory is visible to the copy engine and to products issued after the next
// barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// What earlier kernels have written to global memory is visible to the copy engine.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- turns: blocks that add to the same floats one after another, or clear them for others -------------------------

// Whose turn it is. If it is one's own, then what those before have added is there after fence_turns().
__device__ __forceinline__ unsigned look_at_turn(const unsigned* turn) {
    unsigned now;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    return now;
}
// Wait until turn `mine`: then what those before have added is there. They must have started before this block, which
// otherwise might wait for a block that waits for its multiprocessor.
__device__ __forceinline__ void wait_for_turn(const unsigned* turn, unsigned mine) {
    unsigned now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != mine);
}
// Between adding and pass_turn(): what this thread has added, or has seen others of its warp add, is there.
__device__ __forceinline__ void fence_turns() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void pass_turn(unsigned* turn, unsigned mine) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(mine + 1) : "memory");
}

// In any order: one more of those before is done, and what this thread has written, or has seen others of its warp
// write, is there for whoever waits.
__device__ __forceinline__ void count_turn(unsigned* turn) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(turn) : "memory");
}

// Let others of the multiprocessor work, for about so many nanoseconds.
template <int NANOSECONDS> __device__ __forceinline__ void rest() {
    asm volatile("nanosleep.u32 %0;" ::"n"(NANOSECONDS));
}

// ---- floats that blocks tell each other ---------------------------------------------------------------------------

// Whoever is late sees what was there before.
__device__ __forceinline__ float look_at_float(const float* at) {
    float x;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
    return x;
}
__device__ __forceinline__ void tell_float(float* at, float x) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(at), "f"(x) : "memory");
}

// ---- products of a warpgroup: wgmma.cuh has the shapes ------------------------------------------------------------

// A matrix in shared memory, as products read it: slabs of rows of PITCH = 32, 64 or 128 bytes, swizzled as
// tensor_map.cuh says. `leading` is the distance in bytes between slabs where a product spans several: the columns
// of an operand whose rows are the summed dimension (MN_MAJOR); otherwise it means nothing.
// Adding 2 to the low word moves 32 bytes along the rows; PITCH / 2 moves eight rows down.
using Descriptor = uint64_t;
template <int PITCH> __device__ __forceinline__ Descriptor describe(uint32_t address, uint32_t leading = 16) {
    constexpr uint32_t SWIZZLE = PITCH == 128 ? 1 : PITCH == 64 ? 2 : 3;
    constexpr uint32_t HIGH = (8 * PITCH >> 4) | SWIZZLE << 30;
    return uint64_t(HIGH) << 32 | ((address >> 4) | (leading >> 4) << 16);
}

// Before the first product, and after registers of one were written.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Wait until at most N of the newest groups are under way.
template <int N> __device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Nothing that uses these registers moves across.
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(uint32_t (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
// Registers whose values nobody reads any more: sums that begin anew.
template <int N> __device__ __forceinline__ void forget(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "=f"(x[i])::"memory");
}

// ---- matrix fragments ---------------------------------------------------------------------------------------------

// An 8x8 matrix of 16-bit elements in a warp's registers, transposed: see load_matrix_x4.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// The counterpart of load_matrix_x4: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrix_x4(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
