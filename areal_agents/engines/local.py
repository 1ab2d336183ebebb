"""The engines of this machine that the settings describe.

There are one or several, and each is started again when it is lost.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch

from areal_agents.engine_kind import engine_kind
from areal_agents.engines.context import fit_context
from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.replica import SupervisedSettings
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.engines.spec import EngineSpec, process_seed
from areal_agents.engines.vllm.cpu_build import require_deterministic
from areal_agents.errors import ConfigError
from areal_agents.settings.config import EngineConfig
from areal_agents.utils.packages import require_package
from areal_agents.utils.precision import Format
from areal_agents.utils.system import available_cores


def engine_spec(
    engine: EngineConfig, model: Path, *, max_context: int, threads: int, format: Format, on_gpu: bool = False
) -> EngineSpec:
    """Return how one engine is started, here or on another node.

    Args:
        engine: the settings.
        model: the model's folder.
        max_context: longest prompt plus completion, in tokens, as it was set.
        threads: cores of the engine.
        format: what it computes in. It is decided here, since the engine's node may differ from this one.
        on_gpu: whether it computes on a GPU, whose memory and not ``engine.kv_tokens`` bounds the KV.

    Raises:
        ConfigError: ``max_context`` is more than model and engine can take. See ``fit_context``.
    """
    max_context = fit_context(model, max_context, kv_tokens=None if on_gpu else engine.kv_tokens)
    options: dict[str, Any] = {
        "precision": format,
        "max_batch": engine.max_batch,
        "kv_tokens": engine.kv_tokens,
        "max_context": max_context,
        "threads": threads,
        "deterministic": engine.deterministic,
    }
    kind = engine_kind(engine.kind)
    options |= {argument: getattr(engine, setting) for setting, argument in kind.own.items()}
    options |= kind.prepare(model, max_context)
    return EngineSpec(engine.kind, str(model.absolute()), options)


def require_startable(engine: EngineConfig) -> None:
    """Raise ConfigError for what keeps engines from starting on this machine, whatever the model."""
    if engine.kind == "vllm":
        require_package("vllm", "engine.kind = 'vllm'", "set engine.kind = 'transformers'")
        if engine.deterministic:
            require_deterministic()
    engine_threads(engine)


def engine_threads(engine: EngineConfig) -> int:
    """Return the threads of each engine of this machine. Raises ConfigError for more than there are cores."""
    return max(1, threads_of("engine.threads", engine.threads) // engine.replicas)


def threads_of(setting: str, value: int) -> int:
    """Return ``value``, or for 0 every core of this process. Raises ConfigError for more than there are."""
    cores = available_cores()
    if value > cores:
        raise ConfigError(f"{setting} = {value} exceeds the {cores} cores of this process: lower it or set it to 0")
    return value or cores


def supervision(engine: EngineConfig) -> SupervisedSettings:
    """Return the time limits of ``SupervisedEngine``, in seconds."""
    start_seconds = engine_kind(engine.kind).start_seconds
    return {
        "hang_seconds": engine.hang_timeout,
        "start_seconds": start_seconds,
        "update_seconds": start_seconds + 300.0,  # an engine that is lost during it starts again first
    }


@contextlib.asynccontextmanager
async def open_engines(
    engine: EngineConfig, spec: EngineSpec, *, seed: int, salt: str = "", event: Callable[..., None]
) -> AsyncIterator[SupervisedEngine | EnginePool]:
    """Start ``engine.replicas`` engines of ``spec`` as processes of this machine, and end them.

    Args:
        engine: the settings.
        spec: how each is started.
        seed: of sampling. Every process gets one of its own.
        salt: see ``process_seed``.
        event: is told of losses and restarts.

    Raises:
        ConfigError: several engines would share this machine's first GPU.
        ModelError, EngineError: what starting raises.
    """
    if engine_kind(engine.kind).takes_gpus and engine.replicas > 1 and torch.cuda.is_available():
        raise ConfigError(
            f"engine.replicas = {engine.replicas} {engine.kind} engines would all take the first GPU: set it to 1 (a "
            "training has cluster.backend = 'ray' and cluster.engine_gpus, which gives each its own)"
        )
    processes = itertools.count()

    async def start(index: int) -> Restartable:
        return await spec.start(process_seed(seed, salt=salt, index=index, nth=next(processes)))

    settings = supervision(engine)
    if engine.replicas == 1:
        async with SupervisedEngine(lambda: start(0), event=event, **settings) as one:
            yield one
    else:
        async with EnginePool(start, replicas=engine.replicas, event=event, **settings) as pool:
            yield pool
