"""What the emulator adds for compute capability 9.0: results against torch, and planted bugs.

A planted bug is a case of a kernel that passes: ``BUG(name)`` is true in the line under test when the test asks for it.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from emulator import build
from emulator.harness import KernelFault, Library
from emulator.memory import Guarded
from torch import Tensor

from cosattn.render import templates_directory

SEEDS = range(6)
COLUMNS = ", ".join(str(n) for n in range(8, 257, 8))
PRELUDE = f"""
#define EMULATOR_WGMMA_COLUMNS {COLUMNS}
#define EMULATOR_WGMMA_ELEMENT ELEMENT
#include "hopper.cuh"
#include "launch.cuh"
#include "wgmma.cuh"

#define ALIGNED_SHARED(name)                                                                            \\
    SHARED_MEMORY(name##_unaligned);                                                                    \\
    unsigned char* const name = name##_unaligned + (1024 - shared_address(name##_unaligned) % 1024) % 1024

// Maps of (rows, columns) tensors with a row stride.
inline TensorMap map_of(const void* p, int rows, int columns, int stride, int box_rows, int box_columns) {{
    TensorMap map;
    if (make_tensor_map(map, p, 1, 1, rows, columns, Stride{{0, 0, stride}}, box_rows, box_columns)) abort();
    return map;
}}
inline Descriptor further(Descriptor d, uint32_t bytes) {{ return d + bytes / 16; }}
inline int row_of(int t, int r) {{ return t % 128 / 32 * 16 + t % 32 / 4 + 8 * (r / 2 % 2); }}
inline int column_of(int t, int r) {{ return 8 * (r / 4) + 2 * (t % 4) + r % 2; }}
"""


@cache
def compiled(source: str, element: str = "bf16") -> Library:
    """A source with an entry ``start(void** tensors, int bug)``."""
    bugs = {name: i + 1 for i, name in enumerate(sorted(set(re.findall(r"BUG\((\w+)\)", source))))}
    defines = [f"#define ELEMENT {element}", "#define BUG(name) (bug == BUG_##name)"]
    defines += [f"#define BUG_{name} {number}" for name, number in bugs.items()]
    headers = {"params.cuh": (templates_directory() / "include" / "params.cuh").read_text()}
    library = Library(build.library("\n".join([*defines, PRELUDE, source]), headers))
    library.bugs = bugs  # type: ignore[attr-defined]
    return library


def run(library: Library, *tensors: Tensor, case: int | str = 0, seed: int = 0) -> None:
    """Run it on copies of the tensors in guarded memory, then copy them back. A case is a bug's name or a number."""
    bugs: Mapping[str, int] = library.bugs  # type: ignore[attr-defined]
    memory = Guarded()
    inside = [memory.copy(f"tensor {i}", tensor) for i, tensor in enumerate(tensors)]
    library.configure(seed, patience_s=2, memory=memory)
    pointers = (ctypes.c_void_p * 8)(*(tensor.data_ptr() for tensor in inside))
    status = library.symbols.start(pointers, bugs[case] if isinstance(case, str) else case)
    library.check(status, memory)
    for tensor, result in zip(tensors, inside, strict=True):
        tensor.copy_(result)


def faults(library: Library, match: str, *tensors: Tensor, case: int | str) -> None:
    """Every order of threads ends in the fault."""
    for seed in SEEDS:
        with pytest.raises(KernelFault, match=match):
            run(library, *(tensor.clone() for tensor in tensors), case=case, seed=seed)


# ---- products -------------------------------------------------------------------------------------------------------

# c = A B^T in one case of (N, pitch of A's rows, of B's, A, B): every way in which operands lie in shared memory.
PRODUCTS = """
constexpr int K = 96;

// ROWS x COLUMNS, cut into slabs of PITCH bytes.
template <int PITCH> uint32_t load(uint32_t to, const TensorMap& map, uint32_t barrier, int rows, int columns) {
    int bytes = 0;
    for (int c = 0; c < columns; c += PITCH / 2, bytes += rows * PITCH) load_box(to + bytes, map, barrier, c, 0, 0, 0);
    return bytes;
}
template <int PITCH, Major MAJOR> Descriptor at_step(uint32_t tile, int rows, int step) {
    if (MAJOR == MN_MAJOR) return further(describe<PITCH>(tile, rows * PITCH), step * 16 * PITCH);
    const int slab = step * 32 / PITCH, inside = step * 32 % PITCH;
    return further(describe<PITCH>(tile), slab * rows * PITCH + inside);
}

template <int N, int A_PITCH, int B_PITCH, Major A, Major B, bool REGISTERS>
__global__ void product(const ELEMENT* a, float* c, TensorMap a_map, TensorMap b_map) {
    ALIGNED_SHARED(shared);
    const uint32_t barrier = shared_address(shared), a_tile = barrier + 1024, b_tile = a_tile + 64 * 1024;
    const int t = threadIdx.x, a_rows = A == K_MAJOR ? 64 : K, b_rows = B == K_MAJOR ? N : K;
    if (t == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (t == 0) {
        int bytes = load<A_PITCH>(a_tile, a_map, barrier, a_rows, A == K_MAJOR ? K : 64);
        bytes += load<B_PITCH>(b_tile, b_map, barrier, b_rows, B == K_MAJOR ? K : N);
        mbarrier_expect(barrier, bytes);
    }
    mbarrier_wait(barrier, 0);
    float d[N / 2];
    uint32_t x[K / 16][4];
    for (int step = 0; step < K / 16; ++step)
        for (int r = 0; r < 4; ++r) {
            const int row = row_of(t, 2 * r), column = step * 16 + 2 * (t % 4) + r / 2 * 8;
            x[step][r] = a[row * K + column].bits | uint32_t(a[row * K + column + 1].bits) << 16;
        }
    product_fence();
    for (int step = 0; step < K / 16; ++step) {
        const Descriptor b = at_step<B_PITCH, B>(b_tile, b_rows, step);
        if constexpr (REGISTERS) multiply<B>(d, x[step], b, step > 0);
        else multiply<A, B>(d, at_step<A_PITCH, A>(a_tile, a_rows, step), b, step > 0);
    }
    product_commit();
    product_wait<0>();
    for (int r = 0; r < N / 2; ++r) c[row_of(t, r) * N + column_of(t, r)] = d[r];
}

template <int N, int A_PITCH, int B_PITCH, Major A, Major B, bool REGISTERS = false> int launch_product(void** p) {
    const int a_rows = A == K_MAJOR ? 64 : K, a_columns = A == K_MAJOR ? K : 64;
    const int b_rows = B == K_MAJOR ? N : K, b_columns = B == K_MAJOR ? K : N;
    return launch(product<N, A_PITCH, B_PITCH, A, B, REGISTERS>, Launch{dim3(1), 128, 160 * 1024, nullptr, false},
                  static_cast<const ELEMENT*>(p[0]), static_cast<float*>(p[2]),
                  map_of(p[0], a_rows, a_columns, a_columns, a_rows, A_PITCH / 2),
                  map_of(p[1], b_rows, b_columns, b_columns, b_rows, B_PITCH / 2));
}

extern "C" int start(void** p, int number) {
    switch (number) {
        CASES
    }
    return -1;
}
"""
K, MN, REGISTERS = "K_MAJOR", "MN_MAJOR", "REGISTERS"
SHAPES = [
    (16, 128, 128, K, K),
    (40, 64, 64, K, K),
    (64, 32, 32, K, K),
    (96, 128, 64, K, K),
    (256, 128, 128, K, K),
    (16, 128, 32, K, MN),
    (40, 64, 128, K, MN),
    (96, 128, 64, K, MN),
    (96, 64, 128, K, MN),  # one and a half slabs
    (128, 32, 128, MN, MN),
    (256, 64, 128, MN, MN),
    (64, 128, 32, MN, K),
    (40, 128, 64, REGISTERS, K),
    (256, 128, 128, REGISTERS, MN),
    (96, 128, 32, REGISTERS, MN),
]


def products(shapes: list[tuple[int, int, int, str, str]], element: str) -> Library:
    cases = []
    for i, (n, a_pitch, b_pitch, a, b) in enumerate(shapes):
        where = f"K_MAJOR, {b}, true" if a == REGISTERS else f"{a}, {b}"
        cases.append(f"case {i}: return launch_product<{n}, {a_pitch}, {b_pitch}, {where}>(p);")
    return compiled(PRODUCTS.replace("CASES", "\n        ".join(cases)), element)


def check_product(shapes: list[tuple[int, int, int, str, str]], number: int, dtype: torch.dtype) -> None:
    n, _, _, a_major, b_major = shapes[number]
    a, b, c = torch.randn(64, 96).to(dtype), torch.randn(n, 96).to(dtype), torch.empty(64, n)
    stored_a = a.T.contiguous() if a_major == MN else a
    stored_b = b.T.contiguous() if b_major == MN else b
    element = "bf16" if dtype == torch.bfloat16 else "f16"
    run(products(shapes, element), stored_a, stored_b, c, case=number, seed=number)
    torch.testing.assert_close(c, a.float() @ b.float().T, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=["-".join(map(str, shape)) for shape in SHAPES])
def test_products(number: int) -> None:
    check_product(SHAPES, number, torch.bfloat16)


def test_products_of_f16() -> None:
    shapes = [(16, 64, 64, K, MN), (16, 64, 64, REGISTERS, MN)]
    for number in range(len(shapes)):
        check_product(shapes, number, torch.float16)


def test_wrong_leading_distance_is_a_wrong_result() -> None:
    source = PRODUCTS.replace("rows * PITCH), step", "rows * PITCH / 2), step")
    assert source != PRODUCTS
    library = compiled(source.replace("CASES", "case 0: return launch_product<96, 128, 64, K_MAJOR, MN_MAJOR>(p);"))
    a, b, c = torch.randn(64, 96).bfloat16(), torch.randn(96, 96).bfloat16(), torch.empty(64, 96)
    run(library, a, b.T.contiguous(), c)
    expected = a.float() @ b.float().T
    torch.testing.assert_close(c[:, :32], expected[:, :32], rtol=1e-5, atol=2e-5)
    assert (c - expected)[:, 32:].norm() > 0.5 * expected.norm()


def test_sums_of_16_products_are_truncated() -> None:
    source = """
    __global__ void sums(float* result, float start) {
        ALIGNED_SHARED(shared);
        const int t = threadIdx.x;
        for (int i = t; i < 16 * 16; i += 128) reinterpret_cast<uint32_t*>(shared)[i] = pack2<bf16>(1.f, 1.f);
        fence_async();
        __syncthreads();
        const uint32_t tenth = pack2<bf16>(0.1f, 0.1f), a[4] = {tenth, tenth, tenth, tenth};
        float d[8];
        for (int r = 0; r < 8; ++r) d[r] = start;
        product_fence();
        multiply<K_MAJOR>(d, a, describe<32>(shared_address(shared)), true);
        multiply<K_MAJOR>(d, a, describe<32>(shared_address(shared)), true);
        product_commit();
        product_wait<0>();
        for (int r = 0; r < 8; ++r) result[row_of(t, r) * 16 + column_of(t, r)] = d[r];
    }
    extern "C" int start(void** p, int) {
        return launch(sums, Launch{dim3(1), 128, 8192, nullptr, false}, static_cast<float*>(p[0]), 16777216.f);
    }
    """
    result = torch.empty(64, 16)
    run(compiled(source), result)
    assert torch.equal(result, torch.full((64, 16), 16777216.0))  # + 1.6 twice, where neighbours are 2 apart


# ---- a pipeline, and what can go wrong in it ------------------------------------------------------------------------

# out[i] = a b[i] for 64 x 64 matrices b[i]: a producer brings them into a ring of two stages; a is written to shared
# memory by the threads of the other warpgroup, which multiply and store through shared memory.
PIPELINE = """
constexpr int TILES = 5, STAGES = 2, TILE = 64 * 128, THREADS = 256;

__global__ void pipeline(const bf16* a, const TensorMap b_map, const TensorMap out_map, int bug) {
    ALIGNED_SHARED(shared);
    const uint32_t base = shared_address(shared), a_tile = base + 1024, b_tiles = a_tile + TILE;
    const uint32_t out = b_tiles + STAGES * TILE;
    const int t = threadIdx.x, lane = t % 32;
    const auto full = [&](int i) { return base + 8 * (i % STAGES); };
    const auto empty = [&](int i) { return base + 8 * (STAGES + i % STAGES); };
    const auto round = [&](int i) { return uint32_t(i / STAGES % 2); };
    if (t == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full(i), 1);
            mbarrier_init(empty(i), 4);
        }
        if (!BUG(init_fence)) mbarrier_init_fence();
    }
    if (!BUG(init_barrier)) __syncthreads();

    if (t < 128) {
        give_registers<40>();
        if (t == 0) {
            for (int i = 0; i < TILES; ++i) {
                if (!BUG(no_wait_for_free_stage)) mbarrier_wait(empty(i), round(i) ^ 1);
                if (BUG(no_expect)) mbarrier_arrive(full(i));
                else mbarrier_expect(full(i), BUG(expect_less) ? TILE / 2 : BUG(expect_more) ? 2 * TILE : TILE);
                load_box(b_tiles + i % STAGES * TILE, b_map, full(i), 0, i * 64, 0, 0);
                if (BUG(arrive_twice)) mbarrier_arrive(full(i));
            }
            if (BUG(exit_with_load)) load_box(out + TILE, b_map, full(TILES), 0, 0, 0, 0);
        }
        return;
    }
    take_registers<256>();
    // a, in the swizzle of 128 bytes
    for (int i = t - 128; i < 64 * 8; i += 128) {
        const int row = i / 8, chunk = i % 8;
        *reinterpret_cast<uint4*>(shared + 1024 + row * 128 + (chunk ^ row % 8) * 16) =
            *reinterpret_cast<const uint4*>(a + row * 64 + chunk * 8);
    }
    if (!BUG(a_fence)) fence_async();
    if (BUG(a_barrier)) __syncwarp();
    else barrier_sync(1, 128);
    if (BUG(a_fence) && t == 128) fence_async();

    float d[32], e[32];
    uint32_t x[4][4];
    for (int step = 0; step < 4; ++step)
        for (int r = 0; r < 4; ++r)
            x[step][r] = *reinterpret_cast<const uint32_t*>(a + row_of(t, 2 * r) * 64 + step * 16 + 2 * (t % 4) +
                                                            r / 2 * 8);
    for (int i = 0; i < TILES; ++i) {
        if (!BUG(one_lane_waits) || lane == 0) mbarrier_wait(full(i), round(i) ^ uint32_t(BUG(parity)));
        const auto release = [&] {
            if (lane == 0 && !BUG(no_arrival)) mbarrier_arrive(empty(i));
            if (lane == 0 && BUG(arrivals_of_two_lanes)) mbarrier_arrive(empty(i));
        };
        if (BUG(early_release)) release();
        if (!BUG(product_fence)) product_fence();
        if (BUG(a_fence_late)) x[3][2] += i;
        if (BUG(accumulator_fence)) d[7] = 0.f;
        const Descriptor a_rows = describe<128>(a_tile), b = describe<128>(b_tiles + i % STAGES * TILE);
        const Descriptor wrong_stride = b - (uint64_t(512 >> 4) << 32);
        for (int step = 0; step < 4; ++step) {
            const Descriptor b_step = further(BUG(stride) ? wrong_stride : b, step * 32);
            if (i % 2) multiply<K_MAJOR>(d, x[step], b_step, step > 0);
            else multiply<K_MAJOR, K_MAJOR>(d, further(a_rows, step * 32), b_step, step > 0);
        }
        if (BUG(a_registers)) x[1][2] ^= 1;
        if (BUG(a_registers_loaded)) load_matrix_x4(x[2], shared + 1024 + 16 * lane);
        if (BUG(accumulators)) d[7] = 0.f;
        if (BUG(half_the_accumulators)) multiply<K_MAJOR>(reinterpret_cast<float(&)[16]>(d[16]), x[0], b, true);
        if (BUG(other_accumulators)) multiply<K_MAJOR>(reinterpret_cast<float(&)[16]>(d), x[0], b, true);
        if (BUG(operands_of_a_warp) && t < 160) multiply<K_MAJOR>(e, x[0], further(b, 32), false);
        else if (BUG(operands_of_a_warp)) multiply<K_MAJOR>(e, x[0], b, false);
        if (BUG(overwrite_operand)) *reinterpret_cast<uint4*>(shared + 1024 + 16 * (t - 128)) = make_uint4(0, 0, 0, 0);
        if (!BUG(commit)) product_commit();
        if (BUG(read_before_wait)) e[0] = d[5];
        if (BUG(product_wait)) product_wait<1>();
        else product_wait<0>();
        if (BUG(exit_with_product) && i + 1 == TILES) {
            product_fence();
            multiply<K_MAJOR>(e, x[0], b, false);
        }
        if (!BUG(early_release)) release();

        if (!BUG(reuse_stored) && i > 0) {
            if (t == 128) store_box_wait<0>();
            if (!BUG(reuse_stored_without_barrier)) barrier_sync(1, 128);
        }
        for (int c = 0; c < 4; ++c) {
            const int row = (t - 128) / 32 * 16 + lane % 16, chunk = 2 * c + lane / 16;
            const float* const y = d + 8 * c;
            store_matrix_x4(out + row * 128 + (chunk ^ row % 8) * 16, pack2<bf16>(y[0], y[1]), pack2<bf16>(y[2], y[3]),
                            pack2<bf16>(y[4], y[5]), pack2<bf16>(y[6], y[7]));
        }
        if (!BUG(store_fence)) fence_async();
        if (!BUG(store_barrier)) barrier_sync(1, 128);
        if (t == 128) {
            store_box(out_map, out, 0, i * 64, 0, 0);
            store_box_commit();
        }
    }
    if (t == 128 && !BUG(exit_with_store)) store_box_wait<0>();
}
extern "C" int start(void** p, int bug) {
    return launch(pipeline, Launch{dim3(2), THREADS, 64 * 1024, nullptr, false}, static_cast<const bf16*>(p[0]),
                  map_of(p[1], 5 * 64, 64, 64, 64, 64), map_of(p[2], 5 * 64, 64, 64, 64, 64), bug);
}
"""


def pipeline_tensors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(64, 64).bfloat16(), torch.randn(5 * 64, 64).bfloat16(), torch.empty(5 * 64, 64).bfloat16()


def pipeline_result(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a.float() @ tile.float().T for tile in b.split(64)])


