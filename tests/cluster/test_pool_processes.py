"""``EnginePool`` around real workers, without Ray; here because of the time it takes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from areal_agents.engine import Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.types import Completion, Prompt
from areal_agents.weights.shared_memory import SharedWeights
from tests.served import assert_logprobs, ids_of
from tests.tiny_models import save_tiny, tiny_model

pytestmark = pytest.mark.ray


def test_two_real_workers_serve_the_same_weights_and_outlive_each_other(tmp_path: Path) -> None:
    folder, events = save_tiny(tmp_path / "model", tiny_model()), []
    workers: list[TransformersEngine] = []

    async def start(index: int) -> Restartable:
        workers.append(
            await TransformersEngine.start(folder, precision="fp32", max_batch=2, max_context=256, seed=len(workers))
        )
        return workers[-1]

    async def work() -> None:
        model = tiny_model(seed=7)
        state = {name: p.detach() for name, p in model.named_parameters()}
        shared = SharedWeights(state, torch.float32)

        def ask(i: int, tokens: int = 30) -> asyncio.Task[Completion]:
            asked = pool.generate(Prompt(ids_of(9 + i, i)), Sampling(tokens), session=f"s{i}", deadline=50)
            return asyncio.create_task(asked)

        told: Callable[..., None] = lambda kind, **fields: events.append(kind)  # noqa: E731
        async with EnginePool(start, replicas=2, event=told, health_interval=0.05) as pool:
            assert (await pool.update_weights(shared.fill(state, 1))).version == 1
            pending = [ask(i, 200) for i in range(4)]
            while not all([(await w.health()).running == 2 for w in workers[:2]]):
                pass
            os.kill(workers[0].pid, signal.SIGKILL)
            for i, done in enumerate(await asyncio.gather(*pending)):
                assert done.versions == (1,) * 200
                assert_logprobs(model, ids_of(9 + i, i), done)
            assert events.count("request_retried") == 2
        shared.close()

    asyncio.run(asyncio.wait_for(work(), 60))
