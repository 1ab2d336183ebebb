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
    names: frozenset[str]
    """Of the language, as a task or a fenced block may write them."""
    sample: str
    """A program that prints 42. It shows whether a sandbox has what the language needs."""
    remedy: str = ""
    compile_seconds: float = 30.0
    memory: int = 96 << 20
    """Bytes that its run time needs at least."""


_PYTHON = ("python3", "-I", "-X", "utf8")
LANGUAGES = {
    "python": Language(
        "main.py", (*_PYTHON, "-c", "import sys; compile(open('main.py', 'rb').read(), 'main.py', 'exec')"),
        (*_PYTHON, "main.py"), frozenset({"python", "py", "python3", "py3"}), "print(42)",
    ),
    "c": Language(
        "main.c", ("cc", "-O2", "-o", "main", "main.c", "-lm"), ("./main",), frozenset({"c"}),
        "#include <stdio.h>\nint main(void) { puts(\"42\"); }", "apt-get install gcc libc6-dev",
    ),
    "c++": Language(
        "main.cpp", ("c++", "-O2", "-o", "main", "main.cpp"), ("./main",), frozenset({"c++", "cpp", "cxx", "cc"}),
        "#include <iostream>\nint main() { std::cout << 42; }", "apt-get install g++",
    ),
    "javascript": Language(
        "main.js", ("node", "--check", "main.js"), ("node", "main.js"), frozenset({"javascript", "js", "node"}),
        "console.log(42)", "apt-get install nodejs",
    ),
}  # fmt: skip


def language_of(name: str) -> str:
    """Return the language that goes by ``name``. Raises ValueError where there is none."""
    for language, entry in LANGUAGES.items():
        if str(name).lower() in entry.names:
            return language
    raise ValueError(f"unknown language {name!r:.40}: there are {', '.join(LANGUAGES)}")


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
