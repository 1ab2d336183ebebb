"""One engine on a Ray actor.

``EngineActor`` hosts the engine. ``RayEngine`` is the ``Restartable`` that a pool supervises.

    RayEngine.start ─▶ placed by resources ─▶ EngineActor ─▶ EngineSpec.start ─▶ the engine's own process(es)
    RayEngine.kill, the actor's death, the driver's death ─▶ they all end

Ray never restarts the actor (``max_restarts=0``). ``SupervisedEngine`` starts another one, anywhere in the cluster,
and gives it the weights before any request.

Waits for / unblocked by: ``start`` waits for resources, at most ``place_seconds``. Then it waits for the model, until
the caller's deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import ray

from areal_agents.cluster.engine_host import CONCURRENCY, EngineHandle, EngineHost, Place
from areal_agents.cluster.remote_errors import Failure
from areal_agents.cluster.watched_actor import ActorLost, ActorSilent, WatchedActor
from areal_agents.engine import WeightsRef
from areal_agents.engines.spec import EngineSpec
from areal_agents.errors import ArealError, ConfigError, EngineError

_START_SECONDS = 3600.0
_CLUSTER_SECONDS = 10.0
_LESS = ". Lower engine.replicas or what an engine asks for (cluster.engine_cpus, cluster.engine_gpus), or add nodes"


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources that Ray reserves for one engine actor.

    Raises ConfigError for negative numbers.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)
    """Further resources by name, as ``ray start --resources`` declares them."""

    def __post_init__(self) -> None:
        for name, amount in self.asked().items():
            if amount < 0:
                raise ConfigError(f"an engine actor cannot ask for {amount:g} {name}: use 0 or more")

    def asked(self) -> dict[str, float]:
        """Return the amounts by Ray's names."""
        return {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.custom}

    def options(self) -> dict[str, Any]:
        """Return the amounts as Ray's actor options."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "resources": dict(self.custom)}


class EngineActor(EngineHost):
    """An async Ray actor that hosts one engine."""

    async def start(self, spec: EngineSpec, seed: int) -> Place | Failure:
        """Start the engine and return where it runs."""
        try:
            self._engine = await spec.start(seed)
        except ArealError as error:
            return Failure.of(error)
        return await self.place()

    async def _call(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if method == "update_weights":
            await asyncio.to_thread(_require_here, args[0])
        return await super()._call(method, args, options)


def _require_here(ref: WeightsRef) -> None:
    """Raise EngineError where ``ref`` is in shared memory that this host does not have."""
    if ref.transport == "shm" and not Path(ref.locator).exists():
        node = ray.get_runtime_context().get_node_id()[:8]
        raise EngineError(
            f"weights v{ref.version} lie in shared memory ({ref.locator}), which this engine on node {node} does not "
            "have: the learner has ended, or runs on another host. Set engine.transport = 'disk', 'nccl' or 'gloo' "
            "where engines and learner do not share a host"
        )


class RayEngine(EngineHandle):
    """A ``Restartable`` engine on an actor, made by ``start``."""

    @classmethod
    async def start(
        cls,
        spec: EngineSpec,
        *,
        seed: int,
        resources: Resources,
        options: Mapping[str, Any] | None = None,
        place_seconds: float = 60.0,
        hang_seconds: float = 60.0,
        health_interval: float = 5.0,
        update_seconds: float = 300.0,
        what: str = "the engine actor",
    ) -> Self:
        """Place an actor and start the engine there.

        The caller sets a deadline for the model.

        Args:
            spec: how to start the engine.
            seed: the seed of the engine's process.
            resources: what Ray reserves for the actor.
            options: more of Ray's actor options (``scheduling_strategy``, ``runtime_env``, …).
            place_seconds: how long the actor may wait for its resources.
            hang_seconds: without an answer from the actor's event loop for so long, the actor is lost.
            health_interval: seconds between two questions to the event loop.
            update_seconds: deadline of an update of the weights.
            what: the actor's name in messages.

        Raises:
            EngineError: no node has the resources within ``place_seconds``, or the actor dies.
            ArealError: whatever the engine's own ``start`` raises.
        """
        chosen: dict[str, Any] = resources.options() | dict(options or {})
        chosen |= {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": CONCURRENCY}
        handle = ray.remote(EngineActor).options(**chosen).remote()
        actor = WatchedActor(handle, what, hang_seconds=hang_seconds, interval=health_interval)
        try:
            try:
                try:
                    # An answer proves that the actor was placed. So silence means missing resources, not a slow model.
                    await actor.call("place", seconds=place_seconds)
                except ActorSilent as error:
                    said = await unplaced("an engine actor", resources.asked(), place_seconds, str(error))
                    raise EngineError(said + _LESS) from error
                place: Place = await actor.call("start", spec, seed, seconds=_START_SECONDS)
            except ActorLost as error:
                raise EngineError(str(error)) from error
        except BaseException:
            await actor.end("it was not started")
            raise
        engine = cls(actor, place)
        engine._update_seconds = update_seconds
        return engine


async def unplaced(what: str, resources: Mapping[str, float], seconds: float, reason: str) -> str:
    """Say why an actor was not placed, and what the cluster has.

    Args:
        what: the actor, as the message names it.
        resources: what was asked for, by Ray's names.
        seconds: how long the actor waited.
        reason: what its watcher reported.

    Returns:
        The message, without a next action.
    """
    asked = ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
    try:
        async with asyncio.timeout(_CLUSTER_SECONDS):
            total, free, largest = await asyncio.to_thread(_cluster)
        found = f"the cluster has {total} in all, {free} of it free, and its largest nodes {largest}"
    except TimeoutError:
        found = "the cluster did not say what it has"
    return f"{what} that asks for {asked or 'nothing'} was not placed within {seconds:g} s: {found} ({reason})"


def _cluster() -> tuple[str, str, str]:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    names = sorted({name for node in nodes for name in node if ":" not in name and "memory" not in name})
    largest = {name: max(node.get(name, 0.0) for node in nodes) for name in names}
    return (
        _amounts(ray.cluster_resources(), names),
        _amounts(ray.available_resources(), names),
        _amounts(largest, names),
    )


def _amounts(found: Mapping[str, float], names: list[str]) -> str:
    return ", ".join(f"{found.get(name, 0.0):g} {name}" for name in names) or "nothing"
