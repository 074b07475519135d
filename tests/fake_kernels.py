"""A tiny kernel source in the place of the rendered one, so that build tests compile in seconds."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass

from cosattn.spec import KernelSpec

SPEC = KernelSpec("forward", "sm80", "float16", 64, 64)

GOOD = """// {name}
#include "include/value.cuh"
__global__ void kernel(float* x) {{ *x = VALUE; }}
extern "C" int cosattn_launch(const void*, const void*, void*) {{ kernel<<<1, 1>>>(nullptr); return 0; }}
extern "C" const char* cosattn_spec_name() {{ return "{name}"; }}
extern "C" int cosattn_value() {{ return VALUE; }}
"""
BAD = GOOD + "this is not C++\n"


@dataclass(frozen=True)
class Rendered:
    spec: KernelSpec
    source: str
    headers: Mapping[str, str]


def install(source: str = GOOD, value: int = 1) -> types.ModuleType:
    """Put a module ``cosattn.render`` in place that renders ``source``; ``calls`` counts."""
    module = types.ModuleType("cosattn.render")
    module.calls = 0

    def render(spec: KernelSpec) -> Rendered:
        module.calls += 1
        return Rendered(spec, source.format(name=spec.name), {"include/value.cuh": f"#define VALUE {value}\n"})

    module.render = render
    sys.modules["cosattn.render"] = module
    return module
