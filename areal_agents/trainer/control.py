"""Requests to a run while it trains, as files in ``OUT/control``.

    ask ──▶ ID.request ──▶ answer_requests, in the run ──▶ handle
     ▲                                                        │
     └── ID.reply: empty and touched every second, then JSON ◀┘

They are files and no socket, so whoever sees OUT can ask, on any machine, and nothing listens anywhere. The file system
of a network may show a new file only after a minute (NFS caches directories for up to ``acdirmax``, 60 s).

Waits for / unblocked by: ``ask`` waits for the reply, and is unblocked by the reply or by ``silent_seconds`` without a
touch of it. ``answer_requests`` waits for a request until it is cancelled.
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
"""A JSON object with whatever the handler returns, or with ``error``."""


async def answer_requests(
    out: Path, handle: Callable[[Mapping[str, Any]], Awaitable[ControlReply]], *, event: Callable[..., None]
) -> None:
    """Answer one request after the other until cancelled.

    What an earlier process left unanswered is thrown away. An error of ``handle`` goes to whoever asked, and ``event``
    is told request_failed (request, error).
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
    """Write the reply where somebody waits for it, and remove the request whether that worked or not.

    Without a reply, who asked takes the silence for the end of the run. But a request that stayed would be carried out
    twice.
    """
    with contextlib.suppress(OSError):
        if path.exists():
            write_atomically(reply, answer)
        else:  # nobody waits for it
            reply.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


async def _beat(folder: Path) -> None:
    """Give a sign of life to everybody who waits, also behind the request that is being carried out."""
    for n in itertools.count(1):
        for path in _requests(folder):
            with contextlib.suppress(OSError):
                _touch(path.with_suffix(".reply"), n)
        await asyncio.sleep(_POLL_SECONDS)


def _touch(reply: Path, n: int) -> None:
    """Set the reply's time to ``n``, which counts up in whole seconds.

    It is no clock, since machines disagree on the time, and file systems on its fractions.
    """
    if not reply.exists():
        reply.touch()
    os.utime(reply, (n, n))


async def ask(
    out: Path, request: Mapping[str, Any], *, silent_seconds: float = 90.0, message: Callable[[str], None]
) -> ControlReply:
    """Ask the run in ``out`` and return its answer.

    Cancelling withdraws the request, unless the run has begun with it.

    Args:
        out: the run's folder.
        request: what to ask for, as JSON.
        silent_seconds: how long the run may give no sign of life.
        message: is told every 10 s what is waited for.

    Raises:
        ArealError: the run answers with an error, gives no sign of life for ``silent_seconds``, or the folder cannot be
            written.
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
