"""Fresh memory for large tensors, in huge pages where the system supports them.

The first access to a 4 KiB page costs more than most of the computation on it. Linux provides 2 MiB pages on request
(its usual setting, `madvise`), which makes fresh memory about three times as fast.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_LARGE = 5 << 20  # bytes from which huge pages pay off; chunks are smaller and use recycled memory
_PAGE = 2 << 20


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
    """`torch.empty`, for tensors that may be large."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    madvise = _madvise() if tensor.nbytes >= _LARGE and tensor.device.type == "cpu" else None
    if madvise is not None:
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE  # only huge pages that lie wholly inside the tensor
        stop = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        madvise(begin, stop - begin, mmap.MADV_HUGEPAGE)  # on failure the pages stay ordinary ones
    return tensor


class Pool:
    """Recycled memory: the first access costs time even with huge pages, most of all in a virtual machine.

    Args:
        limit: bytes held, lent and free together; the lent memory alone may exceed it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lent = 0
        self._free: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """Lend at least `size` bytes, (n,) uint8, with arbitrary contents; may be called from any thread."""
        with self._lock:
            # Skip a much larger buffer: requests that need its size could not use it.
            fitting = [index for index, memory in enumerate(self._free) if size <= len(memory) <= 2 * size]
            if fitting:
                memory = self._free.pop(min(fitting, key=lambda index: len(self._free[index])))
            else:
                while self._free and self._lent + sum(map(len, self._free)) + size > self._limit:
                    self._free.pop(0)
                memory = fresh((size,), torch.uint8)
            self._lent += len(memory)
        return memory

    def give(self, memory: Tensor) -> None:
        """Return lent memory that is no longer used."""
        with self._lock:
            self._lent -= len(memory)
            self._free.append(memory)


@lru_cache(maxsize=1)
def _madvise():
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
