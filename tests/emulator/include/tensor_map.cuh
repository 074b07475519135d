// Stands in for the kernels' tensor_map.cuh.
#pragma once
#include <cuda_runtime.h>

#include "machine_sm90.h"
#include "params.cuh"

using TensorMap = emulator::TensorMap;

inline cudaError_t make_tensor_map(TensorMap& map, const void* address, int64_t batches, int64_t heads, int64_t rows,
                                   int columns, const Stride& stride, int box_rows, int box_columns) {
    const auto bytes = [&](int64_t elements) { return elements == 0 ? int64_t(2) * columns : 2 * elements; };
    const int64_t sizes[4] = {columns, rows, stride.h == 0 ? 1 : heads, stride.b == 0 ? 1 : batches};
    const int64_t strides[3] = {bytes(stride.s), bytes(stride.h), bytes(stride.b)};
    return emulator::encode(map, address, sizes, strides, box_rows, box_columns) ? cudaSuccess : cudaErrorInvalidValue;
}