@pytest.mark.parametrize("seed", range(12))
def test_pipeline(seed: int) -> None:
    a, b, out = pipeline_tensors()
    run(compiled(PIPELINE), a, b, out, seed=seed)
    torch.testing.assert_close(out.float(), pipeline_result(a, b), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("bug", "match"),
    [
        ("init_fence", "no mbarrier_init_fence after the mbarrier_init of thread 0"),
        ("init_barrier", "no barrier between|there is no mbarrier"),
        ("no_wait_for_free_stage", r"load_box .*(which the product of warp \d at .* reads|is under way)|one arrival"),
        ("no_expect", "while the load of thread 0 at .* is under way|more bytes|no mbarrier_wait between"),
        ("expect_less", "more bytes have come than were announced|is under way"),
        ("expect_more", r"deadlock: .*mbarrier_wait kernel.cpp:\d+ for parity . of the mbarrier at byte .* 8192 bytes"),
        ("arrive_twice", "mbarrier_arrive at .*: one arrival too many"),
        ("exit_with_load", "the block exits and nobody has waited for the load of thread 0 at"),
        ("a_fence", "fence_async is missing: a product byte"),
        ("a_barrier", "race in shared memory: reads byte .* wrote"),
        ("one_lane_waits", "no mbarrier_wait between|is under way|which the product of warp"),
        ("parity", "is under way|no mbarrier_wait between|deadlock|which the product of warp"),
        ("no_arrival", r"deadlock: .*1 threads \(first: 0\) at mbarrier_wait"),
        ("arrivals_of_two_lanes", "one arrival too many|which the product of warp|deadlock"),
        ("early_release", "which the product of warp"),
        ("product_fence", "product_fence is missing"),
        ("a_fence_late", "product_fence is missing: register of A 2 was written"),
        ("accumulator_fence", "product_fence is missing: accumulator 7 was written"),
        ("a_registers", r"writes a register of A at kernel.cpp:\d+ while its product is under way"),
        ("a_registers_loaded", r"writes a register of A at kernel.cpp:\d+ while its product is under way"),
        ("accumulators", r"writes an accumulator at kernel.cpp:\d+ while its product is under way"),
        ("read_before_wait", r"reads an accumulator at kernel.cpp:\d+ while its product is under way"),
        ("other_accumulators", "other accumulators than the product"),
        ("half_the_accumulators", "accumulator 0 is part of another product under way"),
        ("operands_of_a_warp", "divergent warpgroup"),
        ("overwrite_operand", "writes byte .* which the product of warp . at .* reads|race in shared memory: reads"),
        ("commit", r"reads an accumulator at kernel.cpp:\d+ while its product is under way"),
        ("product_wait", r"reads an accumulator at kernel.cpp:\d+ while its product is under way"),
        ("exit_with_product", "a thread exits while its product at"),
        ("reuse_stored", "which the store of thread 128 at .* reads: no store_box_wait"),
        ("reuse_stored_without_barrier", "which the store of thread 128 at .* reads: no store_box_wait"),
        ("store_fence", "fence_async is missing: store_box byte"),
        ("store_barrier", "race in shared memory: reads byte .* wrote"),
        ("exit_with_store", "a thread exits while its store at"),
    ],
)
def test_bugs_of_a_pipeline(bug: str, match: str) -> None:
    faults(compiled(PIPELINE), match, *pipeline_tensors(), case=bug)


