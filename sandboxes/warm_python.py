"""Python programs that run in a fork of pid 1, which has imported what takes long, instead of in a new interpreter.

The programs are those whose Python would find the same as pid 1 has: isolated (``-I``), from a text, from stdin or from
a file. All others start as ever. Sent into the sandbox with the supervisor, so it imports only the standard library.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

HUGE, COLLAPSE = 2 << 20, 25
_SHELL = re.compile(r"exec (python3(?: [-\w./]+)*)( 2>&1)?")
"""What a shell is told that makes way for Python: plain words, so that there is nothing for it to expand."""


class Program(NamedTuple):
    """A program as its command line says."""

    source: str
    """``-c``, ``-`` or a path."""
    text: str
    argv: list[str]
    unbuffered: bool
    merged: bool
    """Whether stderr is stdout."""
    original: list[str]


def preload(names: Sequence[str]) -> None:
    """Import modules, and keep what they made out of the collector's way: forks share it."""
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _collapse()


def _collapse() -> None:
    """Have the memory of what was imported in pages of 2 MB, where the kernel does that: a fork copies 512 at once.

    Half of the time of a fork with numpy and sympy goes to its page tables otherwise. A kernel before 6.1 refuses.
    """
    madvise = ctypes.CDLL(None).madvise
    with open("/proc/self/maps") as file:
        regions = [words for line in file if len(words := line.split()) == 5 or words[-1] == "[heap]"]
    for region, rights, *_ in regions:
        start, end = (int(text, 16) for text in region.split("-"))
        start = -(-start // HUGE) * HUGE
        if rights == "rw-p" and end // HUGE * HUGE > start:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end // HUGE * HUGE - start), COLLAPSE)


def program(argv: Sequence[str]) -> Program | None:
    """Read a command line, and return None where a Python of its own must run it."""
    words, merged = list(argv), False
    if words[:2] == ["/bin/sh", "-c"]:
        match = _SHELL.fullmatch(words[2]) if len(words) == 3 else None
        if match is None:
            return None
        words, merged = match[1].split(), bool(match[2])
    if words[0] not in ("python3", sys.executable) or any("\0" in word for word in words):
        return None
    original, isolated, unbuffered = words, False, False
    words = words[1:]
    while words and words[0] in ("-I", "-u", "-B", "-X"):
        flag = words.pop(0)
        isolated, unbuffered = isolated or flag == "-I", unbuffered or flag == "-u"
        if flag == "-X" and (not words or words.pop(0) != "utf8"):
            return None
    if not isolated or not words:
        return None
    source, *rest = words
    if source == "-c":
        return Program("-c", rest[0], ["-c", *rest[1:]], unbuffered, merged, original) if rest else None
    if source.startswith("-") and source != "-":
        return None
    return Program(source, "", words, unbuffered, merged, original)


def run(told: Program) -> int:
    """Run a program as its own interpreter would, and return its exit code."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if told.merged:
        os.dup2(1, 2)
    _open_streams(told.unbuffered)
    sys.argv, sys.orig_argv = told.argv, told.original
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # each program had the same numbers otherwise
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = main
    code = _guarded(lambda: _execute(told, main.__dict__))
    for step in (threading._shutdown, atexit._run_exitfuncs, main.__dict__.clear, gc.collect):  # type: ignore[attr-defined]
        after = _guarded(step)
        code = code or after
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError):
            code = code or 120
    return code


def _open_streams(unbuffered: bool) -> None:
    """Make the three streams anew: those of pid 1 hold what it read and wrote."""
    texts: dict[str, io.TextIOWrapper[Any] | None] = {}
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        try:
            raw: Any = io.FileIO(number, "rb" if number == 0 else "wb", closefd=False)
        except OSError:
            texts[name] = None
            continue
        direct = unbuffered and number > 0
        buffer = raw if direct else io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
        errors = "backslashreplace" if number == 2 else "surrogateescape"
        texts[name] = io.TextIOWrapper(
            buffer, "utf-8", errors, "\n" if number else None, line_buffering=number == 2, write_through=direct
        )
        raw.name = f"<{name}>"
    for name, text in texts.items():
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _execute(told: Program, scope: dict[str, Any]) -> None:
    if told.source == "-c":
        code: Any = compile(told.text, "<string>", "exec", dont_inherit=True)
    elif told.source == "-":
        code = compile(sys.stdin.buffer.read(), "<stdin>", "exec", dont_inherit=True)
    else:
        where = os.path.join(os.getcwd(), told.source)
        try:
            with open(where, "rb") as file:
                source = file.read()
        except OSError as error:
            os.write(
                2, f"{told.original[0]}: can't open file {where!r}: [Errno {error.errno}] {error.strerror}\n".encode()
            )
            raise SystemExit(2) from None
        scope["__file__"] = where
        code = compile(source, where, "exec", dont_inherit=True)
    exec(code, scope)


def _guarded(step: Callable[[], object]) -> int:
    """Run a step, print what it raises as the interpreter does, and return an exit code."""
    try:
        step()
    except SystemExit as error:
        return _exit_code(error)
    except KeyboardInterrupt as error:
        _print(error)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        return 130
    except BaseException as error:  # noqa: BLE001  the outermost frame of somebody's program
        _print(error)
        return 1
    return 0


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _print(error: BaseException) -> None:
    """Print a traceback without the frames of this module."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    error.__traceback__ = trace
    try:
        sys.excepthook(type(error), error, trace)
    except BaseException:  # noqa: BLE001  somebody's hook
        sys.__excepthook__(type(error), error, trace)
