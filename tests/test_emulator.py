"""The emulator itself: it computes what the instructions define, and reports the bugs it exists for.

Every planted bug differs from a kernel that passes by the one line under test.
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from emulator import build
from emulator.harness import KernelFault, Library
from emulator.memory import Guarded

SEEDS = range(6)

PRELUDE = """
#include "launch.cuh"
#include "ptx.cuh"
"""


def run(
    body: str, *tensors: torch.Tensor, threads: int = 64, blocks: int = 1, shared: int = 4096, seed: int = 0
) -> None:
    """Run a kernel whose parameters are the tensors ``a``, ``b``, ``c``, ... as float pointers."""
    names = "abcdef"[: len(tensors)]
    parameters = ", ".join(f"float* {name}" for name in names)
    arguments = "".join(f", static_cast<float*>(p[{i}])" for i in range(len(names)))
    source = f"""{PRELUDE}
__global__ void kernel({parameters}) {{
    SHARED_MEMORY(shared);
    float* s = reinterpret_cast<float*>(shared);
    const int t = threadIdx.x, lane = t % 32;
    (void)s, (void)lane;
    {body}
}}
extern "C" int start(void** p) {{
    return launch(kernel, Launch{{dim3({blocks}), {threads}, {shared}, nullptr, false}}{arguments});
}}
"""
    library = Library(build.library(source))
    memory = Guarded()
    inside = [memory.copy(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
    library.configure(seed, patience_s=1)
    library.check(library.symbols.start((ctypes.c_void_p * 6)(*(tensor.data_ptr() for tensor in inside))), memory)
    for tensor, result in zip(tensors, inside, strict=True):
        tensor.copy_(result)


def faults(body: str, match: str, *tensors: torch.Tensor, **options: int) -> None:
    """Every order of threads ends in the fault."""
    for seed in SEEDS:
        with pytest.raises(KernelFault, match=match):
            run(body, *tensors, seed=seed, **options)


# ---- what instructions compute --------------------------------------------------------------------------------------

FRAGMENTS = """
    const int g = lane / 4, q = lane % 4;
    float c[4] = {{}};
    {load}
    {multiply}
    b[g * 8 + 2 * q] = c[0], b[g * 8 + 2 * q + 1] = c[1];
    b[(g + 8) * 8 + 2 * q] = c[2], b[(g + 8) * 8 + 2 * q + 1] = c[3];
"""
# a holds A (16, 16) then B (8, 16), so the result is A B^T; the inputs reach shared memory as 16-bit rows.
LDMATRIX = """
    uint16_t* const h = reinterpret_cast<uint16_t*>(shared);
    for (int i = lane; i < 24 * 16; i += 32) h[i] = uint16_t(pack2<{type}>(a[i], 0.f));
    __syncwarp();
    uint32_t x[4], y[4];
    load_matrix_x4(x, h + (lane % 16) * 16 + lane / 16 * 8);
    load_matrix_x4(y, h + 16 * 16 + (lane % 8) * 16 + lane / 8 % 2 * 8);
