"""Tools on the files of an episode: ``read_file``, ``write_file``, ``edit_file``, ``list_files``, ``search_files``.

They work inside the sandbox, in the session's working folder, where the ``python`` tool's code finds and leaves files.
They follow no symbolic link, wait for no pipe and show no more than fits (``files_inside.py``).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import EnvError
from areal_agents.sandbox import Sandbox
from areal_agents.tool import ToolError, ToolResult, ToolSpec, made_by, tool

EXEC_TIMEOUT_S: Final = 10.0
MAX_TEXT_CHARS: Final = 1 << 20
"""Of what is written, and of each text of an edit."""


def file_tools(root: str | None = None) -> tuple[ToolSpec, ...]:
    """Make the five tools for a folder of the sandbox.

    ``root`` is an absolute path inside it, such as the repository of a task's image. None is the session's own folder,
    and ``FILE_TOOLS`` are those.
    """
    if root is not None and not root.startswith("/"):
        raise ValueError(f"root {root!r} must be an absolute path inside the sandbox")

    # A tool's own limit is wider than the program's: opening a sandbox on a busy machine must not cost reward.
    @tool(timeout=60, max_output_chars=8000)
    async def read_file(path: str, first: int = 1, last: int | None = None, *, sandbox: Sandbox) -> ToolResult:
        """Read a text file, with line numbers.

        Args:
            path: relative to the working folder
            first: the first line to show
            last: the last one
        """
        return await _inside(sandbox, root, {"op": "read", "path": path, "first": first, "last": last})

    @tool(timeout=60)
    async def write_file(path: str, content: str, *, sandbox: Sandbox) -> ToolResult:
        """Write a file, and make the folders on its way."""
        return await _inside(sandbox, root, {"op": "write", "path": path, "content": content})

    @tool(timeout=60)
    async def edit_file(path: str, old: str, new: str, all: bool = False, *, sandbox: Sandbox) -> ToolResult:
        """Replace an exact text of a file, which must occur once.

        Args:
            old: the text with its spaces and line ends, without line numbers
            all: replace each place where it occurs
        """
        return await _inside(sandbox, root, {"op": "edit", "path": path, "old": old, "new": new, "all": all})

    @tool(timeout=60, max_output_chars=8000)
    async def list_files(path: str = ".", depth: int = 1, *, sandbox: Sandbox) -> ToolResult:
        """List a folder, with sizes in bytes.

        Args:
            depth: how many levels of folders
        """
        return await _inside(sandbox, root, {"op": "list", "path": path, "depth": depth})

    @tool(timeout=60, max_output_chars=8000)
    async def search_files(
        text: str, path: str = ".", files: str = "*", regex: bool = False, *, sandbox: Sandbox
    ) -> ToolResult:
        """Find the lines of files that have a text.

        Args:
            path: the folder to search
            files: names of files, such as *.py
            regex: text is a regular expression of Python
        """
        request = {"op": "search", "path": path, "text": text, "files": files, "regex": regex}
        return await _inside(sandbox, root, request)

    return tuple(map(made_by(file_tools, root), (read_file, write_file, edit_file, list_files, search_files)))


@cache
def _program() -> str:
    return Path(__file__).with_name("files_inside.py").read_text()


async def _inside(sandbox: Sandbox, root: str | None, request: dict[str, Any]) -> ToolResult:
    """Run one operation inside the sandbox."""
    for name, value in request.items():
        if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
            raise ToolError(f"error: {name} has {len(value)} characters, more than {MAX_TEXT_CHARS}")
        if type(value) is int and abs(value) >= 1 << 31:
            raise ToolError(f"error: {name} is too large a number")
    stdin = json.dumps({**request, "root": root}).encode()
    argv = ("python3", "-I", "-S", "-X", "utf8", "-c", _program())
    done = await sandbox.exec(argv, stdin=stdin, timeout=EXEC_TIMEOUT_S, max_output=1 << 20)
    if done.status == "timeout":
        return ToolResult(f"error: stopped after {EXEC_TIMEOUT_S:g} s", "timeout")
    if done.status == "error" and done.exit_code in (126, 127):
        raise EnvError(f"the file tools need python3 in the sandbox: {done.stderr.decode(errors='replace')[:200]}")
    try:
        answer = json.loads(done.stdout)
        text = answer.get("error", answer.get("text"))
        if not isinstance(text, str):
            raise ValueError
    except (ValueError, AttributeError):
        raise ToolError(f"error: the sandbox could not do it ({done.status})") from None
    return ToolResult(f"error: {text}", "error") if "error" in answer else ToolResult(text)


FILE_TOOLS: Final = file_tools()
read_file, write_file, edit_file, list_files, search_files = FILE_TOOLS
