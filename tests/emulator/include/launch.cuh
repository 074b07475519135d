// Stands in for the kernels' launch.cuh: a launch runs the blocks one after another in the emulated machine.
#pragma once
#include <cuda_runtime.h>

#include <tuple>

struct Launch {
    dim3 grid;
    int threads;
    int shared_bytes;
    cudaStream_t stream;
    bool overlap;
};

// So few that a kernel which goes on to the next tile does so in tests.
inline cudaError_t multiprocessors(int& count) {
    count = 3;
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, Arguments... arguments) {
    if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return cudaSuccess;
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } call{kernel, {Parameters(arguments)...}};
    return cudaError_t(emulator::run(
        {how.grid.x, how.grid.y, how.grid.z}, how.threads, how.shared_bytes, how.overlap,
        [](void* p) { std::apply(static_cast<Call*>(p)->kernel, static_cast<Call*>(p)->arguments); }, &call));
}
