"""The memory of this process, with its peak and a way to give free memory back."""

from __future__ import annotations

import ctypes


def peak_mib() -> float:
    """Return the process's largest resident size so far, in MiB."""
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trim() -> None:
    """Give free memory back to the system now.

    glibc's allocator keeps it otherwise. The call is worth it after something large was freed. With another C library
    it does nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
