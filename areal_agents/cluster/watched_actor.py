"""Ray actors under watch.

Every call has a deadline, and a lost actor ends all of its calls at once.

    alive ── dead | silent for hang_seconds | a call past its deadline ──▶ lost: its process is killed

Ray reports an actor that died. It says nothing of one that was stopped, or whose event loop is blocked, so the watcher
asks ``ping`` for that.

Waits for / unblocked by: a call waits for its answer, and is unblocked by the answer, the loss or its deadline. The
watcher waits for a pong until its deadline, and the kill for Ray until its own.
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
"""Looks for a pong within ``hang_seconds``. A single one may miss it while this process's own event loop is blocked."""
_KILL_SECONDS = 10.0
_GRACE_SECONDS = 2.0
"""Time for a process that Ray was told to end."""


class ActorLost(Exception):
    """The actor is gone.

    The message says why. Callers raise their own error from it.
    """


class ActorSilent(ActorLost):
    """The actor did not answer a call in time.

    Perhaps it was never placed.
    """


class WatchedActor:
    """One actor from its start to its loss.

    It belongs to the event loop that made it.

    Args:
        actor: a Ray actor handle. Its class has ``ping()``, and its methods return a ``Failure`` where they would raise
            an ArealError.
        what: its name in messages.
        hang_seconds: without a pong for so long, it is lost.
        interval: seconds between two questions.

    Raises:
        ConfigError: a number is out of range.
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
        """Why it is lost. Empty while it lives."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called once, when it is lost."""

    @property
    def pid(self) -> int:
        """Its process id on its node, or 0 before ``watch``."""
        return 0 if self._process is None else self._process[1]

    def watch(self, node: str, pid: int, pong: Callable[[Any], None] = lambda answer: None) -> None:
        """Begin to ask for health.

        Args:
            node: the node where its process runs.
            pid: its process id there.
            pong: is called with each answer.
        """
        self._process = (node, pid)
        self._watcher = asyncio.create_task(self._watch(pong), name=f"watch-{self.what}")

    async def call(self, method: str, *args: Any, seconds: float) -> Any:
        """Call ``actor.method(*args)`` and return its answer.

        An actor that does not answer within ``seconds`` is lost.

        Raises:
            ActorLost: the actor is gone.
            ActorSilent: it did not answer within ``seconds``.
            ArealError: the method returned it as a ``Failure``.
            RayTaskError: the method raised something else, which Ray raises again as this.
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
        """Call without waiting for an answer.

        A lost actor is no error.
        """
        if not self.reason:
            with contextlib.suppress(RayError):
                self._ask(method, *args)

    def _ask(self, method: str, *args: Any) -> asyncio.Future[Any]:
        """Call the actor and return its answer as a future of the running loop.

        Whoever stops waiting for the future may drop it.
        """
        future: asyncio.Future[Any] = asyncio.wrap_future(getattr(self.actor, method).remote(*args).future())
        future.add_done_callback(lambda f: f.cancelled() or f.exception())  # retrieved: a dropped one must not warn
        return future

    async def _answer(self, answer: asyncio.Future[Any], seconds: float) -> tuple[bool, Any]:
        """Wait up to ``seconds`` for ``answer`` or a loss.

        Returns whether the answer came, and the answer. Raises what the call raised.
        """
        both: set[asyncio.Future[Any]] = {answer, self._lost}
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return answer.done(), answer.result() if answer.done() else None

    def lose(self, reason: str) -> None:
        """Give the actor up, unless it is lost already.

        Its calls raise ActorLost, and its process is killed.
        """
        if self.reason:
            return
        self.reason = reason
        self._lost.set_result(None)
        # The watcher may be the caller here. Then it ends by itself.
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            self._watcher.cancel()
        self._killing = asyncio.create_task(self._kill(), name=f"kill-{self.what}")
        self.on_lost()  # last, because it may raise, and the process must be killed all the same

    async def end(self, reason: str) -> None:
        """Give the actor up and wait for its end, which has a deadline.

        May be called twice.
        """
        self.lose(reason)
        assert self._killing is not None
        # A caller that is cancelled must not leave the process alive, so the kill goes on without it.
        await asyncio.shield(self._killing)

    async def _watch(self, pong: Callable[[Any], None]) -> None:
        try:
            await self._ask_again(pong)
        except Exception as error:  # noqa: BLE001  boundary: nobody awaits this task; every later call raises it
            self.lose(f"what {self.what} said could not be recorded: {type(error).__name__}: {error}")

    async def _ask_again(self, pong: Callable[[Any], None]) -> None:
        """Ask for health until the actor is lost."""
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
        """End the process by Ray, and then from here where it runs on this node and does not end soon.

        A stopped process does not end by Ray alone. Ray comes first all the same: a process that is killed before it
        can obey Ray is reported as crashed, on the user's terminal.
        """
        with contextlib.suppress(RayError, ValueError, TimeoutError):
            async with asyncio.timeout(_KILL_SECONDS):
                await asyncio.to_thread(_kill_actor, self.actor)
        if self._process is not None:
            await asyncio.to_thread(_kill_here, *self._process)


def _kill_actor(actor: Any) -> None:
    """Kill ``actor`` where Ray runs.

    Without a Ray there is nothing to kill, and ``ray.kill`` would start one.
    """
    if ray.is_initialized():
        ray.kill(actor)


def _kill_here(node: str, pid: int) -> None:
    """Kill process ``pid`` where ``node`` is this one and the process is a Ray worker that does not end by itself."""
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
    """Return node and process id of the calling actor, for ``WatchedActor.watch``."""
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _brief(error: BaseException) -> str:
    """Put the first lines of Ray's account on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:6])[:500] or type(error).__name__
