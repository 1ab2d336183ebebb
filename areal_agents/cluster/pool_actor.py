"""The engine pool of a cluster, as an actor on the driver's node and the handle that everybody calls.

    driver ───────────┐ generate, update_weights, resize                       ┌─▶ RayEngine ─▶ EngineActor (a node)
                      ├──────────▶ PoolActor: EnginePool ─▶ Replica: supervised ┼─▶ RayEngine ─▶ EngineActor
    rollout workers ──┘ generate        │                                      └─▶ …
    driver ◀──── events, long-polled ───┘

``RemotePool`` is the ``Engine`` of the driver, which starts and closes it. Pickled, it becomes the ``PoolHandle`` of a
rollout worker, which talks to the same actor and ends nothing. ``engines.pool`` takes care of sessions, retries and
weights. The actor only moves this work out of the driver, so that episodes do not travel through it.

**If the PoolActor is lost**, its engines end with it, for Ray ends what a dead actor owns. Every call then raises
EngineError at once, in the workers too. The run stops and goes on from its checkpoint with ``--resume``. The actor is
not started again. It computes nothing and runs on the driver's node, so what ends it mostly ends the driver too.

**If the driver dies**, Ray ends the PoolActor and everything below it, for no actor is detached.

Waits for / unblocked by: a call waits for the actor's answer. It is unblocked by the answer, by the actor's loss (at
once where it died, after ``hang_seconds`` where it is silent) or by its deadline. The poller waits for events, and is
unblocked by an event, the poll's end or the actor's loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from areal_agents.cluster.engine_actors import RayEngine, Resources
from areal_agents.cluster.engine_host import CONCURRENCY, EngineHandle, EngineHost, Place
from areal_agents.cluster.pool_handle import PoolHandle
from areal_agents.cluster.remote_errors import Failure
from areal_agents.cluster.watched_actor import ActorLost, WatchedActor
from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.replica import SupervisedSettings
from areal_agents.engines.spec import EngineSpec, process_seed
from areal_agents.errors import ArealError, EngineError
from areal_agents.utils.closing import AsyncClosing

_POLL_SECONDS = 20.0
_START_SECONDS = 60.0
PoolEvent = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """The picklable settings that a PoolActor is started with."""

    spec: EngineSpec
    replicas: int
    resources: Resources = field(default_factory=Resources)
    seed: int = 0
    salt: str = ""
    """See ``engines.spec.process_seed``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More of Ray's options for the engine actors."""
    place_seconds: float = 60.0
    """How long an engine actor may wait for its resources."""
    drain_seconds: float = 600.0
    supervised: SupervisedSettings = field(default_factory=SupervisedSettings)
    """``SupervisedEngine``'s numbers."""

    @property
    def start_seconds(self) -> float:
        return self.supervised.get("start_seconds", 300.0)

    @property
    def update_seconds(self) -> float:
        """The deadline of an update in seconds, with a growing replica's load before it."""
        return 2 * self.supervised.get("update_seconds", 300.0)

    @property
    def resize_seconds(self) -> float:
        """The deadline of a resize in seconds, for a drain or for a start and the load behind an update."""
        return self.start_seconds + self.update_seconds + self.drain_seconds


class PoolActor(EngineHost):
    """An async Ray actor that hosts the pool."""

    def __init__(self) -> None:
        super().__init__()
        self._events: dict[int, PoolEvent] = {}
        self._numbers = itertools.count(1)
        self._news = asyncio.Event()
        self._processes = itertools.count()

    async def start(self, settings: PoolSettings) -> Place | Failure:
        """Start every replica and return where the actor runs."""
        s = settings

        async def start(index: int) -> RayEngine:
            nth = next(self._processes)
            return await RayEngine.start(
                s.spec,
                seed=process_seed(s.seed, salt=s.salt, index=index, nth=nth),
                resources=s.resources,
                options=s.options,
                place_seconds=s.place_seconds,
                hang_seconds=s.supervised.get("hang_seconds", 60.0),
                health_interval=s.supervised.get("health_interval", 5.0),
                update_seconds=s.supervised.get("update_seconds", 300.0),
                what=f"the actor of engine {index}",
            )

        pool = EnginePool(start, replicas=s.replicas, event=self._log, drain_seconds=s.drain_seconds, **s.supervised)
        try:
            self._engine = await pool.__aenter__()
        except ArealError as error:
            return Failure.of(error)
        return await self.place()

    def _log(self, kind: str, **fields: Any) -> None:
        self._events[next(self._numbers)] = kind, fields
        self._news.set()

    async def events(self, seen: int, seconds: float) -> list[tuple[int, PoolEvent]]:
        """Return the events after number ``seen``, and wait up to ``seconds`` for the first one.

        Events up to ``seen`` are forgotten.
        """
        # Forgotten here and not when they are sent, because only the next question proves that they arrived.
        for number in [n for n in self._events if n <= seen]:
            del self._events[number]
        if not self._events:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._news.wait()
        return list(self._events.items())


