"""Plans: everything about a CUDA call that depends on shapes, strides and options but not on data, worked out once.

A plan holds the kernel, the packed ``Problem`` and the layouts of the results, so a repeated call costs a dictionary
look-up, its allocations and one ctypes call. Nothing here is recorded by autograd.

Layout rules of the kernels: the last dimension is contiguous, and the address and every other stride are multiples of
16 bytes. Strides of dimensions of size 1 mean nothing and are replaced. Tensors that break the rules are copied once
per call (``realigned``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from enum import Enum
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from cosattn import abi, fallback, families, host, launch
from cosattn.arch import arch_of
from cosattn.arguments import Sizes, canonical_mask, with_heads
from cosattn.errors import ToolchainError, UnsupportedError
from cosattn.spec import DType, KernelSpec, Softmax

ALIGNMENT = 16
"""Bytes; addresses and row strides of q, k, v, out and their gradients are multiples of it."""

DTYPE_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

_MAX_PLANS = 4096
_MAX_BACKWARDS = 16


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""dq, dk, dv, dbias (shape and dtype of the bias) and dscale ((Hq,) float32); None where not asked for."""


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: plain arithmetic on shapes and strides


def dense_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor of ``shape`` that stores its dimensions in the order ``strides`` does.

    The last dimension is always innermost; where ``strides`` says nothing (sizes of 1, expanded dimensions) the order
    is that of a contiguous tensor. So (B, H, S, D) stays as it is and a (B, S, H, D) storage stays one.
    """
    leading = len(shape) - 1
    telling = [axis for axis in range(leading) if shape[axis] != 1]
    if all(strides[axis] != 0 for axis in telling):
        telling.sort(key=lambda axis: strides[axis], reverse=True)
    result = [0] * len(shape)
    result[-1] = 1
    step = shape[-1]
    for axis in reversed(telling):
        result[axis] = step
        step *= max(shape[axis], 1)
    for axis in reversed(range(leading)):
        if shape[axis] == 1:
            result[axis] = shape[axis + 1] * result[axis + 1]
    return tuple(result)


def bhs_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Strides over batch, head and row of a (B, H, S, D) or (N, S, D) tensor, in elements.

    A dimension of size 1 gets the stride a contiguous tensor would have.
    """
    if len(shape) == 3:
        shape, strides = (shape[0], 1, *shape[1:]), (strides[0], 0, *strides[1:])
    batches, heads, rows, width = shape
    row = strides[2] if rows != 1 else width
    head = strides[1] if heads != 1 else rows * row
    batch = strides[0] if batches != 1 else heads * head
    return batch, head, row


