"""Rollout workers on Ray, which play episodes in actors on whichever nodes Ray places them.

    RemotePlayer.play ─▶ Places: least-loaded live worker ─▶ RolloutWorker ─▶ engine handle ─▶ engines
                               │ worker dead or silent: its episodes raise WorkerLost, it is started again
                               └──▶ more than max_restarts within window_seconds: dropped; none left: the run ends

Waits for / unblocked by: a play waits for a free place, and is unblocked by another play's end, a restart, growth, or
the loss of the last worker. Then it waits for its answer, until the answer, the worker's loss or the episode's
deadline. A restart waits for the actor, at most ``start_seconds``. An attempt whose worker was lost is over. Whatever
that worker still does, its answer is not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import ray
from ray.exceptions import RayError

from areal_agents.cluster.engine_actors import unplaced
from areal_agents.cluster.remote_errors import Failure
from areal_agents.cluster.rollout_worker import Events, Played, RolloutWorker
from areal_agents.cluster.watched_actor import ActorLost, ActorSilent, WatchedActor
from areal_agents.cluster.worker_slots import Places
from areal_agents.engine import Engine
from areal_agents.engines.pool.supervision import RestartLimit
from areal_agents.errors import ArealError, ConfigError, EngineError, EnvError, FailureBudgetError, WorkerLost
from areal_agents.registry import EnvSpec
from areal_agents.rollout.episode import Limits
from areal_agents.rollout.player import EventSink, PlayerSpec, no_events
from areal_agents.types import Task, Trajectory
from areal_agents.utils.closing import AsyncClosing

_CANCEL_SECONDS = 20.0
_CLOSE_SECONDS = 90.0
_RELEASE_SECONDS = 10.0


class _Worker:
    """One actor, from the proof of its sandbox to its end."""

    def __init__(self, index: int, actor: WatchedActor) -> None:
        self.index, self.actor = index, actor
        self.leaving = False
        """It gets no more episodes, and is not started again."""
        self.ending = False
        """Its end is no loss."""


class RolloutWorkers(AsyncClosing):
    """A pool of rollout workers, which belongs to the event loop that entered it.

    Use it as ``async with RolloutWorkers(engine, env, …) as workers: workers.player(spec)``.

    Args:
        engine: a picklable handle, of which each worker calls its own copy.
        env, sandbox, more: the environments, and the sandbox backend of each, that a worker proves before it plays.
        workers, episodes_per_worker: actors, and the episodes that each plays at once. Others wait their turn.
        event: is told worker_lost (worker, reason, episodes), worker_restarted (worker, seconds), worker_dropped
            (worker, reason), worker_added, worker_removed (worker, episodes), and players' reports (with worker).
        num_cpus, options: what Ray reserves for a worker, and more of Ray's actor options (``resources``, …). Workers
            are spread over the nodes unless ``scheduling_strategy`` says otherwise.
        max_restarts, window_seconds: a worker with more restarts within so many seconds is dropped.
        hang_seconds, health_interval: a silence that means a loss, and the seconds between two questions.
        start_seconds: deadline of a worker's placement, start and proof together.
        drain_seconds: how long the episodes of a removed worker may still play.
    """

    def __init__(
        self,
        engine: Engine,
        env: EnvSpec,
        *,
        sandbox: str = "bubblewrap",
        more: Sequence[tuple[EnvSpec, str]] = (),
        workers: int = 1,
        episodes_per_worker: int = 16,
        event: EventSink = no_events,
        num_cpus: float = 1.0,
        options: Mapping[str, Any] | None = None,
        max_restarts: int = 3,
        window_seconds: float = 600.0,
        hang_seconds: float = 60.0,
        health_interval: float = 5.0,
        start_seconds: float = 120.0,
        drain_seconds: float = 600.0,
    ) -> None:
        """Start nothing yet. Raises ConfigError for a number out of range."""
        if workers < 1 or min(hang_seconds, health_interval, start_seconds, drain_seconds) <= 0:
            said = f"rollout workers = {workers} must be at least 1, their interval and deadlines positive seconds"
            raise ConfigError(said)
        self._engine, self._proved, self._event = engine, [(env, sandbox), *more], event
        self._first = workers
        self._options = {
            "num_cpus": num_cpus, "max_restarts": 0, "max_concurrency": 2 * episodes_per_worker + 64,
            "scheduling_strategy": "SPREAD", **(options or {}),
        }  # fmt: skip
        self._hang, self._interval = hang_seconds, health_interval
        self._start_seconds, self._drain_seconds = start_seconds, drain_seconds
        self._restart_limit = (max_restarts, window_seconds)
        RestartLimit(*self._restart_limit)  # numbers out of range are refused now
        self._limits: dict[int, RestartLimit] = {}
        self._indices, self._tickets, self._numbers = itertools.count(), itertools.count(), itertools.count()
        self.places = episodes_per_worker
        self._places: Places[_Worker] = Places(episodes_per_worker)
        self._workers: dict[int, _Worker] = {}
        self._leaving: set[_Worker] = set()
        self._restarts: dict[int, asyncio.Task[None]] = {}
        self._growing = 0
        self._dropped: ArealError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._resizing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Start every worker. Raises SandboxUnavailable, and WorkerLost where one dies or misses its deadline."""
        try:
            await self._grow(self._first)
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the live workers, each on its node, by index."""
        return {index: worker.actor.pid for index, worker in self._workers.items()}

    def player(self, spec: PlayerSpec) -> RemotePlayer:
        """Return a player of ``spec`` on these workers. Many may be open at once and share the places."""
        # A worker's working directory is another one.
        return RemotePlayer(self, next(self._numbers), replace(spec, model=spec.model.absolute()))

    async def resize(self, workers: int) -> None:
        """Grow or shrink to ``workers``, and return once new workers play.

        Workers that are being restarted go first, then the newest. They get no more episodes, and end in the background
        when theirs are over. Raises ConfigError below 1 worker, and what ``__aenter__`` raises.
        """
        if workers < 1:
            raise ConfigError(f"rollout workers = {workers} must be at least 1")
        async with self._resizing:
            have = sorted({*self._workers, *self._restarts}, key=lambda i: (i not in self._workers, i))
            for index in have[workers:]:
                await self._remove(index)
            for worker in await self._grow(max(workers - len(have), 0)):
                self._event("worker_added", worker=worker.index)

    async def close(self) -> None:
        """End every worker with its environments and sandboxes. Plays that still run raise. May be called twice."""
        self._places.fail(ArealError("the rollout workers were closed"))
        workers = [*self._workers.values(), *self._leaving]
        for worker in workers:
            worker.ending = True  # before anything is awaited: a loss from now on must not start a worker again
        await _cancel([*self._restarts.values(), *self._tasks])
        await asyncio.gather(*(self._end(worker) for worker in workers))

    # --- episodes ----------------------------------------------------------------------------------------------------

    async def play(self, player: int, spec: PlayerSpec, task: Task, *, id: str, group: str, seed: int) -> Trajectory:
        """Play one attempt on the least-loaded worker, for ``RemotePlayer.play``."""
        worker = await self._take()
        ticket, seconds = next(self._tickets), episode_seconds(spec.limits, spec.step_seconds)
        try:
            async with asyncio.timeout(seconds):
                played: Played = await worker.actor.call(
                    "play", ticket, player, spec, task, id, group, seed, seconds=2 * seconds
                )
        except ActorLost as error:
            self._spawn(self._release(id))
            raise WorkerLost(f"episode {id}: {error}") from error
        except TimeoutError as error:
            await self._cancel_attempt(worker, ticket)
            raise EnvError(f"episode {id} of task {task.id} did not end within {seconds:g} s: cancelled") from error
        except asyncio.CancelledError:
            await self._cancel_attempt(worker, ticket)
            raise
        finally:
            self._places.give_back(worker)  # only here: until its attempt has ended the worker has no room for another
        self._repeat(worker, played.events)
        if isinstance(played.result, Failure):
            if worker.ending:  # it cancelled what it played
                raise WorkerLost(f"episode {id}: rollout worker {worker.index} was removed")
            raise played.result.error()
        return played.result

    async def end_player(self, player: int) -> None:
        """Close a player on every worker."""

        async def end(worker: _Worker) -> None:
            with contextlib.suppress(ActorLost):
                self._repeat(worker, await worker.actor.call("end_player", player, seconds=_CLOSE_SECONDS))

        await asyncio.gather(*(end(worker) for worker in [*self._workers.values(), *self._leaving]))

    async def _take(self) -> _Worker:
        while True:
            worker = await self._places.take()
            if not worker.actor.reason:
                return worker
            self._places.give_back(worker)  # lost between the offer and now

    async def _cancel_attempt(self, worker: _Worker, ticket: int) -> None:
        """Cancel an attempt where it runs, and wait a while for its end."""
        with contextlib.suppress(ActorLost, TimeoutError):
            async with asyncio.timeout(_CANCEL_SECONDS):
                await worker.actor.call("cancel", ticket, seconds=_CLOSE_SECONDS)

    async def _release(self, session: str) -> None:
        """Drop what the engine keeps for an attempt whose worker cannot say so any more."""
        with contextlib.suppress(ArealError, TimeoutError):
            async with asyncio.timeout(_RELEASE_SECONDS):
                await self._engine.release(session)

    def _repeat(self, worker: _Worker, events: Events) -> None:
        for kind, fields in events:
            self._event(kind, **{"worker": worker.index, **fields})

    # --- workers -----------------------------------------------------------------------------------------------------

    async def _grow(self, n: int) -> list[_Worker]:
        """Start ``n`` more workers at once, all or none. Raises the first error."""
        self._growing += n
        launches = (self._launch(next(self._indices)) for _ in range(n))
        try:
            tried = await asyncio.gather(*launches, return_exceptions=True)
        finally:
            self._growing -= n
            self._require_any()
        started = [worker for worker in tried if isinstance(worker, _Worker)]
        for error in tried:
            if isinstance(error, BaseException):
                await asyncio.gather(*(self._end(worker) for worker in started))
                self._require_any()
                raise error
        for worker in started:
            if not worker.actor.reason:
                self._places.add(worker)
        return started

    async def _launch(self, index: int) -> _Worker:
        """Start worker ``index`` without offering its places yet. Raises SandboxUnavailable, WorkerLost."""
        handle = ray.remote(RolloutWorker).options(**self._options).remote(self._engine)
        actor = WatchedActor(handle, f"rollout worker {index}", hang_seconds=self._hang, interval=self._interval)
        end = time.monotonic() + self._start_seconds
        try:
            await self._placed(actor)
            for env, sandbox in self._proved:
                left = max(end - time.monotonic(), 1.0)
                node, pid = await actor.call("start", env, sandbox, seconds=left)
        except ActorLost as error:
            await actor.end("it did not start")
            raise WorkerLost(f"{error}: `ray status` shows what is free, `ray logs` what it wrote") from error
        except BaseException:
            await actor.end("it did not start")
            raise
        worker = self._workers[index] = _Worker(index, actor)
        actor.on_lost = lambda: self._lost(worker)
        actor.watch(node, pid, lambda events: self._repeat(worker, events))
        return worker

    async def _placed(self, actor: WatchedActor) -> None:
        """Wait until ``actor`` runs. Raises WorkerLost where no node has what it asks for."""
        try:
            await actor.call("ping", seconds=self._start_seconds)
        except ActorSilent as error:
            asked = {"CPU": self._options["num_cpus"], **(self._options.get("resources") or {})}
            said = await unplaced("a rollout worker", asked, self._start_seconds, str(error))
            raise WorkerLost(f"{said}. Lower cluster.rollout_workers or cluster.worker_cpus, or add nodes") from error

    def _lost(self, worker: _Worker) -> None:
        self._places.remove(worker)
        if worker.ending:
            return
        index, reason = worker.index, worker.actor.reason
        if not worker.leaving:  # before anybody is told: that may raise
            del self._workers[index]
            again = self._supervise_restart(index, reason)
            self._restarts[index] = asyncio.create_task(again, name=f"restart-worker-{index}")
        self._event("worker_lost", worker=index, reason=reason, episodes=self._places.taken(worker))

    async def _supervise_restart(self, index: int, reason: str) -> None:
        try:
            await self._restart(index, reason)
        except Exception as error:  # noqa: BLE001  boundary: nobody awaits this task; every play raises it
            self._restarts.pop(index, None)
            failure = ArealError(f"rollout worker {index} was not restarted: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._places.fail(failure)

    async def _restart(self, index: int, reason: str) -> None:
        """Start worker ``index`` again until it plays, or drop it past its limit. With the last one the pool fails."""
        begin = time.monotonic()
        limit = self._limits.setdefault(index, RestartLimit(*self._restart_limit))
        while True:
            try:
                limit.count(reason, "Ray keeps it: `ray logs`")
            except EngineError as error:
                return self._drop(index, error)
            try:
                self._places.add(await self._launch(index))
            except (ArealError, RayError) as error:
                reason = str(error)
                self._event("worker_lost", worker=index, reason=reason, episodes=0)
            else:
                del self._restarts[index]
                self._event("worker_restarted", worker=index, seconds=round(time.monotonic() - begin, 3))
                return None

    def _drop(self, index: int, error: ArealError) -> None:
        del self._restarts[index]
        self._event("worker_dropped", worker=index, reason=str(error))
        self._dropped = error
        self._require_any()

    def _require_any(self) -> None:
        """Fail every play where a worker was dropped and none plays, is restarted or is being added."""
        if self._dropped is not None and not (self._workers or self._restarts or self._growing):
            failure = FailureBudgetError(f"the last rollout worker is gone: {self._dropped}")
            failure.__cause__ = self._dropped
            self._places.fail(failure)

    async def _remove(self, index: int) -> None:
        restart, worker = self._restarts.pop(index, None), self._workers.pop(index, None)
        if restart is not None:
            await _cancel([restart])
        if worker is not None:
            worker.leaving = True
            self._places.remove(worker)
            self._leaving.add(worker)
            self._spawn(self._drain(worker))
        episodes = 0 if worker is None else self._places.taken(worker)
        self._event("worker_removed", worker=index, episodes=episodes)

    async def _drain(self, worker: _Worker) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_seconds):
                await self._places.idle(worker)
        await self._end(worker)

    async def _end(self, worker: _Worker) -> None:
        """Cancel and close what the worker plays, then end its process."""
        worker.ending = True
        self._places.remove(worker)
        try:
            with contextlib.suppress(ActorLost):
                self._repeat(worker, await worker.actor.call("close", seconds=_CLOSE_SECONDS))
        except RayError as error:  # a defect in closing: noted, it must not keep others from their end
            self._event("close_failed", worker=worker.index, error=type(error).__name__, detail=str(error))
        finally:
            await worker.actor.end("it was closed")
            self._leaving.discard(worker)
            if self._workers.get(worker.index) is worker:
                del self._workers[worker.index]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class RemotePlayer:
    """An ``EpisodePlayer`` on rollout workers, made by ``RolloutWorkers.player``."""

    def __init__(self, workers: RolloutWorkers, number: int, spec: PlayerSpec) -> None:
        self._workers, self._number, self._spec = workers, number, spec

    async def play(self, task: Task, *, id: str, group: str, seed: int) -> Trajectory:
        """Play one attempt on a worker, as ``EpisodePlayer`` promises. Cancelling it cancels the attempt there.

        Raises what a ``LocalPlayer`` raises, with a ``RemoteCause`` (text) as ``__cause__``. Raises WorkerLost, an
        InfraError, where the worker died or hung, and EnvError after ``episode_seconds``. Raises FailureBudgetError
        where the last worker was lost more often than it may be.
        """
        return await self._workers.play(self._number, self._spec, task, id=id, group=group, seed=seed)

    async def close(self) -> None:
        """End this player's environments and sandboxes on every worker. The workers stay."""
        await self._workers.end_player(self._number)


def episode_seconds(limits: Limits, step_seconds: float = 0.0) -> float:
    """Return more seconds than any episode within ``limits`` can take, with a blocked loop and a second start.

    ``step_seconds`` is what a step may take beyond ``limits.step_timeout``.
    """
    calls = limits.max_turns + 3  # reset, finish and close too
    return 2 * (calls * (limits.step_timeout + step_seconds + limits.request_timeout) + 60.0)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
