"""While a merge runs, free memory within the heaps is returned to the system between chunks of work."""

import subprocess
import sys

import pytest

SCATTER = """
import ctypes
from freemerge.runtime.heap import _Watch, own_process, relieve, returning

own_process()

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes, library.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [
    ctypes.c_void_p
]

def scattered():
    "64 MiB in use, freed; a small block behind each large one stays, so that the heap cannot shrink at its end."
    large = []
    for _ in range(128):
        large.append(library.malloc(1 << 19))
        ctypes.memset(large[-1], 1, 1 << 19)
        library.malloc(20_000)
    for block in large:
        library.free(block)

def grown(before):
    return (_Watch._own() - before) >> 20

relieve()  # nothing to do where nothing is watched
before = _Watch._own()
with returning(1 << 25, 1 << 24):
    scattered()
    kept = grown(before)
    relieve()
    print(kept, grown(before))
scattered()
relieve()
print(grown(before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc, on Linux")
def test_scattered_memory_is_given_back_while_a_merge_runs_and_only_then():
    result = subprocess.run([sys.executable, "-c", SCATTER], capture_output=True, text=True, check=True)
    kept, relieved, afterwards = map(int, result.stdout.split())
    assert kept >= 60
    assert relieved <= 8
    assert afterwards >= 60
