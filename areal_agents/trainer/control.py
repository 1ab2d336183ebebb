"""Asking a run for something while it trains: files in ``OUT/control``.

    ask ──▶ ID.request ──▶ answer_requests, in the run ──▶ handle
     ▲                                                        │
     └── ID.reply: empty and touched every second, then JSON ◀┘

Files and no socket: whoever sees OUT can ask, on any machine, and nothing listens anywhere. A network's file system may
show a new file only after a minute (NFS caches directories for up to ``acdirmax``, 60 s).

Waits for / unblocked by: ``ask`` for the reply, by the reply, or by ``silent_seconds`` without a touch of it;
``answer_requests`` for a request, until it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError
from areal_agents.utils.files import unwritable, write_atomically

_POLL_SECONDS = 1.0
_LOOK_SECONDS = 0.1
_ENDED = "the run ended before this was done"

ControlReply = Mapping[str, Any]
"""JSON: whatever the handler returns, or ``error``."""


async def answer_requests(
    out: Path, handle: Callable[[Mapping[str, Any]], Awaitable[ControlReply]], *, event: Callable[..., None]
) -> None:
    """Answer one request after the other until cancelled. What an earlier process left unanswered is thrown away.

    ``event`` is told request_failed (request, error) for an error of ``handle``, which goes to whoever asked.
    """
    folder = out / "control"
    _clear(folder)
    while True:
        for path in _requests(folder):
            await _answer(path, handle, event)
        await asyncio.sleep(_POLL_SECONDS)


def _requests(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.glob("*.request"))
    return []


def _clear(folder: Path) -> None:
    for path in [*folder.glob("*.request"), *folder.glob("*.reply")]:
        with contextlib.suppress(OSError):
            path.unlink()


async def _answer(
    path: Path, handle: Callable[[Mapping[str, Any]], Awaitable[ControlReply]], event: Callable[..., None]
) -> None:
    reply, answer = path.with_suffix(".reply"), {"error": _ENDED}
    beating = asyncio.create_task(_beat(path.parent))
    try:
        if text := _read(path):  # else it is withdrawn
            answer = dict(await handle(json.loads(text)))
    except Exception as error:  # noqa: BLE001  boundary: the run goes on; who asked is told, and the event log
        answer = {"error": str(error) if isinstance(error, ArealError) else f"{type(error).__name__}: {error}"}
        with contextlib.suppress(ArealError):  # the log cannot be written: the run's own next line says so
            event("request_failed", request=path.stem, error=answer["error"])
    finally:
        beating.cancel()
        _finish(path, reply, json.dumps(answer))


def _finish(path: Path, reply: Path, answer: str) -> None:
    """Who asked takes silence for the end of the run; a request is never carried out twice."""
    with contextlib.suppress(OSError):
        if path.exists():
            write_atomically(reply, answer)
        else:  # nobody waits for it
            reply.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


async def _beat(folder: Path) -> None:
    """A sign of life for everybody who waits, also behind the request that is being carried out."""
    for n in itertools.count(1):
        for path in _requests(folder):
            with contextlib.suppress(OSError):
                _touch(path.with_suffix(".reply"), n)
        await asyncio.sleep(_POLL_SECONDS)


def _touch(reply: Path, n: int) -> None:
    """Whole seconds that count up: no clock, since machines disagree on the time, and file systems on its fractions."""
    if not reply.exists():
        reply.touch()
    os.utime(reply, (n, n))


async def ask(
    out: Path, request: Mapping[str, Any], *, silent_seconds: float = 90.0, message: Callable[[str], None]
) -> ControlReply:
    """What the run in ``out`` answers. ``message`` is told every 10 s what is waited for.

    Cancelling withdraws the request, unless the run has begun with it. Raises ArealError for the run's own error, for
    a run that gives no sign of life for ``silent_seconds``, and for a folder that cannot be written.
    """
    path = out / "control" / f"{time.time_ns()}-{os.getpid()}.request"
    reply = path.with_suffix(".reply")
    begin = heard = told = time.monotonic()
    sign = None
    try:
        while not (text := _read(reply)):
            now = time.monotonic()
            if (touched := _touched(reply)) != sign:
                sign, heard = touched, now
            elif sign is None:
                _require_file(path, json.dumps(request))  # once more: a run that starts clears its folder
            if now - heard > silent_seconds:
                raise ArealError(
                    f"no run in {out} gave a sign of life for {silent_seconds:g} s: the request is withdrawn. Is it "
                    f"still training? {out / 'events.jsonl'} has what it did last, and whether it was done after all"
                )
            if now - told >= 10.0:
                told = now
                doing = f"waiting for a sign of life from the run in {out}" if sign is None else "the run works on it"
                message(f"{doing}: {now - begin:.0f} s")
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        path.unlink(missing_ok=True)
        reply.unlink(missing_ok=True)
    answer: ControlReply = json.loads(text)
    if "error" in answer:
        raise ArealError(str(answer["error"]))
    return answer


def _require_file(path: Path, text: str) -> None:
    try:
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, text)
    except OSError as error:
        raise unwritable(path, error) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
