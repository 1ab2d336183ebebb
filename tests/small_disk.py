"""A disk that is soon full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import missing


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "1m", inodes: int = 0) -> Iterator[Path]:
    """A file system of ``size``, with at most ``inodes`` files and folders, its own included, at the new ``folder``.

    0 inodes: as many as one likes. The test is skipped where no file system can be mounted.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={inodes}", "areal-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        missing(f"a tmpfs: {'not root' if done is None else done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, room: int = 0) -> Path:
    """Fill the disk up to ``room`` bytes; returns the file to remove for more room."""
    free = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - room))
    return ballast
