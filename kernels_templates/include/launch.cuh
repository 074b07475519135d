// Host side of a launch. The emulator replaces this header together with ptx.cuh.
#pragma once
#include <cuda_runtime.h>

struct Launch {
    dim3 grid;
    int threads;
    int shared_bytes;
    cudaStream_t stream;
    bool overlap;  // programmatic dependent launch: the kernel calls wait_for_previous_kernel() itself
};

template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return cudaSuccess;
    if (how.shared_bytes > 48 * 1024) {
        cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes);
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = how.grid;
    config.blockDim = dim3(how.threads);
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = how.stream;
    config.attrs = &attribute;
    config.numAttrs = how.overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
