"""The handling of Ctrl-C and SIGTERM.

The first signal finishes what runs and saves. The second stops now.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, TypeVar

from areal_agents.utils.outcomes import unheard

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_RESORT_SECONDS = 10.0
"""Time that cleaning up may take after the second signal, before the process ends without it."""


class StopRequested(BaseException):
    """The stop that ``Stop.race`` raise after a signal.

    It is no ``Exception``, because only the run's own code may catch it.
    """


class Stop:
    """A request to stop a run, which a signal makes.

    ``forced`` is true after the second signal, which also cancels the run's task. While ``at_once`` is true the first
    one cancels it too, since nothing has begun that would be worth finishing.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.signal: signal.Signals | None = None
        self.forced = False
        self.at_once = False
        self.waiting = False
        """Whether ``race`` runs what a stop ends at once, so that there is no step to finish."""
        self.farewell: Callable[[], str] = lambda: f"stopped by {self.name}"
        """Says what is printed where the process must end without cleaning up."""

    @property
    def name(self) -> str:
        return self.signal.name if self.signal else "a signal"

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self, number: signal.Signals) -> None:
        self.signal = number
        self._event.set()

    @contextlib.contextmanager
    def cancelling(self, tasks: Mapping[Any, asyncio.Task[Any]], *, seconds: float) -> Iterator[None]:
        """Cancel the tasks that still run ``seconds`` after a stop.

        Once a second, because whoever swallows a cancellation goes on.
        """

        async def cancel() -> None:
            await self._event.wait()
            await asyncio.sleep(seconds)
            while True:
                for task in tasks.values():
                    task.cancel()
                await asyncio.sleep(1.0)

        canceller = asyncio.create_task(cancel())
        try:
            yield
        finally:
            canceller.cancel()

    async def race(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` and return its result, unless a stop comes first.

        A stop cancels ``work``, waits for its end and raises StopRequested. After an earlier stop nothing begins.
        """
        if self.requested:
            work.close()
            raise StopRequested
        task = asyncio.create_task(work)
        waiter = asyncio.create_task(self._event.wait())
        self.waiting = True
        try:
            await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():  # asked first: a result that came together with the stop is not thrown away
                return task.result()
            raise StopRequested
        finally:
            self.waiting = False
            waiter.cancel()
            unheard(task)  # it may end with an error in the moment in which the caller is cancelled
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _end_now(stop: Stop) -> None:
    """End the process, which does not end by itself, with what it has to say and with the terminal's cursor."""
    try:
        if sys.stdout.isatty():  # a live display hides the cursor, and gives it back only in order
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
        os.write(2, f"{stop.farewell()}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(130)


@contextlib.contextmanager
def stop_on_signals(message: Callable[[str], None], *, doing: str = "finishing the step and saving") -> Iterator[Stop]:
    """Handle SIGINT and SIGTERM for the current task.

    In other threads than the main one, and on Windows, signals are left alone. ``doing`` says what the first signal
    leads to.
    """
    stop, loop, task = Stop(), asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    last_resort = threading.Timer(_LAST_RESORT_SECONDS, _end_now, (stop,))
    last_resort.daemon = True

    def on_signal(number: signal.Signals) -> None:
        if not stop.requested:
            stop.request(number)
            what = "saving what is done" if stop.waiting else doing
            message(f"{number.name}: stopping" if stop.at_once else f"{number.name}: {what}. Once more stops at once")
            if stop.at_once:
                task.cancel()
        elif not stop.forced:
            stop.forced = True
            # A learner's thread cannot be stopped inside a step. The engine and sandboxes end with this process.
            last_resort.start()
            task.cancel()

    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield stop
        return
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield stop
    finally:
        last_resort.cancel()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
