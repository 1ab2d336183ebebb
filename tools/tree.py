"""The files of an episode's sandbox: written before its calls, and read with limits after them.

They are for ``ToolEnv.prepare`` and ``ToolEnv.inspect``. A model may have put anything there: links, pipes, a million
files. Nothing of it makes the functions that read raise. What is wrong is part of what they return.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, TypedDict

from areal_agents.errors import EnvError
from areal_agents.sandbox import Sandbox

EXEC_TIMEOUT_S: Final = 30.0
MAX_OUTPUT_BYTES: Final = 512 << 10


_WRITTEN_AT: Final = 1_700_000_000
"""When all files were written, in seconds since 1970: what a model sees of them must not depend on the clock."""


class Tree(TypedDict):
    """What lies in a folder of the sandbox."""

    files: dict[str, str]
    """Path → SHA-256 of the content, in hexadecimal digits."""
    others: dict[str, str]
    """Path → ``link``, ``special`` (a pipe, a socket), or ``unreadable``. Folders are not listed."""
    problem: str
    """Why something may be missing; empty where all was seen."""


async def write_tree(sandbox: Sandbox, files: Mapping[str, str | bytes]) -> None:
    """Make /work hold these files and nothing else, by their paths in it.

    Raises SandboxError, and ValueError for a path that leads out of it.
    """
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, content in sorted(files.items()):
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(path)
            member.size, member.mode, member.mtime = len(data), 0o644, _WRITTEN_AT
            archive.addfile(member, io.BytesIO(data))
    await sandbox.restore(packed.getvalue())


async def read_tree(sandbox: Sandbox, root: str = "/work", *, max_files: int = 2000, max_bytes: int = 64 << 20) -> Tree:
    """Look at every file of a folder.

    Args:
        sandbox: the session.
        root: the folder, as an absolute path inside.
        max_files: how many files and folders are looked at.
        max_bytes: how much of their content.

    Raises:
        SandboxError: when the sandbox itself failed.
        EnvError: the sandbox has no python3.
    """
    request = json.dumps({"root": root, "max_files": max_files, "max_bytes": max_bytes}).encode()
    argv = ("python3", "-I", "-S", "-X", "utf8", "-c", _program())
    done = await sandbox.exec(argv, stdin=request, timeout=EXEC_TIMEOUT_S, max_output=MAX_OUTPUT_BYTES)
    if done.status == "error" and done.exit_code in (126, 127):
        raise EnvError(f"read_tree needs python3 in the sandbox: {done.stderr.decode(errors='replace')[:200]}")
    try:
        found: Any = json.loads(done.stdout)
        return Tree(files=dict(found["files"]), others=dict(found["others"]), problem=str(found["problem"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return Tree(files={}, others={}, problem=f"it could not be read ({done.status})")


async def read_small(sandbox: Sandbox, path: str, max_bytes: int = 64 << 10) -> bytes | None:
    """Return the content of a file below /work, or None where there is no regular file of at most ``max_bytes``.

    Raises SandboxError, and ValueError for a path outside /work.
    """
    try:
        return await sandbox.read_file(path, max_bytes)
    except OSError:  # missing, a folder, a link, a pipe, too large: whatever the model made of it
        return None


@cache
def _program() -> str:
    return Path(__file__).with_name("tree_inside.py").read_text()
