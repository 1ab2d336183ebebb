"""The parts that a run computes with, which are engine, learner and players.

They are on this machine or on a Ray cluster.

    cluster.backend = "local"   engines: processes of this machine · learner, episodes: this process (``local.py``)
    cluster.backend = "ray"     all of them actors (``cluster/backend.py``)

This file has the parts, and the options of each from the settings. ``run.py`` picks by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from areal_agents.algorithms.batch import Row
from areal_agents.engine import Engine, Transport
from areal_agents.engine_kind import engine_kind
from areal_agents.engines.local import engine_spec
from areal_agents.engines.spec import EngineSpec
from areal_agents.learner.contract import Learner, Metrics
from areal_agents.registry import EnvSpec
from areal_agents.rollout.player import EpisodePlayer, PlayerSpec
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.lora import MAX_SERVED_RANK
from areal_agents.trainer.teacher import with_teacher_found
from areal_agents.utils.precision import Format, is_slow, resolve_device, resolve_precision

Event = Callable[..., None]


class RunLearner(Learner, Protocol):
    """The learner as a run needs it, for more than its steps."""

    async def sft_step(self, rows: Sequence[Row], *, lr: float) -> Metrics: ...
    async def export(self, path: Path) -> None: ...
    async def close(self) -> None: ...


class Elastic(Protocol):
    """A backend whose parts come and go while the run goes on."""

    @property
    def places(self) -> int:
        """Episodes that one rollout worker plays at once."""
        ...

    async def set_replicas(self, n: int) -> None:
        """Grow or shrink to ``n`` engines.

        Returns once they serve, or are gone. Raises EngineError.
        """

    async def set_rollout_workers(self, n: int) -> None:
        """Grow or shrink to ``n`` rollout workers.

        Returns once they play. Removed ones end by themselves.
        """


@dataclass(frozen=True, slots=True)
class Backend:
    """The parts of one run that may lie elsewhere."""

    engine: Engine
    learner: RunLearner
    players: Callable[[PlayerSpec], EpisodePlayer] | None = None
    """Makes players. None: they play in this process."""
    elastic: Elastic | None = None
    """None: the sizes are fixed."""


class OpenBackend(Protocol):
    """A function that opens a backend, which ``local.open_local`` and ``cluster.backend.open_ray`` are."""

    def __call__(
        self, config: TrainConfig, spec: EnvSpec, model: Path, *, event: Event, resumed_at: int
    ) -> contextlib.AbstractAsyncContextManager[Backend]: ...


def salt(resumed_at: int) -> str:
    """Return the ``salt`` of ``process_seed`` for a run that goes on from step ``resumed_at``."""
    return str(resumed_at) if resumed_at else ""


def engines_text(config: TrainConfig) -> str:
    """Write what the engines of a run are, as ``2 vllm engines``."""
    n = config.engine.replicas
    return f"{n} {config.engine.kind} engine{'s' if n > 1 else ''}"


def engine_spec_of(config: TrainConfig, model: Path, *, threads: int) -> EngineSpec:
    """Return how one engine of a run is started."""
    number: Format = "bf16" if engine_dtype(config) == torch.bfloat16 else "fp32"
    spec = engine_spec(
        config.engine, model, max_context=config.model.max_context, threads=threads, format=number,
        on_gpu=_on_gpu(config),
    )  # fmt: skip
    if not publishes_adapters(config):
        return spec
    lora = config.learner.lora
    return replace(spec, options={**spec.options, "lora_rank": lora.rank, "lora_targets": lora.targets})


def _on_gpu(config: TrainConfig) -> bool:
    placed = config.cluster.backend == "ray" and config.cluster.engine_gpus > 0
    return engine_kind(config.engine.kind).takes_gpus and (placed or torch.cuda.is_available())


def publishes_adapters(config: TrainConfig) -> bool:
    """Say whether the engines get the adapters of ``learner.lora`` alone, and not whole weights."""
    lora = config.learner.lora
    if lora.publish == "auto":
        return config.engine.kind == "vllm" and _on_gpu(config) and 0 < lora.rank <= MAX_SERVED_RANK
    return lora.publish == "adapter"


def engine_dtype(config: TrainConfig) -> torch.dtype:
    """Return the number format that the engines compute in.

    It is decided here, once, since their nodes may differ from this one.
    """
    return resolve_precision(config.engine.precision, gpu=_on_gpu(config))


def slow_formats(config: TrainConfig) -> list[str]:
    """Name the settings that ask for a number format which the processor computes in software.

    It is this machine's processor that is looked at, as for the engines' ``auto``. On Ray the learner's node, which is
    another one perhaps, says nothing.
    """
    asked = {"engine.precision": is_slow(config.engine.precision, gpu=_on_gpu(config))}
    if config.cluster.backend == "local":
        on_gpu = resolve_device(config.learner.device).type == "cuda"
        asked["learner.precision"] = is_slow(config.learner.precision, gpu=on_gpu)
    return [name for name, slow in asked.items() if slow]


def receivers(config: TrainConfig, replicas: int) -> int:
    """Return how many processes of ``replicas`` live engines take part in a broadcast of the weights."""
    return replicas * config.engine.tensor_parallel


def learner_settings(config: TrainConfig, transport: Transport, *, threads: int) -> dict[str, Any]:
    """Return ``TorchLearner``'s keyword arguments, which can be pickled."""
    return {
        "learner": config.learner,
        "algorithm": with_teacher_found(config.algorithm),
        "total_steps": config.steps,
        "seed": config.seed,
        "publish_dtype": engine_dtype(config),
        "publish_adapters": publishes_adapters(config),
        "max_staleness": config.rollout.staleness if config.rollout.on_exceed == "mask" else None,
        "threads": threads,
        "transport": transport,
        "weights_dir": (config.out / "weights").absolute() if transport == "disk" else None,
    }
