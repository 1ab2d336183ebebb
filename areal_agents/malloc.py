"""What glibc's allocator keeps, given back. Nothing happens with another C library."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Give free memory back to the system now. Worth it after something large was freed for good."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
