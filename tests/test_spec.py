"""Kernel specifications: names, which softmax, and that they are values."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from matrix import support_matrix

from cosattn.arch import ARCHS
from cosattn.spec import DTYPES, HEAD_DIMS, KernelSpec, softmax_mode

PLAIN = KernelSpec("forward", "sm90", "bfloat16", 64, 64)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "forward_sm90_bf16_d64"),
        ({"direction": "backward", "arch": "sm80", "dtype": "float32"}, "backward_sm80_f32_d64"),
        ({"dtype": "float16", "value_dim": 32}, "forward_sm90_f16_d64_dv32"),
        ({"groups": 8}, "forward_sm90_bf16_d64_g8"),
        ({"l2norm": False}, "forward_sm90_bf16_d64_nonorm"),
        ({"causal": True, "mask": True}, "forward_sm90_bf16_d64_causal_mask"),
        ({"bias": "float32", "softmax": "online"}, "forward_sm90_bf16_d64_bias-f32_online"),
        (
            {"direction": "backward", "bias": "float16", "bias_grad": True, "deterministic": True},
            "backward_sm90_bf16_d64_bias-f16-grad_deterministic",
        ),
    ],
)
def test_names(changes: dict[str, object], name: str) -> None:
    """Compiled kernels are cached under these names."""
    assert replace(PLAIN, **changes).name == name  # type: ignore[arg-type]


def test_names_are_unique() -> None:
    dims = list(itertools.product((8, 64, 256), (8, 64, 256)))
    specs = [
        spec
        for direction, arch, dtype in itertools.product(("forward", "backward"), ("sm80", "sm90"), DTYPES)
        for spec in support_matrix(direction, arch, dtype, dims)
    ]
    assert len({spec.name for spec in specs}) == len(set(specs)) == len(specs)
    assert all(set(spec.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for spec in specs)


def test_every_field_is_in_the_name() -> None:
    backward = replace(PLAIN, direction="backward", bias="float32")
    other = {
        "direction": "forward",
        "arch": "sm80",
        "dtype": "float16",
        "head_dim": 32,
        "value_dim": 128,
        "groups": 2,
        "l2norm": False,
        "causal": True,
        "mask": True,
        "pair_mask": True,
        "bias": "float16",
        "softmax": "online",
        "few": True,
        "short": 64,
        "split": 16,
        "deterministic": True,
        "bias_grad": True,
    }
    assert set(other) == {field.name for field in fields(KernelSpec)}
    for name, value in other.items():
        assert replace(backward, **{name: value}).name != backward.name, name  # type: ignore[arg-type]


def test_specs_are_values() -> None:
    copy = pickle.loads(pickle.dumps(PLAIN))
    assert copy == PLAIN
    assert hash(copy) == hash(PLAIN)
    with pytest.raises(FrozenInstanceError):
        PLAIN.causal = True  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_mode_at_its_threshold(dtype: str) -> None:
    bound = (29 if dtype == "float16" else 120) / (2 * math.log2(math.e))
    assert softmax_mode(dtype, bound * (1 - 1e-12)) == "bounded"
    assert softmax_mode(dtype, bound * (1 + 1e-12)) == "online"
    assert softmax_mode(dtype, None) == "online"
    assert softmax_mode(dtype, math.inf) == "online"
    assert softmax_mode(dtype, math.nan) == "online", "a bound that is no number proves nothing"


def test_the_usual_scale_is_bounded() -> None:
    assert {dtype: softmax_mode(dtype, 8.0) for dtype in DTYPES} == dict.fromkeys(DTYPES, "bounded")
    assert softmax_mode("float16", 16.0) == "online"


def test_ranges() -> None:
    assert tuple(range(8, 257, 8)) == HEAD_DIMS
    assert set(ARCHS) == {arch.name for arch in ARCHS.values()}