class RemotePool(EngineHandle, AsyncClosing):
    """An ``Engine`` with ``resize`` on the pool's actor.

    Use it as ``async with await RemotePool.start(...) as pool``.

    Pickled, it becomes a ``PoolHandle`` for another process of the cluster.
    """

    def __reduce__(self) -> tuple[type[PoolHandle], tuple[Any, Place]]:
        return PoolHandle, (self._actor.actor, replace(self.place, version=self.version))

    @classmethod
    async def start(cls, settings: PoolSettings, *, event: Callable[..., None]) -> RemotePool:
        """Start the actor and its replicas.

        ``event(kind, **fields)`` is called on the caller's loop. ``EnginePool`` lists the kinds, and ``pool_lost``
        (reason) tells of the actor's own loss.

        Raises:
            EngineError: the actor is lost, or an engine cannot be placed.
            ArealError: whatever else a replica's start raises, such as for a model that cannot be loaded.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        handle = (
            ray.remote(PoolActor)
            .options(
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=CONCURRENCY,
                scheduling_strategy=here,
            )
            .remote()
        )
        hang = settings.supervised.get("hang_seconds", 60.0)
        interval = settings.supervised.get("health_interval", 5.0)
        actor = WatchedActor(handle, "the engine pool's actor", hang_seconds=hang, interval=interval)
        try:
            await actor.call("place", seconds=_START_SECONDS)
            limit = settings.place_seconds + settings.start_seconds + _START_SECONDS
            place: Place = await actor.call("start", settings, seconds=limit)
        except BaseException as error:
            await actor.end("it was not started")
            if isinstance(error, ActorLost):
                raise EngineError(str(error)) from error
            raise
        pool = cls(actor, place)
        pool._begin(settings, event)
        return pool

    def _begin(self, settings: PoolSettings, event: Callable[..., None]) -> None:
        self._event, self._seen = event, 0
        self._live = set(range(settings.replicas))
        self._update_seconds = settings.update_seconds
        self._resize_seconds = settings.resize_seconds
        self._poller = asyncio.create_task(self._poll(), name="pool-events")

    @property
    def replicas(self) -> int:
        """The number of replicas that serve or restart, as of the last event."""
        return len(self._live)

    async def resize(self, replicas: int) -> None:
        """Grow or shrink to ``replicas``, as ``EnginePool.resize`` does."""
        await self._ask("resize", replicas, seconds=self._resize_seconds)

    async def close(self) -> None:
        """Deliver the events so far, close every replica and end the actor.

        May be called twice.
        """
        self._poller.cancel()  # first: two readers would deliver an event twice
        await asyncio.gather(self._poller, return_exceptions=True)
        try:
            with contextlib.suppress(ActorLost):
                await self._deliver(0.0)
        finally:
            await super().close()

    async def _poll(self) -> None:
        try:
            while True:
                await self._deliver(_POLL_SECONDS)
        except ActorLost as error:  # every call says so too, among others' failures
            self._event("pool_lost", reason=str(error))
        except Exception as error:  # noqa: BLE001  boundary: nobody awaits this task; every later call raises it
            self._actor.lose(f"the engine pool's events could not be recorded: {type(error).__name__}: {error}")

    async def _deliver(self, seconds: float) -> None:
        events = await self._actor.call("events", self._seen, seconds, seconds=seconds + _POLL_SECONDS)
        for number, (kind, fields) in events:
            self._seen = number
            if kind == "replica_added":
                self._live.add(fields["replica"])
            elif kind in ("replica_removed", "replica_lost"):
                self._live.discard(fields["replica"])
            self._event(kind, **fields)
