"""Attention problems for property tests, the same for CPU and CUDA.

A ``Spec`` is what a CUDA kernel is compiled for, so there are few of them, listed. A ``Problem`` adds everything that
is decided at run time (sizes, strides, values, forms of the arguments) and is drawn by hypothesis. ``Inputs`` are its
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accuracy import Case, Results
from hypothesis import strategies as st
from torch import Tensor

from cosattn.reference import cosine_attention_reference, l2norm, repeated
from cosattn.spec import softmax_mode
from cosattn.tiles_short import FEW_HEADS
from cosattn.tiles_split import MINIMUM_KEYS

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for."""

    dtype: torch.dtype
    d: int
    dv: int
    groups: int = 1
    causal: bool = False
    mask: bool = False
    pair_mask: bool = False
    bias: torch.dtype | None = None
    bias_grad: bool = False
    softmax: str = "bounded"
    l2norm: bool = True
    deterministic: bool = False

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), f"d{self.d}"]
        parts += [f"dv{self.dv}"] * (self.dv != self.d) + [f"g{self.groups}"] * (self.groups != 1)
        parts += ["causal"] * self.causal + ["mask"] * self.mask + ["pairmask"] * self.pair_mask
        if self.bias is not None:
            parts.append(f"bias-{str(self.bias).removeprefix('torch.')}" + "-grad" * self.bias_grad)
        parts += ["nonorm"] * (not self.l2norm) + ["deterministic"] * self.deterministic
        return "-".join([*parts, self.softmax])

    @property
    def bound(self) -> float:
        """The largest |logit| the bounded softmax takes, a little less than the exact limit."""
        return 10.0 if self.dtype == F16 else 41.5


SPECS: tuple[Spec, ...] = (
    # every dtype plain, and with its usual companions
    Spec(BF16, 64, 64),
    Spec(BF16, 64, 64, causal=True),
    Spec(BF16, 64, 64, softmax="online"),
    Spec(BF16, 128, 128, causal=True, mask=True),
    Spec(BF16, 128, 64, mask=True, softmax="online"),
    Spec(F16, 64, 64),
    Spec(F16, 32, 32, mask=True, bias=F16, bias_grad=True, softmax="online"),
    Spec(F16, 64, 64, softmax="online"),
    Spec(F16, 128, 128, causal=True, softmax="online"),
    Spec(F32, 64, 64),
    Spec(F32, 64, 64, causal=True, mask=True),
    Spec(F32, 64, 64, softmax="online"),
    Spec(F32, 128, 128, causal=True),
    # head dims: smallest, odd multiples of 8, largest, unequal
    Spec(BF16, 8, 8, causal=True),
    Spec(F16, 24, 40, mask=True),
    Spec(BF16, 256, 256, causal=True, softmax="online"),
    Spec(F32, 40, 24, bias=F32, bias_grad=True, softmax="online"),
    Spec(F32, 256, 256),
    Spec(F16, 96, 80, causal=True),
    # groups, no norm, bias without gradient, bias of another dtype, bounded bias, bitwise repeatable gradients
    Spec(BF16, 64, 64, groups=8, causal=True, softmax="online"),
    Spec(F16, 64, 64, groups=4, mask=True),
    Spec(F32, 48, 48, groups=3, l2norm=True),
    Spec(BF16, 64, 64, groups=2, l2norm=False, causal=True),
    Spec(F32, 32, 32, l2norm=False, mask=True, softmax="online"),
    Spec(BF16, 32, 32, mask=True, bias=F32, bias_grad=True, causal=True, softmax="online"),
    Spec(BF16, 72, 72, bias=BF16, softmax="bounded"),
    Spec(BF16, 64, 64, causal=True, deterministic=True),
    Spec(F16, 128, 128, deterministic=True),
    Spec(BF16, 256, 256, mask=True, deterministic=True),
    Spec(BF16, 64, 64, causal=True, bias=BF16, bias_grad=True, softmax="online"),
    Spec(F16, 128, 128, mask=True, bias=F32, bias_grad=True, softmax="online"),
    Spec(BF16, 192, 192, bias=F16, bias_grad=True, softmax="online"),
    Spec(F32, 32, 32, mask=True, deterministic=True),
    # masks over queries and keys
    Spec(BF16, 32, 32, pair_mask=True, bias=F32, bias_grad=True, softmax="online"),
    Spec(F16, 64, 64, pair_mask=True, causal=True),
    Spec(F32, 40, 24, pair_mask=True, bias=F32, bias_grad=True, softmax="online", deterministic=True),
    Spec(BF16, 128, 128, pair_mask=True),
)
"""Covers every feature on CUDA; each is a forward and a backward kernel that take seconds to compile."""

