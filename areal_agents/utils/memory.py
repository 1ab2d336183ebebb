"""This process's memory: its peak, and what glibc's allocator keeps, given back."""

from __future__ import annotations

import ctypes
import resource


def peak_mib() -> float:
    """The process's largest resident size so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trim() -> None:
    """Give free memory back to the system now: worth it after something large was freed. glibc alone can do so."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
