"""What a processor's memory costs: glibc gives freed pieces of 32 MiB and more back to the kernel, which clears each page anew.

A step's activations and logits are such pieces, again and again: a quarter of a step was spent there (docs/benchmarks.md).
"""

import ctypes
import os

LARGEST_KEPT = 2**27
"""Bytes of a piece that is kept for the next one, and of what may lie free at the end of a heap. With a GiB there were gaps, and
memory was a fifth more at its peak."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""


CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables of the environment by which somebody has said how it should be."""


def keep_freed_memory() -> bool:
    """For this process; False where somebody has chosen otherwise, or no glibc takes such a size, and nothing changes.

    In this order: the second alone has every piece of 128 KiB given back.
    """
    if any(name in os.environ for name in CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(of, LARGEST_KEPT) for of in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
