"""Freed memory is kept for what comes next: counted in pages that the kernel has to clear."""

import os
import subprocess
import sys

import pytest

from trainers.core import allocation
from trainers.core.allocation import CHOSEN

PROGRAM = """
import ctypes, resource
from trainers.core import allocation
kept = allocation.keep_freed_memory()
size, libc = 3 * 2**24, ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use():
    piece = libc.malloc(size)
    ctypes.memset(piece, 1, size)
    libc.free(piece)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("chosen", [None, *CHOSEN])
def test_pieces_of_48_mib_are_cleared_once_unless_somebody_has_chosen(chosen):
    """Of 12,288 pages each, unless pages are larger."""
    own = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    values = {None: {}, "GLIBC_TUNABLES": {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}}
    environment = own | values.get(chosen, {chosen: "65536"})
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    kept, faults = map(int, done.stdout.split())
    assert kept == (chosen is None)
    assert (faults < 100) if kept else (faults > 200)


def test_nothing_changes_where_there_is_no_such_function(monkeypatch):
    for name in CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda _: object())
    assert allocation.keep_freed_memory() is False
