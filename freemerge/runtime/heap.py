"""Settings for how the C library handles freed memory during a merge; glibc on Linux only, a no-op elsewhere.

By default glibc keeps blocks up to the largest size freed so far for reuse. So each thread's heap keeps whole tensors,
while the temporaries of chunks are returned to the system, although faulting in their fresh pages costs more than the
computation. With blocks of varying sizes, fragmentation also makes heaps grow to several times the memory in use.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

REUSED = 32 << 20  # bytes; the upper bound of glibc's dynamic mmap threshold
_AT_END = 24 << 20  # free bytes that a thread's heap may keep at its top
_STATISTICS = "/proc/self/statm"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

_watch: _Watch | None = None
_owned = False


def own_process() -> None:
    """Mark this process as freemerge's own, as the command line does: merges may then set the allocator.

    These settings persist and their previous values cannot be read, so nothing is set in any other process.
    """
    global _owned
    _owned = True


@contextmanager
def returning(threshold: int, scattered: int) -> Iterator[None]:
    """Return large blocks of memory to the system when they are freed, and reuse smaller ones.

    In a process that is not freemerge's own, only free memory inside the heaps is returned; see `own_process`.

    Args:
        threshold: bytes of the smallest block that is returned.
        scattered: bytes that the process may grow by before `relieve` returns the free memory inside its heaps.
    """
    global _watch
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):  # other C libraries lack it or ignore it
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
            library.mallopt(_M_MMAP_THRESHOLD, REUSED)  # the value that glibc would have adapted to
            library.mallopt(_M_TRIM_THRESHOLD, 2 * REUSED)


def relieve(pause: float = 0.01) -> None:
    """Between two chunks of work, return the free memory inside the heaps if the process has grown.

    Args:
        pause: seconds between two checks; each check releases the GIL and has to reacquire it.
    """
    if (watch := _watch) is not None:
        watch.look(pause)


class _Watch:
    """Tracks the process's anonymous memory, without the pages of files."""

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
        self._ceiling = self._own() + self._scattered  # in addition to the memory in use

    @staticmethod
    def _own() -> int:
        file = os.open(_STATISTICS, os.O_RDONLY)
        try:
            _, resident, shared, *_ = os.read(file, 256).split()
        finally:
            os.close(file)
        return (int(resident) - int(shared)) * mmap.PAGESIZE
