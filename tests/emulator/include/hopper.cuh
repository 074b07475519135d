// Stands in for the kernels' hopper.cuh: the same names and meanings, carried out by the emulated machine.
#pragma once
#include "ptx.cuh"
#include "tensor_map.cuh"

constexpr int WARPGROUP = 128;  // threads

inline int uniform(int x, emulator::Site site = EMULATOR_CALLER) {
    return emulator_shuffle("uniform", 0xffffffffu, x, 0, site);
}

inline float exp2_polynomial(float x) {
    const float i = floorf(x), f = x - i;
    return ldexpf(((f * 0.0771190897f + 0.227564394f) * f + 0.695146143f) * f + 1.f, int(i));
}

// ---- registers ----------------------------------------------------------------------------------------------------

template <int N> inline void take_registers(emulator::Site site = EMULATOR_CALLER) {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    emulator::set_registers("take_registers", N, true, site);
}
template <int N> inline void give_registers(emulator::Site site = EMULATOR_CALLER) {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    emulator::set_registers("give_registers", N, false, site);
}

// ---- barriers -----------------------------------------------------------------------------------------------------

inline void barrier_arrive(int id, int threads, emulator::Site site = EMULATOR_CALLER) {
    emulator::barrier_arrive("barrier_arrive", id, threads, site);
}
inline void mbarrier_init(uint32_t barrier, int arrivals, emulator::Site site = EMULATOR_CALLER) {
    emulator::mbarrier_init(barrier, arrivals, site);
}
inline void mbarrier_init_fence() { emulator::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint32_t barrier, emulator::Site site = EMULATOR_CALLER) {
    emulator::mbarrier_arrive("mbarrier_arrive", barrier, 0, site);
}
inline void mbarrier_expect(uint32_t barrier, int bytes, emulator::Site site = EMULATOR_CALLER) {
    emulator::mbarrier_arrive("mbarrier_expect", barrier, bytes, site);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, emulator::Site site = EMULATOR_CALLER) {
    emulator::mbarrier_wait(barrier, parity, site);
}
inline bool mbarrier_test(uint32_t barrier, uint32_t parity, emulator::Site site = EMULATOR_CALLER) {
    return emulator::mbarrier_test(barrier, parity, site);
}

// ---- pairs of elements --------------------------------------------------------------------------------------------

template <class T> struct PairFactor;
template <> struct PairFactor<bf16> {
    float high, low;

    explicit PairFactor(float factor)
        : high(emulator::from_bf16(emulator::to_bf16(factor))),
          low(emulator::from_bf16(emulator::to_bf16(factor - high))) {}
    uint32_t times(uint32_t x) const {
        const float2 y = unpack2<bf16>(x), rest = unpack2<bf16>(pack2<bf16>(y.x * low, y.y * low));
        return pack2<bf16>(fmaf(y.x, high, rest.x), fmaf(y.y, high, rest.y));
    }
};
template <> struct PairFactor<f16> {
    float factor;

    explicit PairFactor(float factor) : factor(factor) {}
    uint32_t times(uint32_t x) const {
        const float2 y = unpack2<f16>(x);
        return pack2<f16>(y.x * factor, y.y * factor);
    }
};

// ---- the copy engine ----------------------------------------------------------------------------------------------

inline void prefetch_map(const TensorMap& map, emulator::Site site = EMULATOR_CALLER) {
    emulator::require_map("prefetch_map", map, site);
}
inline void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row, int head, int batch,
                     emulator::Site site = EMULATOR_CALLER) {
    emulator::load_box(to, map, barrier, column, row, head, batch, site);
}
inline void load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier,
                       emulator::Site site = EMULATOR_CALLER) {
    emulator::load_bytes(to, from, bytes, barrier, site);
}
inline void store_box(const TensorMap& map, uint32_t from, int column, int row, int head, int batch,
                      emulator::Site site = EMULATOR_CALLER) {
    emulator::store_box(map, from, column, row, head, batch, site);
}
inline void store_floats(float* to, uint32_t from, int floats, emulator::Site site = EMULATOR_CALLER) {
    emulator::store_floats(to, from, floats, false, site);
}
inline void reduce_floats(float* to, uint32_t from, int floats, emulator::Site site = EMULATOR_CALLER) {
    emulator::store_floats(to, from, floats, true, site);
}
inline void store_box_commit() { emulator::store_box_commit(); }
template <int N> inline void store_box_wait() { emulator::store_box_wait(N); }
inline void store_box_finish() { emulator::store_box_finish(); }
inline void fence_async() { emulator::fence_async(); }
inline void fence_async_global() { emulator::fence_async_global(); }

// ---- turns ---------------------------------------------------------------------------------------------------------

// Blocks run one after another: those before have passed their turns, or never will. Every other look comes too early.
inline unsigned look_at_turn(const unsigned* turn) {
    static unsigned looks = 0;
    return looks++ % 2 ? *turn : ~0u;
}
inline void wait_for_turn(const unsigned* turn, unsigned mine, emulator::Site site = EMULATOR_CALLER) {
    if (*turn != mine)
        emulator::fault("deadlock: wait_for_turn at %s:%d for turn %u, it is turn %u", site.file, site.line, mine,
                        *turn);
}
inline void fence_turns() {}
inline void pass_turn(unsigned* turn, unsigned mine) { *turn = mine + 1; }
inline void count_turn(unsigned* turn) { ++*turn; }
template <int NANOSECONDS> inline void rest() {}

// ---- floats that blocks tell each other ---------------------------------------------------------------------------

// Every other look comes too early.
inline float look_at_float(const float* at) {
    static unsigned looks = 0;
    return looks++ % 2 ? *at : 0.f;
}
inline void tell_float(float* at, float x) { *at = x; }

// ---- products of a warpgroup: wgmma.cuh has the shapes ------------------------------------------------------------

using Descriptor = uint64_t;
template <int PITCH> inline Descriptor describe(uint32_t address, uint32_t leading = 16) {
    static_assert(PITCH == 128 || PITCH == 64 || PITCH == 32);
    constexpr uint32_t SWIZZLE = PITCH == 128 ? 1 : PITCH == 64 ? 2 : 3;
    constexpr uint32_t HIGH = (8 * PITCH >> 4) | SWIZZLE << 30;
    return uint64_t(HIGH) << 32 | ((address >> 4) | (leading >> 4) << 16);
}

inline void product_fence() { emulator::product_fence(); }
inline void product_commit() { emulator::product_commit(); }
template <int N> inline void product_wait(emulator::Site site = EMULATOR_CALLER) { emulator::product_wait(N, site); }
template <int N> inline void hold(float (&)[N]) {}
template <int N> inline void hold(uint32_t (&)[N]) {}
template <int N> inline void forget(float (&x)[N]) {
    for (float& value : x) value = NAN;
}

// ---- matrix fragments ---------------------------------------------------------------------------------------------

inline uint32_t transpose_matrix(uint32_t x, emulator::Site site = EMULATOR_CALLER) {
    const int lane = int(threadIdx.x) % 32;
    uint32_t pair = 0;
    for (int e = 0; e < 2; ++e) {
        const int from = (lane % 4 * 2 + e) * 4 + lane / 8;
        const uint32_t word = emulator_shuffle("transpose_matrix", 0xffffffffu, x, from, site);
        pair |= (lane / 4 % 2 ? word >> 16 : word & 0xffffu) << 16 * e;
    }
    return pair;
}
inline void store_matrix_x4(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                            emulator::Site site = EMULATOR_CALLER) {
    emulator::store_matrix_x4(row, {a, b, c, d}, site);
}
