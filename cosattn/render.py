"""Rendering: (spec) -> CUDA source text. Pure: no GPU, no compiler, no torch.

Jinja decides what is emitted (features, constants); loops and arithmetic stay C++ in ``kernels_templates/include``.
Delimiters are ``<% %>``, ``<$ $>`` and ``<# #>`` because Jinja's own collide with C++ braces.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from cosattn import tiles, tiles_short, tiles_sm90_backward, tiles_sm90_forward, tiles_split
from cosattn.arch import ARCHS
from cosattn.families import family_of
from cosattn.spec import KernelSpec

_ELEMENTS = {"float32": "float", "float16": "f16", "bfloat16": "bf16"}
_INCLUDE = re.compile(r'^#include "(include/[\w./]+)"', re.MULTILINE)
_INCLUDE_BESIDE = re.compile(r'^#include "([\w.]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Rendered:
    """One specialised source file and the headers it includes (path relative to the source, text)."""

    spec: KernelSpec
    source: str
    headers: Mapping[str, str]


@functools.cache
def templates_directory() -> Path:
    """``cosattn/_kernels_templates`` of an installed package, ``kernels_templates`` of a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_kernels_templates", package.parent / "kernels_templates"):
        if (candidate / "include").is_dir():
            return candidate
    raise FileNotFoundError(f"the kernel templates are missing: neither in {package} nor beside it")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_directory()),
        undefined=jinja2.StrictUndefined,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<$",
        variable_end_string="$>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _header(name: str, variables: Mapping[str, Any]) -> str:
    """A header's text; one that ends in ``.jinja`` on disk holds only what this kernel needs."""
    if (templates_directory() / name).is_file():
        return (templates_directory() / name).read_text()
    return _environment().get_template(f"{name}.jinja").render(variables)


def _headers_of(source: str, variables: Mapping[str, Any]) -> dict[str, str]:
    headers: dict[str, str] = {}
    pending = _INCLUDE.findall(source)
    while pending:
        name = pending.pop()
        if name not in headers:
            headers[name] = _header(name, variables)
            pending += [f"include/{beside}" for beside in _INCLUDE_BESIDE.findall(headers[name])]
    return dict(sorted(headers.items()))


_CUTS = {
    ("sm80", "forward"): tiles.cuts,
    ("sm80", "backward"): tiles.cuts,
    ("split", "forward"): tiles_split.cuts,
    ("short", "forward"): tiles_short.cuts,
    ("short", "backward"): tiles_short.cuts,
    ("sm90", "forward"): tiles_sm90_forward.cuts,
    ("sm90", "backward"): tiles_sm90_backward.cuts,
}


def render(spec: KernelSpec) -> Rendered:
    """The CUDA source of one spec."""
    family = family_of(spec)
    variables: dict[str, Any] = {
        "spec": spec,
        "arch": ARCHS[spec.arch],
        "element": _ELEMENTS[spec.dtype],
        "bias_element": _ELEMENTS[spec.bias] if spec.bias else None,
        **_CUTS[family, spec.direction](spec),
    }
    short_forward = family == "short" and spec.direction == "forward"
    name = tiles_short.forward_template(spec) if short_forward else spec.direction
    source = _environment().get_template(f"{family}/{name}.cu.jinja").render(variables)
    return Rendered(spec, source, _headers_of(source, variables))
