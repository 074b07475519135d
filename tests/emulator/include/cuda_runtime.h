// The part of CUDA C++ and of the CUDA runtime that the kernels use, for a host compiler. Included before every kernel.
#pragma once
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

// ---- built-in types and variables ---------------------------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

#define EMULATOR_VECTOR(type, element)                                                              \
    struct alignas(2 * sizeof(element)) type##2 { element x, y; };                                  \
    struct type##3 { element x, y, z; };                                                            \
    struct alignas(sizeof(element) < 4 ? 4 * sizeof(element) : 16) type##4 { element x, y, z, w; }; \
    inline type##2 make_##type##2(element x, element y) { return {x, y}; }                          \
    inline type##4 make_##type##4(element x, element y, element z, element w) { return {x, y, z, w}; }
EMULATOR_VECTOR(float, float)
EMULATOR_VECTOR(int, int)
EMULATOR_VECTOR(short, short)
EMULATOR_VECTOR(ushort, unsigned short)
EMULATOR_VECTOR(char, signed char)
EMULATOR_VECTOR(uchar, unsigned char)
#undef EMULATOR_VECTOR
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- built-in functions -------------------------------------------------------------------------------------------

template <class To, class From> inline To emulator_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline uint32_t __float_as_uint(float x) { return emulator_bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulator_bits<float>(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
template <class T> inline T __ldg(const T* p) { return *p; }
using std::max;
using std::min;
[[noreturn]] inline void __trap() { emulator::fault("__trap()"); }

inline void __syncthreads(emulator::Site site = EMULATOR_CALLER) {
    emulator::block_barrier("__syncthreads", 0, emulator::block_threads(), site);
}
inline int __syncthreads_count(int p, emulator::Site site = EMULATOR_CALLER) { return emulator::block_count(p, site); }
inline int __syncthreads_or(int p, emulator::Site site = EMULATOR_CALLER) {
    return emulator::block_count(p, site) != 0;
}
inline int __syncthreads_and(int p, emulator::Site site = EMULATOR_CALLER) {
    return emulator::block_count(!p, site) == 0;
}

inline void emulator_full_mask(unsigned mask) {
    if (mask != 0xffffffffu) emulator::fault("a warp mask other than 0xffffffff (0x%x) is not emulated", mask);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = EMULATOR_CALLER) {
    emulator_full_mask(mask);
    emulator::warp_barrier(site);
}
template <class T>
inline T emulator_shuffle(const char* name, unsigned mask, T value, int source, emulator::Site site) {
    static_assert(sizeof(T) <= 8);
    emulator_full_mask(mask);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulator::shuffle(name, bits, source, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = EMULATOR_CALLER) {
    int first = emulator::lane() & ~(width - 1);
    return emulator_shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = EMULATOR_CALLER) {
    int self = emulator::lane(), other = self ^ bits;
    return emulator_shuffle("__shfl_xor_sync", mask, value, other > (self | (width - 1)) ? self : other, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emulator::Site site = EMULATOR_CALLER) {
    int self = emulator::lane(), inside = self & (width - 1);
    return emulator_shuffle("__shfl_up_sync", mask, value, inside < int(delta) ? self : self - int(delta), site);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                             emulator::Site site = EMULATOR_CALLER) {
    int self = emulator::lane(), inside = self & (width - 1);
    return emulator_shuffle("__shfl_down_sync", mask, value, inside + int(delta) >= width ? self : self + int(delta),
                            site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = EMULATOR_CALLER) {
    emulator_full_mask(mask);
    return emulator::ballot(predicate, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = EMULATOR_CALLER) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = EMULATOR_CALLER) {
    return __ballot_sync(mask, predicate, site) == 0xffffffffu;
}

// Threads run one at a time, so a plain update is atomic.
template <class T> inline T atomicAdd(T* p, T x) {
    T old = *p;
    *p = old + x;
    return old;
}
template <class T> inline T atomicMax(T* p, T x) {
    T old = *p;
    *p = old < x ? x : old;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- runtime ------------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchFailure = emulator::fault_status
};
inline const char* cudaGetErrorString(cudaError_t status) {
    switch (status) {
        case cudaSuccess:
            return "no error";
        case cudaErrorLaunchFailure:
            return emulator::fault_message();
        default:
            return "invalid argument";
    }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
    emulator::forget_previous_launch();
    memset(p, value, bytes);
    return cudaSuccess;
}
