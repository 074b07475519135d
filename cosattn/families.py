"""Template families: (spec) -> the folder of ``kernels_templates/`` that its kernel is rendered from."""

from __future__ import annotations

from cosattn import tiles_sm90_backward, tiles_sm90_forward
from cosattn.arch import ARCHS
from cosattn.spec import KernelSpec


def family_of(spec: KernelSpec) -> str:
    """The fastest family of the architecture that serves ``spec``; ``sm80`` serves everything.

    ``sm90`` (wgmma, TMA) multiplies 16-bit types only: float32 takes split products, which live in registers.
    """
    for family in ARCHS[spec.arch].families:
        if family == "sm80" or (spec.dtype != "float32" and _serves_sm90(spec)):
            return family
    raise AssertionError(f"no family serves {spec.name}")


def _serves_sm90(spec: KernelSpec) -> bool:
    return tiles_sm90_forward.serves(spec) if spec.direction == "forward" else tiles_sm90_backward.serves(spec)
