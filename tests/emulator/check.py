"""One attention problem through the emulated forward and backward kernels, held against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from accuracy import Case, assert_accurate, relative_error
from torch import Tensor

from cosattn.reference import cosine_attention_reference, repeated
from cosattn.spec import DType, KernelSpec, Softmax
from cosattn.tiles_short import size_class
from cosattn.tiles_sm90_backward import BLOCK_M, apart_class, head_class
from cosattn.tiles_sm90_forward import short_class
from emulator import harness

TORCH = {name: dtype for dtype, name in harness.DTYPES.items()}


@dataclass(frozen=True)
class Problem:
    """What is computed, and with which kernels. The name lists what differs from the defaults."""

    dtype: DType = "bfloat16"
    d: int = 32
    dv: int | None = None
    """None: as ``d``."""
    sq: int = 77
    sk: int | None = None
    """None: as ``sq``."""
    batch: int = 2
    heads: int = 2
    kv_heads: int | None = None
    """None: as ``heads``."""
    groups: int = 1
    l2norm: bool = True
    causal: bool = False
    mask: bool = False
    """Hides about a third of the keys of the first batch, and all keys of the last."""
    pair_mask: tuple[int, bool, bool, bool] | None = None
    """W, and whether the mask differs between heads, between queries and between keys; hides about a third."""
    bias: DType | None = None
    bias_shape: Literal["hqk", "bqk", "bhqk", "qk"] = "hqk"
    bias_period: int | None = None
    """W of a bias that repeats over the batch; None: as ``bias_shape`` says."""
    bias_grad: bool = True
    scale: float | None = None
    """None: 8 / groups; 0: a tensor of a value per head."""
    softmax: Softmax | None = None
    deterministic: bool = False
    dlse: bool = False
    strided: bool = False
    """(B, S, H, D) storage, expanded keys."""
    arch: str = "sm80"
    short: bool = False
    """The kernels for short sequences, where they are able to serve it."""
    in_place: bool = False
    """Forward up to head dim 96: keys are normalised where blocks meet them."""
    by_head: bool = False
    """Backward: a head a block, whose queries' sums stay in shared memory."""
    apart: bool = False
    """Backward up to head dim 128: dQ by a kernel of its own."""

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return "_".join(name if value is True else f"{name}-{value}" for name, value in changed) or "default"


@dataclass
class Tensors:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scale: float | Tensor
    dlse: Tensor | None


