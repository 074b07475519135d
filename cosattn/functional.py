"""The public function: checks its arguments and takes the shortest way to the work.

Plain CUDA tensors in eager mode go straight to the kernels: in C++ where the host extension (``host.py``) is there and
knows such a call, else through ``plan.py`` and ``autograd.py``, which check, plan and launch in Python. All else, which
is CPU tensors, torch.compile, fake and meta tensors, tensor subclasses and dispatch modes, goes through the registered
operators (``ops.py``). All ways run the same kernels.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cosattn import arguments, fallback, flops, host
from cosattn.arguments import Sizes, bias_with_four_dimensions, canonical_mask, scale_per_head, with_heads
from cosattn.autograd import attention, gradients_for_host
from cosattn.errors import UnsupportedError
from cosattn.ops import attention_forward
from cosattn.plan import ALIGNMENT, MISSING, Plan, made_ready, metadata, plans, realigned, remember
from cosattn.spec import Softmax, softmax_mode

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None), float, int})
"""Types of arguments that the direct way may serve; subclasses have their own ideas of what an operator does."""


@overload
def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor = ...,
    groups: int = ...,
    causal: bool = ...,
    mask: Tensor | None = ...,
    attn_bias: Tensor | None = ...,
    attn_bias_batch_dim: bool = ...,
    l2norm_qk: bool = ...,
    scale_max: float | None = ...,
    bias_bound: float | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool | None = ...,
) -> Tensor: ...


@overload
def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor = ...,
    groups: int = ...,
    causal: bool = ...,
    mask: Tensor | None = ...,
    attn_bias: Tensor | None = ...,
    attn_bias_batch_dim: bool = ...,
    l2norm_qk: bool = ...,
    scale_max: float | None = ...,
    bias_bound: float | None = ...,
    return_lse: Literal[True],
    deterministic: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...


def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor = 8.0,
    groups: int = 1,
    causal: bool = False,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    attn_bias_batch_dim: bool = False,
    l2norm_qk: bool = True,
    scale_max: float | None = None,
    bias_bound: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose logits are scaled cosine similarities: ``softmax(scale * l2norm(q) @ l2norm(k).T + bias) @ v``.

    Extra memory is linear in the lengths, forward and backward. A row that may attend no key gives exactly 0 and no
    gradient. Empty inputs are legal. Inputs are differentiable once.

    Layout: on CUDA a tensor is read in place when its last dimension is contiguous and its address and other strides
    are multiples of 16 bytes, so ``(B, S, H, D)`` storage viewed as ``(B, H, S, D)`` and expanded tensors cost nothing;
    any other tensor is copied once per call. The result is stored in the dimension order of q.

    Args:
        q: ``(B, Hq, Sq, D)``; or ``(N, Sq, D)``, batch and heads merged, with k and v merged too.
        k: ``(B, Hkv, Sk, D)``, where Hkv divides Hq; ``(B, Sk, D)`` is a single head; or ``(N, Sk, D)``.
        v: ``(B, Hkv, Sk, Dv)``, ``(B, Sk, Dv)`` or ``(N, Sk, Dv)``. q, k and v share one dtype: float32, float16 or
            bfloat16, also float64 on the CPU; head dimensions on CUDA are multiples of 8 up to 256. Under
            ``torch.autocast`` the three are cast to the autocast dtype; the norm is in float32 all the same.
        scale: the factor of the cosine; or a tensor with one value per query head, ``(Hq,)``, ``(Hq, 1, 1)`` or
            ``(1, Hq, 1, 1)``, or a single value, which may require a gradient.
        groups: the norm is taken over this many equal chunks of the head dimension.
        causal: row i attends keys j <= i + Sk - Sq (aligned bottom-right).
        mask: bool, True = may be attended: ``(B, Sk)`` (``(N, Sk)`` when merged), or 1 in place of a size; or
            ``(B, Hq, Sq, Sk)``, or 1 in place of any size; or ``(1, W, Hq, Sq, Sk)`` where W divides B: the batch seen
            as ``(B / W, W)``, such as the windows of several images.
        attn_bias: added to the logits: ``(Hq, Sq, Sk)``, ``(B, Sq, Sk)`` with ``attn_bias_batch_dim``,
            ``(N, Sq, Sk)`` when merged, or four or five dimensions as for ``mask``; 1 in place of Sq or Sk always, of
            the others where there are four or five. May require a gradient. Any of the dtypes above.
        attn_bias_batch_dim: a three-dimensional ``attn_bias`` starts with the batch instead of the heads.
        l2norm_qk: False when q and k are normalised already: their rows must have norm <= sqrt(groups).
        scale_max: promise that ``|scale| <= scale_max`` for a scale tensor, which allows the faster softmax without a
            running maximum.
        bias_bound: promise that ``attn_bias <= bias_bound`` in size (or -inf), for the same reason.
        return_lse: also return the log of the sum of the exponentials of the logits of each row, differentiable.
        deterministic: gradients repeat bit by bit. None follows ``torch.are_deterministic_algorithms_enabled()``.

    Returns:
        ``(B, Hq, Sq, Dv)``, or ``(N, Sq, Dv)`` when merged, in q's dtype. With ``return_lse`` also lse, ``(B, Hq, Sq)``
        or ``(N, Sq)``, float32 (float64 for float64), -inf for a row that attends nothing.

    Raises:
        ArgumentError: lists everything that is wrong with the arguments.
        UnsupportedError: no kernel serves the call on this GPU; lists the reasons and the ways out.
        MissingKernelError, BuildError, ToolchainError, CacheError: the kernel can not be built.
        LaunchError: CUDA refused the launch.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    attend = host.attend
    if attend is not None and not compiling and forward_ad._current_level < 0:
        found: Tensor | tuple[Tensor, Tensor] | None = attend(
            q,
            k,
            v,
            mask,
            attn_bias,
            scale,
            groups,
            causal,
            attn_bias_batch_dim,
            l2norm_qk,
            scale_max,
            bias_bound,
            return_lse,
            deterministic,
        )
        if found is not None:
            return found
    if (
        compiling
        or type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or type(v) not in _PLAIN
        or type(mask) not in _PLAIN
        or type(attn_bias) not in _PLAIN
        or type(scale) not in _PLAIN
        or not getattr(q, "is_cuda", False)
        or q.is_neg()  # the memory of such tensors holds other numbers
        or (isinstance(k, Tensor) and k.is_neg())
        or (isinstance(v, Tensor) and v.is_neg())
        or (isinstance(attn_bias, Tensor) and attn_bias.is_neg())
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        run = _through_operators
    else:
        run = _planned
    return run(
        q,
        k,
        v,
        mask,
        attn_bias,
        scale,
        groups,
        causal,
        attn_bias_batch_dim,
        l2norm_qk,
        scale_max,
        bias_bound,
        return_lse,
        deterministic,
    )


def _direct(*inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """A call on plain CUDA tensors: by the host extension, else in Python."""
    found = None if host.attend is None else host.attend(*inputs)
    return _planned(*inputs) if found is None else found


def _planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | Tensor,
    groups: int,
    causal: bool,
    attn_bias_batch_dim: bool,
    l2norm_qk: bool,
    scale_max: float | None,
    bias_bound: float | None,
    return_lse: bool,
    deterministic: bool | None,
) -> Tensor | tuple[Tensor, Tensor]:
    options = (groups, causal, attn_bias_batch_dim, l2norm_qk, scale_max, bias_bound, deterministic)
    if torch.is_autocast_enabled("cuda"):
        cast = _autocast(q, k, v)
        if any(one is not other for one, other in zip(cast, (q, k, v), strict=True)):
            return _direct(*cast, mask, attn_bias, scale, *options[:6], return_lse, deterministic)
    try:
        key = metadata(q, k, v, mask, attn_bias, scale, options)
        plan = plans.get(key, MISSING)
    except (AttributeError, RuntimeError, TypeError):  # not tensors, not strided, not hashable: the checks say it
        _check(q, k, v, mask, attn_bias, scale, options)
        raise
    if plan is MISSING:
        plan = remember(key, _plan, q, k, v, mask, attn_bias, scale, options)
        host.begin(gradients_for_host)
    if plan is None:
        return _by_fallback(q, k, v, mask, attn_bias, scale, options, return_lse)
    if not plan.ready or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT:
        q, k, v, attn_bias, scale = _made_ready(q, k, v, attn_bias, scale)
        return _direct(q, k, v, mask, attn_bias, scale, *options[:6], return_lse, deterministic)
    if host.attend is not None and not plan.host:
        inputs = (q, k, v, mask, attn_bias, scale, *options[:6], return_lse, deterministic)
        host.offer(plan, *inputs)
        found: Tensor | tuple[Tensor, Tensor] | None = host.attend(*inputs)
        if found is not None:
            return found
    scale_tensor = scale if isinstance(scale, Tensor) else None
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (attn_bias is not None and attn_bias.requires_grad)
        or (scale_tensor is not None and scale_tensor.requires_grad)
    ):
        result: Tensor | tuple[Tensor, Tensor] = attention(
            (plan, deterministic, return_lse), q, k, v, mask, attn_bias, scale_tensor
        )
        return result
    out, lse = plan.forward(q, k, v, mask, attn_bias, scale_tensor, return_lse)
    return out if lse is None else (out, lse)


def _through_operators(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | Tensor,
    groups: int,
    causal: bool,
    attn_bias_batch_dim: bool,
    l2norm_qk: bool,
    scale_max: float | None,
    bias_bound: float | None,
    return_lse: bool,
    deterministic: bool | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(q, Tensor) and q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q, k, v)
    options = (groups, causal, attn_bias_batch_dim, l2norm_qk, scale_max, bias_bound, deterministic)
    sizes = _check(q, k, v, mask, attn_bias, scale, options)
    if not torch.compiler.is_dynamo_compiling():
        _refuse_transforms(q, k, v, attn_bias, scale)
        if torch._C._len_torch_dispatch_stack():
            flops.tell_active_counters()
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    mask, attn_bias, scale_tensor = _canonical(sizes, q, mask, attn_bias, scale, attn_bias_batch_dim)
    out, lse = attention_forward(
        with_heads(q),
        with_heads(k),
        with_heads(v),
        mask,
        attn_bias,
        scale_tensor,
        0.0 if isinstance(scale, Tensor) else float(scale),
        groups,
        causal,
        l2norm_qk,
        _softmax(q, attn_bias, scale, options) == "online",
        deterministic,
    )
    if sizes.merged:
        out, lse = out.squeeze(1), lse.squeeze(1)
    return (out, lse) if return_lse else out


_Options = tuple[int, bool, bool, bool, float | None, float | None, bool | None]
"""groups, causal, attn_bias_batch_dim, l2norm_qk, scale_max, bias_bound, deterministic."""


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | Tensor,
    options: _Options,
) -> Sizes:
    groups, _, batch_dim, _, scale_max, bias_bound, deterministic = options
    return arguments.check(
        q,
        k,
        v,
        scale=scale,
        groups=groups,
        mask=mask,
        attn_bias=attn_bias,
        attn_bias_batch_dim=batch_dim,
        scale_max=scale_max,
        bias_bound=bias_bound,
        deterministic=deterministic,
    )


def _softmax(q: Tensor, attn_bias: Tensor | None, scale: float | Tensor, options: _Options) -> Softmax:
    groups, _, _, _, scale_max, bias_bound, _ = options
    bound = arguments.logit_bound(scale, groups, scale_max, attn_bias, bias_bound)
    return softmax_mode(str(q.dtype).removeprefix("torch."), bound)


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | Tensor,
    options: _Options,
) -> Plan:
    """Check everything and plan the call."""
    sizes = _check(q, k, v, mask, attn_bias, scale, options)
    groups, causal, batch_dim, l2norm, _, _, _ = options
    return Plan(
        sizes,
        q,
        k,
        v,
        mask,
        attn_bias,
        scale,
        groups=groups,
        causal=causal,
        l2norm=l2norm,
        softmax=_softmax(q, attn_bias, scale, options),
        bias_batch_dim=batch_dim or sizes.merged,
    )


def _canonical(
    sizes: Sizes,
    q: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | Tensor,
    attn_bias_batch_dim: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """mask (B, Sk) or in four dimensions, bias in four, scale tensor (Hq,): views, differentiable."""
    if mask is not None:
        mask = canonical_mask(mask, sizes)
    if attn_bias is not None:
        attn_bias = bias_with_four_dimensions(attn_bias, attn_bias_batch_dim or sizes.merged, sizes)
    if not isinstance(scale, Tensor):
        return mask, attn_bias, None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return mask, attn_bias, scale_per_head(scale, sizes.q_heads, dtype)


def _made_ready(
    q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None, scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | Tensor]:
    """Copies, which autograd records, of what the kernels can not read in place."""
    if attn_bias is not None:
        attn_bias = made_ready(attn_bias, (q.shape[-2], k.shape[-2]))
    if isinstance(scale, Tensor):
        scale = scale_per_head(scale, q.shape[1] if q.ndim == 4 else 1, torch.float32)
    return realigned(q), realigned(k), realigned(v), attn_bias, scale


def _by_fallback(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | Tensor,
    options: _Options,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    sizes = _check(q, k, v, mask, attn_bias, scale, options)
    groups, causal, batch_dim, l2norm, _, _, _ = options
    mask, attn_bias, scale_tensor = _canonical(sizes, q, mask, attn_bias, scale, batch_dim)
    out, lse = fallback.attention(
        with_heads(q),
        with_heads(k),
        with_heads(v),
        mask,
        attn_bias,
        scale if scale_tensor is None else scale_tensor,
        groups=groups,
        causal=causal,
        l2norm=l2norm,
        with_lse=return_lse,
    )
    if sizes.merged:
        out, lse = out.squeeze(1), None if lse is None else lse.squeeze(1)
    return out if lse is None else (out, lse)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in the dtype of the active autocast, which leaves float64 alone."""
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in (q, k, v)
    )
    return q, k, v


def _refuse_transforms(*inputs: Tensor | float | None) -> None:
    """Raise UnsupportedError for derivatives and transforms the operators have no rule for."""
    ways_out = (
        "Ways out: torch.autograd.grad or .backward(), a mapped dimension folded into the batch, or "
        "cosattn.reference.cosine_attention_reference with O(S^2) memory."
    )
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(f"cosattn has no rules for torch.func transforms (grad, vjp, jvp, vmap). {ways_out}")
    if forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise UnsupportedError(f"cosattn has no forward-mode derivative (torch.autograd.forward_ad). {ways_out}")
