"""A background event loop on which synchronous code runs coroutines.

Each process has one, in a daemon thread.

    run_sync(coro) ──submits──▶ loop thread ──result──▶ the caller, which waits

A forked child has the module's state but not the thread, so the loop knows the process it was started in. A call from
the loop's own thread would wait for itself, so it raises instead.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from areal_agents.errors import EnvError
from areal_agents.utils.exits import guard_tasks
from areal_agents.utils.outcomes import opened, outcome_of

P = ParamSpec("P")
T = TypeVar("T")

_EXIT_SECONDS = 5.0
_exit_hooks: dict[Callable[[], Coroutine[Any, Any, None]], None] = {}
"""Awaited on the loop before it ends. A dict keeps their order, and each of them once."""


class _LateExecutor(ThreadPoolExecutor):
    """A thread pool that also works while the interpreter ends.

    Other pools refuse new work then. With this one exit hooks may use ``to_thread``.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError:
            done: Future[T] = Future()
            try:
                done.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001  a boundary: the awaiting coroutine gets it
                done.set_exception(error)
            return done


async def _wind_down() -> None:
    """Await the exit hooks, then cancel what still runs on this loop."""
    for hook in _exit_hooks:
        with suppress(Exception):  # the interpreter is ending, and the next hook must still run
            await hook()
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


class _BackgroundLoop:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        guard_tasks(self.loop)  # an environment's sys.exit would end it, and the caller would wait for ever
        self.loop.set_default_executor(_LateExecutor(thread_name_prefix="areal-agents-facade"))
        self.thread = threading.Thread(target=self._run, name="areal-agents-facade", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def stop(self) -> None:
        if self.pid != os.getpid():  # a forked child: thread and selector are the parent's
            return
        ending = asyncio.run_coroutine_threadsafe(_wind_down(), self.loop)
        with suppress(TimeoutError):
            ending.result(_EXIT_SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(_EXIT_SECONDS)
        if not self.thread.is_alive():
            self.loop.close()


_lock = threading.Lock()
_current: _BackgroundLoop | None = None


def _after_fork() -> None:
    global _lock, _current
    _lock = threading.Lock()  # the parent may have held it at the fork
    if _current is not None:
        # The selector is shared with the parent: closing it here would be seen there. Only forget it.
        _inherited.append(_current)
        _current = None


_inherited: list[_BackgroundLoop] = []
"""Loops of the parent, kept from the garbage collector, which would warn that they were never closed."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def background_loop() -> asyncio.AbstractEventLoop:
    """Return this process's background loop, which the first call starts."""
    global _current
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = _BackgroundLoop()
            atexit.register(_current.stop)
        return _current.loop


def on_exit(hook: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Await ``hook()`` on the background loop when the process ends, if there is such a loop by then."""
    _exit_hooks[hook] = None


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` on the background loop and wait for its result.

    An interrupt of the caller cancels the coroutine. Raises EnvError when it is called from the background loop itself.
    """
    loop = background_loop()
    if _current is not None and threading.current_thread() is _current.thread:
        coroutine.close()
        raise EnvError(
            "the synchronous reset/step/close was called on the environments' own event loop, where it would wait "
            "for itself: await areset/astep/aclose instead"
        )
    future = asyncio.run_coroutine_threadsafe(outcome_of(lambda: coroutine), loop)
    try:
        return opened(future.result())
    except BaseException:
        future.cancel()
        raise
