"""GPU architectures: one row each. A new GPU is a new row, and a template family only if it brings new instructions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arch:
    """What the rest of the package needs to know about one GPU architecture."""

    name: str
    """Short name used in specs, cache paths and command lines, for example ``sm90``."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    gencode: str
    """Value of nvcc's ``-gencode`` flag."""
    shared_memory: int
    """Bytes of shared memory one thread block may use."""
    families: tuple[str, ...]
    """Folders of ``kernels_templates/`` that serve it, the fastest first: ``families.family_of`` chooses."""
    minimum_cuda: tuple[int, int]
    """Oldest CUDA toolkit that compiles for it."""

    @property
    def launches_overlap(self) -> bool:
        """Whether programmatic dependent launch exists (compute capability 9.0 and newer)."""
        return self.capability >= (9, 0)


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm80", (8, 0), "arch=compute_80,code=sm_80", 166_912, ("sm80",), (11, 4)),
        Arch("sm86", (8, 6), "arch=compute_86,code=sm_86", 101_376, ("sm80",), (11, 4)),
        Arch("sm87", (8, 7), "arch=compute_87,code=sm_87", 166_912, ("sm80",), (11, 4)),
        Arch("sm89", (8, 9), "arch=compute_89,code=sm_89", 101_376, ("sm80",), (11, 8)),
        Arch("sm90", (9, 0), "arch=compute_90a,code=sm_90a", 232_448, ("sm90", "sm80"), (12, 0)),
        Arch("sm100", (10, 0), "arch=compute_100,code=sm_100", 232_448, ("sm80",), (12, 8)),
        Arch("sm103", (10, 3), "arch=compute_103,code=sm_103", 232_448, ("sm80",), (12, 9)),
        Arch("sm120", (12, 0), "arch=compute_120,code=sm_120", 101_376, ("sm80",), (12, 8)),
        Arch("sm121", (12, 1), "arch=compute_121,code=sm_121", 101_376, ("sm80",), (12, 9)),
    )
}

_BY_CAPABILITY = {arch.capability: arch for arch in ARCHS.values()}


def arch_of(capability: tuple[int, int]) -> Arch | None:
    """The row for a compute capability, or None when cosattn has no kernel for it."""
    return _BY_CAPABILITY.get(capability)
