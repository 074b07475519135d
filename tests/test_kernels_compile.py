"""Rendered kernels through nvcc to machine code, without a GPU: spills, and the instructions that make speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator.check import Problem, specs
from sass import Cubin, compile_source, compile_spec, nvdisasm

from cosattn import toolchain
from cosattn.arch import ARCHS
from cosattn.errors import ToolchainError
from cosattn.families import family_of, few_rows
from cosattn.spec import KernelSpec

PROBLEMS = [
    *(
        Problem(dtype=dtype, d=64, arch=arch)
        for dtype in ("bfloat16", "float16", "float32")
        for arch in ("sm80", "sm90")
    ),
    *(Problem(dtype=dtype, d=128, arch="sm90", causal=True) for dtype in ("bfloat16", "float16", "float32")),
    *(Problem(dtype=dtype, d=256, arch="sm89") for dtype in ("bfloat16", "float32")),
    Problem(d=128, arch="sm80"),
    Problem(d=8, arch="sm89", causal=True),
    Problem(d=40, dv=24, arch="sm80", groups=5),
    Problem(d=192, dv=128, arch="sm90", causal=True),
    Problem(d=64, arch="sm90", mask=True),
    Problem(d=32, arch="sm90", bias="bfloat16", mask=True),
    Problem(d=32, arch="sm90", bias="bfloat16", pair_mask=(1, False, True, True)),
    Problem(d=64, arch="sm90", bias="float32", pair_mask=(1, False, True, True)),
    Problem(dtype="float32", d=32, arch="sm80", pair_mask=(1, False, True, True)),
    Problem(dtype="float16", d=128, arch="sm80", pair_mask=(1, False, True, True), causal=True),
    Problem(dtype="float16", d=64, arch="sm89", bias="float16", causal=True),
    Problem(dtype="float32", d=32, arch="sm80", bias="float32"),
    Problem(d=64, arch="sm80", softmax="online", causal=True, mask=True),
    Problem(d=128, arch="sm80", deterministic=True, causal=True),
    Problem(dtype="float32", d=64, arch="sm89", deterministic=True, mask=True),
    Problem(dtype="float16", d=64, arch="sm80", deterministic=True, bias="float32"),
]
# What the sm80 family serves: on sm90, few queries of narrow heads among it.
SPECS = [
    spec
    for spec in dict.fromkeys(replace(spec, few=few_rows(spec) > 0) for problem in PROBLEMS for spec in specs(problem))
    if family_of(spec) == "sm80"
]
MAIN = {"forward": ["forward"], "backward": ["backward_keys"]}
HMMA = {"bfloat16": "HMMA.16816.F32.BF16", "float16": "HMMA.16816.F32", "float32": "HMMA.1688.F32.TF32"}


# Bytes of spill stores and loads. The kernels use all 255 registers, so some keep a few values around the inner loop.
FEW_REGISTERS = 80
WIDE_FLOAT32 = 2560  # above 128 with 99 KB of shared memory: the sums alone fill the registers


def spill_limit(spec: KernelSpec) -> int:
    """Nothing for the shapes that benchmarks are about."""
    widest = max(spec.head_dim, spec.value_dim)
    if spec.dtype == "float32":
        return WIDE_FLOAT32 if widest > 128 else FEW_REGISTERS if spec.mask or widest == 128 else 0
    plain = spec.softmax == "bounded" and not (spec.mask or spec.pair_mask) and spec.bias is None
    return 0 if plain and (widest <= 64 or spec.arch == "sm90") else FEW_REGISTERS


def _missing_toolchain() -> str:
    try:
        toolchain.find(ARCHS["sm80"], torch.version.cuda)
    except ToolchainError as error:
        return str(error)
    return ""


needs_nvcc = pytest.mark.skipif(bool(_missing_toolchain()), reason=f"no CUDA compiler: {_missing_toolchain()}")
pytestmark = needs_nvcc


@pytest.fixture(scope="module", params=SPECS, ids=[spec.name for spec in SPECS])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[KernelSpec, Cubin]:
    return request.param, compile_spec(request.param, tmp_path_factory.mktemp("cubin"))


def test_registers_and_stack(compiled: tuple[KernelSpec, Cubin]) -> None:
    spec, cubin = compiled
    assert set(MAIN[spec.direction]) <= set(cubin.kernels)
    for name, kernel in cubin.kernels.items():
        assert 0 < kernel.registers <= 255, name
        limit = 0 if name.startswith(("prepare", "finish")) else spill_limit(spec)
        assert kernel.spilled <= limit, f"{name} moves {kernel.spilled} bytes through its stack, {limit} are allowed"
    slow = [line for line in cubin.warnings if "C75" in line]
    assert not slow, "\n".join(slow)


@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")
def test_instructions(compiled: tuple[KernelSpec, Cubin]) -> None:
    spec, cubin = compiled
    for name in MAIN[spec.direction]:
        kernel = cubin.kernels[name]
        assert kernel.instructions[HMMA[spec.dtype]] > 0, "products run on tensor cores"
        assert kernel.count("LDGSTS") > 0, "tiles are copied asynchronously"
        if spec.dtype != "float32":
            assert kernel.count("LDSM") > 0, "fragments are loaded as matrices"
    for name, kernel in cubin.kernels.items():
        assert kernel.instructions, name
        atomics = sum(kernel.count(opcode) for opcode in ("RED", "REDG", "ATOM", "ATOMG"))
        adds = spec.direction == "backward" and not spec.deterministic and name in MAIN["backward"]
        assert (atomics > 0) == adds, f"{name} has {atomics} atomic instructions"


def test_vector_reductions_where_the_architecture_has_them(tmp_path: Path) -> None:
    for arch, opcode in (("sm89", "RED.E.ADD.F32.FTZ.RN.STRONG.GPU"), ("sm90", "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU")):
        _, backward = specs(Problem(d=32, arch=arch))
        cubin = compile_spec(backward, tmp_path)
        if nvdisasm() is not None:
            assert cubin.kernels["backward_keys"].instructions[opcode] > 0


def test_spills_are_found(tmp_path: Path) -> None:
    """So the tests above can fail."""
    source = tmp_path / "kernel.cu"
    source.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) hungry(float* p) {
            float x[64];
        #pragma unroll
            for (int i = 0; i < 64; ++i) x[i] = p[i * 1024 + threadIdx.x];
        #pragma unroll
            for (int round = 0; round < 3; ++round)
        #pragma unroll
                for (int i = 0; i < 64; ++i) x[i] = x[i] * x[(i * 7 + 1) % 64] + x[(i + 13) % 64];
        #pragma unroll
            for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = x[i];
        }
        """
    )
    cubin = compile_source(source, ARCHS["sm80"])
    kernel = cubin.kernels["hungry"]
    assert kernel.spilled > 0
    assert kernel.stack > 0
    assert any("spilled" in warning for warning in cubin.warnings)
    if nvdisasm() is not None:
        assert kernel.count("LDL") > 0


@pytest.mark.parametrize("used_before", [False, True])
def test_arrivals_that_overtake_loads_are_found(used_before: bool, tmp_path: Path) -> None:
    """So those who ask for none can fail."""
    if nvdisasm() is None:
        pytest.skip("what an instruction waits for is read by nvdisasm: pip install nvidia-cuda-nvdisasm")
    source = tmp_path / "kernel.cu"
    use = "if (r[3] == 7) *p = 1;"
    source.write_text(
        f"""
        __global__ void reader(unsigned* p) {{
            extern __shared__ unsigned char tile[];
            const unsigned at = unsigned(__cvta_generic_to_shared(tile));
            unsigned r[4];
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];"
                         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at + threadIdx.x * 16) : "memory");
            {use if used_before else ""}
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
            p[threadIdx.x] = r[0] + r[1] + r[2] + r[3];
        }}
        """
    )
    assert (compile_source(source, ARCHS["sm90"]).kernels["reader"].overtaking == []) == used_before