def test_wrong_stride_is_a_wrong_result() -> None:
    a, b, out = pipeline_tensors()
    run(compiled(PIPELINE), a, b, out, case="stride")
    assert not (out.float() - pipeline_result(a, b)).norm() < 0.1 * out.float().norm()


# ---- the copy engine ------------------------------------------------------------------------------------------------

# Boxes of 64 rows of each head, in and out again; what was in shared memory also goes to the second output.
COPIES = """
constexpr int ROWS = 70, COLUMNS = 40;
template <int PITCH> __global__ void copies(const TensorMap in, const TensorMap out, float* seen, bool one_head) {
    ALIGNED_SHARED(shared);
    constexpr int SLAB = PITCH / 2, SLABS = (COLUMNS + SLAB - 1) / SLAB;
    const uint32_t barrier = shared_address(shared), tile = barrier + 1024;
    const int t = threadIdx.x, head = blockIdx.x % 3, batch = blockIdx.x / 3;
    if (t == 0) {
        prefetch_map(in);
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    for (int block = 0; block < 2; ++block) {
        if (t == 0) {
            mbarrier_expect(barrier, 64 * PITCH * SLABS);
            for (int slab = 0; slab < SLABS; ++slab)
                load_box(tile + slab * 64 * PITCH, in, barrier, slab * SLAB, block * 64, one_head ? 0 : head, batch);
        }
        mbarrier_wait(barrier, block);
        for (int i = t; i < 64 * SLABS * SLAB; i += 64) {
            const int row = i / (SLABS * SLAB), column = i % (SLABS * SLAB), slab = column / SLAB;
            const int chunk = column % SLAB / 8 ^ row / (128 / PITCH) % (PITCH / 16);
            const int at = slab * 64 * PITCH + row * PITCH + chunk * 16 + column % 8 * 2;
            seen[((blockIdx.x * 2 + block) * 64 + row) * 64 + column] =
                to_float(*reinterpret_cast<const bf16*>(shared + 1024 + at));
        }
        __syncthreads();
        if (t == 0) {
            for (int slab = 0; slab < SLABS; ++slab)
                store_box(out, tile + slab * 64 * PITCH, slab * SLAB, block * 64, head, batch);
            store_box_commit();
            store_box_wait<0>();
        }
        __syncthreads();
    }
}
template <int PITCH> int launch_copies(void** p, bool one_head) {
    TensorMap in, out;
    const Stride x{ROWS * 144, one_head ? 0 : 48, 144}, y{3 * ROWS * 48, ROWS * 48, 48};
    if (make_tensor_map(in, p[0], 2, 3, ROWS, COLUMNS, x, 64, PITCH / 2)) return -2;
    if (make_tensor_map(out, p[1], 2, 3, ROWS, COLUMNS, y, 64, PITCH / 2)) return -3;
    return launch(copies<PITCH>, Launch{dim3(6), 64, 32 * 1024, nullptr, false}, in, out, static_cast<float*>(p[2]),
                  one_head);
}
extern "C" int start(void** p, int number) {
    const bool one_head = number >= 1000;
    switch (number % 1000) {
        case 128: return launch_copies<128>(p, one_head);
        case 64: return launch_copies<64>(p, one_head);
        case 32: return launch_copies<32>(p, one_head);
    }
    return -1;
}
"""


