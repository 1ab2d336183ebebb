"""A run on Ray, with engines, learner and rollout workers as actors.

The driver keeps the buffer, the loop and the files.

    driver: trainer/loop.py ── batches ──▶ LearnerActor ── WeightsRef ──▶ PoolActor ─▶ EngineActor × replicas
       │ ▲                                                            ▲ generate
       │ └───────────────── trajectories ──── RolloutWorker × n ──────┘
       └────────────────────── tasks ──────────────▲

An actor computes with as many threads as it reserves CPUs. It never takes over the cores of an actor that is idle.
A private Ray is told of as many CPUs as the actors reserve, also where the machine has fewer. So a laptop may run what
a cluster runs, only slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import ray

from areal_agents.cluster.engine_actors import Resources
from areal_agents.cluster.learner_actor import RemoteLearner
from areal_agents.cluster.pool_actor import PoolSettings, RemotePool
from areal_agents.cluster.ray_session import Cluster, cluster
from areal_agents.cluster.rollout_workers import RolloutWorkers
from areal_agents.engine import Transport
from areal_agents.engine_kind import engine_kind
from areal_agents.engines.local import supervision
from areal_agents.registry import EnvSpec
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.backend import Backend, Event, engine_spec_of, engines_text, learner_settings, receivers, salt
from areal_agents.trainer.parts import parts_of
from areal_agents.utils.system import available_cores


@contextlib.asynccontextmanager
async def open_ray(
    config: TrainConfig, spec: EnvSpec, model: Path, *, event: Event, resumed_at: int
) -> AsyncIterator[Backend]:
    """Start the actors of a run and yield them as a ``Backend``.

    They end with the context. See ``trainer.backend.OpenBackend``.

    Args:
        config: the settings of the run.
        spec: not used here, since the settings name every environment that the rollout workers play.
        model: the model's folder, which every node can read.
        event: ``event(kind, **fields)`` writes a line to the event log.
        resumed_at: the step at which the run was resumed, or 0. It changes the engines' random numbers.

    Raises:
        ConfigError: the cluster does not have what is asked of it.
    """
    c, hang = config.cluster, config.engine.hang_timeout
    if not c.learner_gpus:  # Ray does not hide GPUs from an actor that reserves none
        config = config.model_copy(update={"learner": config.learner.model_copy(update={"device": "cpu"})})
    async with contextlib.AsyncExitStack() as stack:
        event("starting", part="a private Ray" if not c.address else f"the connection to Ray at {c.address}")
        joined = await stack.enter_async_context(
            cluster(
                c.address, object_store_gib=c.object_store_gib, num_cpus=_reserved(config), resources=_declared(config)
            )
        )
        event("cluster_joined", address=joined.address, private=joined.private)
        # The parts close in reverse order, so that the workers' episodes end before the engines that they call.
        engines = await asyncio.to_thread(_pool_settings, config, model, resumed_at)
        event("starting", part=engines_text(config))
        pool = await RemotePool.start(engines, event=event)
        await stack.enter_async_context(pool)
        event("starting", part="the learner")
        learner = await RemoteLearner.start(
            model, num_cpus=c.learner_cpus, num_gpus=c.learner_gpus, hang_seconds=hang,
            receivers=lambda: receivers(config, pool.replicas),
            **learner_settings(config, _transport(config, joined), threads=max(1, int(c.learner_cpus))),
        )  # fmt: skip
        await stack.enter_async_context(learner)
        first, *more = ((part.spec, part.env.sandbox) for part in parts_of(config))
        workers = RolloutWorkers(
            pool, first[0], sandbox=first[1], more=more, workers=c.rollout_workers, num_cpus=c.worker_cpus,
            episodes_per_worker=math.ceil(_episodes(config) / c.rollout_workers),
            event=event, hang_seconds=hang, options={"resources": dict(c.worker_resources)},
        )  # fmt: skip
        await stack.enter_async_context(workers)

        yield Backend(pool, learner, workers.player, _Parts(pool, workers, workers.places))


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of a run whose numbers can change, as ``trainer.backend.Elastic`` promises."""

    pool: RemotePool
    workers: RolloutWorkers
    places: int

    async def set_replicas(self, n: int) -> None:
        await self.pool.resize(n)

    async def set_rollout_workers(self, n: int) -> None:
        await self.workers.resize(n)


def _episodes(config: TrainConfig) -> int:
    """Return the largest number of episodes that play at once.

    Training plays ``rollout.concurrency`` of them. An evaluation fills every engine's batch.
    """
    return max(config.rollout.concurrency, config.engine.max_batch * config.engine.replicas)


def _reserved(config: TrainConfig) -> float | None:
    """Return the CPUs that a private Ray is said to have, a whole number.

    None stands for a joined Ray, which has its own.
    """
    c = config.cluster
    if c.address:
        return None
    asked = c.engine_cpus * config.engine.replicas + c.learner_cpus + c.worker_cpus * c.rollout_workers
    return max(float(math.ceil(asked)), float(available_cores()))


def _declared(config: TrainConfig) -> dict[str, float]:
    """Return the other resources that a private Ray is said to have, which is all that is asked for."""
    c, total = config.cluster, dict[str, float]()
    for asked, times in ((c.engine_resources, config.engine.replicas), (c.worker_resources, c.rollout_workers)):
        for name, amount in asked.items():
            total[name] = total.get(name, 0.0) + amount * times
    return total


def _pool_settings(config: TrainConfig, model: Path, resumed_at: int) -> PoolSettings:
    c = config.cluster
    return PoolSettings(
        engine_spec_of(config, model, threads=max(1, int(c.engine_cpus))),
        config.engine.replicas,
        resources=Resources(c.engine_cpus, c.engine_gpus, c.engine_resources),
        seed=config.seed,
        salt=salt(resumed_at),
        supervised=supervision(config.engine),
    )


def _transport(config: TrainConfig, joined: Cluster) -> Transport:
    """Return the transport of the weights, and choose one where the setting is ``auto``.

    On a cluster of one node it chooses shared memory. On a larger one it chooses a broadcast where learner and engines
    compute on GPUs, else files.
    """
    if config.engine.transport != "auto":
        return config.engine.transport
    if joined.private or sum(bool(node["Alive"]) for node in ray.nodes()) == 1:
        return "shm"
    gpus = config.cluster.learner_gpus and config.cluster.engine_gpus and config.learner.device != "cpu"
    return "nccl" if gpus and engine_kind(config.engine.kind).takes_gpus else "disk"
