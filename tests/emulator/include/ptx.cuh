// Stands in for the kernels' ptx.cuh: the same names and layouts, carried out by the emulated machine.
#pragma once
#include <cuda_runtime.h>

#include "machine_sm90.h"

#define SHARED_MEMORY(name) unsigned char* name = ::emulator::shared_memory()
#define SHARED_MEMORY_ALIGNED(name, bytes) unsigned char* name = ::emulator::aligned_shared_memory(bytes)

// ---- element types ------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return emulator::from_bf16(x.bits); }
inline float to_float(f16 x) { return emulator::from_f16(x.bits); }

template <class T> uint32_t pack2(float lo, float hi);
template <> inline uint32_t pack2<bf16>(float lo, float hi) {
    return emulator::to_bf16(lo) | uint32_t(emulator::to_bf16(hi)) << 16;
}
template <> inline uint32_t pack2<f16>(float lo, float hi) {
    return emulator::to_f16(lo) | uint32_t(emulator::to_f16(hi)) << 16;
}
template <class T> inline float2 unpack2(uint32_t x) {
    return make_float2(to_float(T{uint16_t(x)}), to_float(T{uint16_t(x >> 16)}));
}

inline float tf32_nearest(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u); }
inline int renew(int x) { return x; }
inline int thread_again() { return int(threadIdx.x); }

// ---- arithmetic ---------------------------------------------------------------------------------------------------

inline float exp2_fast(float x) { return emulator::exp2_flushed(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float reciprocal_sqrt(float x) { return 1.0f / sqrtf(x); }

inline void reduce_add(float* address, float x) { *address += x; }
inline void reduce_add4(float* address, float a, float b, float c, float d, emulator::Site site = EMULATOR_CALLER) {
    emulator::require_aligned("reduce_add4", address, 16, site);
    address[0] += a;
    address[1] += b;
    address[2] += c;
    address[3] += d;
}

// ---- asynchronous copies: global to shared ------------------------------------------------------------------------

inline uint32_t shared_address(const void* p, emulator::Site site = EMULATOR_CALLER) {
    return emulator::shared_address(p, site);
}

inline void copy_async16(void* shared, const void* global, bool valid, emulator::Site site = EMULATOR_CALLER) {
    emulator::copy_async(shared, global, 16, valid, site);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int N> inline void copy_async_wait() { emulator::copy_async_wait(N); }

// ---- barriers -----------------------------------------------------------------------------------------------------

inline void barrier_sync(int id, int threads, emulator::Site site = EMULATOR_CALLER) {
    emulator::block_barrier("barrier_sync", id, threads, site);
}

// ---- matrix fragments ---------------------------------------------------------------------------------------------

inline void load_matrix_x4(uint32_t (&r)[4], const void* row, emulator::Site site = EMULATOR_CALLER) {
    emulator::load_matrix_x4(r, row, false, site);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row, emulator::Site site = EMULATOR_CALLER) {
    emulator::load_matrix_x4(r, row, true, site);
}

template <class T> void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                     emulator::Site site = EMULATOR_CALLER);
template <>
inline void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Site site) {
    emulator::mma_bf16(c, a, b0, b1, site);
}
template <>
inline void mma_m16n8k16<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulator::Site site) {
    emulator::mma_f16(c, a, b0, b1, site);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], float b0, float b1,
                             emulator::Site site = EMULATOR_CALLER) {
    emulator::mma_tf32(c, a, b0, b1, site);
}

// ---- programmatic dependent launch --------------------------------------------------------------------------------
// Whether or not a kernel lets the next one start early: without a wait, that one may not see what this one writes.

inline void dependents_may_start() {}
inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }
