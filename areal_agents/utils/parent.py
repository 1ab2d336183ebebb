"""A request to Linux that ends this process with its parent."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Ask Linux for SIGKILL when the thread that started this process ends.

    The end of the pipe from the parent says so too, but not while nobody reads it, and not while a process that the
    parent forked holds the pipe open. The pipe in turn covers a parent that was gone before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
