// What compute capability 9.0 adds to the emulated block. See machine_sm90.cpp.
#pragma once
#include "machine.h"

namespace emulator {

// ---- addresses in the shared window -------------------------------------------------------------------------------

uint32_t shared_address(const void* p, Site site);

// ---- barriers -----------------------------------------------------------------------------------------------------

void barrier_arrive(const char* name, int id, int threads, Site site);
void mbarrier_init(uint32_t barrier, int arrivals, Site site);
void mbarrier_init_fence();
void mbarrier_arrive(const char* name, uint32_t barrier, int bytes, Site site);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Site site);
bool mbarrier_test(uint32_t barrier, uint32_t parity, Site site);
void set_registers(const char* name, int count, bool more, Site site);

// ---- the copy engine ----------------------------------------------------------------------------------------------

// A (batches, heads, rows, columns) tensor of 16-bit elements, innermost first here.
struct alignas(64) TensorMap {
    const unsigned char* address;
    int64_t sizes[4];
    int64_t strides[4];  // bytes
    int box_rows, pitch;
    uint64_t valid;
};
static_assert(sizeof(TensorMap) == 128);
// False where the driver would refuse.
bool encode(TensorMap& map, const void* address, const int64_t (&sizes)[4], const int64_t (&strides)[3], int box_rows,
            int box_columns);

void require_map(const char* name, const TensorMap& map, Site site);
void load_box(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row, int head, int batch, Site site);
void load_bytes(uint32_t to, const void* from, int bytes, uint32_t barrier, Site site);
void store_box(const TensorMap& map, uint32_t from, int column, int row, int head, int batch, Site site);
void store_floats(float* to, uint32_t from, int floats, bool add, Site site);
void store_box_commit();
void store_box_wait(int newest_allowed);
void store_box_finish();
void fence_async();
void fence_async_global();

// ---- products of a warpgroup --------------------------------------------------------------------------------------

struct ProductOperands {
    int columns;
    bool a_in_registers, a_mn_major, b_mn_major, accumulate, bf16;
    uint64_t a, b;  // descriptors
};
// d: columns / 2 accumulators of this thread; a: its four registers of A, or null.
void multiply(const ProductOperands& operands, float* d, const uint32_t* a, Site site);
void product_fence();
void product_commit();
void product_wait(int newest_allowed, Site site);

void store_matrix_x4(uint32_t row, const uint32_t (&x)[4], Site site);

}  // namespace emulator
