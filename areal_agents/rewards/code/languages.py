"""The languages that a submission may be written in: its file, its compiler and its command in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """How a program is built and run."""

    file: str
    compile: Sequence[str]
    """Ends with 0 where the source is a program."""
    run: Sequence[str]
    fences: frozenset[str]
    """Names of its fenced blocks in Markdown."""
    compile_seconds: float = 30.0


_PYTHON = ("python3", "-I", "-X", "utf8")
LANGUAGES = {
    "python": Language(
        "main.py", (*_PYTHON, "-c", "import sys; compile(open('main.py', 'rb').read(), 'main.py', 'exec')"),
        (*_PYTHON, "main.py"), frozenset({"python", "py", "python3", ""}),
    ),
    "c": Language("main.c", ("cc", "-O2", "-o", "main", "main.c", "-lm"), ("./main",), frozenset({"c", ""})),
    "c++": Language("main.cpp", ("c++", "-O2", "-o", "main", "main.cpp"), ("./main",), frozenset({"c++", "cpp", ""})),
    "javascript": Language(
        "main.js", ("node", "--check", "main.js"), ("node", "main.js"), frozenset({"javascript", "js", ""}),
    ),
}  # fmt: skip

CALL = """
import json, os, sys, types
def _call():
    asked = json.loads(sys.stdin.buffer.read())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = sys.modules["submission"] = types.ModuleType("submission")
    exec(compile(open("main.py", "rb").read(), "main.py", "exec"), module.__dict__)
    name = asked["function"]
    call = getattr(module if hasattr(module, name) or not hasattr(module, "Solution") else module.Solution(), name)
    out.write(json.dumps(call(*asked["arguments"])))
    out.flush()
_call()
"""
"""Calls a function of a Python submission, or a method of its ``Solution``. What it prints goes to stderr.

Hostile code runs beside it: what comes out is only compared, outside."""
