"""A run on one machine.

Its engines are processes of their own. The learner and the episodes are in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from areal_agents.engine import Transport
from areal_agents.engines.local import engine_threads, open_engines, threads_of
from areal_agents.engines.pool.pool import EnginePool
from areal_agents.learner.learner import TorchLearner
from areal_agents.registry import EnvSpec
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.backend import (
    Backend,
    Event,
    engine_spec_of,
    engines_text,
    learner_settings,
    receivers,
    salt,
)
from areal_agents.utils.openmp import warn_where_threads_spin


@contextlib.asynccontextmanager
async def open_local(
    config: TrainConfig, spec: EnvSpec, model: Path, *, event: Event, resumed_at: int
) -> AsyncIterator[Backend]:
    """Open everything on this machine, and end it in reverse.

    Raises what the parts raise.

    Args:
        config: the settings.
        spec: not used here, since the caller has proved the environment's sandbox.
        model: the model's folder.
        event: is told of lost and restarted engines.
        resumed_at: the step that the run goes on from, 0 for a new run. A resumed run's engines must not draw the
            random numbers of its first life.
    """
    warn_where_threads_spin()
    # Both have all cores: threads that wait do not spin (utils/openmp.py), so nothing is gained by dividing them.
    spec_of_one = await asyncio.to_thread(engine_spec_of, config, model, threads=engine_threads(config.engine))
    async with contextlib.AsyncExitStack() as stack:
        event("starting", part=engines_text(config))
        engine = await stack.enter_async_context(
            open_engines(config.engine, spec_of_one, seed=config.seed, salt=salt(resumed_at), event=event)
        )
        # `auto` is shared memory: engines and learner are on this machine.
        transport: Transport = "shm" if config.engine.transport == "auto" else config.engine.transport
        event("starting", part="the learner")
        learner = TorchLearner(
            model, **learner_settings(config, transport, threads=threads_of("learner.threads", config.learner.threads)),
            receivers=lambda: receivers(config, engine.replicas if isinstance(engine, EnginePool) else 1),
        )  # fmt: skip
        stack.push_async_callback(learner.close)
        yield Backend(engine, learner)
