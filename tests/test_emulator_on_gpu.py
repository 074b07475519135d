"""The emulator against a GPU: the same kernels on the same inputs give the same results but for rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import relative_error
from emulator import harness

from cosattn import cosine_attention
from cosattn.arch import arch_of

pytestmark = pytest.mark.gpu

CASES = [
    (torch.float32, 64, True),
    (torch.float32, 128, False),
    (torch.bfloat16, 128, True),
    (torch.float16, 40, False),
]
LIMITS = {torch.float32: 1.5e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Results may differ by a rounding here and there: exp2 and the order of additions are not those of the GPU."""


@pytest.mark.parametrize(("dtype", "head_dim", "causal"), CASES)
def test_same_inputs_same_results(dtype: torch.dtype, head_dim: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    shapes = ((1, 4, 150, head_dim), (1, 2, 190, head_dim), (1, 2, 190, head_dim), (1, 4, 150, head_dim))
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    leaves = [x.cuda().requires_grad_() for x in (q, k, v)]
    out, lse = cosine_attention(*leaves, causal=causal, return_lse=True)
    gradients = torch.autograd.grad(out, leaves, dout.cuda())
    out, lse = out.detach().cpu(), lse.detach().cpu()

    arch = arch_of(torch.cuda.get_device_capability())
    assert arch is not None
    spec = replace(harness.spec_of("forward", q, k, v, causal=causal), arch=arch.name)
    forward = harness.run_forward(spec, q, k, v)
    backward = harness.run_backward(replace(spec, direction="backward"), q, k, v, out, lse, dout)
    found = {"out": forward.out, "lse": forward.lse, "dq": backward.dq, "dk": backward.dk, "dv": backward.dv}
    expected = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), (x.cpu() for x in gradients), strict=True))}
    errors = {name: relative_error(found[name], expected[name]) for name in found}
    print(f"\n{spec.name}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert all(error <= LIMITS[dtype] for error in errors.values()), errors
