"""The host of environments: an event loop on a thread of its own.

So a hanging environment cannot stop training. An ``await`` that never returns is cancelled at its deadline. Code that
blocks the thread cannot be cancelled: the host is then *wedged*. It is abandoned with its episodes (they are retried
elsewhere, at no cost to their retries), and a fresh host takes over. The thread is a daemon: it does not keep the
process alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

from areal_agents.errors import ArealError, EnvError, InfraError
from areal_agents.utils.exits import guard_tasks
from areal_agents.utils.outcomes import Outcome, opened, outcome_of
from areal_agents.utils.short_text import described

T = TypeVar("T")
_HEARTBEAT_SECONDS = 5.0
_ENDING_SECONDS = 10.0


class Host(Protocol):
    """A place where an environment's coroutines run, such as ``EnvHost``."""

    async def call(self, make: Callable[[], Awaitable[T]], *, timeout: float, what: str) -> T:
        """Await ``make()`` for at most ``timeout`` seconds. ``what`` names the call in errors."""
        ...


class HostLost(InfraError):
    """Another environment blocked the shared loop.

    This episode is innocent and starts again.
    """


class _End(enum.Enum):
    """Why a call has no outcome."""

    CANCELLED = "its own environment cancelled it"
    EXPIRED = "its time is over"
    LOST = "the host was abandoned"