def tensors_of(problem: Problem, seed: int = 0) -> Tensors:
    """Random inputs, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype = TORCH[problem.dtype]
    heads, kv_heads = problem.heads, problem.kv_heads or problem.heads
    sq, sk, dv = problem.sq, problem.sk or problem.sq, problem.dv or problem.d

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def heads_of(n: int, length: int, width: int) -> Tensor:
        x = normal(problem.batch, length, n, width) if problem.strided else normal(problem.batch, n, length, width)
        return x.to(dtype).transpose(1, 2) if problem.strided else x.to(dtype)

    q, k, v = heads_of(heads, sq, problem.d), heads_of(kv_heads, sk, problem.d), heads_of(kv_heads, sk, dv)
    if problem.strided:
        v = v[:1].expand_as(v)
    if not problem.l2norm:
        q, k = (F.normalize(x.float(), dim=-1).to(dtype) for x in (q, k))
    mask = None
    if problem.mask:
        mask = torch.rand(problem.batch, sk, generator=generator) > 0.3
        mask[0, 0] = True
        mask[-1] = problem.batch == 1
    if problem.pair_mask:
        period, *differs = problem.pair_mask
        shape = [full if on else 1 for on, full in zip(differs, (heads, sq, sk), strict=True)]
        mask = torch.rand(period, *shape, generator=generator) > 0.3
        mask[..., 0, :] = False  # a row that sees nothing
        mask = mask.expand(-1, heads, sq, sk)
    bias = None
    if problem.bias:
        sizes = {"b": problem.batch, "h": heads}
        leading = [sizes[axis] if axis in problem.bias_shape else 1 for axis in "bh"]
        leading[0] = problem.bias_period or leading[0]
        bias = normal(*leading, sq, sk).to(TORCH[problem.bias])
    scale: float | Tensor = 8.0 / problem.groups if problem.scale is None else problem.scale
    if scale == 0:
        scale = torch.linspace(4.0, 9.0, heads)
    dlse = normal(problem.batch, heads, sq) if problem.dlse else None
    return Tensors(q, k, v, heads_of(heads, sq, dv), mask, bias, scale, dlse)


def specs(problem: Problem) -> Iterator[KernelSpec]:
    """The forward and the backward spec."""
    t = tensors_of(problem)
    forward = harness.spec_of(
        "forward",
        t.q,
        t.k,
        t.v,
        arch=problem.arch,
        scale=t.scale,
        groups=problem.groups,
        l2norm=problem.l2norm,
        causal=problem.causal,
        mask=t.mask,
        bias=t.bias,
        softmax=problem.softmax,
    )
    backward = replace(
        forward,
        direction="backward",
        deterministic=problem.deterministic,
        bias_grad=problem.bias is not None and problem.bias_grad,
    )
    if problem.in_place:
        forward = replace(forward, short=short_class(forward, t.k.shape[2]))
    if problem.by_head:
        rows = t.q.shape[1] // t.k.shape[1] * -(-t.q.shape[2] // BLOCK_M) * BLOCK_M
        backward = replace(backward, short=head_class(backward, rows))
    if problem.apart:
        backward = replace(backward, short=apart_class(backward, t.k.shape[2]))
    for spec in (forward, backward):
        yield replace(spec, short=size_class(spec, t.q.shape[2], t.k.shape[2])) if problem.short else spec


def exact(problem: Problem, t: Tensors) -> dict[str, Tensor]:
    """The results in float64."""
    leaves = {name: getattr(t, name).double().requires_grad_() for name in ("q", "k", "v")}
    if t.bias is not None:
        leaves["bias"] = t.bias.double().requires_grad_()
    bias, mask = leaves.get("bias"), t.mask
    if isinstance(t.scale, Tensor):
        leaves["scale"] = t.scale.double().requires_grad_()
    out, lse = cosine_attention_reference(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        scale=leaves.get("scale", t.scale),
        groups=problem.groups,
        causal=problem.causal,
        mask=mask if mask is None or mask.ndim == 2 else mask[None],
        attn_bias=None if bias is None else bias[None],
        l2norm_qk=problem.l2norm,
        return_lse=True,
    )
    loss = (out * t.dout.double()).sum()
    if t.dlse is not None:
        loss = loss + (lse * t.dlse.double()).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    names = [f"d{name}" for name in leaves]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, gradients, strict=True))}


def computed(problem: Problem, t: Tensors, seed: int = 0) -> dict[str, Tensor]:
    """The results of the kernels; what the mask hides is NaN. Raises harness.KernelFault."""
    forward, backward = specs(problem)
    k, v = t.k, t.v
    if problem.mask:
        hidden = ~t.mask[:, None, :, None]
        k, v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, float("nan"))
    first = harness.run_forward(forward, t.q, k, v, mask=t.mask, bias=t.bias, scale=t.scale, seed=seed)
    second = harness.run_backward(
        backward,
        t.q,
        k,
        v,
        first.out,
        first.lse,
        t.dout,
        dlse=t.dlse,
        mask=t.mask,
        bias=t.bias,
        scale=t.scale,
        want_dscale=isinstance(t.scale, Tensor),
        seed=seed,
    )
    results = {"out": first.out, "lse": first.lse, "dq": second.dq, "dk": second.dk, "dv": second.dv}
    if second.dbias is not None:
        results["dbias"] = second.dbias
    if second.dscale_rows is not None:
        results["dscale"] = second.dscale_rows.double().sum((0, 2))
    return results


def check(problem: Problem, seed: int = 0) -> dict[str, float]:
    """Relative errors. Raises AssertionError when one is beyond the accuracy contract or a kernel misbehaves."""
    t = tensors_of(problem, seed)
    expected, results = exact(problem, t), computed(problem, t, seed)
    lse, expected_lse = results.pop("lse"), expected.pop("lse")
    sees = expected_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~sees), "lse is -inf for exactly the rows that see nothing"
    roundoff = torch.finfo(t.q.dtype).eps * (abs(t.scale) if isinstance(t.scale, float) else t.scale.max().item())
    difference = (lse - expected_lse)[sees].abs().max().item() if sees.any() else 0.0
    assert difference <= roundoff * problem.groups + 2e-5, f"lse is off by {difference:.2e}"
    for name in ("out", "dq"):
        assert not results[name][~sees].any(), f"{name} of a row that sees nothing is 0"
    if problem.mask:
        for name in ("dk", "dv"):
            assert not results[name].transpose(1, 2)[~t.mask].any(), f"{name} of a hidden key is 0"
    scale = t.scale if isinstance(t.scale, Tensor) else torch.full((problem.heads,), t.scale)
    dlse = torch.zeros(t.q.shape[:-1]) if t.dlse is None else t.dlse
    case = Case(t.q, t.k, t.v, scale, problem.groups, problem.l2norm, visible(problem, t), t.bias, t.dout, dlse)
    standard = problem.scale is None and min(problem.sk or problem.sq, problem.sq) > 8 and not problem.dlse
    assert_accurate(results, expected, case, standard=standard)
    return {name: relative_error(x, expected[name]) for name, x in results.items()}


def visible(problem: Problem, t: Tensors) -> Tensor:
    sq, sk = t.q.shape[2], t.k.shape[2]
    visible = torch.ones(t.q.shape[0], 1, sq, sk, dtype=torch.bool)
    if problem.causal:
        visible &= torch.ones(sq, sk, dtype=torch.bool).tril(sk - sq)
    if t.mask is not None:
        visible = visible & (t.mask[:, None, None, :] if problem.mask else repeated(t.mask, t.q.shape[0]))
    return visible


def check_repeats(problem: Problem) -> None:
    """Every result has the same bits whatever the order of threads and blocks."""
    tensors = tensors_of(problem)
    first = computed(problem, tensors, seed=1)
    for seed in (2, 3):
        for name, value in computed(problem, tensors, seed).items():
            assert torch.equal(value, first[name]), name
