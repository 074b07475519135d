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

// Shared memory above 48 KB has to be allowed, once for a kernel, device and size: asking each time costs 1 us.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
    struct Allowed {
        const void* kernel;
        int device;
        int bytes;
    };
    constexpr int CAPACITY = 64;
    static thread_local Allowed allowed[CAPACITY];
    static thread_local int count = 0;
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    int place = 0;
    while (place < count && (allowed[place].kernel != kernel || allowed[place].device != device)) ++place;
    if (place < count && allowed[place].bytes >= bytes) return cudaSuccess;
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (status != cudaSuccess || place == CAPACITY) return status;
    allowed[place] = Allowed{kernel, device, bytes};
    if (place == count) ++count;
    return cudaSuccess;
}

// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int& count) {
    constexpr int CAPACITY = 64;
    static thread_local int counts[CAPACITY] = {};
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    if (device < CAPACITY && counts[device] != 0) return count = counts[device], cudaSuccess;
    status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess && device < CAPACITY) counts[device] = count;
    return status;
}

template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return cudaSuccess;
    if (how.shared_bytes > 48 * 1024) {
        const cudaError_t status = allow_shared_memory(reinterpret_cast<const void*>(kernel), how.shared_bytes);
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
