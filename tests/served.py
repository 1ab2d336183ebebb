"""An engine under test, with the model it serves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch

from areal_agents.engine import Engine, Sampling, WeightsRef
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.types import Completion, Prompt
from areal_agents.weights.shared_memory import SharedWeights
from tests.tiny_models import VOCABULARY, forward_logprobs, save_tiny

T = TypeVar("T")
CONTEXT = 256


class Served:
    """An engine on a loop of its own, with the model it serves."""

    def __init__(self, model: Any, folder: Path, start: Any = TransformersEngine.start, **settings: Any) -> None:
        self.model = model
        self.runner = asyncio.Runner()
        options: dict[str, Any] = {
            "precision": "fp32",
            "max_batch": 4,
            "kv_tokens": 1200,
            "max_context": CONTEXT,
        } | settings
        self.engine = self.runner.run(start(save_tiny(folder, model), **options))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(work, 60))

    def publish(self, model: Any, version: int) -> tuple[SharedWeights, WeightsRef]:
        state = {name: p.detach() for name, p in model.named_parameters()}
        shared = SharedWeights(state, torch.float32)
        return shared, shared.fill(state, version)

    async def update(self, model: Any, version: int, **how: Any) -> Any:
        shared, ref = self.publish(model, version)
        try:
            report = await self.engine.update_weights(ref, **how)
        finally:
            shared.close()
        self.model = model
        return report

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()


def ids_of(n: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCABULARY), k=n))


async def ask(
    engine: Engine,
    ids: tuple[int, ...],
    tokens: int,
    session: str,
    *,
    deadline: float = 50,
    **sampling: Any,
) -> Completion:
    return await engine.generate(Prompt(ids), Sampling(tokens, **sampling), session=session, deadline=deadline)


def assert_logprobs(model: Any, prompt: tuple[int, ...], done: Completion, temperature: float = 1.0) -> None:
    want = forward_logprobs(model, prompt + done.ids, temperature)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(done.logprobs), want, atol=1e-4, rtol=0)
