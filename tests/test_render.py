"""Rendered sources: every spec of the support matrix, the same text every time, and nothing left of the template."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import jinja2
import pytest
from matrix import support_matrix

from cosattn import render as rendering
from cosattn.arch import ARCHS
from cosattn.render import render
from cosattn.spec import DTYPES, HEAD_DIMS, KernelSpec

PLAIN = KernelSpec("backward", "sm90", "bfloat16", 64, 64)
MARKS = ("<%", "%>", "<$", "$>", "<#", "#>")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_spec_renders(direction: str, arch: str) -> None:
    """Undefined names in a template raise; distinct specs have distinct sources."""
    dims = [(d, d) for d in HEAD_DIMS[::4]] + [(64, 8), (8, 256)]
    sources = {}
    for dtype in DTYPES:
        for spec in support_matrix(direction, arch, dtype, dims):
            rendered = render(spec)
            assert rendered.spec is spec
            assert rendered.source.startswith(f"// {spec.name}\n")
            assert not [mark for mark in MARKS if mark in rendered.source], spec.name
            sources[spec] = rendered.source
    assert len(set(sources.values())) == len(sources)


def test_headers_are_those_that_are_included() -> None:
    for spec in (PLAIN, replace(PLAIN, direction="forward"), replace(PLAIN, causal=True, deterministic=True)):
        rendered = render(spec)
        included = set(re.findall(r'#include "(include/.+)"', rendered.source))
        for text in rendered.headers.values():
            included |= {f"include/{name}" for name in re.findall(r'#include "(.+)"', text)}
        assert set(rendered.headers) == included
        assert {"include/params.cuh", "include/ptx.cuh"} <= included


def test_features_leave_no_trace_where_they_are_not_asked_for() -> None:
    plain = render(PLAIN).source
    assert "p.mask" not in plain
    assert "bias_of" not in plain
    assert "k_hat;" not in plain
    assert "backward_queries" not in plain
    full = render(replace(PLAIN, mask=True, bias="float32", bias_grad=True, deterministic=True)).source
    for text in ("p.mask", "bias_of", "k_hat;", "backward_queries", "backward_bias"):
        assert text in full
    assert "pair_mask_of" not in full
    assert "pair_mask_of" in render(replace(PLAIN, pair_mask=True)).source


def test_an_undefined_name_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        rendering._environment().from_string("<$ tile.block_m $>").render()


def test_rendering_is_pure() -> None:
    """The same text in another process with another hash seed, and neither torch nor a compiler is touched."""
    script = (
        "import hashlib, sys; from cosattn.render import render; from cosattn.spec import KernelSpec;"
        "r = render(KernelSpec('backward', 'sm90', 'bfloat16', 64, 64));"
        "assert 'torch.utils.cpp_extension' not in sys.modules;"
        "print(hashlib.sha256(repr((r.source, sorted(r.headers.items()))).encode()).hexdigest())"
    )
    root = str(rendering.templates_directory().parent)
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
