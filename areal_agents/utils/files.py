"""Writing files so that a killed process or a full disk leaves them whole."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

from areal_agents.errors import ArealError


def unwritable(path: Path, error: OSError) -> ArealError:
    """The error for a file of a run that cannot be written: path, reason, next action."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    action = "free some space on that disk" if full else "make it writable"
    reason = error.strerror or str(error)
    return ArealError(f"{path} cannot be written ({reason}): {action}, then start again; `train --resume` goes on")


def append_whole(file: io.FileIO, data: bytes) -> None:
    """Append ``data`` to an unbuffered file, or nothing of it. Raises OSError."""
    end = os.fstat(file.fileno()).st_size
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) or 0 :]
    except OSError:
        os.ftruncate(file.fileno(), end)
        raise


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline: the line a killed process was writing. Raises OSError."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        keep, block = end, 1 << 16
        while keep > 0:
            start = max(0, keep - block)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The names in ``folder`` are on the disk: a new or renamed file outlives a power cut. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
