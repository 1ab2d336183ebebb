"""A run on one machine: its engines are processes; the learner and the episodes are in this one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch

from areal_agents.engine import Transport
from areal_agents.engine_kind import engine_kind
from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.engines.spec import EngineSpec, process_seed
from areal_agents.errors import ConfigError
from areal_agents.learner.learner import TorchLearner
from areal_agents.registry import EnvSpec
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.backend import (
    Backend,
    Event,
    RunEngine,
    engine_spec,
    learner_settings,
    receivers,
    salt,
    supervision,
)
from areal_agents.trainer.threads import split_cores


@contextlib.asynccontextmanager
async def open_local(
    config: TrainConfig, spec: EnvSpec, model: Path, *, event: Event, resumed_at: int
) -> AsyncIterator[Backend]:
    """Everything on this machine; ended in reverse. Raises what the parts raise.

    spec: not used here: the caller has proved the environment's sandbox.
    resumed_at: the step that the run goes on from: its engines must not draw the random numbers of its first life.
    """
    replicas = config.engine.replicas
    kind = engine_kind(config.engine.kind)
    if kind.takes_gpus and replicas > 1 and torch.cuda.is_available():
        raise ConfigError(
            f"engine.replicas = {replicas} {config.engine.kind} engines would all take the first GPU: set "
            "cluster.backend = 'ray' and cluster.engine_gpus, which gives each its own"
        )
    cores = split_cores(config.engine.threads, config.learner.threads, replicas=replicas)
    # An engine that keeps its threads never gets the learner's.
    threads = cores.engine if kind.fixed_threads else cores.engine_alone
    spec_of_one = await asyncio.to_thread(engine_spec, config, model, threads=threads)
    start = _starter(config, spec_of_one, salt(resumed_at))
    supervised = supervision(config)
    async with contextlib.AsyncExitStack() as stack:
        if replicas == 1:
            one = SupervisedEngine(lambda: start(0), event=event, **supervised)
            engine: RunEngine = await stack.enter_async_context(one)
        else:
            pool = EnginePool(start, replicas=replicas, event=event, **supervised)
            engine = await stack.enter_async_context(pool)
        # `auto` is shared memory: engines and learner are on this machine.
        transport: Transport = "shm" if config.engine.transport == "auto" else config.engine.transport
        learner = TorchLearner(
            model, **learner_settings(config, transport, threads=cores.learner),
            receivers=lambda: receivers(config, engine.replicas if isinstance(engine, EnginePool) else 1),
        )  # fmt: skip
        stack.push_async_callback(learner.close)
        yield Backend(engine, learner, cores)


def _starter(config: TrainConfig, spec: EngineSpec, salt: str) -> Callable[[int], Any]:
    """Starts a process of a replica: each with a seed of its own."""
    processes = itertools.count()

    async def start(index: int) -> Restartable:
        return await spec.start(process_seed(config.seed, salt=salt, index=index, nth=next(processes)))

    return start
