"""The registered operators ``torch.ops.cosattn``: schemas, implementations for CPU, CUDA and fake tensors, gradients.

Both take canonical inputs: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), mask (B, Sk) or (W, Hq, Sq, Sk),
bias (W, Hq or 1, Sq, Sk), where W divides B and entry b reads entry b % W, scale_tensor (Hq,) or None for the constant
``scale``. ``functional.py`` checks arguments and brings them to this form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosattn import cpu, fallback
from cosattn.arguments import Sizes
from cosattn.autograd import NO_DOUBLE_BACKWARD
from cosattn.errors import UnsupportedError
from cosattn.plan import MISSING, Plan, empty_like_stored, made_ready, metadata, plans, realigned, remember

FORWARD = "cosattn::attention_forward"
BACKWARD = "cosattn::attention_backward"

torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? scale_tensor, float scale, int groups, "
    "bool causal, bool l2norm, bool online, bool deterministic) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    BACKWARD,
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? scale_tensor, "
    "Tensor out, Tensor lse, float scale, int groups, bool causal, bool l2norm, bool online, bool deterministic, "
    "bool bias_grad, bool scale_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dscale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
attention_forward = torch.ops.cosattn.attention_forward.default
attention_backward = torch.ops.cosattn.attention_backward.default


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
) -> Plan | None:
    key = metadata(q, k, v, mask, bias, scale, groups, causal, l2norm, online)
    found = plans.get(key, MISSING)
    if found is not MISSING:
        return found
    return remember(key, _new_plan, q, k, v, mask, bias, scale, groups, causal, l2norm, online)


def _new_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
) -> Plan:
    return Plan(
        _sizes(q, k, v),
        q,
        k,
        v,
        mask,
        bias,
        scale,
        groups=groups,
        causal=causal,
        l2norm=l2norm,
        softmax="online" if online else "bounded",
        bias_batch_dim=False,
    )


def _cuda_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v, bias, scale_tensor = _ready(q, k, v, bias, scale_tensor)
    factor = scale if scale_tensor is None else scale_tensor
    plan = _plan(q, k, v, mask, bias, factor, groups, causal, l2norm, online)
    if plan is None:
        out, lse = fallback.attention(
            q, k, v, mask, bias, factor, groups=groups, causal=causal, l2norm=l2norm, with_lse=True
        )
        out = stored_like(out, q)
    else:
        out, lse = plan.forward(q, k, v, mask, bias, scale_tensor, True)
    assert lse is not None
    return out, lse


def _cuda_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
    deterministic: bool,
    bias_grad: bool,
    scale_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, bias, scale_tensor = _ready(q, k, v, bias, scale_tensor)
    factor = scale if scale_tensor is None else scale_tensor
    plan = _plan(q, k, v, mask, bias, factor, groups, causal, l2norm, online)
    if plan is None:
        found = fallback.gradients(
            (q, k, v, mask, bias, factor),
            (dout, dlse),
            groups=groups,
            causal=causal,
            l2norm=l2norm,
            wanted=(bias_grad, scale_grad),
        )
    else:
        found = plan.backward(
            q, k, v, mask, bias, scale_tensor, out, lse, dout, dlse,
            deterministic, bias_grad, scale_grad,
        )  # fmt: skip
    return _results(q, k, v, found)


def _cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    factor = scale if scale_tensor is None else scale_tensor
    out, lse = cpu.forward(q, k, v, mask, bias, factor, groups=groups, causal=causal, l2norm=l2norm)
    return stored_like(out, q), lse


def _cpu_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
    deterministic: bool,
    bias_grad: bool,
    scale_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = cpu.backward(
        q,
        k,
        v,
        mask,
        bias,
        scale if scale_tensor is None else scale_tensor,
        out,
        lse,
        torch.zeros_like(out) if dout is None else dout,
        dlse,
        groups=groups,
        causal=causal,
        l2norm=l2norm,
        needs=(bias_grad, scale_grad),
    )
    return _results(q, k, v, found)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return empty_like_stored(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _fake_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    groups: int,
    causal: bool,
    l2norm: bool,
    online: bool,
    deterministic: bool,
    bias_grad: bool,
    scale_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_like_stored(x, x.shape[3]) for x in (q, k, v))
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_grad else q.new_empty(0)
    dscale = scale_tensor.new_empty(scale_tensor.shape) if scale_tensor is not None and scale_grad else q.new_empty(0)
    return dq, dk, dv, dbias, dscale


def _ready(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the kernels can read in place: copies of what they can not."""
    if bias is not None:
        bias = made_ready(bias, (q.shape[2], k.shape[2]))
    if scale_tensor is not None:
        scale_tensor = scale_tensor.contiguous()
    return realigned(q), realigned(k), realigned(v), bias, scale_tensor


def stored_like(result: Tensor, tensor: Tensor) -> Tensor:
    """``result`` in the storage order of ``tensor``."""
    wanted = empty_like_stored(tensor, result.shape[-1])
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def _results(
    q: Tensor, k: Tensor, v: Tensor, found: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients as the schema wants them: stored like the inputs, and empty tensors for what was not asked for."""
    dq, dk, dv, dbias, dscale = found
    return (
        stored_like(dq, q),
        stored_like(dk, k),
        stored_like(dv, v),
        q.new_empty(0) if dbias is None else dbias.contiguous(),
        q.new_empty(0) if dscale is None else dscale.contiguous(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, bias, scale_tensor, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask, bias, scale_tensor, *output)
    ctx.set_materialize_grads(False)


def _forward_gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    bias_grad, scale_grad = ctx.needs_input_grad[4:6]
    dq, dk, dv, dbias, dscale = attention_backward(dout, dlse, *ctx.saved_tensors, *ctx.options, bias_grad, scale_grad)
    gradients = dq, dk, dv, None, dbias if bias_grad else None, dscale if scale_grad else None
    return *gradients, *(None for _ in ctx.options)


def _backward_gradient(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise UnsupportedError(NO_DOUBLE_BACKWARD)


for _device, _forward, _backward in (("CUDA", _cuda_forward, _cuda_backward), ("CPU", _cpu_forward, _cpu_backward)):
    torch.library.impl(FORWARD, _device, _forward)
    torch.library.impl(BACKWARD, _device, _backward)
torch.library.register_fake(FORWARD, _fake_forward)
torch.library.register_fake(BACKWARD, _fake_backward)
torch.library.register_autograd(FORWARD, _forward_gradient, setup_context=_setup_context)
torch.library.register_autograd(BACKWARD, _backward_gradient)