CPU_SPECS: tuple[Spec, ...] = (
    *SPECS,
    Spec(F64, 5, 3, causal=True, mask=True, bias=F64, bias_grad=True, softmax="online"),
    Spec(F64, 12, 7, groups=3, mask=True),
)
"""The CPU path also takes float64 and any head dim."""

EDGES = (
    *(1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 49, 50, 63, 64, 65, 95, 96, 97, 127, 128, 129),
    *(144, 145, 160, 161, 192, 193, 256, 257),
)
"""Lengths around the edges of tiles, and of the size classes of short sequences."""

VALUES = ("normal", "normal", "normal", "equal_qk", "opposite_qk", "same_keys", "zeros", "uneven", "huge")
LAYOUTS = ("dense", "dense", "heads_last", "packed", "padded", "misaligned", "strided")
KV_LAYOUTS = (*LAYOUTS, "expanded_heads", "expanded_batch")
DOUT_LAYOUTS = ("dense", "heads_last", "ones")
FORMS = ("4d", "4d", "single_head_kv", "merged")
MASKS = ("random", "random", "sparse", "all", "empty_batch", "tail")
BIASES = ("heads", "batch", "full", "shared", "repeated", "rows", "keys")
"""``repeated``: over the halves of the batch; ``rows``, ``keys``: one number for each row, for each key."""


@dataclass(frozen=True)
class Problem:
    """One call, up to the numbers in its tensors, which ``seed`` decides."""

    spec: Spec
    batch: int
    kv_heads: int
    heads_per_kv: int
    q_len: int
    k_len: int
    seed: int
    scale: float
    scale_tensor: bool = False
    form: str = "4d"
    values: str = "normal"
    layouts: tuple[str, str, str] = ("dense", "dense", "dense")
    dout_layout: str = "dense"
    mask: str = "random"
    bias: str = "heads"
    bias_has_infinities: bool = False
    pair_mask: tuple[bool, bool, bool, bool] = (True, True, True, True)
    """Whether a mask over pairs differs between entries of the batch, heads, queries and keys."""
    repeats: bool = False
    """The batch is two equal parts to a mask over pairs."""
    uses_lse: bool = False

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.heads_per_kv

    @property
    def standard(self) -> bool:
        """Whether the accuracy table is promised: see ``accuracy.assert_accurate``."""
        modest = 1 <= self.scale * self.spec.groups <= 16 and not self.scale_tensor
        large = self.q_len >= 16 and self.k_len >= 64 and (not self.spec.causal or self.k_len >= self.q_len)
        whole = not (self.spec.mask or self.spec.pair_mask) or self.mask in ("random", "all")
        plain = self.spec.bias is None and self.values == "normal" and not self.uses_lse and self.dout_layout != "ones"
        return modest and large and whole and plain

    @property
    def bias_bound(self) -> float | None:
        return 1.0 if self.spec.bias is not None and self.spec.softmax == "bounded" else None


