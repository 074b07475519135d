"""How far a result may be from the float64 reference, and what other implementations reach on the same inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cosattn.reference import l2norm, repeated

TOLERANCE = {  # relative Frobenius error of (out, gradients) on random normal inputs
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 5e-6),
    torch.float16: (1.0e-3, 1.5e-3),
    torch.bfloat16: (6e-3, 9e-3),
}
SDPA_RATIO = 1.25


def relative_error(x: Tensor, exact: Tensor) -> float:
    """``||x - exact|| / ||exact||``, Frobenius, in float64; 0 when both are 0."""
    error, size = _norm(x.double() - exact.double()), _norm(exact)
    return error / size if size else (0.0 if error == 0 else math.inf)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Case:
    """One attention problem in canonical form, without gradients: what every implementation below takes."""

    q: Tensor  # (B, Hq, Sq, D)
    k: Tensor  # (B, Hkv, Sk, D)
    v: Tensor  # (B, Hkv, Sk, Dv)
    scale: Tensor  # (Hq,)
    groups: int
    l2norm_qk: bool
    visible: Tensor  # bool, broadcastable to (B, Hq, Sq, Sk)
    bias: Tensor | None  # (B|1, Hq|1, Sq, Sk)
    dout: Tensor  # (B, Hq, Sq, Dv)
    dlse: Tensor  # (B, Hq, Sq), zeros when the log-sum-exp is not used

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values, one head per query head."""
        return x.repeat_interleave(self.q.shape[1] // x.shape[1], dim=1)


Results = dict[str, Tensor]
"""``out`` and the gradients ``dq``, ``dk``, ``dv``, perhaps ``dbias`` and ``dscale``, in canonical shapes."""


def rounded_attention(case: Case) -> Results:
    """The textbook computation with the roundings tensor cores force on any implementation.

    Products of operands rounded to the input dtype, everything else float32, the backward pass from rounded P and dS.
    """
    dtype = case.q.dtype
    wide = torch.promote_types(dtype, torch.float32)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    q, k = case.q.to(wide), case.repeated(case.k.to(wide))
    v, dout = case.repeated(case.v.to(wide)), case.dout.to(wide)
    q_unit, k_unit = (l2norm(x, case.groups) if case.l2norm_qk else x for x in (q, k))
    q_low, k_low = rounded(q_unit), rounded(k_unit)
    scale = case.scale.to(wide).view(-1, 1, 1)
    logits = scale * (q_low @ k_low.mT)
    if case.bias is not None:
        logits = logits + repeated(case.bias, q.shape[0]).to(wide)
    p = _softmax(logits, case.visible)
    out = (rounded(p) @ v).to(dtype)
    delta = (dout * out.to(wide)).sum(-1, keepdim=True) - case.dlse.to(wide)[..., None]
    dlogits = rounded(p * (dout @ v.mT - delta))
    dv = rounded(p).mT @ dout
    dq = scale * (dlogits @ k_low)
    dk = (scale * dlogits).mT @ q_low
    dscale = (dlogits * (q_low @ k_low.mT)).sum((0, 2, 3))
    if case.l2norm_qk:
        dq, dk = _norm_backward(dq, q, case.groups), _norm_backward(dk, k, case.groups)
    dk, dv = (x.unflatten(1, (case.k.shape[1], -1)).sum(2) for x in (dk, dv))
    results = {"out": out, "dq": dq.to(dtype), "dk": dk.to(dtype), "dv": dv.to(dtype), "dscale": dscale}
    if case.bias is not None:
        results["dbias"] = _summed(dlogits, case.bias).to(case.bias.dtype)
    return results


def sdpa(case: Case) -> Results:
    """``F.scaled_dot_product_attention`` after ``F.normalize``: the implementation users have today.

    One scale for all heads: SDPA has no other.
    """
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = leaves
    if case.l2norm_qk:
        q, k = (F.normalize(x.unflatten(-1, (case.groups, -1)), dim=-1).flatten(-2) for x in (q, k))
    bias = None
    if case.bias is not None or not case.visible.all():
        bias = torch.zeros((), dtype=q.dtype, device=q.device)
        if case.bias is not None:
            bias = repeated(case.bias, q.shape[0]).to(q.dtype)
        bias = torch.where(case.visible, bias, float("-inf"))
    out = F.scaled_dot_product_attention(
        q, case.repeated(k), case.repeated(v), attn_mask=bias, scale=case.scale[0].item()
    )
    dq, dk, dv = torch.autograd.grad(out, leaves, case.dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def magnitudes(case: Case) -> dict[str, float]:
    """Norms of the sums of absolute values behind each result: rounding errors scale with these where terms cancel."""
    q, k, v, dout = (x.double() for x in (case.q, case.repeated(case.k), case.repeated(case.v), case.dout))
    q_unit, k_unit = (l2norm(x, case.groups) if case.l2norm_qk else x for x in (q, k))
    scale = case.scale.double().view(-1, 1, 1)
    logits = scale * (q_unit @ k_unit.mT) + (0 if case.bias is None else repeated(case.bias, q.shape[0]).double())
    p = _softmax(logits, case.visible)
    out = p @ v.abs()
    delta = (dout.abs() * out).sum(-1, keepdim=True) + case.dlse.double().abs()[..., None]
    dlogits = p * (dout.abs() @ v.abs().mT + delta)
    dq, dk = (scale.abs() * dlogits) @ k_unit.abs(), (scale.abs() * dlogits).mT @ q_unit.abs()
    if case.l2norm_qk:
        dq, dk = _over_norm(dq, q, case.groups), _over_norm(dk, k, case.groups)
    dv = p.mT @ dout.abs()
    sizes = {"out": out, "dq": dq, "dk": dk, "dv": dv, "dscale": dlogits.sum((0, 2, 3)) * case.groups}
    if case.bias is not None:
        sizes["dbias"] = _summed(dlogits, case.bias)
    return {name: _norm(value) for name, value in sizes.items()}


def assert_accurate(results: Results, exact: Results, case: Case, *, standard: bool) -> None:
    """Hold ``results`` to the accuracy contract.

    ``standard`` inputs (random normal, one modest scale, more than a handful of keys) must meet the table, or, where
    the table is beyond reach of the dtype, be within 1.25 of what SDPA does. On special inputs (equal keys, zero
    vectors, large scales, one key) terms cancel and logits amplify the rounding of q and k: there the yardsticks are
    the rounded textbook computation and the roundoff of the terms that cancel. So they are for the gradients of bias
    and scale, which SDPA does not have.
    """
    out_tolerance, grad_tolerance = TOLERANCE[case.q.dtype]
    errors = {name: _norm(value.double() - exact[name]) for name, value in results.items()}
    allowed = {name: (out_tolerance if name == "out" else grad_tolerance) * _norm(exact[name]) for name in results}
    excessive = {name for name in results if not errors[name] <= allowed[name]}
    if standard and excessive & _CORE:
        baseline = sdpa(case)
        for name in excessive & _CORE:
            allowed[name] = max(allowed[name], SDPA_RATIO * _norm(baseline[name].double() - exact[name]))
    special = excessive - _CORE if standard else excessive
    if special:
        baseline, terms = rounded_attention(case), magnitudes(case)
        # exp(logit - lse): both are rounded in the accumulator's type, relative to their size. Tensor cores truncate
        # their sums: the d / 8 steps of a float32 logit lose half an ulp each, of half the logit on average.
        # The logits of q_hat and k_hat, 2 d rounded numbers of 1 / sqrt(d), are off by 2 / sqrt(d) roundoffs of the
        # bound or so; a single row may be luckier in the textbook, which rounds q_hat without the scale.
        bound = case.groups * case.scale.abs().max().item()
        wide = torch.promote_types(case.q.dtype, torch.float32)
        roundings = 4 + case.q.shape[-1] / 16
        inputs = 2 * (1 + bound / math.sqrt(case.q.shape[-1])) * unit_roundoff(case.q.dtype)
        roundoff = inputs + roundings * bound * unit_roundoff(wide)
        for name in special:
            textbook = _norm(baseline[name].double() - exact[name])
            subnormals = smallest(results[name].dtype) * math.sqrt(exact[name].numel())
            allowed[name] = max(allowed[name], 3 * textbook, roundoff * terms[name], subnormals)
    report = [
        f"{name}: error {errors[name]:.3e} > allowed {allowed[name]:.3e}, size {_norm(exact[name]):.3e}"
        for name in sorted(results)
        if not errors[name] <= allowed[name]
    ]
    assert not report, f"{'standard' if standard else 'special'} inputs\n" + "\n".join(report)


_CORE = frozenset({"out", "dq", "dk", "dv"})


def smallest(dtype: torch.dtype) -> float:
    """Spacing of the numbers nearest to 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _summed(dlogits: Tensor, bias: Tensor) -> Tensor:
    """The gradient of a bias that is repeated over the batch and broadcast over the rest."""
    return dlogits.unflatten(0, (-1, bias.shape[0])).sum(0).sum_to_size(bias.shape)


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def _softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Zeros in a row that sees nothing."""
    return logits.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)


def _norm_backward(gradient: Tensor, x: Tensor, groups: int) -> Tensor:
    """Vector-Jacobian product of ``l2norm``."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (result,) = torch.autograd.grad(l2norm(leaf, groups), leaf, gradient)
    return result


def _over_norm(gradient: Tensor, x: Tensor, groups: int) -> Tensor:
    """``gradient`` over the norms of the chunks of ``x``."""
    chunks = x.unflatten(-1, (groups, -1))
    norm = chunks.norm(dim=-1, keepdim=True)
    return (gradient.unflatten(-1, (groups, -1)) / norm.masked_fill(norm <= 1e-12, math.inf)).flatten(-2)