def aligned(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the kernels can read a tensor of these strides as it is. Rows that are all one row need a copy."""
    if shape[-1] != 1 and strides[-1] != 1:
        return False
    steps = bhs_strides(shape, strides)
    return steps[2] != 0 and all(stride * itemsize % ALIGNMENT == 0 for stride in steps)


def realigned(tensor: Tensor) -> Tensor:
    """``tensor`` if it obeys the layout rules, else a dense copy, in the same storage order. Differentiable."""
    if aligned(tensor.shape, tensor.stride(), tensor.element_size()) and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    strides = dense_strides(tensor.shape, tensor.stride())
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def empty_like_stored(tensor: Tensor, width: int) -> Tensor:
    """Uninitialised, of ``tensor``'s shape with ``width`` as last dimension and of its storage order."""
    shape = (*tensor.shape[:-1], width)
    return tensor.new_empty_strided(shape, dense_strides(shape, tensor.stride()))


def _allocation(
    shape: tuple[int, ...], strides: tuple[int, ...], width: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides of ``empty_like_stored``; None where ``torch.empty_like``, which is quicker, gives the same."""
    wanted = (*shape[:-1], width)
    dense = dense_strides(wanted, strides)
    return None if wanted == shape and dense == strides else (wanted, dense)


def _allocate(tensor: Tensor, layout: tuple[tuple[int, ...], tuple[int, ...]] | None) -> Tensor:
    return torch.empty_like(tensor) if layout is None else tensor.new_empty_strided(*layout)


# ---------------------------------------------------------------------------------------------------------------------
# Plans


def architecture(device: int) -> str:
    """Key of ``arch.ARCHS`` for a CUDA device. Raises UnsupportedError when cosattn has no kernel for it."""
    capability = torch.cuda.get_device_capability(device)
    arch = arch_of(capability)
    if arch is None:
        raise UnsupportedError(
            f"cosattn has no kernel for {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}). Ways out: a supported GPU (the README lists them), CPU tensors, or "
            "COSATTN_FALLBACK=1 to use PyTorch's scaled_dot_product_attention on normalised inputs."
        )
    return arch.name


def load(spec: KernelSpec) -> launch.Kernel:
    """The kernel of a spec. Raises UnsupportedError with every reason when there is none."""
    from cosattn import support  # its rules are needed once per kernel, not by every process

    reasons = support.reasons(spec)
    if reasons:
        lines = "\n  - ".join([f"no kernel serves {spec.name}:", *reasons])
        raise UnsupportedError(
            f"{lines}\nWays out: change what is listed, use CPU tensors, or set COSATTN_FALLBACK=1 to use PyTorch's "
            "scaled_dot_product_attention on normalised inputs."
        )
    return launch.kernel(spec)


class Backward(NamedTuple):
    """What a backward call needs, for one set of strides."""

    kernel: launch.Kernel | None
    """None where the fallback serves the call."""
    problem: bytes
    workspace: int
    dq: tuple[tuple[int, ...], tuple[int, ...]] | None
    dk: tuple[tuple[int, ...], tuple[int, ...]] | None
    dv: tuple[tuple[int, ...], tuple[int, ...]] | None
    aligned: bool


class Plan:
    """How calls with one set of metadata run on a CUDA device.

    Built from checked arguments in any accepted form; ``bias_batch_dim`` says how to read a three-dimensional bias.
    A scale tensor must be ready (float32, contiguous, one value per query head) when the plan runs; ``ready`` says
    whether it, the bias and the strides of q, k and v can be used as they are.
    """

    __slots__ = (
        "_backwards",
        "_bias",
        "_dense_out",
        "_device",
        "_kernel",
        "_lse",
        "_lse_shape",
        "_out",
        "_problem",
        "_scale",
        "_sizes",
        "_spec",
        "_workspace",
        "host",
        "ready",
    )

    def __init__(
        self,
        sizes: Sizes,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: float | Tensor,
        *,
        groups: int,
        causal: bool,
        l2norm: bool,
        softmax: Softmax,
        bias_batch_dim: bool,
    ) -> None:
        self._sizes = sizes
        self._device = q.get_device()
        self._lse_shape = tuple(q.shape[:-1])
        self._out = _allocation(q.shape, q.stride(), sizes.value_dim)
        self._scale = 0.0 if isinstance(scale, Tensor) else float(scale)
        self._bias = None if bias is None else _bias_shape(bias, bias_batch_dim)
        self._backwards: dict[Hashable, Backward] = {}
        self._kernel: launch.Kernel | None = None
        self._problem = b""
        self._workspace = 0
        self.host = 0
        """Its name in the host extension; 0: not there."""
        self.ready = not isinstance(scale, Tensor) or scale_is_ready(scale, sizes.q_heads)
        self._spec: KernelSpec | None = None
        if sizes.empty:
            return
        self.ready = (
            self.ready
            and all(aligned(tensor.shape, tensor.stride(), q.element_size()) for tensor in (q, k, v))
            and (bias is None or bias_is_ready(bias, (sizes.q_len, sizes.k_len)))
        )
        pairs = mask is not None and _is_pair_mask(mask, sizes)
        spec = KernelSpec(
            direction="forward",
            arch=architecture(self._device),
            dtype=DTYPE_NAMES[q.dtype],
            head_dim=sizes.head_dim,
            value_dim=sizes.value_dim,
            groups=groups if l2norm else 1,
            l2norm=l2norm,
            causal=causal,
            mask=mask is not None and not pairs,
            pair_mask=pairs,
            bias=None if bias is None else DTYPE_NAMES[bias.dtype],
            softmax=softmax,
        )
        self._spec = self._sized(spec)
        self._kernel = load(self._spec)
        if self.ready:
            out_shape, out_strides = self._out or (q.shape, q.stride())
            fields = self._input_fields(q, k, v, mask, bias)
            fields["out"] = bhs_strides(out_shape, out_strides)
            self._dense_out = tuple(out_shape), tuple(out_strides)
            self._problem = self._pack(fields)
            with torch.cuda.device(self._device):
                self._workspace = self._kernel.workspace_bytes(self._problem)
            # Shape and type without memory: torch.empty_like reads its arguments faster than new_empty.
            self._lse = q.new_empty(self._lse_shape, dtype=torch.float32)
            self._lse.untyped_storage().resize_(0)

    def _sized(self, spec: KernelSpec) -> KernelSpec:
        sizes = self._sizes
        group, heads = sizes.q_heads // sizes.kv_heads, sizes.batch * sizes.kv_heads
        return families.sized(spec, sizes.q_len, sizes.k_len, group, heads)

    def for_host(self) -> dict[str, Any] | None:
        """What the host extension needs to serve calls of this plan; None where it can not."""
        if self._kernel is None or not self.ready:
            return None
        sizes = self._sizes
        return {
            "call": (self._kernel, self._kernel.address, self._problem, self._workspace),
            "out": self._dense_out,
            "lse": self._lse_shape,
            "rows": (sizes.batch, sizes.q_heads, sizes.q_len),
        }

    def backward_for_host(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        dout: Tensor,
        deterministic: bool,
        bias_grad: bool,
    ) -> tuple[Any, ...] | None:
        """What the host extension needs to serve backward passes on tensors like these; None where it can not."""
        plan = self.backward_plan(q, k, v, mask, bias, out, dout, deterministic, bias_grad)
        if plan.kernel is None or not plan.aligned:
            return None
        layouts = zip((plan.dq, plan.dk, plan.dv), (q, k, v), strict=True)
        return (
            (plan.kernel, plan.kernel.address, plan.problem, plan.workspace),
            *(layout or (tuple(x.shape), dense_strides(x.shape, x.stride())) for layout, x in layouts),
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """out, and lse (float32) when asked for. Every tensor must be ready and aligned."""
        kernel = self._kernel
        if kernel is None:
            out = _allocate(q, self._out).zero_()
            return out, q.new_full(self._lse_shape, -torch.inf, dtype=torch.float32) if with_lse else None
        device = self._device
        if launch.current_device() != device:
            with torch.cuda.device(device):
                return self.forward(q, k, v, mask, bias, scale, with_lse)
        out = torch.empty_like(q) if self._out is None else q.new_empty_strided(*self._out)
        lse = torch.empty_like(self._lse) if with_lse else None
        stream = launch.current_stream(device)
        workspace = launch.allocate(self._workspace, stream) if self._workspace else 0
        pointers = launch.pack_pointers(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            workspace,
        )
        code = kernel.launch(pointers, self._problem, stream)
        if workspace:
            launch.free(workspace)
        if code:
            raise kernel.error(code)
        return out, lse

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dlse: Tensor | None,
        deterministic: bool,
        bias_grad: bool,
        scale_grad: bool,
    ) -> Gradients:
        """Gradients of the inputs. Strides may differ from those of forward: saved tensors can have been moved."""
        if self._spec is None:
            return self._empty_gradients(q, k, v, bias if bias_grad else None, scale_grad)
        device = self._device
        if launch.current_device() != device:
            with torch.cuda.device(device):
                return self.backward(
                    q, k, v, mask, bias, scale, out, lse, dout, dlse,
                    deterministic, bias_grad, scale_grad,
                )  # fmt: skip
        dout = torch.zeros_like(out) if dout is None else dout.resolve_neg()
        plan = self.backward_plan(q, k, v, mask, bias, out, dout, deterministic, bias_grad)
        kernel = plan.kernel
        if kernel is None:
            return self._gradients_by_fallback(q, k, v, mask, bias, scale, dout, dlse, bias_grad, scale_grad)
        q_address, k_address, v_address = q.data_ptr(), k.data_ptr(), v.data_ptr()
        out_address, dout_address = out.data_ptr(), dout.data_ptr()
        if not plan.aligned or (q_address | k_address | v_address | out_address | dout_address) % ALIGNMENT:
            q, k, v, out, dout = (realigned(tensor) for tensor in (q, k, v, out, dout))
            bias = bias if bias is None or _keys_are_contiguous(bias) else bias.contiguous()
            return self.backward(
                q, k, v, mask, bias, scale, out, lse, dout, dlse,
                deterministic, bias_grad, scale_grad,
            )  # fmt: skip
        lse = lse.contiguous()
        if dlse is not None:
            dlse = dlse.resolve_neg().contiguous()
        dq = torch.empty_like(q) if plan.dq is None else q.new_empty_strided(*plan.dq)
        dk = torch.empty_like(k) if plan.dk is None else k.new_empty_strided(*plan.dk)
        dv = torch.empty_like(v) if plan.dv is None else v.new_empty_strided(*plan.dv)
        dbias = bias.new_empty(bias.shape, dtype=torch.float32) if bias is not None and bias_grad else None
        dscale = q.new_empty(self._lse_shape, dtype=torch.float32) if scale_grad else None
        stream = launch.current_stream(device)
        workspace = launch.allocate(plan.workspace, stream) if plan.workspace else 0
        pointers = launch.pack_pointers(
            q_address,
            k_address,
            v_address,
            0 if mask is None else mask.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            out_address,
            lse.data_ptr(),
            dout_address,
            0 if dlse is None else dlse.data_ptr(),
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            0 if dscale is None else dscale.data_ptr(),
            workspace,
        )
        code = kernel.launch(pointers, plan.problem, stream)
        if workspace:
            launch.free(workspace)
        if code:
            raise kernel.error(code)
        if dbias is not None and bias is not None:
            dbias = dbias.to(bias.dtype)
        if dscale is not None and scale is not None:
            sizes = self._sizes
            dscale = dscale.view(sizes.batch, sizes.q_heads, sizes.q_len).sum((0, 2))
        return dq, dk, dv, dbias, dscale

    def backward_plan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        dout: Tensor,
        deterministic: bool,
        bias_grad: bool,
    ) -> Backward:
        """How a backward pass on tensors like these runs."""
        key = (
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            dout.stride(),
            None if mask is None else mask.stride(),
            None if bias is None else bias.stride(),
            deterministic,
            bias_grad,
        )
        plan = self._backwards.get(key)
        if plan is None:
            plan = self._plan_backward(key, q, k, v, mask, bias, out, dout, deterministic, bias_grad)
        return plan

    def _plan_backward(
        self,
        key: Hashable,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        dout: Tensor,
        deterministic: bool,
        bias_grad: bool,
    ) -> Backward:
        assert self._spec is not None
        spec = replace(self._spec, direction="backward", deterministic=deterministic, bias_grad=bias_grad)
        spec = self._sized(spec)
        kernel: launch.Kernel | None = None
        try:
            kernel = load(spec)
        except (UnsupportedError, ToolchainError) as error:
            if not fallback.enabled():
                raise
            fallback.warn_once(error)
        itemsize = q.element_size()
        usable = all(aligned(tensor.shape, tensor.stride(), itemsize) for tensor in (q, k, v, out, dout))
        usable = usable and (bias is None or _keys_are_contiguous(bias))
        problem, workspace = b"", 0
        layouts = [_allocation(tensor.shape, tensor.stride(), tensor.shape[-1]) for tensor in (q, k, v)]
        if usable and kernel is not None:
            fields = self._input_fields(q, k, v, mask, bias)
            fields["out"] = bhs_strides(out.shape, out.stride())
            fields["dout"] = bhs_strides(dout.shape, dout.stride())
            for name, tensor, layout in zip(("dq", "dk", "dv"), (q, k, v), layouts, strict=True):
                fields[name] = bhs_strides(*(layout or (tensor.shape, tensor.stride())))
            if bias_grad and self._bias is not None:
                fields["dbias"] = _broadcast_strides(self._bias, dense_strides(self._bias, (0, 0, 0, 1)))[:3]
            problem = self._pack(fields)
            with torch.cuda.device(self._device):
                workspace = kernel.workspace_bytes(problem)
        plan = Backward(kernel, problem, workspace, layouts[0], layouts[1], layouts[2], usable)
        with _lock:
            if len(self._backwards) >= _MAX_BACKWARDS:
                self._backwards.pop(next(iter(self._backwards)))
            self._backwards[key] = plan
        return plan

    def _input_fields(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> dict[str, tuple[int, ...]]:
        fields: dict[str, tuple[int, ...]] = {
            name: bhs_strides(tensor.shape, tensor.stride()) for name, tensor in (("q", q), ("k", k), ("v", v))
        }
        if mask is not None:
            batch, *inner = _broadcast_strides(mask.shape, mask.stride())[-4:]
            fields["mask"] = (batch, *(inner if len(inner) == 3 else (0, 0, *inner)))
            fields["mask_batches"] = (mask.shape[-4] if mask.ndim >= 4 else mask.shape[0],)
        if bias is not None and self._bias is not None:
            strides = bias.stride()
            if len(strides) == 3:
                strides = (0, *strides) if self._bias[0] == 1 else (strides[0], 0, *strides[1:])
            fields["bias"] = _broadcast_strides(self._bias, strides[-4:])[:3]
            fields["bias_batches"] = (self._bias[0],)
        return fields

    def _pack(self, fields: dict[str, tuple[int, ...]]) -> bytes:
        """The ``Problem`` of these strides; tensors that are not in ``fields`` get zeros."""
        sizes = self._sizes
        values = {
            "batch": sizes.batch,
            "q_heads": sizes.q_heads,
            "kv_heads": sizes.kv_heads,
            "q_len": sizes.q_len,
            "k_len": sizes.k_len,
        }
        for name, strides in fields.items():
            if name in abi.INTEGERS:
                (values[name],) = strides
                continue
            axes = ("b", "h", "q", "s") if name == "mask" else ("b", "h", "s")
            values.update({f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)})
        return launch.pack_problem(*(values.get(name, 0) for name in abi.INTEGERS), self._scale)

    def _gradients_by_fallback(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        dout: Tensor,
        dlse: Tensor | None,
        bias_grad: bool,
        scale_grad: bool,
    ) -> Gradients:
        assert self._spec is not None
        sizes = self._sizes
        dq, dk, dv, dbias, dscale = fallback.gradients(
            (
                with_heads(q),
                with_heads(k),
                with_heads(v),
                mask if mask is None else canonical_mask(mask, sizes),
                None if bias is None or self._bias is None else bias.reshape(self._bias),
                self._scale if scale is None else scale.view(-1),
            ),
            (with_heads(dout), dlse if dlse is None else dlse.reshape(sizes.batch, sizes.q_heads, sizes.q_len)),
            groups=self._spec.groups,
            causal=self._spec.causal,
            l2norm=self._spec.l2norm,
            wanted=(bias_grad, scale_grad),
        )
        dbias = None if dbias is None or bias is None else dbias.reshape(bias.shape)
        return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape), dbias, dscale

    def _empty_gradients(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale_grad: bool) -> Gradients:
        dq, dk, dv = (empty_like_stored(tensor, tensor.shape[-1]).zero_() for tensor in (q, k, v))
        dbias = None if bias is None else bias.new_zeros(bias.shape)
        dscale = q.new_zeros(self._sizes.q_heads, dtype=torch.float32) if scale_grad else None
        return dq, dk, dv, dbias, dscale


def bias_is_ready(bias: Tensor, lengths: tuple[int, ...]) -> bool:
    """Whether the kernels can read a bias as it is: all queries and keys there, keys contiguous."""
    return bias.shape[-2:] == lengths and _keys_are_contiguous(bias)


def _keys_are_contiguous(bias: Tensor) -> bool:
    return bias.shape[-1] == 1 or bias.stride(-1) == 1


def made_ready(bias: Tensor, lengths: tuple[int, int]) -> Tensor:
    """A bias that is ready: expanded over queries without a copy, a copy where its keys are apart. Differentiable."""
    bias = bias.expand(*bias.shape[:-2], *lengths)
    return bias if bias_is_ready(bias, lengths) else bias.contiguous()


def scale_is_ready(scale: Tensor, heads: int) -> bool:
    """Whether the kernels can read a scale tensor as it is: one float32 for each query head, side by side."""
    return scale.dtype == torch.float32 and scale.numel() == heads and scale.is_contiguous()


def _bias_shape(bias: Tensor, batch_dim: bool) -> tuple[int, ...]:
    shape = tuple(bias.shape)
    if len(shape) >= 4:
        return shape[-4:]
    return (shape[0], 1, *shape[1:]) if batch_dim else (1, *shape)


def _broadcast_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, 0 where the size is 1."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _is_pair_mask(mask: Tensor, sizes: Sizes) -> bool:
    """Whether a mask says more than which keys of a batch entry exist."""
    if mask.ndim == 2:
        return False
    batch, heads, rows = _broadcast_strides(mask.shape, mask.stride())[-4:-1]
    return heads != 0 or rows != 0 or (batch != 0 and mask.shape[-4] != sizes.batch)


# ---------------------------------------------------------------------------------------------------------------------
# The plans of this process


class Missing(Enum):
    """Type of ``MISSING``."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING
"""What ``plans.get(key, MISSING)`` gives for a call not seen before."""

plans: dict[Hashable, Plan | None] = {}
"""Key of ``metadata`` -> plan; None where the fallback serves the call. Bounded: the oldest goes first."""

_lock = threading.Lock()


def metadata(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | Tensor,
    *options: Hashable,
) -> tuple[Hashable, ...]:
    """Everything a plan depends on, as a dictionary key."""
    return (
        q.dtype,
        q.shape,
        q.stride(),
        q.get_device(),
        k.dtype,
        k.shape,
        k.stride(),
        k.get_device(),
        v.dtype,
        v.shape,
        v.stride(),
        v.get_device(),
        None if mask is None else (mask.dtype, mask.shape, mask.stride(), mask.get_device()),
        None if bias is None else (bias.dtype, bias.shape, bias.stride(), bias.get_device()),
        (scale.dtype, scale.shape, scale.stride(), scale.get_device()) if isinstance(scale, Tensor) else scale,
        options,
    )


def remember(key: Hashable, build: Callable[..., Plan], *arguments: Any) -> Plan | None:
    """Build a plan and keep it. None, kept too, when no kernel can serve it and the fallback is switched on."""
    plan: Plan | None
    try:
        plan = build(*arguments)
    except (UnsupportedError, ToolchainError) as error:
        if not fallback.enabled():
            raise
        fallback.warn_once(error)
        plan = None
    with _lock:
        if len(plans) >= _MAX_PLANS:
            oldest = plans.pop(next(iter(plans)))
            if oldest is not None and oldest.host:
                host.forget(oldest)
        plans[key] = plan
    return plan
