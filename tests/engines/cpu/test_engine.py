"""``TransformersEngine`` end to end: the contract of engines, and what is its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.errors import EngineError
from areal_agents.types import Completion
from tests.engine_suite import REQUESTS, SAMPLING, kill, turns_equal_a_forward_pass
from tests.engine_update_suite import LOADING, UPDATES
from tests.processes import alive
from tests.served import Served, ServedModel, ask, ids_of, publish, served
from tests.tiny_models import forward_logprobs, tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(ServedModel(tiny_model), tmp_path_factory.mktemp("llama")) as it:
        yield it


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    make = partial(tiny_model, "qwen3", tie_word_embeddings=True)
    with served(ServedModel(make), tmp_path_factory.mktemp("qwen3")) as it:
        yield it


EVERYTHING = REQUESTS | SAMPLING | UPDATES | LOADING
TIED = {"turns_equal_a_forward_pass": turns_equal_a_forward_pass} | UPDATES


@pytest.mark.parametrize("check", EVERYTHING)
def test_the_contract(llama: Served, check: str) -> None:
    llama.run(EVERYTHING[check](llama))


@pytest.mark.parametrize("check", TIED)
def test_the_contract_with_tied_weights(tied: Served, check: str) -> None:
    tied.run(TIED[check](tied))


def test_what_was_sent_before_a_question_is_done_when_it_is_answered(llama: Served) -> None:
    """A cancelled turn, a late one and a released session are gone at once."""

    async def work() -> None:
        before = (await llama.idle()).kv_tokens
        task = asyncio.create_task(llama.ask(ids_of(50, 11), 200, "cancelled"))
        await llama.until(lambda health: health.kv_tokens > before or task.done())
        task.cancel()
        await asyncio.wait({task})
        health = await llama.engine.health()
        assert (health.running, health.waiting) == (0, 0)
        assert health.kv_tokens <= before + 250 * (not task.cancelled())
        with pytest.raises(EngineError, match=r"no completion of session 'late' within 0.02 s"):
            await llama.ask(ids_of(50, 12), 200, "late", deadline=0.02)
        health = await llama.engine.health()
        assert (health.running, health.waiting) == (0, 0)
        await llama.ask(ids_of(50, 13), 5, "released")
        health = await llama.engine.health()
        await llama.engine.release("released")
        assert (await llama.engine.health()).kv_tokens == health.kv_tokens - 54

    llama.run(work())


def test_weights_that_are_not_finite_fail_requests_and_recover(tied: Served) -> None:
    async def work() -> None:
        good, broken = tied.model.now, tied.model.make(seed=5)
        with torch.no_grad():
            broken.model.norm.weight.fill_(float("nan"))
        shared, ref = publish(broken, tied.version + 1)
        await tied.serve(ref, broken)
        shared.close()
        with pytest.raises(EngineError, match=f"logits are not finite at version {tied.version}"):
            await tied.ask(ids_of(9, 19), 6, "nan")
        await tied.update(good)
        tied.check(ids_of(9, 19), await tied.ask(ids_of(9, 19), 6, "nan"))

    tied.run(work())


def test_a_killed_worker_fails_every_call(tied: Served) -> None:
    """The last that uses the engine: it ends it."""
    tied.run(kill(tied))


def test_a_hung_worker_meets_the_deadline_and_is_ended(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last that uses the engine: it ends it."""
    monkeypatch.setattr("areal_agents.engines.process.CLOSE_SECONDS", 0.3)

    async def work() -> None:
        os.kill(llama.engine.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="no completion"):
            await llama.ask((1, 2), 5, "hung", deadline=0.2)
        await llama.engine.close()
        assert not alive(llama.engine.pid)

    llama.run(work())


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "mean", "worst"), [("fp32", 3e-5, 1e-4), ("bf16", 0.08, 1.0)])
def test_the_embedded_model(smollm2: Path, reference: Any, precision: Any, mean: float, worst: float) -> None:
    """|Δ logprob| to a full fp32 forward pass over two turns; bf16 rounds weights' products and logits."""

    async def work() -> list[tuple[tuple[int, ...], Completion]]:
        ids, turns = tuple(range(100, 190)), []
        async with await TransformersEngine.start(smollm2, precision=precision, max_batch=2, max_context=512) as engine:
            for turn in range(2):
                done = await ask(engine, ids, 24, "s", seed=turn)
                turns.append((ids, done))
                ids = ids + done.ids + (5, 6, 7)
        return turns

    for prompt, done in asyncio.run(work()):
        want = forward_logprobs(reference, prompt + done.ids)[len(prompt) - 1 :]
        difference = (torch.tensor(done.logprobs) - want).abs()
        assert float(difference.mean()) < mean
        assert float(difference.max()) < worst
