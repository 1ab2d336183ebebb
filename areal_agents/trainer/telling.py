"""The lines that tell whoever watches a run what its parts do: that they start, are lost and come back."""

from __future__ import annotations

import asyncio
import contextlib
import textwrap
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from areal_agents.evaluation.progress import Stopwatch
from areal_agents.tracking.console import plain
from areal_agents.tracking.tracker import Tracker

_EVERY_SECONDS = 15.0
"""How often a start that goes on is told of."""


def _engine(f: Mapping[str, Any]) -> str:
    return f"engine {f['replica']}" if "replica" in f else "the engine"


_LINES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "starting": lambda f: f"starting {f['part']}",
    "engine_lost": lambda f: f"{_engine(f)} is lost ({_reason(f)}): it is started again",
    "engine_restarted": lambda f: f"{_engine(f)} is back after {f['seconds']:.0f} s",
    "replica_lost": lambda f: f"{_engine(f)} is lost for good ({_reason(f)}): {f['left']} left",
    "worker_lost": lambda f: f"rollout worker {f['worker']} is lost ({_reason(f)}): it is started again",
    "worker_restarted": lambda f: f"rollout worker {f['worker']} is back after {f['seconds']:.0f} s",
    "worker_dropped": lambda f: f"rollout worker {f['worker']} is lost for good ({_reason(f)})",
    "pool_lost": lambda f: f"the engine pool is lost ({_reason(f)}): the run ends, and goes on with --resume",
    "learner_lost": lambda f: f"the learner is lost ({_reason(f)})",
}


def _reason(fields: Mapping[str, Any]) -> str:
    return textwrap.shorten(plain(" ".join(str(fields["reason"]).split())), 200, placeholder=" …")


def line_of(kind: str, fields: Mapping[str, Any]) -> str | None:
    """Return the line that an event is worth, or None where people need not know of it."""
    found = _LINES.get(kind)
    return None if found is None else found(fields)


class Telling:
    """An event log that also shows the events which people should know of."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._part = tracker, ""

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event, and show its line where it has one."""
        self._tracker.event(kind, **fields)
        if kind == "starting":
            self._part = fields["part"]
        if (line := line_of(kind, fields)) is not None:
            self._tracker.message(line)

    @contextlib.asynccontextmanager
    async def start(self, every: float = _EVERY_SECONDS) -> AsyncIterator[None]:
        """Say every so many seconds what still starts, while the block runs."""

        async def repeat() -> None:
            watch = Stopwatch()
            while True:
                await asyncio.sleep(every)
                self._tracker.message(f"still starting {self._part or 'the run'}: {watch.seconds:.0f} s so far")

        task = asyncio.create_task(repeat(), name="start-progress")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
