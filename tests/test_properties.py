"""What must hold for every input, held on the CPU path and (``-m gpu``) on the CUDA kernels alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import TOLERANCE, assert_accurate, magnitudes, relative_error, smallest, unit_roundoff
from hypothesis import given, note
from hypothesis import strategies as st
from strategies import BF16, CPU_SPECS, F16, F32, SPECS, Inputs, Problem, Spec, build, problems, softmax_of
from torch import Tensor

from cosattn import cosine_attention, cpu

LARGEST = {"cpu": 129, "cuda": 1100}


def on_both(specs: tuple[Spec, ...] = SPECS, cpu_specs: tuple[Spec, ...] | None = None) -> pytest.MarkDecorator:
    """Parametrise over (device, spec)."""
    cases = [pytest.param("cpu", spec, id=f"cpu-{spec}") for spec in cpu_specs or specs]
    cases += [pytest.param("cuda", spec, id=f"cuda-{spec}", marks=pytest.mark.gpu) for spec in specs]
    return pytest.mark.parametrize(("device", "spec"), cases)


def chosen(*wanted: Spec) -> tuple[Spec, ...]:
    """Specs, all of them in ``SPECS``: a property must not cost CUDA more kernels."""
    assert set(wanted) <= set(SPECS), set(wanted) - set(SPECS)
    return wanted


PLAIN = chosen(Spec(BF16, 64, 64), Spec(F16, 64, 64, softmax="online"), Spec(F32, 64, 64))
CAUSAL = chosen(
    Spec(BF16, 64, 64, causal=True), Spec(F16, 96, 80, causal=True), Spec(F32, 64, 64, causal=True, mask=True)
)
PAIRS = chosen(
    Spec(F16, 64, 64, pair_mask=True, causal=True),
    Spec(BF16, 128, 128, pair_mask=True),
)
MASKED = chosen(
    Spec(BF16, 128, 128, causal=True, mask=True),
    Spec(F16, 24, 40, mask=True),
    Spec(F16, 32, 32, mask=True, bias=F16, bias_grad=True, softmax="online"),
    Spec(F32, 32, 32, l2norm=False, mask=True, softmax="online"),
)
BOUNDED_AND_ONLINE = ((BF16, 64), (F16, 64), (F32, 64))


@pytest.fixture(autouse=True)
def small_cpu_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 32 keys and at most 16 rows, so that small problems cross many edges."""
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_TILE_KEYS", 32)
        patch.setattr(cpu, "_TILE_ELEMENTS", 1)
        yield


def draw_inputs(data: st.DataObject, spec: Spec, device: str, **options: Any) -> Inputs:
    problem = data.draw(problems(spec, largest=LARGEST[device], **options), label="problem")
    return build(problem, device)


def attend(inputs: Inputs, **changes: Any) -> Tensor:
    """Only the output."""
    arguments, options = inputs.arguments()
    out = cosine_attention(*arguments, **{**options, **changes})
    return out.view(inputs.dout.shape)