@st.composite
def problems(draw: st.DrawFn, spec: Spec, *, largest: int = 129, forms: tuple[str, ...] = FORMS) -> Problem:
    """Problems that run the kernels of one spec, with lengths up to ``largest``."""
    lengths = st.one_of(
        st.sampled_from([edge for edge in EDGES if edge <= largest]), st.integers(min_value=1, max_value=largest)
    )
    q_len = draw(lengths)
    k_lengths = [st.just(q_len), lengths]
    if largest > MINIMUM_KEYS:  # where the keys of few queries begin to be split
        k_lengths.append(st.integers(MINIMUM_KEYS - 1, largest))
    k_len = draw(st.one_of(k_lengths))
    form = draw(st.sampled_from(forms))
    budget = 300_000 if largest <= 129 else 8_000_000
    batch = draw(st.integers(1, max(1, min(4, budget // (q_len * k_len)))))
    kv_heads = 1 if form != "4d" else draw(st.integers(1, 3))
    heads_per_kv = 1 if form == "merged" else draw(st.integers(1, 3))
    crowd = -(-FEW_HEADS // (kv_heads * heads_per_kv))  # so many heads that short sequences get other kernels
    if largest > 129 and crowd * kv_heads * heads_per_kv * q_len * k_len <= 3 * budget and draw(st.booleans()):
        batch = crowd
    scale_tensor, scale = draw(_scales(spec))
    return Problem(
        spec=spec,
        batch=batch,
        kv_heads=kv_heads,
        heads_per_kv=heads_per_kv,
        q_len=q_len,
        k_len=k_len,
        seed=draw(st.integers(0, 2**16)),
        scale=scale,
        scale_tensor=scale_tensor,
        form=form,
        values=draw(st.sampled_from(VALUES)),
        layouts=(
            draw(st.sampled_from(LAYOUTS)),
            draw(st.sampled_from(KV_LAYOUTS)),
            draw(st.sampled_from(KV_LAYOUTS)),
        ),
        dout_layout=draw(st.sampled_from(DOUT_LAYOUTS)),
        mask=draw(st.sampled_from(MASKS)),
        bias=draw(st.sampled_from(BIASES)),
        bias_has_infinities=draw(st.booleans()),
        pair_mask=draw(st.tuples(*[st.booleans()] * 4)),
        repeats=draw(st.booleans()),
        uses_lse=draw(st.booleans()),
    )


def _scales(spec: Spec) -> st.SearchStrategy[tuple[bool, float]]:
    """Whether the scale is a tensor, and its size, such that the softmax of the spec is the one chosen."""
    room = (spec.bound - (1.0 if spec.bias is not None else 0.0)) / spec.groups
    if spec.softmax == "bounded":
        return st.tuples(st.booleans(), st.sampled_from([s for s in (8.0, 5.0, room, 1.0, 0.0, -2.0) if s <= room]))
    if spec.bias is not None:
        return st.tuples(st.booleans(), st.sampled_from([8.0, 10.0, 50.0, -2.0]))
    return st.one_of(
        st.tuples(st.just(True), st.sampled_from([8.0, 1.0, 100.0, -2.0])),
        st.tuples(st.just(False), st.sampled_from([50.0 / spec.groups, 100.0, -50.0])),
    )


@dataclass(frozen=True)
class Inputs:
    """The tensors of a problem: canonical 4-D, with the strides the problem asks for."""

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    mask: Tensor | None
    bias: Tensor | None
    dout: Tensor
    dlse: Tensor

    def visible(self) -> Tensor:
        """bool, broadcastable to ``(B, Hq, Sq, Sk)``: which keys a row attends."""
        problem = self.problem
        visible = torch.ones(1, 1, problem.q_len, problem.k_len, dtype=torch.bool, device=self.q.device)
        if problem.spec.causal:
            visible = visible.tril(problem.k_len - problem.q_len)
        if self.mask is not None:
            pairs = self.mask if self.mask.ndim == 4 else self.mask[:, None, None, :]
            visible = visible & repeated(pairs, self.problem.batch)
        return visible if self.bias is None else visible & (repeated(self.bias, self.problem.batch) > float("-inf"))

    def case(self) -> Case:
        """What the other implementations take."""
        spec = self.problem.spec
        bias = None if self.bias is None else self.bias.masked_fill(self.bias == float("-inf"), 0)
        return Case(
            self.q,
            self.k,
            self.v,
            self.scale,
            spec.groups,
            spec.l2norm,
            self.visible(),
            bias,
            self.dout,
            self.dlse if self.problem.uses_lse else torch.zeros_like(self.dlse),
        )

    def arguments(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Positional and keyword arguments of the public function, in the forms the problem asks for."""
        problem, spec = self.problem, self.problem.spec
        q, k, v = self.q, self.k, self.v
        if problem.form == "merged":
            q = q[:, 0]
        if problem.form != "4d":
            k, v = k[:, 0], v[:, 0]
        options: dict[str, Any] = {"groups": spec.groups, "causal": spec.causal, "l2norm_qk": spec.l2norm}
        if problem.scale_tensor:
            options["scale"] = self.scale.view([(-1,), (-1, 1, 1), (1, -1, 1, 1)][problem.seed % 3])
            if spec.softmax == "bounded":
                options["scale_max"] = abs(problem.scale)
        else:
            options["scale"] = problem.scale
        if spec.deterministic:
            options["deterministic"] = True
        if self.mask is not None:
            options["mask"] = _with_period(self.mask, problem.batch)
        if self.bias is not None:
            options["attn_bias"] = self._public_bias(self.bias)
            options["attn_bias_batch_dim"] = problem.bias == "batch" and options["attn_bias"].ndim == 3
            options["bias_bound"] = problem.bias_bound
        return (q, k, v), options

    def _public_bias(self, bias: Tensor) -> Tensor:
        if self.problem.bias == "repeated":
            return bias[None]
        if self.problem.bias == "heads" and self.problem.form != "merged":
            return bias[0]
        return bias[:, 0] if self.problem.bias == "batch" else bias

    def run(self, attention: Callable[..., Any]) -> tuple[Results, Tensor]:
        """Output, gradients and log-sum-exp of an implementation with the public signature, in canonical shapes."""
        (q, k, v), options = self.arguments()
        leaves = {"dq": q.detach(), "dk": k.detach(), "dv": v.detach()}
        if self.problem.scale_tensor:
            leaves["dscale"] = options["scale"] = options["scale"].detach()
        if self.bias is not None and self.problem.spec.bias_grad:
            leaves["dbias"] = options["attn_bias"] = options["attn_bias"].detach()
        for leaf in leaves.values():
            leaf.requires_grad_()
        out, lse = attention(leaves["dq"], leaves["dk"], leaves["dv"], return_lse=True, **options)
        outputs, upstream = [out], [self.dout.view_as(out) if self.problem.form == "merged" else self.dout]
        if self.problem.uses_lse:
            outputs.append(lse)
            upstream.append(self.dlse.view_as(lse))
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        results = {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}
        for name, gradient in zip(leaves, gradients, strict=True):
            assert gradient.shape == leaves[name].shape, name
            assert gradient.dtype == leaves[name].dtype, name
        assert out.dtype == self.q.dtype
        shapes = {"out": self.dout.shape, "dq": self.q.shape, "dk": self.k.shape, "dv": self.v.shape}
        shapes |= {"dscale": self.scale.shape, "dbias": self.bias.shape if self.bias is not None else ()}
        return {name: x.reshape(shapes[name]) for name, x in results.items()}, lse.detach().view(self.dlse.shape)

    def run_reference(self) -> tuple[Results, Tensor]:
        """The same from the float64 reference, which is given canonical shapes only."""
        spec = self.problem.spec
        leaves = {"dq": self.q, "dk": self.k, "dv": self.v, "dscale": self.scale}
        if self.bias is not None:
            leaves["dbias"] = self.bias
        leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        out, lse = cosine_attention_reference(
            leaves["dq"],
            leaves["dk"],
            leaves["dv"],
            scale=leaves["dscale"],
            groups=spec.groups,
            causal=spec.causal,
            mask=None if self.mask is None else _with_period(self.mask, self.problem.batch),
            attn_bias=leaves["dbias"][None] if self.bias is not None else None,
            l2norm_qk=spec.l2norm,
            return_lse=True,
        )
        outputs, upstream = [out], [self.dout.double()]
        if self.problem.uses_lse:
            outputs.append(lse)
            upstream.append(self.dlse.double())
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}, lse.detach()

    def moved(self, **tensors: Tensor | None) -> Inputs:
        """The same problem with other tensors, its sizes taken from them."""
        changed = replace(self, **tensors)
        problem = replace(
            self.problem,
            batch=changed.q.shape[0],
            q_len=changed.q.shape[2],
            k_len=changed.k.shape[2],
        )
        return replace(changed, problem=problem)


def build(problem: Problem, device: str) -> Inputs:
    """The tensors of a problem."""
    spec = problem.spec
    generator = torch.Generator().manual_seed(problem.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    batch, q_heads, kv_heads = problem.batch, problem.q_heads, problem.kv_heads
    q = normal(batch, q_heads, problem.q_len, spec.d)
    k = normal(batch, kv_heads, problem.k_len, spec.d)
    v = normal(batch, kv_heads, problem.k_len, spec.dv)
    q, k = _special_values(problem, q, k, generator)
    for axis, layout in ((1, "expanded_heads"), (0, "expanded_batch")):
        k = k.narrow(axis, 0, 1).expand_as(k) if problem.layouts[1] == layout else k
        v = v.narrow(axis, 0, 1).expand_as(v) if problem.layouts[2] == layout else v
    if not spec.l2norm:
        q, k = l2norm(q, spec.groups), l2norm(k, spec.groups)
    q, k, v = (place(x.to(spec.dtype).to(device), layout) for x, layout in zip((q, k, v), problem.layouts, strict=True))
    scale = torch.full((q_heads,), problem.scale, dtype=F64 if spec.dtype == F64 else F32, device=device)
    if problem.scale_tensor:  # heads below the promised maximum
        scale = scale * torch.linspace(1, 0.5, q_heads, dtype=scale.dtype, device=device)
    dout = normal(batch, q_heads, problem.q_len, spec.dv).to(spec.dtype).to(device)
    if problem.dout_layout == "ones":
        dout = torch.ones((), dtype=spec.dtype, device=device).expand_as(dout)
    else:
        dout = place(dout, problem.dout_layout)
    dlse = normal(batch, q_heads, problem.q_len).to(device, F64 if spec.dtype == F64 else F32)
    return Inputs(
        problem=problem,
        q=q,
        k=k,
        v=v,
        scale=scale,
        mask=_mask(problem, generator).to(device) if spec.mask or spec.pair_mask else None,
        bias=_bias(problem, generator, device) if spec.bias is not None else None,
        dout=dout,
        dlse=dlse,
    )


def _special_values(problem: Problem, q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    dtype = problem.spec.dtype
    if problem.values in ("equal_qk", "opposite_qk"):
        common = min(problem.q_len, problem.k_len)
        k[:, :, :common] = q[:, : problem.kv_heads, :common] * (1 if problem.values == "equal_qk" else -1)
    elif problem.values == "same_keys":
        k[:] = k[:, :, :1].clone()
    elif problem.values == "zeros":
        # Zero vectors, zero chunks, and (where the dtype has such numbers) chunks whose norm is below the epsilon.
        for x in (q, k):
            chunks = x.unflatten(-1, (problem.spec.groups, -1))
            dead = torch.rand(chunks.shape[:-1], generator=generator) < 0.3
            chunks[dead] *= 0 if dtype == F16 or problem.seed % 2 else 1e-16
    elif problem.values == "uneven":
        exponent = 6 if dtype == F16 else 30
        q = q * 2.0 ** torch.randint(-exponent, exponent + 1, (*q.shape[:-1], 1), generator=generator)
        k = k * 2.0 ** torch.randint(-exponent, exponent + 1, (*k.shape[:-1], 1), generator=generator)
    elif problem.values == "huge":
        factor = 1e3 if dtype == F16 else 1e12
        q, k = q * factor, k * factor
    return q, k


def _mask(problem: Problem, generator: torch.Generator) -> Tensor:
    share = {"random": 0.75, "sparse": 0.1}.get(problem.mask, 1.0)
    if problem.spec.pair_mask:
        full = (_period(problem) if problem.repeats else problem.batch, problem.q_heads, problem.q_len, problem.k_len)
        shape = [size if differs else 1 for size, differs in zip(full, problem.pair_mask, strict=True)]
        return torch.rand(shape, generator=generator) < share
    mask = torch.rand(problem.batch, problem.k_len, generator=generator) < share
    if problem.mask == "empty_batch":
        mask[problem.seed % problem.batch] = False
    elif problem.mask == "tail":
        mask[:, problem.k_len - problem.seed % problem.k_len :] = False
    return mask


def _period(problem: Problem) -> int:
    """Half of the batch, if it has one."""
    return problem.batch // 2 if problem.batch % 2 == 0 else problem.batch


def _with_period(x: Tensor, batch: int) -> Tensor:
    """``(W, ...)`` in five dimensions where the batch is more than one W."""
    return x if x.ndim == 2 or x.shape[0] in (1, batch) else x[None]


def _bias(problem: Problem, generator: torch.Generator, device: str) -> Tensor:
    spec = problem.spec
    batch = {"batch": problem.batch, "full": problem.batch, "repeated": _period(problem)}.get(problem.bias, 1)
    heads = problem.q_heads if problem.bias in ("heads", "full", "repeated") else 1
    q_len, k_len = 1 if problem.bias == "keys" else problem.q_len, 1 if problem.bias == "rows" else problem.k_len
    bias = torch.randn(batch, heads, q_len, k_len, generator=generator, dtype=F64)
    if problem.bias_bound is not None:
        bias = bias.clamp(-problem.bias_bound, problem.bias_bound)
    if problem.bias_has_infinities:
        bias.masked_fill_(torch.rand(bias.shape, generator=generator) < 0.2, float("-inf"))
    return bias.to(spec.bias).to(device)


def place(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` (B, H, S, D) in storage of the named layout; unused storage is NaN."""
    batch, heads, length, dim = x.shape
    if layout == "heads_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":  # q, k and v of one projection
        storage = x.new_full((batch, length, 3, heads, dim), float("nan"))
        placed = storage[:, :, 1].transpose(1, 2)
    elif layout == "padded":  # rows behind the last
        placed = x.new_full((batch, heads, length + 5, dim), float("nan"))[:, :, :length]
    elif layout == "misaligned":
        placed = x.new_full((x.numel() + 1,), float("nan"))[1:].view(x.shape)
    elif layout == "strided":
        placed = x.new_full((batch, heads, length, 2 * dim), float("nan"))[..., ::2]
    elif layout == "expanded_heads":
        return x[:, :1].contiguous().expand_as(x)
    elif layout == "expanded_batch":
        return x[:1].contiguous().expand_as(x)
    else:
        return x.contiguous()
    placed.copy_(x)
    return placed


def softmax_of(problem: Problem) -> str:
    """The softmax that the documented rule chooses for a problem."""
    spec = problem.spec
    unknown = spec.softmax == "online" and (problem.scale_tensor or spec.bias is not None)
    bound = None if unknown else abs(problem.scale) * spec.groups + (problem.bias_bound or 0)
    return softmax_mode(str(spec.dtype).removeprefix("torch."), bound)
