// Tensor maps: how the copy engine sees a tensor. Host side. The emulator replaces this header together with ptx.cuh.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "params.cuh"

using TensorMap = CUtensorMap;

// The driver's encoder, without linking the driver.
inline cudaError_t tensor_map_encoder(decltype(&cuTensorMapEncodeTiled)& encode) {
    static void* found = nullptr;
    if (found == nullptr) {
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        if (status != cudaSuccess) return status;
        if (found == nullptr || result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    }
    encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    return cudaSuccess;
}

// A (batches, heads, rows, columns) tensor of 16-bit elements, moved in boxes of box_rows x box_columns of one head.
// In shared memory a row of a box has box_columns * 2 = 32, 64 or 128 bytes, and the 16-byte chunks of rows are
// exchanged by that width's swizzle. Reading beyond rows or columns gives zeros; writing there does nothing.
// A head or batch stride of 0 (an expanded tensor) makes that dimension one long: its coordinate must be 0.
inline cudaError_t make_tensor_map(TensorMap& map, const void* address, int64_t batches, int64_t heads, int64_t rows,
                                   int columns, const Stride& stride, int box_rows, int box_columns) {
    decltype(&cuTensorMapEncodeTiled) encode;
    const cudaError_t status = tensor_map_encoder(encode);
    if (status != cudaSuccess) return status;
    const int64_t row_bytes = 2 * columns;
    const auto bytes = [&](int64_t elements) { return cuuint64_t(elements == 0 ? row_bytes : 2 * elements); };
    const cuuint64_t sizes[4] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(stride.h == 0 ? 1 : heads),
                                 cuuint64_t(stride.b == 0 ? 1 : batches)};
    const cuuint64_t strides[3] = {bytes(stride.s), bytes(stride.h), bytes(stride.b)};
    const cuuint32_t box[4] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1, 1};
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    const CUtensorMapSwizzle swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
    const auto describe = [&] {
        return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(address), sizes, strides, box, steps,
                      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
    };
    if (describe()) return cudaSuccess;
    // The driver needs a current context, which a thread that has called no CUDA function yet, like autograd's, lacks.
    int device = 0;
    cudaError_t bound = cudaGetDevice(&device);
    if (bound == cudaSuccess) bound = cudaSetDevice(device);
    if (bound != cudaSuccess) return bound;
    return describe() ? cudaSuccess : cudaErrorInvalidValue;
}
