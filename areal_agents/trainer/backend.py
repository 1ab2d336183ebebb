"""What a run computes with: engine, learner and players, on this machine or on a Ray cluster.

    cluster.backend = "local"   engines: processes of this machine · learner: this process · episodes: this process
    cluster.backend = "ray"     all of them actors (``cluster/backend.py``)

Nothing else of the trainer knows the difference.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from areal_agents.algorithms.batch import Row
from areal_agents.engine import Engine, Transport
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.replica import SupervisedSettings
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.engines.pool.supervision import Restartable, Threaded
from areal_agents.engines.spec import EngineSpec, process_seed
from areal_agents.errors import ConfigError
from areal_agents.learner.learner import Learner, Metrics, TorchLearner
from areal_agents.registry import EnvSpec
from areal_agents.rollout.player import EpisodePlayer, PlayerSpec
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.threads import Cores, split_cores
from areal_agents.utils.precision import resolve_precision

Event = Callable[..., None]


class RunEngine(Engine, Threaded, Protocol):
    """What a run needs of its engine."""


class RunLearner(Learner, Protocol):
    """What a run needs of its learner beside the steps."""

    async def sft_step(self, rows: Sequence[Row], *, lr: float) -> Metrics: ...
    async def export(self, path: Path) -> None: ...
    def set_threads(self, n: int) -> None: ...
    async def close(self) -> None: ...


class Elastic(Protocol):
    """A backend whose parts come and go while the run goes on."""

    @property
    def places(self) -> int:
        """Episodes that one rollout worker plays at once."""
        ...

    async def set_replicas(self, n: int) -> None:
        """``n`` engines from now on. Returns once they serve, or are gone. Raises EngineError."""

    async def set_rollout_workers(self, n: int) -> None:
        """``n`` rollout workers from now on. Returns once they play; removed ones end by themselves."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts of one run that may lie elsewhere."""

    engine: RunEngine
    learner: RunLearner
    cores: Cores
    players: Callable[[PlayerSpec], EpisodePlayer] | None = None
    """Makes players; None: they play in this process."""
    elastic: Elastic | None = None
    """None: the sizes are fixed."""


@contextlib.asynccontextmanager
async def open_backend(
    config: TrainConfig, spec: EnvSpec, model: Path, *, event: Event, resumed_at: int = 0
) -> AsyncIterator[Backend]:
    """Everything started; ended in reverse. Raises what the parts raise.

    spec: the environment; the workers of a cluster prove its sandbox, here the caller has.
    resumed_at: the step that the run goes on from: its engines must not draw the random numbers of its first life.
    """
    if config.cluster.backend == "ray":
        opened = importlib.import_module("areal_agents.cluster.backend").open_ray
    else:
        opened = _open_local
    async with opened(config, spec, model, event=event, resumed_at=resumed_at) as backend:
        yield backend


@contextlib.asynccontextmanager
async def _open_local(
    config: TrainConfig, spec: EnvSpec, model: Path, *, event: Event, resumed_at: int
) -> AsyncIterator[Backend]:
    replicas = config.engine.replicas
    if config.engine.kind == "vllm" and replicas > 1 and torch.cuda.is_available():
        raise ConfigError(
            f"engine.replicas = {replicas} vLLM engines would all take the first GPU: set cluster.backend = 'ray' and "
            "cluster.engine_gpus, which gives each its own"
        )
    cores = split_cores(config.engine.threads, config.learner.threads, replicas=replicas)
    # vLLM's threads stay as many as they were at its start, so it never has the learner's.
    threads = cores.engine if config.engine.kind == "vllm" else cores.engine_alone
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


def salt(resumed_at: int) -> str:
    """See ``process_seed``."""
    return str(resumed_at) if resumed_at else ""


def engine_spec(config: TrainConfig, model: Path, *, threads: int) -> EngineSpec:
    """How one engine is started."""
    e = config.engine
    options: dict[str, Any] = {
        "precision": "bf16" if engine_dtype(config) == torch.bfloat16 else "fp32",
        "max_batch": e.max_batch,
        "kv_tokens": e.kv_tokens,
        "max_context": config.model.max_context,
        "threads": threads,
    }
    if e.kind == "vllm":
        options |= {
            "gpu_memory_utilization": e.gpu_memory,
            "tensor_parallel_size": e.tensor_parallel,
        }
    else:
        options["shape"] = Shape.read(model, config.model.max_context)
    return EngineSpec(e.kind, str(model.absolute()), options)


def engine_dtype(config: TrainConfig) -> torch.dtype:
    """What the engines compute in, decided here once: their nodes may differ from this one."""
    placed = config.cluster.backend == "ray" and config.cluster.engine_gpus > 0
    gpu = config.engine.kind == "vllm" and (placed or torch.cuda.is_available())
    return resolve_precision(config.engine.precision, gpu=gpu)


def supervision(config: TrainConfig) -> SupervisedSettings:
    """``SupervisedEngine``'s numbers. vLLM loads, and on GPUs compiles, for minutes."""
    start_seconds = 900.0 if config.engine.kind == "vllm" else 300.0
    return {
        "hang_seconds": config.engine.hang_timeout,
        "start_seconds": start_seconds,
        "update_seconds": start_seconds + 300.0,  # an engine that is lost during it starts again first
    }


def receivers(config: TrainConfig, replicas: int) -> int:
    """Processes of so many live replicas that take part in a broadcast of the weights."""
    return replicas * config.engine.tensor_parallel


def learner_settings(config: TrainConfig, transport: Transport, *, threads: int) -> dict[str, Any]:
    """``TorchLearner``'s keyword arguments; picklable."""
    return {
        "learner": config.learner,
        "algorithm": config.algorithm,
        "total_steps": config.steps,
        "seed": config.seed,
        "publish_dtype": engine_dtype(config),
        "max_staleness": config.rollout.staleness if config.rollout.on_exceed == "mask" else None,
        "threads": threads,
        "transport": transport,
        "weights_dir": (config.out / "weights").absolute() if transport == "disk" else None,
    }