@pytest.mark.parametrize("one_head", [False, True])
@pytest.mark.parametrize("pitch", [128, 64, 32])
def test_copies(pitch: int, one_head: bool) -> None:
    stored = torch.randn(2, 70, 3, 48).bfloat16()
    x = stored.transpose(1, 2)[..., :40]
    if one_head:
        x = x[:, :1].expand(-1, 3, -1, -1)
    out, seen = torch.full((2, 3, 70, 48), 5.0).bfloat16(), torch.zeros(2, 3, 128, 64)
    run(compiled(COPIES), stored, out, seen, case=pitch + 1000 * one_head)
    expected = torch.zeros(2, 3, 128, 64)
    expected[:, :, :70, :40] = x
    assert torch.equal(seen, expected)
    assert torch.equal(out[..., :40], x)
    assert bool((out[..., 40:] == 5).all())


def test_maps_that_the_driver_refuses() -> None:
    source = """
    extern "C" int make(long address, long rows, int columns, long stride, int box_rows, int box_columns) {
        TensorMap map;
        return make_tensor_map(map, reinterpret_cast<void*>(address), 1, 1, rows, columns, Stride{0, 0, stride},
                               box_rows, box_columns);
    }
    """
    make = compiled(source).symbols.make
    make.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    assert make(4096, 100, 64, 64, 64, 64) == 0
    refused = [
        (4104, 100, 64, 64, 64, 64),
        (4096, 0, 64, 64, 64, 64),
        (4096, 100, 64, 68, 64, 64),
        (4096, 100, 64, 2**40, 64, 64),
        (4096, 100, 64, 64, 257, 64),
        (4096, 100, 64, 64, 64, 128),
    ]
    for arguments in refused:
        assert make(*arguments) == 1


