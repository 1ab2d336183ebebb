"""A decorator that makes a reward of any plain function, however slow.

    @reward_function(timeout=5, concurrency=4)
    def solved(episode: Episode) -> float: ...          # may block: it runs on a thread

    await solved(episode) ─▶ a slot ─▶ thread (sync) or this loop (async) ─▶ what it returned, or raised
                                              └─ late ─▶ InfraError, or a verdict with the status "timeout"

A thread lets nothing else run while it holds Python's lock, as a catastrophic regular expression does. Such a function
needs a process.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import math
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any, Literal, cast
from weakref import WeakValueDictionary

from areal_agents.errors import ConfigError, InfraError, RewardError
from areal_agents.reward import Score, Verdict
from areal_agents.rewards.call_slots import CallSlots, Slot
from areal_agents.utils.exits import no_exit
from areal_agents.utils.short_text import cut, short

OnTimeout = Literal["infra", "score"]
_DECLARED = ("adds", "reads_others", "leave_one_out", "seconds")
"""What a function of a group's episodes declares of itself: the decorated one declares the same."""
_SLOTS: WeakValueDictionary[str, CallSlots] = WeakValueDictionary()
_SLOTS_LOCK = threading.Lock()


def reward_function(
    *bare: object, timeout: float, concurrency: int = 8, on_timeout: OnTimeout = "infra"
) -> Callable[[Callable[[Any], Any]], RewardFunction]:
    """Make a reward of a function of an Episode, sync or async, that may be slow or block.

        @reward_function(timeout=5, concurrency=4)
        def solved(episode: Episode) -> float:
            return float(subprocess.run(["checker", episode.answer or ""]).returncode == 0)

    A sync function runs on a thread, with the context variables of its caller, so that no environment waits for it.
    A thread cannot be ended: one that is late goes on and keeps its place among ``concurrency``. Once all places are
    held so, every call raises InfraError.

    Args:
        timeout: seconds that one call may take, once it runs. Keep it below ``env.step_timeout``, which holds for the
            wait for a place too.
        concurrency: most calls at once in this process, over all episodes and event loops.
        on_timeout: what a late call is. ``infra``: the verifier's fault, an InfraError, so that the episode is played
            again. ``score``: the answer's fault, 0 with the status ``timeout``, which is counted. Choose it only where
            the model's text decides how long the function takes.

    Raises:
        ConfigError: an argument is out of range, or what is decorated does not take one episode.
    """
    if bare:
        raise ConfigError("reward_function takes no function itself: write @reward_function(timeout=5) above it")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ConfigError(f"timeout = {short(timeout)} is no number of seconds over 0")
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ConfigError(f"concurrency = {short(concurrency)} is no whole number of at least 1")
    if on_timeout not in ("infra", "score"):
        raise ConfigError(f"on_timeout = {short(on_timeout)}: use 'infra' or 'score'")
    return functools.partial(
        RewardFunction, timeout=float(timeout), concurrency=concurrency, on_timeout=on_timeout, key=uuid.uuid4().hex
    )


