// A CUDA thread block on one CPU thread: what the rendered kernels and the replaced headers call. See machine.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

// A place in the kernel's source. Wrappers take it as a last defaulted argument, so it names their caller.
struct Site {
    const char* file;
    int line;
};
constexpr Site caller(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
#define EMULATOR_CALLER ::emulator::caller()

// ---- host ---------------------------------------------------------------------------------------------------------

struct Grid {
    unsigned x, y, z;
};
// Runs invoke(kernel) once per thread of every block. Returns 0, or fault_status with the reason in fault_message().
// Launches run one after another; `overlap` says that this one could have started before the end of the previous one.
constexpr int fault_status = 999;
int run(Grid grid, int threads, int shared_bytes, bool overlap, void (*invoke)(void*), void* kernel);
void forget_previous_launch();
const char* fault_message();

// ---- block and warp -----------------------------------------------------------------------------------------------

[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

unsigned char* shared_memory();
unsigned char* aligned_shared_memory(int bytes);
int block_threads();
// Waits until that many threads (whole warps) have come to barrier id; 0 is __syncthreads.
void block_barrier(const char* name, int id, int threads, Site site);
// How many threads of the block gave a non-zero value.
int block_count(int predicate, Site site);

// The 32 lanes meet; the last one to arrive calls compute with what each of them brought, then all go on.
using Compute = void (*)(void* const operands[32]);
void warp_collective(const char* name, Site site, void* operands, Compute compute);
void warp_barrier(Site site);
uint64_t shuffle(const char* name, uint64_t value, int source_lane, Site site);
unsigned ballot(int predicate, Site site);
int lane();

// ---- memory -------------------------------------------------------------------------------------------------------

void load_matrix_x4(uint32_t (&r)[4], const void* row, bool transposed, Site site);
void copy_async(void* shared, const void* global, int bytes, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int newest_allowed);
void wait_for_previous_kernel();
void require_aligned(const char* name, const void* address, size_t alignment, Site site);

// ---- tensor cores and conversions ---------------------------------------------------------------------------------

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, Site site);

float from_bf16(uint16_t x);
float from_f16(uint16_t x);
uint16_t to_bf16(float x);
uint16_t to_f16(float x);
float exp2_flushed(float x);

}  // namespace emulator