# ---- misuse ---------------------------------------------------------------------------------------------------------

MISUSE = """
__global__ void misuse(float* a, const TensorMap map, int bug) {
    ALIGNED_SHARED(shared);
    const uint32_t barrier = shared_address(shared), tile = barrier + 1024;
    const int t = threadIdx.x;
    float* const s = reinterpret_cast<float*>(shared + 1024);
    if (t == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init(barrier + 8, 128);
        if (BUG(init_twice)) mbarrier_init(barrier + 8, 1);
        if (BUG(init_misaligned)) mbarrier_init(barrier + 20, 1);
        if (BUG(init_out_of_bounds)) mbarrier_init(barrier + (1 << 16), 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (BUG(plain_access_to_a_barrier)) shared[3] = 0;
    if (BUG(wrong_barrier)) mbarrier_wait(barrier + 16, 0);
    if (BUG(store_without_barrier) && t == 0) {
        mbarrier_expect(barrier, 8192);
        load_box(tile, map, barrier, 0, 0, 0, 0);
        store_box(map, tile, 0, 0, 0, 0);
    }
    if (BUG(product_without_warps)) {
        if (t >= 64) return;
        float d[4];
        const uint32_t x[4] = {};
        for (int i = t; i < 256; i += 64) s[i] = 0.f;
        fence_async();
        barrier_sync(1, 64);
        product_fence();
        multiply<K_MAJOR>(d, x, describe<32>(tile), false);
        product_commit();
        product_wait<0>();
    }
    if (BUG(no_swizzle)) {
        float d[4];
        product_fence();
        multiply<K_MAJOR, K_MAJOR>(d, tile >> 4, tile >> 4, false);
    }
    if (t == 0) {
        const int bytes = BUG(odd_bytes) ? 8 : 256;
        mbarrier_expect(barrier, 8192 + bytes);
        load_box(tile + (BUG(load_misaligned) ? 512 : 0), map, barrier, BUG(column) ? 4 : 0, 0, BUG(head) ? 1 : 0, 0);
        load_bytes(tile + 8192, a + (BUG(source_misaligned) ? 1 : 0), bytes, barrier);
        if (BUG(two_loads)) load_bytes(tile + 8192, a, 256, barrier);
        if (BUG(not_a_map)) {
            TensorMap empty{};
            load_box(tile, empty, barrier, 0, 0, 0, 0);
        }
    }
    // Whoever asks before using something needs no wait.
    while (!mbarrier_test(barrier, 0) && !BUG(unheeded_test)) {
    }
    a[t % 64] = s[2048 + t % 64];
    mbarrier_arrive(barrier + 8);
    if (BUG(parity_2)) mbarrier_wait(barrier + 8, 2);
    mbarrier_wait(barrier + 8, 0);
    for (int i = t; i < 64; i += 128) s[2048 + i] = 0.f;
    if (t < 32) {
        uint32_t row = tile + t * 16 + (BUG(store_matrix_misaligned) ? 8 : 0);
        store_matrix_x4(row, 0, 0, 0, 0);
    }
}
extern "C" int start(void** p, int bug) {
    return launch(misuse, Launch{dim3(1), 128, 12 * 1024, nullptr, false}, static_cast<float*>(p[0]),
                  map_of(p[1], 64, 64, 64, 64, 64), bug);
}
"""


