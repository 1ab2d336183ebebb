"""The end of a coroutine that runs for somebody else, as a value.

    loop A: await wrap_future(submitted) ──▶ loop B: outcome_of(make) ──▶ (result,) or the exception ──▶ opened

Whoever waits may be cancelled in the moment in which the coroutine raises. Asyncio then reports an exception that was
never retrieved, once an episode where a backend dies. A value that nobody reads is no news.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Outcome: TypeAlias = tuple[T] | Exception
"""A result in a tuple of one, or the exception that came instead."""


async def outcome_of(make: Callable[[], Awaitable[T]]) -> Outcome[T]:
    """Await ``make()`` and return its outcome.

    A cancellation is raised.
    """
    try:
        return (await make(),)
    except Exception as error:  # noqa: BLE001  a boundary: ``opened`` raises it for whoever still waits
        return error


async def to_its_end(make: Callable[[], Awaitable[T]]) -> T:
    """Await ``make()``, and go on to its end where the caller is cancelled meanwhile: that is raised afterwards.

    What closes something must not be cut before it began. A second cancellation ends the wait, not the work.
    """
    task = asyncio.ensure_future(make())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        unheard(task)
        if not task.done():
            await asyncio.wait({task})
        raise


def opened(outcome: Outcome[T]) -> T:
    """Return the result, or raise the exception."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome[0]


def unheard(task: asyncio.Future[Any]) -> None:
    """Let a task's exception go unheard, where nobody may wait for its end any more."""
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
