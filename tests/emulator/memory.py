"""Memory that ends where a tensor ends: the byte behind it can not be touched, the gaps inside it are NaN."""

from __future__ import annotations

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_PAGE = mmap.PAGESIZE
_POISON = 0xFF  # NaN in every float type


class Guarded:
    """Tensors of one launch, each between two pages that fault when touched."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._spans: list[tuple[str, int, int]] = []

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with the shape and strides of ``tensor`` (expanded dimensions stay expanded), all bytes 0xFF."""
        size, stride = tensor.shape, tensor.stride()
        elements = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if tensor.numel() else 0
        flat = self._bytes(name, elements * tensor.element_size()).view(tensor.dtype)
        return flat.as_strided(size, stride)

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The same, holding the values of ``tensor``."""
        result = self.like(name, tensor)
        once = [slice(0, 1) if s == 0 else slice(None) for s in tensor.stride()]
        result[tuple(once)].copy_(tensor[tuple(once)])
        return result

    def empty(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, all bytes 0xFF."""
        return self.like(name, torch.empty(shape, dtype=dtype))

    def spans(self) -> list[tuple[int, int]]:
        """First address and bytes of each tensor."""
        return [(first, last - first) for _, first, last in self._spans if last > first]

    def describe(self, address: int) -> str:
        """The tensor nearest to an address, and how far off it is."""
        name, first, last = min(self._spans, key=lambda span: max(span[1] - address, address - span[2]))
        if address >= last:
            return f"{address - last} bytes behind the end of {name}"
        if address < first:
            return f"{first - address} bytes before {name}"
        return f"inside {name}"

    def _bytes(self, name: str, count: int) -> torch.Tensor:
        used = -(-max(count, 1) // 16) * 16
        pages = -(-used // _PAGE) + 2
        area = mmap.mmap(-1, pages * _PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for guard in (start, start + (pages - 1) * _PAGE):
            if _libc.mprotect(ctypes.c_void_p(guard), _PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        first = start + (pages - 1) * _PAGE - used
        ctypes.memset(first, _POISON, used)
        self._maps.append(area)
        self._spans.append((name, first, first + count))
        # 16-byte aligned, so up to 15 poisoned bytes lie between the tensor and the guard.
        return torch.frombuffer((ctypes.c_char * used).from_address(first), dtype=torch.uint8)[:count]