class _Lane:
    """A way from any thread to an event loop, which is woken once for many callbacks.

    A wake-up is a system call, and whoever makes one gives the interpreter's lock away: with a thousand episodes that
    is most of what a call costs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._acts: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._woken = False

    def put(self, act: Callable[..., object], *args: Any) -> None:
        """Let ``act(*args)``, which raises nothing, run on the loop. Nothing happens where the loop is closed."""
        self._acts.append((act, args))
        if not self._woken:
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._run)
            except RuntimeError:
                if not self.loop.is_closed():
                    raise

    def _run(self) -> None:
        self._woken = False  # before the queue is read: what is put from here on wakes the loop again
        for _ in range(len(self._acts)):
            act, args = self._acts.popleft()
            act(*args)


class _Call:
    """One call: its task on the host, and the future of whoever waits for it."""

    def __init__(self, make: Callable[[], Awaitable[Any]], back: _Lane) -> None:
        self.make, self.back = make, back
        self.waiter: asyncio.Future[Outcome[Any] | _End] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[Outcome[Any]] | None = None

    def resolve(self, end: Outcome[Any] | _End) -> None:
        """Tell the caller, on its own loop."""
        if not self.waiter.done():
            self.waiter.set_result(end)

    def cancel(self) -> None:
        """Cancel the task, on the host."""
        if self.task is not None:
            self.task.cancel()


class EnvHost:
    """One background loop.

    ``call`` is used from the caller's own loop. ``event`` is told env_task_failed, of what an environment's own tasks
    and callbacks raise where nobody listens: no episode hears of it, and many at once may meet it. None leaves that to
    asyncio's own log.
    """

    def __init__(self, event: Callable[..., None] | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        guard_tasks(self._loop)
        if event is not None:
            self._loop.set_exception_handler(partial(_tell, event))
        self._thread = threading.Thread(target=self._run, name="areal-env-host", daemon=True)
        self._lane = _Lane(self._loop)
        self._back: _Lane | None = None
        """To the loop of the last caller."""
        self._open: set[_Call] = set()
        """Whose callers wait."""
        self._calls: set[asyncio.Task[Any]] = set()
        self._culprit: asyncio.Task[Any] | None = None
        self.wedged = False
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        while True:
            try:
                self._loop.run_forever()
                return
            except (SystemExit, KeyboardInterrupt) as error:  # of a callback, so nobody knows whose
                said = {"message": "an environment's callback tried to end the process", "exception": error}
                self._loop.call_exception_handler(said)

    async def call(self, make: Callable[[], Awaitable[T]], *, timeout: float, what: str) -> T:
        """Run ``make()`` on the host, at most ``timeout`` seconds.

        Raises EnvError where it did not return in time, HostLost where another call wedged the host, and whatever
        the awaitable itself raises. Cancelling the caller cancels the call.
        """
        if self.wedged:
            raise HostLost(f"{what}: the environments' loop is blocked by another environment")
        if self._loop.is_closed():
            raise RuntimeError(f"{what}: the environments' host is closed")
        loop = asyncio.get_running_loop()
        if self._back is None or self._back.loop is not loop:
            self._back = _Lane(loop)
        call = _Call(make, self._back)
        clock = loop.call_later(timeout, call.resolve, _End.EXPIRED)
        self._open.add(call)
        self._lane.put(self._begin, call)
        try:
            end = await call.waiter
            if end is _End.EXPIRED and not self.wedged:
                self._lane.put(call.cancel)
                # The loop answers: this call alone hung, and is cancelled. Else some call holds the whole thread.
                if await self.alive():
                    raise _hung(f"{what} did not return within {timeout:g} s (env.step_timeout): it was cancelled")
                self._abandon(call)
        except asyncio.CancelledError:
            self._lane.put(call.cancel)
            raise
        finally:
            clock.cancel()
            self._open.discard(call)
        if not isinstance(end, _End):
            return opened(end)  # type: ignore[no-any-return]
        if end is _End.CANCELLED:
            raise EnvError(f"{what} was cancelled by its own environment")
        if self._culprit is not None and self._culprit is call.task:
            raise _hung(
                f"{what} blocked its event loop for more than {timeout:g} s (env.step_timeout): use `await` or "
                "asyncio.to_thread for slow work"
            )
        raise HostLost(f"{what}: the environments' loop is blocked by another environment")

    def _begin(self, call: _Call) -> None:
        call.task = self._loop.create_task(outcome_of(call.make))
        self._calls.add(call.task)
        call.task.add_done_callback(partial(self._ended, call))

    def _ended(self, call: _Call, task: asyncio.Task[Outcome[Any]]) -> None:
        self._calls.discard(task)
        end: Outcome[Any] | _End = _End.CANCELLED
        if not task.cancelled():
            error = task.exception()
            assert error is None or isinstance(error, Exception)  # the loop's tasks are guarded
            end = task.result() if error is None else error
        call.back.put(call.resolve, end)

    def _abandon(self, mine: _Call) -> None:
        """Give the host up, and find the culprit.

        It is the call whose task holds the thread, or else the one that found out.
        """
        if self.wedged:
            return
        holder = asyncio.current_task(self._loop)
        self._culprit = holder if holder in self._calls else mine.task
        self.wedged = True
        for call in list(self._open):
            call.back.put(call.resolve, _End.LOST)

    async def _end_calls(self) -> None:
        """Cancel the calls and wait for their ends.

        A call whose caller was cancelled may still be ending its process. A second cancellation would interrupt that.
        """
        calls = self._calls - {asyncio.current_task()}
        for task in calls:
            if not task.cancelling():
                task.cancel()
        if calls:
            await asyncio.wait(calls, timeout=_ENDING_SECONDS)

    async def alive(self) -> bool:
        """Say whether the loop still answers."""
        if not self._loop.is_running():
            return False
        beat = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop)
        try:
            async with asyncio.timeout(_HEARTBEAT_SECONDS):
                await asyncio.wrap_future(beat)
        except TimeoutError:
            return False
        return True

    async def close(self, cleanup: Callable[[], Awaitable[Any]] | None = None, *, timeout: float = 20.0) -> None:
        """End the calls, run ``cleanup`` on the loop, then stop it.

        A wedged host is left to its daemon thread.
        """
        if self.wedged or not self._loop.is_running():
            return
        await self.call(self._end_calls, timeout=timeout, what="ending the environments' calls")
        if cleanup is not None:
            await self.call(cleanup, timeout=timeout, what="closing the environments")
        await self.call(_cancel_others, timeout=timeout, what="cancelling what environments left running")
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join, timeout)
        if not self._thread.is_alive():
            self._loop.close()


def _hung(message: str) -> EnvError:
    error = EnvError(message)
    error.blame = "hang"
    return error


def _tell(event: Callable[..., None], loop: asyncio.AbstractEventLoop, said: dict[str, Any]) -> None:
    error = said.get("exception")
    with contextlib.suppress(ArealError):  # the log cannot be written: the run's own next line says so
        event("env_task_failed", message=said["message"], error="" if error is None else described(error))


async def _cancel_others() -> None:
    """Cancel every other task of the running loop and wait for their ends."""
    others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