def attend_lse(inputs: Inputs, **changes: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, canonical."""
    arguments, options = inputs.arguments()
    out, lse = cosine_attention(*arguments, return_lse=True, **{**options, **changes})
    return out.view(inputs.dout.shape), lse.view(inputs.dlse.shape)


def reach_rows(inputs: Inputs) -> Tensor:
    """bool (B, Hq, Sq, Sk): which row sees which key."""
    problem = inputs.problem
    return inputs.visible().expand(problem.batch, problem.q_heads, problem.q_len, problem.k_len)


def lse_tolerance(problem: Problem) -> float:
    """Absolute: q and k rounded to the input dtype shift a logit by up to two roundoffs of the bound."""
    dtype, size = problem.spec.dtype, 1 + abs(problem.scale) * problem.spec.groups
    return {torch.float64: 1e-13, F32: 4e-6}.get(dtype, 2 * unit_roundoff(dtype)) * size + 1e-13


@on_both(SPECS, CPU_SPECS)
@given(data=st.data())
def test_output_gradients_and_lse_match_the_float64_reference(device: str, spec: Spec, data: st.DataObject) -> None:
    assert_matches_reference(draw_inputs(data, spec, device))


# Additions to dbias held the loads of v up for so long that the copy engine had put dO there: one call in five.
HELD_UP = Problem(
    Spec(BF16, 64, 64, causal=True, bias=BF16, bias_grad=True, softmax="online"),
    *(1, 1, 2, 243, 1041),
    seed=8745,
    scale=50.0,
    scale_tensor=True,
    form="single_head_kv",
    layouts=("strided", "dense", "packed"),
    dout_layout="ones",
    bias="batch",
    bias_has_infinities=True,
    uses_lse=True,
)

PAST_FAILURES = [
    # One key that equals its query: what tensor cores truncate of a logit is all the error there is.
    Problem(Spec(F32, 256, 256), 1, 1, 1, 1, 1, seed=0, scale=8.0, form="single_head_kv", values="equal_qk"),
    # One row whose largest logits are 100 times rounded products: the textbook rounds another q_hat.
    Problem(Spec(F16, 64, 64, softmax="online"), 1, 1, 1, 1, 1024, seed=0, scale=100.0, scale_tensor=True),
    HELD_UP,
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("problem", PAST_FAILURES, ids=str)
def test_past_failures(device: str, problem: Problem) -> None:
    assert_matches_reference(build(problem, device))


@pytest.mark.gpu
def test_loads_that_are_held_up_find_what_they_were_sent_for() -> None:
    inputs = build(HELD_UP, "cuda")
    first, _ = inputs.run(cosine_attention)
    for _ in range(200):
        again, _ = inputs.run(cosine_attention)
        for name in ("out", "dk", "dv", "dbias"):  # the order of additions to the others is not fixed
            assert torch.equal(again[name], first[name]), name


def assert_matches_reference(inputs: Inputs) -> None:
    """Output, gradients and lse of one problem against float64."""
    results, lse = inputs.run(cosine_attention)
    exact, exact_lse = inputs.run_reference()
    empty = exact_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    error = (lse.double() - exact_lse).masked_fill(empty, 0).abs().max().item()
    size = 1 + exact_lse.masked_fill(empty, 0).abs().max().item() * 1e-2
    assert error <= lse_tolerance(inputs.problem) * size, f"lse is off by {error:.2e}"
    assert_accurate(results, exact, inputs.case(), standard=inputs.problem.standard and not empty.any())
    assert not results["out"][empty].any()
    assert not results["dq"][empty].any()


@on_both(MASKED)
@given(data=st.data(), poison=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_what_lies_behind_the_mask_reaches_nothing(device: str, spec: Spec, data: st.DataObject, poison: float) -> None:
    clean = draw_inputs(data, spec, device)
    assert clean.mask is not None
    hidden = ~clean.mask[:, None, :, None]
    dirty = replace(clean, k=clean.k.masked_fill(hidden, poison), v=clean.v.masked_fill(hidden, poison))
    clean = replace(clean, k=clean.k.masked_fill(hidden, 0), v=clean.v.masked_fill(hidden, 0))
    exact, exact_lse = clean.run_reference()
    results, lse = dirty.run(cosine_attention)
    assert torch.equal(lse == float("-inf"), exact_lse == float("-inf"))
    assert_accurate(results, exact, clean.case(), standard=False)
    assert not results["dk"].masked_select(hidden).any()
    assert not results["dv"].masked_select(hidden).any()


@on_both(chosen(*CAUSAL, *PAIRS))
@given(data=st.data(), poison=st.sampled_from([float("nan"), float("inf")]), target=st.sampled_from("kv"))
def test_a_broken_key_reaches_only_the_rows_that_see_it(
    device: str, spec: Spec, data: st.DataObject, poison: float, target: str
) -> None:
    clean = draw_inputs(data, spec, device, forms=("4d",))
    problem = clean.problem
    batch, head, key = (data.draw(st.integers(0, n - 1)) for n in (problem.batch, problem.kv_heads, problem.k_len))
    tensor = getattr(clean, target).clone()
    tensor[batch, head, key, data.draw(st.integers(0, tensor.shape[3] - 1))] = poison
    dirty = replace(clean, **{target: tensor})
    seen = torch.zeros_like(clean.dlse, dtype=torch.bool)
    heads = slice(head * problem.heads_per_kv, (head + 1) * problem.heads_per_kv)
    seen[batch, heads] = reach_rows(clean)[batch, heads, :, key]

    expected, expected_lse = clean.run(cosine_attention)
    results, lse = dirty.run(cosine_attention)
    roundings = 4 * unit_roundoff(spec.dtype)  # atomics may add in another order
    # Where dq cancels, its terms say how much that matters.
    terms = 8 * magnitudes(clean.case())["dq"] / math.sqrt(expected["dq"].numel())
    compared = (
        (results["out"], expected["out"], 0.0),
        (results["dq"], expected["dq"], terms),
        (lse, expected_lse, 0.0),
    )
    for value, before, least in compared:
        unseen = ~seen
        size = max(least, before[unseen].nan_to_num(neginf=0).abs().max().item()) if unseen.any() else 0.0
        torch.testing.assert_close(
            value[unseen], before[unseen], rtol=roundings, atol=max(roundings * size, 4 * smallest(value.dtype))
        )
    if seen.any():
        assert not results["out"][seen].isfinite().all(-1).any(), "a row that sees it shows it"
    other = torch.ones(problem.batch, problem.kv_heads, dtype=torch.bool)
    other[batch, head] = False
    for name in ("dk", "dv"):
        assert results[name][other].isfinite().all(), f"{name} of other heads"


@on_both(chosen(*CAUSAL, *PAIRS))
@given(data=st.data(), poison=st.sampled_from([float("nan"), float("inf")]))
def test_a_broken_query_reaches_only_its_row_and_the_keys_it_sees(
    device: str, spec: Spec, data: st.DataObject, poison: float
) -> None:
    inputs = draw_inputs(data, spec, device, forms=("4d",))
    problem = inputs.problem
    batch, head, row = (data.draw(st.integers(0, n - 1)) for n in (problem.batch, problem.q_heads, problem.q_len))
    q = inputs.q.clone()
    q[batch, head, row, 0] = poison
    seen = reach_rows(inputs)[batch, head, row].clone()
    results, _ = replace(inputs, q=q).run(cosine_attention)
    broken = torch.zeros_like(inputs.dlse, dtype=torch.bool)
    broken[batch, head, row] = seen.any()
    for name in ("out", "dq"):
        assert results[name].isfinite().all(-1).logical_or(broken).all(), name
    reached = torch.zeros(problem.batch, problem.kv_heads, problem.k_len, dtype=torch.bool, device=q.device)
    reached[batch, head // problem.heads_per_kv] = seen
    for name in ("dk", "dv"):
        assert results[name].isfinite().all(-1).logical_or(reached).all(), name


@on_both(chosen(*MASKED, *PAIRS))
@given(data=st.data())
def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient(device: str, spec: Spec, data: st.DataObject) -> None:
    inputs = draw_inputs(data, spec, device)
    inputs = replace(inputs, mask=torch.zeros_like(inputs.mask), q=torch.full_like(inputs.q, float("nan")))
    results, lse = inputs.run(cosine_attention)
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    for name, value in results.items():
        assert not value.any(), name


@on_both(PLAIN)
@given(data=st.data())
def test_the_order_of_the_keys_does_not_matter(device: str, spec: Spec, data: st.DataObject) -> None:
    inputs = draw_inputs(data, spec, device)
    order = torch.randperm(inputs.problem.k_len, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = replace(inputs, k=inputs.k[:, :, order], v=inputs.v[:, :, order])
    assert distance(attend(shuffled), attend(inputs), inputs) <= 1


@on_both(chosen(*PLAIN, *CAUSAL))
@given(data=st.data())
def test_the_last_rows_alone_give_the_same_rows(device: str, spec: Spec, data: st.DataObject) -> None:
    inputs = draw_inputs(data, spec, device)
    rows = data.draw(st.integers(1, inputs.problem.q_len))
    part = inputs.moved(q=inputs.q[:, :, -rows:], dout=inputs.dout[:, :, -rows:], dlse=inputs.dlse[:, :, -rows:])
    assert distance(attend(part), attend(inputs)[:, :, -rows:], part) <= 1


@on_both(chosen(*PLAIN, *CAUSAL, *MASKED[:2]))
@given(data=st.data())
def test_batches_and_heads_do_not_mix(device: str, spec: Spec, data: st.DataObject) -> None:
    inputs = draw_inputs(data, spec, device, forms=("4d",))
    problem = inputs.problem
    batch, head = (data.draw(st.integers(0, n - 1)) for n in (problem.batch, problem.kv_heads))
    heads = slice(head * problem.heads_per_kv, (head + 1) * problem.heads_per_kv)

    def alone(name: str) -> Tensor:
        return getattr(inputs, name)[
            batch : batch + 1, heads if name in ("q", "dout", "dlse") else slice(head, head + 1)
        ]

    part = replace(
        inputs,
        problem=replace(problem, batch=1, kv_heads=1),
        **{name: alone(name) for name in ("q", "k", "v", "dout", "dlse")},
        scale=inputs.scale[heads],
        mask=None if inputs.mask is None else inputs.mask[batch : batch + 1],
    )
    results, _ = inputs.run(cosine_attention)
    expected, _ = part.run_reference()
    kept = {
        "out": results["out"][batch : batch + 1, heads],
        "dq": results["dq"][batch : batch + 1, heads],
        "dk": results["dk"][batch : batch + 1, head : head + 1],
        "dv": results["dv"][batch : batch + 1, head : head + 1],
    }
    assert_accurate(kept, expected, part.case(), standard=False)


@on_both(chosen(*PLAIN, *CAUSAL, *MASKED))
@given(data=st.data())
def test_weights_sum_to_one(device: str, spec: Spec, data: st.DataObject) -> None:
    inputs = draw_inputs(data, spec, device)
    out = attend(replace(inputs, v=torch.ones_like(inputs.v)))
    sees = reach_rows(inputs).any(-1)
    # The weights may be rounded to the input dtype, each by up to one roundoff, and so may the sum.
    deviation = (out.double() - sees[..., None].double()).abs().max().item()
    # Tensor cores truncate: every 16 keys cost the sum of the weights half a float32 ulp, one way.
    truncation = inputs.problem.k_len / 16 * unit_roundoff(torch.float32)
    assert deviation <= 2.5 * unit_roundoff(spec.dtype) + 2e-6 + truncation
    assert not out[~sees].any()


@on_both(chosen(*PLAIN, *CAUSAL))
@given(data=st.data())
def test_the_output_is_linear_in_the_values(device: str, spec: Spec, data: st.DataObject) -> None:
    inputs = draw_inputs(data, spec, device)
    generator = torch.Generator().manual_seed(inputs.problem.seed)
    one, two = (
        torch.randint(-4, 5, inputs.v.shape, generator=generator).to(device, spec.dtype) for _ in range(2)
    )  # small whole numbers: sums are exact in every dtype
    outs = [attend(replace(inputs, v=v)).double() for v in (one, two, one + two)]
    size = attend(replace(inputs, v=one.abs() + two.abs())).double()
    assert (outs[0] + outs[1] - outs[2]).norm() <= (4 * unit_roundoff(spec.dtype) + 4e-6) * size.norm()


@on_both(PLAIN)
@given(data=st.data())
def test_lse_merges_results_over_a_split_of_the_keys(device: str, spec: Spec, data: st.DataObject) -> None:
    inputs = draw_inputs(data, spec, device)
    at = data.draw(st.integers(0, inputs.problem.k_len))
    first, second = (
        attend_lse(inputs.moved(k=inputs.k[:, :, part], v=inputs.v[:, :, part]))
        for part in (slice(0, at), slice(at, None))
    )
    out, lse = attend_lse(inputs)
    merged_lse = torch.logaddexp(first[1], second[1])
    weights = [(part[1] - merged_lse).exp()[..., None] for part in (first, second)]
    merged = weights[0] * first[0] + weights[1] * second[0]
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=lse_tolerance(inputs.problem))
    assert distance(merged, out, inputs) <= 2


@pytest.mark.parametrize(
    ("device", "dtype", "d"),
    [("cpu", *case) for case in BOUNDED_AND_ONLINE]
    + [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in BOUNDED_AND_ONLINE],
)
@given(data=st.data())
def test_both_softmax_modes_agree(device: str, dtype: torch.dtype, d: int, data: st.DataObject) -> None:
    (bounded, _) = chosen(Spec(dtype, d, d), Spec(dtype, d, d, softmax="online"))
    problem = replace(data.draw(problems(bounded, largest=LARGEST[device])), scale_tensor=True)
    inputs = build(problem, device)
    out, lse = attend_lse(inputs)
    online_out, online_lse = attend_lse(inputs, scale_max=None)
    # Kernels add the squares of a row in different orders: once in a while q_hat is rounded the other way.
    close = 2e-6 * (1 + abs(problem.scale))
    apart = ~torch.isclose(lse, online_lse, rtol=1e-6, atol=close)
    assert apart.sum() <= 1 + lse.numel() // 200
    rounded = 2 * unit_roundoff(dtype) * abs(problem.scale)
    torch.testing.assert_close(lse, online_lse, rtol=1e-6, atol=close + rounded)
    assert distance(out, online_out, inputs) <= 2


@pytest.mark.parametrize(
    ("device", "spec"),
    [
        *(pytest.param("cpu", spec, id=f"cpu-{spec}") for spec in SPECS if spec.deterministic),
        *(pytest.param("cuda", spec, id=f"cuda-{spec}", marks=pytest.mark.gpu) for spec in SPECS),
    ],
)
@given(data=st.data())
def test_results_repeat_bit_by_bit(device: str, spec: Spec, data: st.DataObject) -> None:
    """All of deterministic calls. Of others what no two blocks add to: if that moves, there is a race."""
    inputs = draw_inputs(data, spec, device)
    first, first_lse = inputs.run(cosine_attention)
    for _ in range(1 if device == "cpu" else 5):
        again, lse = inputs.run(cosine_attention)
        assert torch.equal(lse, first_lse)
        for name in set(first) if spec.deterministic else {"out", "dk", "dv"}:
            assert torch.equal(again[name], first[name]), name


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(data=st.data())
def test_problems_use_the_softmax_of_their_spec(spec: Spec, data: st.DataObject) -> None:
    problem = data.draw(problems(spec))
    note(str(problem))
    assert softmax_of(problem) == spec.softmax


def distance(x: Tensor, y: Tensor, inputs: Inputs) -> float:
    """Of two outputs that should agree, in units of what two roundings of correct results may differ by."""
    dtype = inputs.problem.spec.dtype
    if not y.double().norm():
        return 0.0 if not x.double().norm() else float("inf")
    # Weights and sums are rounded relative to the sum of absolute values.
    size = attend(replace(inputs, v=inputs.v.abs())).double().norm() / y.double().norm()
    logit_noise = abs(inputs.problem.scale) * 2e-7 if dtype == F32 else 0.0
    allowed = (max(2 * TOLERANCE[dtype][0], 2 * logit_noise) * max(size.item(), 1)) or 1e-12
    return relative_error(x, y.double()) / allowed