@pytest.mark.parametrize(
    ("bug", "match"),
    [
        ("init_twice", "writes byte .* where there is the mbarrier at byte"),
        ("init_misaligned", "mbarrier_init at .* is not 8-byte aligned"),
        ("init_out_of_bounds", "mbarrier_init at .* out of bounds"),
        ("plain_access_to_a_barrier", "writes byte .* where there is the mbarrier at byte"),
        ("wrong_barrier", "there is no mbarrier at byte"),
        ("store_without_barrier", "store_box byte .* while the load of thread 0 at .* is under way"),
        ("product_without_warps", "deadlock: .*64 threads .* at product_wait"),
        ("no_swizzle", "operands without swizzle"),
        ("odd_bytes", "load_bytes at .*: 8 bytes"),
        ("load_misaligned", "load_box at .* is not 1024-byte aligned"),
        ("column", "column 4 is not a multiple of 8"),
        ("head", "head 1 of 1"),
        ("source_misaligned", "source.* is not 16-byte aligned"),
        ("two_loads", "load_bytes byte .* is under way"),
        ("not_a_map", "not a tensor map"),
        ("unheeded_test", "is under way|no mbarrier_wait between|race in shared memory"),
        ("parity_2", "parity 2"),
        ("store_matrix_misaligned", "store_matrix_x4 at .* is not 16-byte aligned"),
    ],
)
def test_misuse(bug: str, match: str) -> None:
    faults(compiled(MISUSE), match, torch.randn(64), torch.randn(64, 64).bfloat16(), case=bug)


