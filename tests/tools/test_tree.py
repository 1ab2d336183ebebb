"""What an episode left in its sandbox, among things that were put there to break whoever looks."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.sandbox import SandboxSpec
from areal_agents.tools.tree import Tree, read_small, read_tree
from tests.conftest import require

TRAPS = r"""
import os, socket
os.symlink('/etc/passwd', 'link'); os.symlink('/etc', 'etc'); os.symlink('loop', 'loop'); os.mkfifo('pipe')
open('real', 'w').write('one\n'); os.link('real', 'twin'); os.makedirs('sub/deep/empty')
open('sub/deep/f.py', 'w').write('x = 1\n'); open('.hidden', 'w').close()
open('evil\x1b[31m\nname', 'w').close(); open(b'caf\xe9', 'w').close()
open('closed', 'w').write('x'); os.chmod('closed', 0)
os.mkdir('shut'); open('shut/in', 'w').close(); os.chmod('shut', 0)
socket.socket(socket.AF_UNIX).bind('sock')
"""


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def looked(code: str, look: Any) -> Any:
    require("bwrap")

    async def main() -> Any:
        backend = sandboxes.shared("bubblewrap")
        try:
            async with backend.session(SandboxSpec()) as session:
                done = await session.exec(("python3", "-I", "-c", code), timeout=60)
                assert done.status == "ok", done.stderr
                return await look(session)
        finally:
            await sandboxes.close_shared()

    return asyncio.run(main())


def test_files_have_hashes_and_everything_else_is_named() -> None:
    tree: Tree = looked(TRAPS, read_tree)
    assert tree["files"] == {
        "real": sha("one\n"), "twin": sha("one\n"), "sub/deep/f.py": sha("x = 1\n"), ".hidden": sha(""),
        "evil\x1b[31m\nname": sha(""), "caf\udce9": sha(""),
    }  # fmt: skip
    assert tree["others"] == {
        "link": "link", "etc": "link", "loop": "link", "pipe": "special", "sock": "special", "closed": "unreadable",
        "shut": "unreadable",
    }  # fmt: skip
    assert tree["problem"] == ""


@pytest.mark.parametrize(
    ("code", "limits", "problem"),
    [
        ("for i in range(20): open(f'f{i}', 'w').close()", {"max_files": 19}, "too many entries"),
        ("open('big', 'w').truncate(1 << 20)", {"max_bytes": 1 << 19}, "too many bytes"),
        (
            "pass",
            {"root": "/nowhere"},
            "it could not",
        ),
        (
            "import os\nfor _ in range(600): os.mkdir('d' * 200); os.chdir('d' * 200)\nopen('end', 'w').close()",
            {},
            "it cannot be walked",
        ),
    ],
)
def test_limits_are_said(code: str, limits: dict[str, Any], problem: str) -> None:
    tree = looked(code, lambda session: read_tree(session, **limits))
    assert tree["problem"].startswith(problem)


def test_a_small_file_is_read_and_no_other() -> None:
    async def look(session: Any) -> list[bytes | None]:
        names = ("real", "link", "pipe", "sub", "none", "etc/passwd", "closed", "real/x")
        return [await read_small(session, name, 4) for name in names] + [await read_small(session, "real", 3)]

    assert looked(TRAPS, look) == [b"one\n", *[None] * 8]
