"""What is refused, and that every reason says what would do."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matrix import support_matrix

from cosattn.arch import ARCHS
from cosattn.spec import DTYPES, HEAD_DIMS, KernelSpec
from cosattn.support import reasons

PLAIN = KernelSpec("backward", "sm90", "bfloat16", 64, 64)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_support_matrix_is_served(arch: str, dtype: str) -> None:
    dims = [(d, dv) for d in HEAD_DIMS for dv in (8, d, 256)]
    for direction in ("forward", "backward"):
        for spec in support_matrix(direction, arch, dtype, dims):
            assert reasons(spec) == [], spec.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "sm75"}, ["sm75", "sm80"]),
        ({"dtype": "float64"}, ["float64", "float32"]),
        ({"bias": "float64"}, ["attn_bias", "float64", "float32"]),
        ({"head_dim": 60}, ["head dim 60", "multiple of 8", "zero columns"]),
        ({"value_dim": 264}, ["value dim 264", "256", "zero columns"]),
        ({"head_dim": 0}, ["head dim 0"]),
        ({"groups": 7}, ["groups 7", "head dim 64"]),
        ({"groups": 0}, ["groups 0"]),
        ({"direction": "forward", "deterministic": True}, ["deterministic", "backward"]),
        ({"direction": "forward", "bias": "float32", "bias_grad": True}, ["bias_grad", "backward"]),
        ({"bias_grad": True}, ["bias_grad needs a bias"]),
    ],
)
def test_one_reason(changes: dict[str, object], words: list[str]) -> None:
    (reason,) = reasons(replace(PLAIN, **changes))  # type: ignore[arg-type]
    for word in words:
        assert word in reason


def test_every_reason_is_named() -> None:
    broken = replace(PLAIN, arch="sm70", dtype="int8", head_dim=7, value_dim=9, groups=2, bias_grad=True)  # type: ignore[arg-type]
    assert len(reasons(broken)) == 6