def test_use() -> None:
    a = torch.randn(64)
    for seed in SEEDS:
        result = a.clone()
        run(compiled(MISUSE), result, torch.randn(64, 64).bfloat16(), seed=seed)
        assert torch.equal(result, a)


ARRIVE = """
__global__ void arrive(float* a, float* b, int bug) {
    ALIGNED_SHARED(shared);
    float* const s = reinterpret_cast<float*>(shared);
    const int t = threadIdx.x;
    if (t < 64) {
        if (BUG(arrive_before)) barrier_arrive(1, 128);
        s[t] = a[t];
        if (!BUG(no_arrival) && !BUG(arrive_before)) barrier_arrive(1, 128);
        if (BUG(twice)) barrier_arrive(1, 128);
        if (BUG(arrival_is_no_wait)) a[t] = s[64 + t];
    } else {
        s[t] = a[t];
        barrier_sync(1, 128);
        b[t - 64] = s[t - 64];
    }
}
extern "C" int start(void** p, int bug) {
    return launch(arrive, Launch{dim3(1), 128, 4096, nullptr, false}, static_cast<float*>(p[0]),
                  static_cast<float*>(p[1]), bug);
}
"""


def test_barriers_without_waiting() -> None:
    a, b = torch.randn(128), torch.empty(64)
    for seed in SEEDS:
        run(compiled(ARRIVE), a, b, seed=seed)
        assert torch.equal(b, a[:64])
    faults(compiled(ARRIVE), "race in shared memory", a, b, case="arrive_before")
    faults(compiled(ARRIVE), "race in shared memory", a, b, case="arrival_is_no_wait")
    faults(compiled(ARRIVE), "deadlock: .*64 threads .* at barrier_sync", a, b, case="no_arrival")
    faults(compiled(ARRIVE), "has come to barrier 1 already|deadlock|divergent barrier", a, b, case="twice")


SUMS = """
__global__ void sums(float* result, float* seen, int bug) {
    ALIGNED_SHARED(shared);
    float* const s = reinterpret_cast<float*>(shared);
    const int t = threadIdx.x;
    s[t] = float(t);
    fence_async();
    __syncthreads();
    if (t == 0) {
        if (BUG(store)) store_floats(result, shared_address(shared), 64);
        else reduce_floats(result + (BUG(misaligned) ? 2 : 0), shared_address(shared), BUG(size) ? 62 : 64);
        store_box_commit();
    }
    if (BUG(reuse)) s[t] = 0.f;
    if (t == 0 && !BUG(exit)) {
        if (BUG(finish)) store_box_finish();
        else store_box_wait<0>();
        seen[blockIdx.x] = result[1];
    }
}
extern "C" int start(void** p, int bug) {
    return launch(sums, Launch{dim3(3), 64, 4096, nullptr, false}, static_cast<float*>(p[0]),
                  static_cast<float*>(p[1]), bug);
}
"""


def test_sums_of_floats() -> None:
    for case, expected in ((0, [1, 2, 3]), ("finish", [2, 3, 4])):  # they arrive late unless somebody waits for it
        result, seen = torch.ones(64), torch.empty(3)
        run(compiled(SUMS), result, seen, case=case)
        assert torch.equal(result, 3 * torch.arange(64.0) + 1)
        assert sorted(seen.tolist()) == expected
    run(compiled(SUMS), result, seen, case="store")
    assert torch.equal(result, torch.arange(64.0))
    faults(compiled(SUMS), "destination.* is not 16-byte aligned", result, seen, case="misaligned")
    faults(compiled(SUMS), "62 floats", result, seen, case="size")
    faults(compiled(SUMS), "which the store of thread 0 .* reads|race in shared memory", result, seen, case="reuse")
    faults(compiled(SUMS), "a thread exits while its store at", result, seen, case="exit")


TURNS = """
__global__ void turns(float* sum, float* order, unsigned* state, int bug) {
    if (threadIdx.x != 0) return;
    const unsigned number = BUG(index) ? blockIdx.x : atomicAdd(state, 1u);
    if (look_at_turn(state + 1) != number) wait_for_turn(state + 1, number);
    order[number] = *sum += 1.f;
    fence_turns();
    rest<100>();
    if (BUG(count)) count_turn(state + 1);
    else if (!BUG(no_pass)) pass_turn(state + 1, number);
}
extern "C" int start(void** p, int bug) {
    return launch(turns, Launch{dim3(8), 32, 1024, nullptr, false}, static_cast<float*>(p[0]),
                  static_cast<float*>(p[1]), static_cast<unsigned*>(p[2]), bug);
}
"""


