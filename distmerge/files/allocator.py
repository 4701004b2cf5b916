"""What the C library does with memory that is freed: it keeps it, for the block that comes next.

A merge takes and frees the same few megabytes thousands of times. By default glibc gives blocks of that size back to the kernel
each time, which then hands out fresh pages, zeroed one by one: that costs more than the arithmetic in them.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 64 << 20
MAPPED_BYTES = 32 << 20  # the largest that glibc accepts


def keep_freed_memory() -> None:
    """For this process, from now on; where the C library has no such setting nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
