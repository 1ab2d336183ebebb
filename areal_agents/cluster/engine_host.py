"""An engine inside a Ray actor.

``EngineHost`` is the actor's side. ``EngineHandle`` is the caller's side.

    EngineHandle.generate ── ask(id, "generate", …) ──▶ EngineHost ─▶ the engine
         ▲ cancelled? ────── abort(id) ───────────────▶   └─ a task for each call
         └── Answer: value or Failure, version, failure, stderr ──┘

Answers are values, because an exception that crosses Ray changes its class (``cluster.remote_errors``). Each answer
says whether the engine's process is gone, so ``failure`` is set before a call fails because of it. An actor that dies
or hangs loses every call at once. ``cluster.watched_actor`` sees to that.

Waits for / unblocked by: a call waits for its answer. It is unblocked by the answer, by the actor's loss, or by its
deadline and a second for the way. An abort waits for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayTaskError

from areal_agents.cluster.remote_errors import Failure
from areal_agents.cluster.watched_actor import ActorLost, WatchedActor, process_here
from areal_agents.engine import Engine, Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.errors import ArealError, EngineError
from areal_agents.types import Completion, Prompt
from areal_agents.utils.outcomes import unheard

CONCURRENCY = 16_384
"""Calls that an actor works on at once. Further ones would wait, and health questions with them."""
_WAY_SECONDS = 1.0
"""Time that an answer may take from the actor to its caller. The engine keeps the call's own deadline."""
_HEALTH_SECONDS = 20.0
_CLOSE_SECONDS = 60.0
_ABORTED = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """The node and process of an actor, with facts about its engine."""

    node: str
    pid: int
    version: int = 0
    max_context: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one call.

    ``value`` is the call's result or its ``Failure``. The other fields are the engine's state after the call.
    """

    value: Any
    version: int
    failure: str | None
    stderr: str


class EngineHost:
    """A base class for async Ray actors that host one engine.

    A subclass starts the engine.
    """

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._running: dict[str, asyncio.Task[Any]] = {}
        self._aborted: OrderedDict[str, None] = OrderedDict()

    async def place(self) -> Place:
        """Return where this actor runs.

        The first answer says that the actor was placed.
        """
        node, pid = process_here()
        context = getattr(self._engine, "max_context", 0)
        return Place(node, pid, 0 if self._engine is None else self._engine.version, context)

    async def ping(self) -> Answer:
        """Answer between two events of the loop.

        Silence means that the process is stopped or that its loop is blocked.
        """
        return self._answer(None)

    async def ask(self, id: str, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Answer:
        """Call ``engine.method(*args, **options)`` and return its answer.

        Args:
            id: the name of this call, by which ``abort(id)`` cancels it.
            method: a method of the engine.
            args: its positional arguments.
            options: its keyword arguments.
        """
        if id in self._aborted:  # the abort overtook the call
            del self._aborted[id]
            return self._answer(Failure.of(EngineError("the call was aborted")))
        task = self._running[id] = asyncio.create_task(self._call(method, args, options), name=f"{method}-{id}")
        try:
            await asyncio.wait({task})  # not ``await task``: a cancelled task is an answer, not the end of this call
        finally:
            self._running.pop(id, None)
            unheard(task)
        if task.cancelled():
            return self._answer(Failure.of(EngineError("the call was aborted")))
        try:
            return self._answer(task.result())
        except ArealError as error:
            return self._answer(Failure.of(error))

    async def abort(self, id: str) -> None:
        """Cancel a call, also one that has not arrived yet.

        Ray does not keep the order of calls.
        """
        task = self._running.get(id)
        if task is not None:
            task.cancel()
            return
        self._aborted[id] = None
        while len(self._aborted) > _ABORTED:  # aborts that came after the end of their call
            self._aborted.popitem(last=False)

    async def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self._engine is None:
            raise EngineError("the actor has no engine yet")
        return await getattr(self._engine, method)(*args, **options)

    def _answer(self, value: Any) -> Answer:
        failure: str | None = getattr(self._engine, "failure", None)
        stderr = str(getattr(self._engine, "stderr", "")) if failure is not None else ""
        return Answer(value, 0 if self._engine is None else self._engine.version, failure, stderr)


class EngineHandle:
    """A ``Restartable`` engine on the other side of an actor.

    It belongs to the event loop that made it.
    """

    _update_seconds = 300.0
    """An update's deadline. Whoever knows the engine sets another one."""

    def __init__(self, actor: WatchedActor, place: Place) -> None:
        """Watch ``actor`` from now on.

        It is an ``EngineHost`` whose engine was started, and ``place`` is where it runs.
        """
        self._actor, self.place = actor, place
        self._version = place.version
        self._failure: str | None = None
        self._stderr = ""
        self._closed = False
        self._ids = (f"{uuid.uuid4().hex[:12]}-{n}" for n in itertools.count())
        actor.on_lost = self._lost
        actor.watch(place.node, place.pid, self._heard)

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_context(self) -> int:
        """The longest prompt plus completion in tokens, or 0 where the engine does not say."""
        return self.place.max_context

    @property
    def failure(self) -> str | None:
        """The reason why the engine or its actor is gone, or None while it lives."""
        return self._failure

    @property
    def unreachable(self) -> bool:
        """True once the actor was lost.

        An engine may also fail in an actor that lives.
        """
        return bool(self._actor.reason)

    @property
    def stderr(self) -> str:
        """The end of what the engine's process wrote to stderr, as far as its actor could still tell."""
        return self._stderr

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        """Sample one turn, as ``Engine.generate`` does.

        Cancelling aborts the request on the actor.

        Args:
            prompt: the token ids so far.
            sampling: how to sample.
            session: the conversation, whose KV the engine keeps.
            deadline: seconds from now.

        Raises:
            EngineError: the deadline has passed, the engine or its actor is gone, or the prompt does not fit.
        """
        options = {"session": session, "deadline": deadline}
        done: Completion = await self._ask("generate", prompt, sampling, seconds=deadline, **options)
        return done

    async def release(self, session: str) -> None:
        """Drop the session's KV without waiting for it."""
        self._actor.send("ask", next(self._ids), "release", (session,), {})

    async def update_weights(
        self, ref: WeightsRef, *, mode: UpdateMode = "inflight", kv: KVPolicy = "recompute"
    ) -> UpdateReport:
        """Serve ``ref`` from now on, as ``Engine.update_weights`` does."""
        report: UpdateReport = await self._ask("update_weights", ref, seconds=self._update_seconds, mode=mode, kv=kv)
        return report

    async def health(self) -> Health:
        """Return the engine's state, which is not ``ok`` where the actor is lost."""
        try:
            health: Health = await self._ask("health", seconds=_HEALTH_SECONDS)
        except EngineError as error:
            return Health(False, self._version, 0, 0, 0, 0, str(error))
        return health

    async def close(self) -> None:
        """Close the engine, then end its actor, all within a minute.

        May be called twice.
        """
        if not self._closed and not self._actor.reason:
            self._closed = True
            with contextlib.suppress(ActorLost, ArealError, RayTaskError):  # it ends all the same, by force
                await self._actor.call("ask", next(self._ids), "close", (), {}, seconds=_CLOSE_SECONDS)
        await self.kill()

    async def kill(self) -> None:
        """End the actor and its engine at once.

        Pending calls raise EngineError.
        """
        self._closed = True
        await self._actor.end("the engine was closed")

    async def _ask(self, method: str, *args: Any, seconds: float, **options: Any) -> Any:
        """Call ``method`` of the engine and return its result.

        Raises what the engine raised. Raises EngineError where the actor is lost or ``seconds`` have passed.
        """
        if self._failure is not None:
            raise EngineError(self._failure)
        id, limit = next(self._ids), max(seconds, 0.0) + _WAY_SECONDS
        try:
            # A late answer fails this call alone, so the deadline of ``call``, which loses the actor, is longer. The
            # watcher finds out whether the actor itself is lost.
            async with asyncio.timeout(limit):
                answer = await self._actor.call("ask", id, method, args, options, seconds=2 * limit)
        except asyncio.CancelledError:
            self._actor.send("abort", id)
            raise
        except TimeoutError as error:
            self._actor.send("abort", id)
            raise EngineError(f"{self._actor.what} did not answer {method!r} within {limit:g} s") from error
        except ActorLost as error:
            raise EngineError(self._failure or str(error)) from error
        except RayTaskError as error:  # a bug, or a library's own error: the request failed, the actor lives
            raise EngineError(f"{self._actor.what} failed in {method!r}: {error.cause!r}") from error
        self._heard(answer)
        if isinstance(answer.value, Failure):
            raise answer.value.error()
        return answer.value

    def _heard(self, answer: Answer) -> None:
        self._version = answer.version
        if answer.failure is not None:
            self._failure, self._stderr = self._failure or answer.failure, answer.stderr or self._stderr

    def _lost(self) -> None:
        self._failure = self._failure or self._actor.reason