"""


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_ldmatrix_and_mma_multiply_matrices(name: str, dtype: torch.dtype) -> None:
    a = torch.randn(24, 16).to(dtype).float()
    c = torch.empty(16, 8)
    body = FRAGMENTS.format(load=LDMATRIX.format(type=name), multiply=f"mma_m16n8k16<{name}>(c, x, y[0], y[1]);")
    run(body, a, c, threads=32)
    torch.testing.assert_close(c, a[:16] @ a[16:].T, rtol=1e-5, atol=1e-5)


def test_wrong_fragment_is_a_wrong_result() -> None:
    a = torch.randn(24, 16).bfloat16().float()
    c = torch.empty(16, 8)
    body = FRAGMENTS.format(load=LDMATRIX.format(type="bf16"), multiply="mma_m16n8k16<bf16>(c, x, y[1], y[0]);")
    run(body, a, c, threads=32)
    assert (c - a[:16] @ a[16:].T).norm() > 0.5 * c.norm()


def test_transposed_ldmatrix() -> None:
    source = torch.arange(256.0).reshape(16, 16)
    result = torch.empty(16, 16)
    run(
        """
        uint16_t* const h = reinterpret_cast<uint16_t*>(shared);
        for (int i = lane; i < 256; i += 32) h[i] = uint16_t(pack2<f16>(a[i], 0.f));
        __syncwarp();
        uint32_t x[4];
        load_matrix_x4_transposed(x, h + (lane % 16) * 16 + lane / 16 * 8);
        for (int m = 0; m < 4; ++m) {
            const float2 pair = unpack2<f16>(x[m]);
            float* const row = b + (m / 2 * 8 + lane / 4) * 16 + m % 2 * 8 + lane % 4 * 2;
            row[0] = pair.x, row[1] = pair.y;
        }
        """,
        source,
        result,
        threads=32,
    )
    assert torch.equal(result, source.T)


def test_tf32_operands_are_truncated_and_sums_are_not_rounded_up() -> None:
    one_and_a_bit = torch.full((16, 8), 1 + 2.0**-11)
    c = torch.empty(16, 8)
    load = "const float x[4] = {a[lane], a[lane], a[lane], a[lane]};"
    run(FRAGMENTS.format(load=load, multiply="mma_m16n8k8_tf32(c, x, a[0], a[0]);"), one_and_a_bit, c, threads=32)
    assert torch.equal(c, torch.full((16, 8), 8.0))
    load = "const float x[4] = {1.f, 1.f, 1.f, 1.f}; c[0] = c[1] = c[2] = c[3] = 16777214.f;"
    run(FRAGMENTS.format(load=load, multiply="mma_m16n8k8_tf32(c, x, 0.475f, 0.475f);"), one_and_a_bit, c, threads=32)
    assert torch.equal(c, torch.full((16, 8), 16777216.0))  # 4 x 0.475 twice: 16777215.9 -> 5, 16777216.9 -> 6


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_round_to_nearest_even(name: str, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype).float()
    neighbours = torch.cat([values, values * (1 + 2.0**-9), values * (1 - 2.0**-12), values + 2.0**-25])
    x = torch.cat([neighbours, torch.randn(1024)]).clone()
    rounded, wide = torch.empty_like(x), torch.empty_like(x)
    body = f"""
    for (int i = t; i < {x.numel()}; i += 64) {{
        const uint32_t packed = pack2<{name}>(a[i], -a[i]);
        b[i] = unpack2<{name}>(packed).x, c[i] = unpack2<{name}>(packed).y;
    }}"""
    run(body, x, rounded, wide)
    torch.testing.assert_close(rounded, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, -x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_shuffles_and_votes() -> None:
    result = torch.empty(6, 32)
    run(
        """
        a[lane] = __shfl_xor_sync(0xffffffffu, lane, 5);
        a[32 + lane] = __shfl_sync(0xffffffffu, lane, 3, 8);
        a[64 + lane] = __shfl_up_sync(0xffffffffu, lane, 2, 16);
        a[96 + lane] = __shfl_down_sync(0xffffffffu, lane, 1);
        a[128 + lane] = __popc(__ballot_sync(0xffffffffu, lane % 3 == 0));
        a[160 + lane] = __syncthreads_count(lane < 7);
        """,
        result,
        threads=32,
    )
    lanes = torch.arange(32)
    up = torch.where(lanes % 16 < 2, lanes, lanes - 2)
    expected = [
        lanes ^ 5,
        lanes // 8 * 8 + 3,
        up,
        (lanes + 1).clamp(max=31),
        torch.full((32,), 11),
        torch.full((32,), 7),
    ]
    assert torch.equal(result, torch.stack(expected).float())


def test_every_block_runs_once_in_an_order_that_depends_on_the_seed() -> None:
    orders = []
    for seed in range(3):
        counter, order = torch.zeros(1), torch.full((40,), -1.0)
        run("if (t == 0) b[blockIdx.x] = atomicAdd(a, 1.f);", counter, order, blocks=40, seed=seed)
        assert order.sort().values.tolist() == list(range(40))
        orders.append(order.tolist())
    assert orders[0] != orders[1] != orders[2]


# ---- planted bugs ---------------------------------------------------------------------------------------------------

REVERSE = """
    s[t] = a[t];
    {barrier}
    b[t] = s[63 - t];