def test_turns() -> None:
    for seed, case in itertools.product(SEEDS, (0, "count")):  # passed to the next number, or counted
        total, order = torch.zeros(4), torch.zeros(8)
        run(compiled(TURNS), total, order, torch.zeros(4, dtype=torch.int32), seed=seed, case=case)
        assert order.tolist() == list(range(1, 9))
    for bug in ("index", "no_pass"):  # a block that started earlier waits for a later one; nobody passes the turn on
        faults(compiled(TURNS), "deadlock: wait_for_turn", total, order, torch.zeros(4, dtype=torch.int32), case=bug)


TRANSPOSE = """
__global__ void transpose(uint32_t* matrix, int) {
    matrix[threadIdx.x] = transpose_matrix(matrix[threadIdx.x]);
}
extern "C" int start(void** p, int bug) {
    return launch(transpose, Launch{dim3(1), 32, 1024, nullptr, false}, static_cast<uint32_t*>(p[0]), bug);
}
"""


def test_transposed_matrix() -> None:
    """Of 16-bit elements, in the registers of a warp."""
    matrix = torch.arange(64, dtype=torch.int16).reshape(8, 8)
    result = matrix.clone()
    run(compiled(TRANSPOSE), result)
    assert torch.equal(result, matrix.t())


OVERLAP = """
__global__ void first(float* a) {
    a[threadIdx.x] = float(threadIdx.x);
}
__global__ void second(const float* a, float* b, int bug) {
    ALIGNED_SHARED(shared);
    const int t = threadIdx.x;
    const uint32_t barrier = shared_address(shared);
    float* const s = reinterpret_cast<float*>(shared + 128);
    if (t == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (t == 0) {
        if (!BUG(no_wait)) wait_for_previous_kernel();
        if (!BUG(fence)) fence_async_global();
        mbarrier_expect(barrier, 256);
        load_bytes(barrier + 128, a, 256, barrier);
    }
    if (BUG(wait_elsewhere)) b[t] = a[t];
    mbarrier_wait(barrier, 0);
    b[t] = s[t] + a[t];
}
extern "C" int start(void** p, int bug) {
    const auto a = static_cast<float*>(p[0]), b = static_cast<float*>(p[1]);
    if (const int status = launch(first, Launch{dim3(1), 64, 0, nullptr, false}, a)) return status;
    if (BUG(memset)) cudaMemsetAsync(p[1], 0, 4);
    return launch(second, Launch{dim3(2), 64, 2048, nullptr, true}, a, b, BUG(memset) ? BUG_no_wait : bug);
}
"""


def test_overlapping_kernels() -> None:
    a, b = torch.zeros(64), torch.zeros(64)
    for case in (0, "memset"):  # a memset is no kernel, so nothing overlaps it
        run(compiled(OVERLAP), a, b, case=case)
        assert torch.equal(b, 2 * torch.arange(64.0))
    message = r"reads address 0x\w+ \(inside tensor 0\) at kernel.cpp:\d+, which the previous kernel writes"
    faults(compiled(OVERLAP), message, a, b, case="no_wait")
    faults(compiled(OVERLAP), message, a, b, case="wait_elsewhere")
    faults(compiled(OVERLAP), r"fence_async_global is missing: .*\(inside tensor 0\)", a, b, case="fence")


OVERLAPPED_FIRST = """
__global__ void only(const float* a, float* b, int bug) {
    const float early = BUG(read) ? a[threadIdx.x] : 0.f;
    if (BUG(write)) b[threadIdx.x] = 0.f;
    if (!BUG(no_wait)) wait_for_previous_kernel();
    b[threadIdx.x] = a[threadIdx.x] + early;
}
extern "C" int start(void** p, int bug) {
    const auto a = static_cast<const float*>(p[0]);
    return launch(only, Launch{dim3(1), 64, 0, nullptr, true}, a, static_cast<float*>(p[1]), bug);
}
"""


def test_what_an_overlapping_first_kernel_may_touch() -> None:
    """Whoever ran before it may still read and write anything."""
    a, b = torch.ones(64), torch.zeros(64)
    run(compiled(OVERLAPPED_FIRST), a, b, case=0)
    assert torch.equal(a, b)
    for case, verb in (("read", "reads"), ("write", "writes"), ("no_wait", "reads")):
        faults(compiled(OVERLAPPED_FIRST), f"{verb} address .*, which the previous kernel writes", a, b, case=case)


REGISTER_FILE = """
__global__ void registers(int bug) {
    if (threadIdx.x < 128) {
        give_registers<40>();
    } else if (BUG(too_many)) {
        take_registers<240>();
    } else if (BUG(some_threads)) {
        if (threadIdx.x < 160) take_registers<232>();
    } else if (BUG(take_less)) {
        take_registers<160>();
    } else {
        take_registers<232>();
    }
}
extern "C" int start(void**, int bug) { return launch(registers, Launch{dim3(1), 384, 0, nullptr, false}, bug); }
"""


def test_registers() -> None:
    run(compiled(REGISTER_FILE))
    faults(compiled(REGISTER_FILE), "520 registers a thread together, the block started with 504", case="too_many")
    faults(compiled(REGISTER_FILE), "not by all threads of warpgroup", case="some_threads")
    faults(compiled(REGISTER_FILE), "from 168 registers to 160", case="take_less")
