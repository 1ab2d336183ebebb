"""The walk of ``tree.py``, a program that runs inside the sandbox and imports the standard library alone.

It reads its limits as JSON from stdin and prints ``{"files": {path: sha256}, "others": {path: kind}, "problem": ""}``.
It follows no symbolic link, waits for no pipe, and stops at the limits.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from typing import Any

CHUNK = 1 << 16


class Full(Exception):
    """More is there than may be looked at."""


def digest(directory: int, name: str, left: int) -> tuple[str, int]:
    """Return the SHA-256 of a regular file, and how many bytes may still be read."""
    sha = hashlib.sha256()
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it was replaced")
        while chunk := file.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                raise Full("bytes")
            sha.update(chunk)
    return sha.hexdigest(), left


def walk(root: str, max_files: int, max_bytes: int) -> dict[str, Any]:
    """Look at everything below ``root``, names in order."""
    files: dict[str, str] = {}
    others: dict[str, str] = {}
    found: dict[str, Any] = {"files": files, "others": others, "problem": ""}
    seen = 0

    def shut(error: OSError) -> None:
        others[os.path.relpath(os.fsdecode(error.filename or "?"), root)] = "unreadable"

    try:
        for here, folders, names, directory in os.fwalk(root, onerror=shut):
            folders.sort()
            for name in sorted(names + folders):
                path = os.path.relpath(os.path.join(here, name), root)
                seen += 1
                if seen > max_files:
                    raise Full("entries")
                mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
                if stat.S_ISREG(mode):
                    try:
                        files[path], max_bytes = digest(directory, name, max_bytes)
                    except OSError:
                        others[path] = "unreadable"
                elif not stat.S_ISDIR(mode):
                    others[path] = "link" if stat.S_ISLNK(mode) else "special"
    except Full as full:
        found["problem"] = f"too many {full}"
    except (OSError, RecursionError) as error:
        found["problem"] = f"it cannot be walked: {type(error).__name__}"  # too deep, or it changes meanwhile
    return found


if __name__ == "__main__":
    request = json.load(sys.stdin)
    os.chdir(request["root"])
    print(json.dumps(walk(".", request["max_files"], request["max_bytes"])))
