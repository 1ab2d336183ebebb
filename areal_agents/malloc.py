"""What glibc's allocator keeps, given back. Nothing happens with another C library.

By default it raises its threshold for separate mappings up to 32 MiB, and activations of that size then come from the
heap, where one live block keeps all freed ones before it resident: 1 to 2 GB for a model of 135M parameters.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def map_large_blocks(nbytes: int = 1 << 20) -> None:
    """Give blocks of at least ``nbytes`` a mapping of their own, for this process: freed means given back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, nbytes)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 * nbytes)


def trim() -> None:
    """Give free memory back to the system now."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