"""


def test_missing_syncthreads() -> None:
    a, b = torch.randn(64), torch.empty(64)
    for seed in SEEDS:
        run(REVERSE.format(barrier="__syncthreads();"), a, b, seed=seed)
        assert torch.equal(b, a.flip(0))
    faults(REVERSE.format(barrier=""), r"race in shared memory: (reads|writes) byte \d+ at kernel.cpp:\d+", a, b)
    faults(REVERSE.format(barrier="__syncwarp();"), "with no barrier between", a, b)


def test_missing_syncwarp() -> None:
    a, b = torch.randn(64), torch.empty(64)
    body = "s[t] = a[t]; {barrier} b[t] = s[t ^ 1];"
    run(body.format(barrier="__syncwarp();"), a, b)
    faults(body.format(barrier=""), "race in shared memory", a, b)


def test_missing_barrier_before_overwriting() -> None:
    a, b = torch.randn(64), torch.empty(64)
    body = "s[t] = a[t]; __syncthreads(); b[t] = s[63 - t]; {barrier} s[t] = 0.f;"
    run(body.format(barrier="__syncthreads();"), a, b)
    faults(body.format(barrier=""), "race in shared memory", a, b)


NAMED = """
    if (t < 64) { s[t] = a[t]; barrier_sync(1, 64); b[t] = s[63 - t]; }
    else { s[t] = a[t]; barrier_sync(%d, 64); b[t] = s[191 - t]; }
"""


def test_named_barriers_order_only_who_comes_to_them() -> None:
    a, b = torch.randn(128), torch.empty(128)
    for seed in SEEDS:
        run(NAMED % 2, a, b, threads=128, seed=seed)
        assert torch.equal(b, a.view(2, 64).flip(1).flatten())
    across = "s[t] = a[t]; barrier_sync(1 + t / 64, 64); b[t] = s[127 - t];"
    faults(across, "race in shared memory", a, b, threads=128)


COPY = """
    copy_async16(shared + 16 * t, a + 4 * t, true);
    copy_async_commit();
    {wait}
    {barrier}
    for (int i = 0; i < 4; ++i) b[4 * t + i] = s[{index}];
