"""Gradients of a call that goes straight to the kernels, past PyTorch's dispatcher (``ops.py`` has the other way)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from cosattn import host
from cosattn.errors import UnsupportedError
from cosattn.plan import Gradients, Plan

NO_DOUBLE_BACKWARD = (
    "cosattn has no second derivative: the backward pass of cosine_attention was differentiated (create_graph=True, "
    "torch.func.hessian or a gradient penalty). Way out: cosattn.reference.cosine_attention_reference, which PyTorch "
    "differentiates any number of times, with O(S^2) memory."
)


class Attention(torch.autograd.Function):
    """cosine attention of ready inputs (``Plan.ready``): returns out, or (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Plan, bool | None, bool],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        out, lse = how[0].forward(q, k, v, mask, bias, scale, True)
        ctx.save_for_backward(q, k, v, mask, bias, scale, out, lse)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return (out, lse) if how[2] else out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None = None) -> tuple[Any, ...]:
        q, k, v, mask, bias, scale, out, lse = ctx.saved_tensors
        plan, deterministic, _ = ctx.how
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        _, _, _, _, _, bias_grad, scale_grad = ctx.needs_input_grad
        dq, dk, dv, dbias, dscale = _gradients(plan)(
            q, k, v, mask, bias, scale, out, lse, dout, dlse, deterministic, bias_grad, scale_grad
        )
        if dscale is not None and scale is not None:
            dscale = dscale.view(scale.shape)
        return None, dq, dk, dv, None, dbias, dscale


attention: Callable[..., Any] = super(torch.autograd.Function, Attention).apply
"""``Attention.apply`` past its look for torch.func transforms in Python: ``functional.py`` has looked already."""


class AttentionGradients(torch.autograd.Function):
    """``Plan.backward``, whose own gradient is an error with a way out."""

    @staticmethod
    def forward(ctx: FunctionCtx, plan: Plan, *arguments: Any) -> Gradients:
        return plan.backward(*arguments)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Any, ...]:
        raise UnsupportedError(NO_DOUBLE_BACKWARD)


_differentiable_gradients: Callable[..., Any] = AttentionGradients.apply


def _gradients(plan: Plan) -> Callable[..., Gradients]:
    if torch.is_grad_enabled():  # create_graph=True: the gradients must refuse to be differentiated again
        return partial(_differentiable_gradients, plan)
    return plan.backward


def gradients_for_host(offer: bool, plan: Plan, *arguments: Any) -> Gradients | None:
    """The backward pass of a call that the host extension served, for which it has no plan.

    With ``offer`` it is given one where there can be one, and None says that it should look again.
    """
    if offer and not torch.is_grad_enabled():
        q, k, v, mask, bias, _, out, _, dout, _, deterministic, bias_grad, _ = arguments
        dout = torch.zeros_like(out) if dout is None else dout
        if host.offer_backward(plan, q, k, v, mask, bias, out, dout, deterministic, bias_grad):
            return None
    return _gradients(plan)(*arguments)
