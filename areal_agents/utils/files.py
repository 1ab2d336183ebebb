"""Functions that write files so that a killed process or a full disk leaves them whole."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from areal_agents.errors import ArealError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Say whether ``error`` comes from a disk without room, also where a library says so in words alone."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(os.strerror(number) in str(error) for number in _FULL)


def room_to_make(path: Path, need: int = 0) -> str:
    """Say what makes room on the full disk of ``path``, which ``need`` more bytes are to be written to."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_files and not disk.f_favail and free:
        return f"remove some files on that disk (it has room for {size_text(free)}, but for no more files)"
    if need:
        return f"free about {size_text(need)} on that disk ({size_text(free)} are free)"
    return "free some space on that disk"


def size_text(size: int) -> str:
    """Write a number of bytes for people, such as ``1.6 GB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def unwritable(path: Path, error: Exception, *, need: int = 0) -> ArealError:
    """Return the error for a file of a run that cannot be written, with path, reason and next action.

    ``need`` is how many bytes it takes, where that is known.
    """
    reason = getattr(error, "strerror", None) or str(error)
    if (blocker := _blocker(path)) is not None:
        return ArealError(f"{path} cannot be written: {blocker} is a file and no folder. Choose another --out")
    if is_full(error):
        reason = next((said for number in _FULL if (said := os.strerror(number)) in str(error)), reason)
        action = f"{room_to_make(path, need)}, then go on with --resume"
    else:
        action = "make it writable, then go on with --resume; or choose another --out"
    return ArealError(f"{path} cannot be written ({reason}): {action}")


def unwritten(path: Path, error: OSError) -> ArealError:
    """Return the error for a file that a command was to write, which holds nothing that could go on."""
    action = f": {room_to_make(path)}, or write to another disk" if is_full(error) else ""
    return ArealError(f"cannot write {path}: {error.strerror or error}{action}")


def _blocker(path: Path) -> Path | None:
    """Return the file that stands where ``path`` needs a folder, or None where there is none."""
    for parent in path.parents:
        try:
            if parent.exists():
                return None if parent.is_dir() else parent
        except OSError:  # below a file, or in a folder that may not be searched
            continue
    return None


def append_whole(file: io.FileIO, data: bytes) -> None:
    """Append ``data`` to an unbuffered file, or nothing of it.

    Raises OSError.
    """
    end = os.fstat(file.fileno()).st_size
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) or 0 :]
    except OSError:
        os.ftruncate(file.fileno(), end)
        raise


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline, which is the line that a killed process was writing.

    Raises OSError.
    """
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


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file to fill, which takes the place of ``path`` on a clean exit.

    It is on the disk then. Without a clean exit ``path`` is as before. One process at a time may write to ``path``.
    Raises OSError.
    """
    new = path.with_name(f".{path.name}.tmp")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by a file with ``text``.

    Readers and crashes see the old content or the new. Raises OSError.
    """
    with atomic_file(path) as file:
        file.write(text.encode())


def save_whole(path: Path, text: str) -> None:
    """Replace a run's file ``path`` by one with ``text``, as ``write_atomically`` does.

    Raises ArealError where it cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to fill, which takes the place of ``path`` on a clean exit.

    It is on the disk then. Without a clean exit it is gone.

    A folder already at ``path`` is replaced. It is moved aside first, so a crash between two renames leaves it under
    ``.NAME.old-PID`` beside the complete new one, ``.NAME.tmp-PID``.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for file in [*new.rglob("*"), new]:
            sync(file)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(new, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Folders need it too. A power cut may else undo a rename and keep what came after it, such as a commit that names a
    removed checkpoint. Raises OSError.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
