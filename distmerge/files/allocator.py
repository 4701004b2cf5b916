"""Makes the C library's allocator keep freed memory for the next block instead of returning it to the kernel.

A merge allocates and frees the same few megabytes thousands of times. By default glibc returns blocks of that size to the
kernel each time, and the kernel zeroes every page that it hands out again: that costs more than the arithmetic on them.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 64 << 20
MAPPED_BYTES = 32 << 20  # the largest that glibc accepts


def keep_freed_memory() -> None:
    """Change the setting for this process. Does nothing where the C library has no ``mallopt`` (musl, macOS)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
