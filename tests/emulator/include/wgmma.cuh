// Stands in for the kernels' wgmma.cuh. EMULATOR_WGMMA_COLUMNS and EMULATOR_WGMMA_ELEMENT are what was rendered.
#pragma once
#include <type_traits>

#include "hopper.cuh"

enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

template <int COLUMNS> constexpr bool rendered_columns() {
    for (int columns : {EMULATOR_WGMMA_COLUMNS})
        if (columns == COLUMNS) return true;
    return false;
}

template <Major A, Major B, int N> inline void multiply(float (&d)[N], Descriptor a, Descriptor b, bool accumulate,
                                                        emulator::Site site = EMULATOR_CALLER) {
    static_assert(rendered_columns<2 * N>(), "no product of these columns was rendered");
    constexpr bool is_bf16 = std::is_same_v<EMULATOR_WGMMA_ELEMENT, ::bf16>;
    emulator::multiply({2 * N, false, A == MN_MAJOR, B == MN_MAJOR, accumulate, is_bf16, a, b}, d, nullptr, site);
}
template <Major B, int N> inline void multiply(float (&d)[N], const uint32_t (&a)[4], Descriptor b, bool accumulate,
                                               emulator::Site site = EMULATOR_CALLER) {
    static_assert(rendered_columns<2 * N>(), "no product of these columns was rendered");
    constexpr bool is_bf16 = std::is_same_v<EMULATOR_WGMMA_ELEMENT, ::bf16>;
    emulator::multiply({2 * N, true, false, B == MN_MAJOR, accumulate, is_bf16, 0, b}, d, a, site);
}