class RewardFunction:
    """A decorated function: call it with an episode and await what it returns.

    Copies, also pickled ones, share the slots of their process.
    """

    def __init__(
        self, function: Callable[[Any], Any], *, timeout: float, concurrency: int, on_timeout: OnTimeout, key: str
    ) -> None:
        _require_one_episode(function)
        self.function = function
        self.timeout, self.concurrency, self.on_timeout = timeout, concurrency, on_timeout
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))
        self.__qualname__ = str(getattr(function, "__qualname__", self.__name__))
        self.__module__ = str(getattr(function, "__module__", type(function).__module__))
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        for name in _DECLARED:
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))
        self._key = key
        with _SLOTS_LOCK:
            self._slots = _SLOTS.setdefault(key, CallSlots(concurrency, timeout))
        self._is_async = _is_async(function)

    @property
    def running(self) -> int:
        """Calls that run in this process now."""
        return self._slots.held

    @property
    def late(self) -> int:
        """Those of them that are past their deadline."""
        return self._slots.late

    async def __call__(self, episode: Any) -> Score:
        """Call the function, and return what it returns or raise what it raises.

        Raises InfraError where it is late and ``on_timeout`` is ``infra``, and where all threads are held by late ones.
        """
        if self._is_async:
            return await self._awaited(lambda: self.function(episode), episode)
        value = await self._in_thread(episode)
        if inspect.isawaitable(value):  # a function that returns a coroutine, as lambdas do
            return await self._awaited(lambda: value, episode)
        return cast(Score, value)

    async def _awaited(self, make: Callable[[], Any], episode: Any) -> Score:
        slot = await self._slots.take(self.__name__, thread=False)
        try:
            async with asyncio.timeout(self.timeout) as scope:
                return cast(Score, await make())
        except TimeoutError:
            if not scope.expired():  # the function's own
                raise
            return cast(Score, self._late(episode))
        finally:
            self._slots.release(slot)

    async def _in_thread(self, episode: Any) -> Any:
        slot = await self._slots.take(self.__name__, thread=True)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
        context = contextvars.copy_context()
        work = functools.partial(self._work, slot, context, episode, loop, done)
        try:
            threading.Thread(target=work, name=f"areal-reward-{self.__name__}", daemon=True).start()
        except RuntimeError as error:
            self._slots.release(slot)
            raise InfraError(f"reward {self.__name__!r}: no thread can be started: {error}") from error
        await asyncio.wait((done,), timeout=self.timeout)
        if not done.done():
            return self._late(episode)
        value, raised = done.result()
        if raised is None:
            return value
        if not isinstance(raised, Exception):  # here it would look like a cancellation or a signal of ours
            raise RewardError(
                f"reward {self.__name__!r} raised {type(raised).__name__}, which ends calls and programs: let it raise "
                "an ordinary exception"
            ) from raised
        raise raised

    def _work(
        self,
        slot: Slot,
        context: contextvars.Context,
        episode: Any,
        loop: asyncio.AbstractEventLoop,
        done: asyncio.Future[tuple[Any, BaseException | None]],
    ) -> None:
        """Run the function on this thread, and tell the loop that waits for it."""
        value, raised = None, None
        try:
            with no_exit():
                value = context.run(self.function, episode)
        except BaseException as error:  # noqa: BLE001  a boundary: it is raised where the call is awaited
            raised = error
        self._slots.release(slot)
        try:
            loop.call_soon_threadsafe(_settle, done, (value, raised))
        except RuntimeError:
            return  # the loop is closed: nobody waits for it any more

    def _late(self, episode: Any) -> Any:
        """Say that a call is late, in the way that was chosen: of one episode, or of each of a group."""
        group = isinstance(episode, list | tuple)
        if self.on_timeout == "score":
            late = Verdict(0.0, {self.__name__: 0.0}, status="timeout")
            return [late] * len(episode) if group else late
        one = episode[0] if group and episode else episode
        task = getattr(getattr(one, "task", None), "id", "")
        where = f" on task {cut(str(task), 120)!r}" if task else ""
        held = "" if self._is_async else f"; its thread goes on, and {self.late} of {self.concurrency} are held so"
        raise InfraError(f"reward {self.__name__!r} did not return within {self.timeout:g} s{where}{held}")

    def __reduce__(self) -> str | tuple[Any, ...]:
        found: Any = sys.modules.get(self.__module__) if self.__module__ != "__main__" else None
        for name in self.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is self:  # by its name: the function itself is not found under it any more
            return str(self.__qualname__)
        declared = {name: vars(self)[name] for name in _DECLARED if name in vars(self)}
        return _rebuilt, (self.function, self.timeout, self.concurrency, self.on_timeout, self._key), declared

    def __repr__(self) -> str:
        return f"<reward function {self.__qualname__}, timeout {self.timeout:g} s, concurrency {self.concurrency}>"


def _settle(done: asyncio.Future[Any], outcome: tuple[Any, BaseException | None]) -> None:
    if not done.done():  # else its waiter was cancelled
        done.set_result(outcome)


def _rebuilt(
    function: Callable[[Any], Any], timeout: float, concurrency: int, on_timeout: OnTimeout, key: str
) -> RewardFunction:
    return RewardFunction(function, timeout=timeout, concurrency=concurrency, on_timeout=on_timeout, key=key)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = inspect.getattr_static(type(function), "__call__", None)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _require_one_episode(function: object) -> None:
    if not callable(function) or isinstance(function, type):
        raise ConfigError(f"@reward_function decorates a function of an Episode, not {short(function)}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a built-in that does not tell
        return
    try:
        signature.bind(object())
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"@reward_function: {name}{signature} does not take one Episode alone ({error}); for a method, decorate "
            "the bound one: reward_function(timeout=…)(self.score)"
        ) from error
