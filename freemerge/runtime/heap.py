"""What the C library does with freed memory while a merge runs; glibc on Linux only, and nothing elsewhere.

Left to itself it reuses blocks as large as any that was freed before. That keeps whole tensors, which each thread's
heap hoards; and it gives back the temporaries of chunks, whose fresh pages cost more than what is computed in them.
And with blocks of changing sizes heaps grow to several times what is ever in use: what is free in them lies scattered.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

REUSED = 32 << 20  # bytes of the largest block that glibc ever adapts to use again
_AT_END = 24 << 20  # free bytes that a thread's heap may keep at its end
_STATISTICS = "/proc/self/statm"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_watch: _Watch | None = None
_owned = False


def own_process() -> None:
    """Say that this process is freemerge's own, as that of its command line is: its merges may set the allocator.

    Such settings last, and the C library does not tell what they were: in somebody else's process nothing is set.
    """
    global _owned
    _owned = True


@contextmanager
def returning(threshold: int, scattered: int) -> Iterator[None]:
    """Give blocks of memory back to the system when they are freed, and use smaller ones again.

    In a process that is not ours only what is free within the heaps is given back; see `own_process`.

    Args:
        threshold: bytes of the smallest block that is given back.
        scattered: bytes that the process may grow by before `relieve` gives back what is free within its heaps.
    """
    global _watch
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):  # other C libraries have none, or one that does nothing
        yield
        return
    if owned := _owned:
        library.mallopt(_M_MMAP_THRESHOLD, threshold)
        library.mallopt(_M_TRIM_THRESHOLD, min(2 * threshold, _AT_END))
    try:
        if hasattr(library, "malloc_trim") and os.path.exists(_STATISTICS):
            _watch = _Watch(library, scattered)
        yield
    finally:
        _watch = None
        if owned:
            library.mallopt(_M_MMAP_THRESHOLD, REUSED)  # what it would have adapted to
            library.mallopt(_M_TRIM_THRESHOLD, 2 * REUSED)


def relieve(pause: float = 0.01) -> None:
    """Between two chunks of work: if the process has grown, give back what is free within its heaps.

    Args:
        pause: seconds between two looks: each lets go of the interpreter, and has to wait for it.
    """
    if (watch := _watch) is not None:
        watch.look(pause)


class _Watch:
    """Looks after the memory that is the process's own, without the pages of files."""

    def __init__(self, library: ctypes.CDLL, scattered: int) -> None:
        self._library = library
        self._scattered = scattered
        self._ceiling = self._own() + scattered
        self._looked = float("-inf")

    def look(self, pause: float) -> None:
        now = time.monotonic()
        if now < self._looked + pause:
            return
        self._looked = now
        own = self._own()
        if own <= self._ceiling:
            self._ceiling = min(self._ceiling, own + self._scattered)
            return
        self._library.malloc_trim(0)
        self._ceiling = self._own() + self._scattered  # on top of what is in use

    @staticmethod
    def _own() -> int:
        file = os.open(_STATISTICS, os.O_RDONLY)
        try:
            _, resident, shared, *_ = os.read(file, 256).split()
        finally:
            os.close(file)
        return (int(resident) - int(shared)) * mmap.PAGESIZE
