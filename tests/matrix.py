"""The support matrix as specs, to be walked over by tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cosattn.spec import KernelSpec

FEATURES: Sequence[Mapping[str, Any]] = (
    {},
    {"causal": True},
    {"mask": True},
    {"causal": True, "mask": True},
    {"softmax": "online", "causal": True, "mask": True},
    {"l2norm": False},
    {"groups": 8},
    {"bias": "float32", "softmax": "online"},
    {"bias": "bfloat16", "causal": True, "mask": True, "softmax": "online"},
    {"pair_mask": True},
    {"pair_mask": True, "bias": "float32", "causal": True, "softmax": "online"},
)
BACKWARD_FEATURES: Sequence[Mapping[str, Any]] = (
    *FEATURES,
    {"deterministic": True},
    {"deterministic": True, "causal": True, "mask": True},
    {"bias": "float32", "bias_grad": True, "softmax": "online"},
    {"bias": "float16", "bias_grad": True, "deterministic": True, "causal": True, "mask": True, "softmax": "online"},
)


def support_matrix(
    direction: Any,
    arch: str,
    dtype: Any,
    dims: Iterable[tuple[int, int]],
    features: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[KernelSpec]:
    """Every pair of (head dim, value dim) with every set of features."""
    if features is None:
        features = FEATURES if direction == "forward" else BACKWARD_FEATURES
    for d, dv in dims:
        for options in features:
            yield KernelSpec(direction, arch, dtype, d, dv, **options)
