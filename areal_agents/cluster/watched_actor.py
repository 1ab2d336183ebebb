"""Ray actors under watch: every call has a deadline, and a lost actor ends all of its calls at once.

    alive ── dead | silent for hang_seconds | a call past its deadline ──▶ lost: its process is killed

Ray reports an actor that died, but says nothing of one that was stopped, or whose event loop is blocked: the watcher
asks ``ping`` for that. Waits for / unblocked by: a call for its answer, by the answer, the loss or its deadline; the
watcher for a pong, by its deadline; ``kill`` for Ray, by its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from areal_agents.cluster.remote_errors import Failure
from areal_agents.errors import ConfigError

_CHECKS = 3
"""Looks for a pong within ``hang_seconds``: a single one may miss it while this process's own event loop is blocked."""
_KILL_SECONDS = 10.0
_GRACE_SECONDS = 2.0
"""For a process that Ray was told to end."""


class ActorLost(Exception):
    """The actor is gone; the message says why. Callers raise their own error from it."""


class ActorSilent(ActorLost):
    """It did not answer a call in time: perhaps it was never placed."""


class WatchedActor:
    """One actor from its start to its loss. It belongs to the event loop that made it.

    actor: a Ray actor handle. Its class has ``ping()``, and its methods return a ``Failure`` where they would raise an
        ArealError.
    what: its name in messages.
    hang_seconds: without a pong for so long it is lost. interval: seconds between two questions.
    Raises ConfigError for a number out of range.
    """

    def __init__(self, actor: Any, what: str, *, hang_seconds: float, interval: float) -> None:
        if min(hang_seconds, interval) <= 0:
            raise ConfigError(f"{what}: hang_seconds = {hang_seconds:g} and interval = {interval:g} must be positive")
        self.actor, self.what = actor, what
        self._hang, self._interval = hang_seconds, interval
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watcher: asyncio.Task[None] | None = None
        self._process: tuple[str, int] | None = None
        self._killing: asyncio.Task[None] | None = None
        self.reason = ""
        """Why it is lost; empty while it lives."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called once, when it is lost."""

    @property
    def pid(self) -> int:
        """Its process id, on its node; 0 before ``watch``."""
        return 0 if self._process is None else self._process[1]

    def watch(self, node: str, pid: int, pong: Callable[[Any], None] = lambda answer: None) -> None:
        """Begin to ask for health; ``pong`` is given each answer. ``node`` and ``pid``: where its process runs."""
        self._process = (node, pid)
        self._watcher = asyncio.create_task(self._watch(pong), name=f"watch-{self.what}")

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        """The answer of ``actor.method(*args)``.

        Raises the ArealError that the method returned as a ``Failure``, whatever else it raised as Ray re-raises it,
        ActorLost where the actor is gone, and ActorSilent where it did not answer within ``seconds``: then it is lost.
        """
        if self.reason:
            raise ActorLost(self.reason)
        try:
            done, answer = await self._answer(self._ask(method, *args), seconds)
        except RayTaskError:
            raise
        except RayError as error:
            self.lose(f"{self.what} died: {_brief(error)}")
            raise ActorLost(self.reason) from error
        if self.reason and not done:
            raise ActorLost(self.reason)
        if not done:
            self.lose(f"{self.what} did not answer {method!r} within {seconds:g} s")
            raise ActorSilent(self.reason)
        if isinstance(answer, Failure):
            raise answer.error()
        return answer

    def send(self, method: str, *args: Any) -> None:
        """Call without waiting; a lost actor is no error."""
        if not self.reason:
            with contextlib.suppress(RayError):
                self._ask(method, *args)

    def _ask(self, method: str, *args: Any) -> asyncio.Future[Any]:
        """The answer as a future of the running loop. Whoever stops waiting for it may drop it."""
        future: asyncio.Future[Any] = asyncio.wrap_future(getattr(self.actor, method).remote(*args).future())
        future.add_done_callback(lambda f: f.cancelled() or f.exception())  # retrieved: a dropped one must not warn
        return future

    async def _answer(self, answer: asyncio.Future[Any], seconds: float) -> tuple[bool, Any]:
        """Whether ``answer`` came within ``seconds`` and before a loss, and it. Raises what the call raised."""
        both: set[asyncio.Future[Any]] = {answer, self._lost}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return answer.done(), answer.result() if answer.done() else None

    def lose(self, reason: str) -> None:
        """Give it up: its calls raise ActorLost, its process is killed. Nothing where it is lost already."""
        if self.reason:
            return
        self.reason = reason
        self._lost.set_result(None)
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            self._watcher.cancel()
        self._killing = asyncio.create_task(self._kill(), name=f"kill-{self.what}")
        self.on_lost()

    async def end(self, reason: str) -> None:
        """``lose`` it and wait for its end, which has a deadline. May be called twice."""
        self.lose(reason)
        assert self._killing is not None
        await asyncio.shield(self._killing)

    async def _watch(self, pong: Callable[[Any], None]) -> None:
        try:
            await self._ask_again(pong)
        except Exception as error:  # noqa: BLE001  boundary: nobody awaits this task; every later call raises it
            self.lose(f"what {self.what} said could not be recorded: {type(error).__name__}: {error}")

    async def _ask_again(self, pong: Callable[[Any], None]) -> None:
        """Questions until it is lost."""
        while True:
            try:
                question, done = self._ask("ping"), False
                for _ in range(_CHECKS):
                    if not done:
                        done, answer = await self._answer(question, self._hang / _CHECKS)
            except RayError as error:
                return self.lose(f"{self.what} died: {_brief(error)}")
            if not done:
                return self.lose(f"{self.what} gave no sign of health for {self._hang:g} s")
            pong(answer)
            await asyncio.sleep(self._interval)

    async def _kill(self) -> None:
        """End the process by Ray, and where it runs on this node and does not end soon (it may be stopped), from here.

        Ray reports a process that is killed before it can follow as one that crashed, on the user's terminal.
        """
        with contextlib.suppress(RayError, ValueError, TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await asyncio.to_thread(_kill_actor, self.actor)
        if self._process is not None:
            await asyncio.to_thread(_kill_here, *self._process)


def _kill_actor(actor: Any) -> None:
    """Without a Ray there is nothing to kill, and ``ray.kill`` would start one."""
    if ray.is_initialized():
        ray.kill(actor)


def _kill_here(node: str, pid: int) -> None:
    """SIGKILL ``pid`` where ``node`` is this one and the process is a worker of Ray that does not end by itself."""
    with contextlib.suppress(OSError, RayError):
        if not ray.is_initialized() or ray.get_runtime_context().get_node_id() != node:
            return
        limit = time.monotonic() + _GRACE_SECONDS
        while b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():  # empty for a zombie
            if time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.01)


def process_here() -> tuple[str, int]:
    """Node and process id of the calling actor, for ``WatchedActor.watch``."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _brief(error: BaseException) -> str:
    """The first lines of Ray's account, on one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])[:500] or type(error).__name__
