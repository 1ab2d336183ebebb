"""The parts that several commands share.

They are the error of wrong usage, variables of a chat template, the opening of a saved run, and JSON for files and
standard output, where nothing else may stand beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from areal_agents.errors import ArealError
from areal_agents.utils.files import unwritten, write_atomically

if TYPE_CHECKING:
    from areal_agents.evaluation.saved_run import SavedRun


class UsageError(Exception):
    """Wrong usage that the argument parser does not see.

    The exit code is 2.
    """


_json_output: TextIO | None = None
"""Where JSON goes while ``json_alone`` lasts."""


@contextlib.contextmanager
def json_alone() -> Iterator[None]:
    """Keep standard output for ``write_json``.

    Whatever else is printed goes to standard error: by this package, by somebody else's Python, by a C library and by
    processes that are started meanwhile.
    """
    global _json_output
    usual, before = sys.stdout, _json_output
    usual.flush()
    with contextlib.ExitStack() as stack:
        if _descriptor(usual) == 1 and _descriptor(sys.stderr) == 2:
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
            stack.callback(_flush, usual)
            _json_output = stack.enter_context(open(kept, "w", encoding="utf-8", closefd=False))
        else:  # somebody has replaced them, a test or a notebook
            _json_output = usual
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            _json_output = before


def _flush(stream: TextIO) -> None:
    """Write out what Python and C keep back for ``stream``, as long as it still leads elsewhere."""
    stream.flush()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # a system without it
        ctypes.CDLL(None).fflush(None)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def template_variables(given: Sequence[str]) -> dict[str, Any]:
    """Read the chat template's variables from texts such as ``enable_thinking=false``.

    Values are read as ``--model.template_variables.NAME VALUE`` is. Raises UsageError.
    """
    from areal_agents.settings.describe import settings
    from areal_agents.settings.values import value_of

    found: dict[str, Any] = {}
    for text in given:
        name, equals, raw = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--template-variables {text!r}: write NAME=VALUE, such as enable_thinking=false")
        found[name] = value_of(raw, settings()["model.template_variables"])
    return found


def require_writable(path: Path) -> None:
    """Raise ArealError where the file ``path`` could not be written later, once there is something to write."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise ArealError(f"cannot write {path}: it is a folder")
    if not there.is_dir():
        raise ArealError(f"cannot write {path}: {there} is no folder")
    if not os.access(path if path.exists() else there, os.W_OK):
        raise ArealError(f"cannot write {path}: it may not be written by this user")


def open_run(folder: Path) -> SavedRun:
    """Open a run, and say where it is an evaluation that is not complete."""
    from areal_agents.evaluation.saved_run import SavedRun
    from areal_agents.evaluation.unfinished import partial_note

    run = SavedRun.open(folder)
    if note := partial_note(folder):
        print(f"note: {note}", file=sys.stderr)
    return run


def write_json(value: Any, path: Path | None) -> None:
    """Write ``value`` as JSON to the file ``path``, or to standard output where it is None.

    Raises ArealError where the file cannot be written.
    """
    text = json.dumps(_without_nan(value), indent=2, ensure_ascii=True, allow_nan=False)
    if path is None:
        print(text, file=_json_output or sys.stdout, flush=True)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # /dev/null, a pipe: nothing that another file could replace
            path.write_text(text + "\n", encoding="utf-8")
        else:
            write_atomically(path.resolve(), text + "\n")
    except OSError as error:
        raise unwritten(path, error) from error


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return [_without_nan(v) for v in value] if isinstance(value, (list, tuple)) else value