"""
OWN, OTHER = "4 * t + i", "255 - (4 * t + i)"


def test_missing_wait_for_a_copy() -> None:
    a, b = torch.randn(256), torch.empty(256)
    run(COPY.format(wait="copy_async_wait<0>();", barrier="", index=OWN), a, b)
    assert torch.equal(a, b)
    faults(COPY.format(wait="", barrier="", index=OWN), "while the copy_async of thread .* is under way", a, b)
    faults(COPY.format(wait="copy_async_wait<1>();", barrier="", index=OWN), "is under way", a, b)


def test_waiting_for_a_copy_is_not_a_barrier() -> None:
    a, b = torch.randn(256), torch.empty(256)
    run(COPY.format(wait="copy_async_wait<0>();", barrier="__syncthreads();", index=OTHER), a, b)
    assert torch.equal(a.flip(0), b)
    faults(COPY.format(wait="copy_async_wait<0>();", barrier="", index=OTHER), "race|under way", a, b)
    faults(COPY.format(wait="__syncthreads();", barrier="copy_async_wait<0>();", index=OTHER), "race|under way", a, b)


def test_invalid_copies_write_zeros_and_read_nothing() -> None:
    a, b = torch.randn(4), torch.empty(256)
    body = COPY.format(wait="copy_async_wait<0>();", barrier="", index=OWN)
    run(body.replace("true", "t == 0"), a, b)
    assert torch.equal(b, torch.cat([a, torch.zeros(252)]))
    faults(body, "bytes behind the end of a", a, b)


def test_shared_memory_starts_as_nan_in_every_block() -> None:
    result = torch.zeros(4, 64)
    run("a[64 * blockIdx.x + t] = s[t]; s[t] = 1.f;", result, blocks=4)
    assert result.isnan().all()


@pytest.mark.parametrize("index", ["t + 1", "t - 1", "t + 1000", "t - 1000"])
@pytest.mark.parametrize("statement", ["s[{}] = 0.f;", "a[t] = s[{}];"])
def test_shared_memory_out_of_bounds(statement: str, index: str) -> None:
    a = torch.empty(64)
    run(statement.format("t"), a, shared=256)
    faults(statement.format(index), "shared memory out of bounds", a, shared=256)


def test_fragment_loads_and_copies_out_of_bounds_or_misaligned() -> None:
    a = torch.randn(64)
    load = "uint32_t r[4]; load_matrix_x4(r, shared + lane * 16 + {});"
    run(load.format(0), shared=512)
    faults(load.format(16), "load_matrix_x4 at .*: shared memory out of bounds", shared=512)
    faults(load.format(8), "load_matrix_x4 at .*: address is not 16-byte aligned", shared=1024)
    faults("copy_async16(shared + 4096, a, true);", "copy_async at .*: shared memory out of bounds", a)
    faults("copy_async16(shared, a + 1, true);", "source.* is not 16-byte aligned", a)
    faults("reduce_add4(a + 2, 1.f, 1.f, 1.f, 1.f);", "reduce_add4 at .* is not 16-byte aligned", a)
    faults("*reinterpret_cast<float4*>(s + 1) = make_float4(0, 0, 0, 0);", "misaligned|race", a)


@pytest.mark.parametrize(
    ("index", "place"), [(mmap.PAGESIZE // 4, r"\d+ bytes behind the end of b"), (-64, r"\d+ bytes before b")]
)
def test_global_memory_out_of_bounds(index: int, place: str) -> None:
    a, b = torch.randn(64), torch.empty(mmap.PAGESIZE // 4)  # a whole page, so that b has a guard on both sides
    faults(f"b[{index} + t] = a[t];", rf"access violation at address 0x\w+ \({place}\) at kernel.cpp:\d+", a, b)


def test_divergent_collective() -> None:
    a = torch.empty(64)
    shuffle = "a[t] = __shfl_xor_sync(0xffffffffu, t, 1);"
    faults(f"if (lane < 16) {shuffle} else __syncwarp();", "divergent warp: lane", a)
    faults(f"if (lane < 16) {shuffle}\nelse {shuffle}", "divergent warp: lane", a)
    faults("if (lane < 16) __syncwarp();", "deadlock: .*exit.*__syncwarp|deadlock: .*__syncwarp.*exit", a)
    faults("a[t] = __shfl_xor_sync(0x0000ffffu, t, 1);", "a warp mask other than", a)


def test_divergent_barrier_and_deadlock() -> None:
    faults("if (t < 32) __syncthreads();\nelse __syncthreads();", "divergent barrier")
    faults("if (t < 32) __syncthreads();", r"deadlock: .*32 threads .*at __syncthreads kernel.cpp:\d+")
    faults("barrier_sync(1 + t / 32, 64);", "deadlock: .*barrier_sync")
    faults("barrier_sync(1, t < 32 ? 32 : 64);", "divergent barrier|deadlock")
    faults("barrier_sync(16, 64);", "there is no barrier 16")


def test_endless_loop() -> None:
    with pytest.raises(KernelFault, match=r"still running after 1 s at kernel\.cpp:\d+"):
        run("volatile float* flag = a;\nwhile (*flag == 0.f) {}", torch.zeros(1))


def test_stack_overflow() -> None:
    with pytest.raises(KernelFault, match="stack overflow"):
        run("volatile float big[100000];\nfor (int i = 0; i < 100000; ++i) big[i] = a[0];", torch.zeros(1))


def test_launch_limits() -> None:
    with pytest.raises(KernelFault, match="a block of 48 threads"):
        run("", threads=48)
    with pytest.raises(KernelFault, match="300000 bytes of shared memory"):
        run("", shared=300_000)


def test_the_machine_is_usable_after_a_fault() -> None:
    a, b = torch.randn(256), torch.empty(256)
    faults(COPY.format(wait="", barrier="", index=OWN), "under way", a, b)
    run(COPY.format(wait="copy_async_wait<0>();", barrier="", index=OWN), a, b)
    assert torch.equal(a, b)


def test_compiler_errors_are_reported() -> None:
    with pytest.raises(build.CompileError, match="no_such_function"):
        run("no_such_function();")
