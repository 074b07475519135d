"""Loads built kernels, once per process each, and calls them through ctypes (``abi.py`` is the contract)."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from cosattn import abi
from cosattn.errors import LaunchError
from cosattn.spec import KernelSpec

pack_pointers = struct.Struct(abi.POINTERS_FORMAT).pack
"""Packs one address per name of ``abi.POINTERS``; 0 is null."""

pack_problem = struct.Struct(abi.PROBLEM_FORMAT).pack
"""Packs ``abi.INTEGERS`` then ``abi.DOUBLES``."""

ABI_BYTES = struct.calcsize(abi.POINTERS_FORMAT) + struct.calcsize(abi.PROBLEM_FORMAT)


class Kernel:
    """One built kernel, loaded into this process.

    ``launch(pointers, problem, stream)`` is the bare entry point, which returns a ``cudaError_t``; calling the object
    does the same and raises. ctypes lets other Python threads run during the call, as PyTorch's own operators do.
    ``address`` is that of the entry point, for callers in C++.
    """

    __slots__ = ("_error_string", "_library", "_workspace_bytes", "address", "launch", "path", "spec")

    def __init__(self, spec: KernelSpec, path: Path) -> None:
        """Load ``path``. Raises LaunchError when it is not a cosattn kernel of this version built for ``spec``."""
        self.spec = spec
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            launch = library.cosattn_launch
            workspace_bytes = library.cosattn_workspace_bytes
            error_string = library.cosattn_error_string
            spec_name = library.cosattn_spec_name
            abi_bytes = library.cosattn_abi_bytes
        except (OSError, AttributeError) as error:
            raise LaunchError(f"{path} can not be loaded as the kernel {spec.name}: {error}") from error
        launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        launch.restype = ctypes.c_int
        workspace_bytes.argtypes = (ctypes.c_void_p,)
        workspace_bytes.restype = ctypes.c_longlong
        error_string.argtypes = (ctypes.c_int,)
        error_string.restype = ctypes.c_char_p
        spec_name.argtypes = ()
        spec_name.restype = ctypes.c_char_p
        abi_bytes.argtypes = ()
        abi_bytes.restype = ctypes.c_int
        found_name = spec_name().decode()
        found_bytes = abi_bytes()
        if found_name != spec.name or found_bytes != ABI_BYTES:
            raise LaunchError(
                f"{path} holds the kernel {found_name} with {found_bytes} bytes of arguments; "
                f"expected {spec.name} with {ABI_BYTES}. Delete its directory and call again to rebuild it."
            )
        self._library = library
        self._workspace_bytes = workspace_bytes
        self._error_string = error_string
        self.launch = launch
        self.address = ctypes.cast(launch, ctypes.c_void_p).value or 0

    def workspace_bytes(self, problem: bytes) -> int:
        """Bytes of device memory a launch of ``problem`` needs, possibly 0."""
        size = int(self._workspace_bytes(problem))
        if size < 0:
            raise LaunchError(f"{self.spec.name} refuses this problem (workspace size {size})")
        return size

    def __call__(self, pointers: bytes, problem: bytes, stream: int) -> None:
        """Launch on a raw CUDA stream of the current device. Raises LaunchError when CUDA refuses."""
        code = self.launch(pointers, problem, stream)
        if code:
            raise self.error(code)

    def error(self, code: int) -> LaunchError:
        """The exception for a non-zero return of ``launch``."""
        words = (self._error_string(code) or b"unknown error").decode()
        return LaunchError(
            f"CUDA refused to launch {self.spec.name}: {words} (cudaError {code}). An error of an earlier kernel can "
            f"surface here: CUDA_LAUNCH_BLOCKING=1 finds the one at fault. Kernel: {self.path}"
        )


_kernels: dict[KernelSpec, Kernel] = {}
_lock = threading.Lock()


def kernel(spec: KernelSpec) -> Kernel:
    """The loaded kernel of a spec; built on first use.

    Raises:
        MissingKernelError, BuildError, ToolchainError, CacheError: from ``build.ensure``.
        LaunchError: the built file can not be used.
    """
    found = _kernels.get(spec)
    if found is None:
        with _lock:
            found = _kernels.get(spec)
            if found is None:
                from cosattn import build  # a process that launches nothing never needs the build machinery

                found = _kernels[spec] = Kernel(spec, build.ensure(spec))
    return found


def _public_stream(device: int) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _public_allocate(size: int, stream: int) -> int:
    return int(torch.cuda.caching_allocator_alloc(size, stream=stream))


# Every call of cosine_attention uses these. The private names are what the public functions call in the end; those
# create and check Python objects on the way, which costs microseconds.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""Index of the current CUDA device."""

current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
"""Raw handle of the current CUDA stream of a device."""

allocate: Callable[[int, int], int] = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", _public_allocate)
"""``allocate(size, stream)``: address of memory of PyTorch's caching allocator on the current device.

Memory that only work on ``stream`` uses can be freed as soon as that work is launched: the allocator hands it out again
to later work of that stream alone, also while a CUDA graph is captured.
"""

free: Callable[[int], None] = getattr(
    torch._C, "_cuda_cudaCachingAllocator_raw_delete", torch.cuda.caching_allocator_delete
)
"""Give an address of ``allocate`` back."""
