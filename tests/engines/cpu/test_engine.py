"""``TransformersEngine`` end to end: what it samples, for whom and when."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engine import Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.errors import ConfigError, EngineError
from areal_agents.types import Completion, Image, Prompt
from tests.served import Served, ask, assert_logprobs, ids_of
from tests.tiny_models import VOCABULARY, forward_logprobs, tiny_model


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    it = Served(tiny_model(), tmp_path_factory.mktemp("llama"))
    yield it
    it.close()


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    it = Served(tiny_model("qwen3", tie_word_embeddings=True), tmp_path_factory.mktemp("qwen3"))
    yield it
    it.close()


@pytest.mark.parametrize("which", ["served", "tied"])
def test_logprobs_over_turns_equal_a_full_forward_pass(which: str, request: pytest.FixtureRequest) -> None:
    """Three turns with the KV kept between them, at three temperatures."""
    it: Served = request.getfixturevalue(which)

    async def work() -> None:
        ids = ids_of(70, 1)
        for turn, temperature in enumerate((1.0, 0.7, 1.5)):
            done = await ask(it.engine, ids, 12, "turns", temperature=temperature, seed=turn)
            assert len(done.ids) == 12
            assert done.finish == "length"
            assert_logprobs(it.model, ids, done, temperature)
            ids = ids + done.ids + ids_of(5, turn)
        health = await it.engine.health()
        assert health.ok
        assert health.running == 0
        assert health.kv_tokens >= len(ids) - 6
        await it.engine.release("turns")
        assert (await it.engine.health()).kv_tokens <= health.kv_tokens - (len(ids) - 6)

    it.run(work())


def test_greedy_is_the_argmax_with_temperature_one_logprobs(served: Served) -> None:
    async def work() -> None:
        ids = ids_of(20, 2)
        done = await ask(served.engine, ids, 15, "greedy", temperature=0.0)
        assert_logprobs(served.model, ids, done)
        with torch.no_grad():
            logits = served.model(torch.tensor([ids + done.ids])).logits[0, len(ids) - 1 : -1]
        top = logits.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > 1e-4
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(done.ids)[clear])

    served.run(work())


def test_continuous_batching_equals_one_by_one(served: Served) -> None:
    """Greedy, fp32, 24 requests with random lengths arriving at random moments, twice as many as fit the batch."""

    async def work() -> None:
        rng = random.Random(7)
        jobs = [(ids_of(rng.randint(1, 90), 100 + i), rng.randint(1, 40)) for i in range(24)]
        alone = [await ask(served.engine, ids, n, f"alone{i}", temperature=0.0) for i, (ids, n) in enumerate(jobs)]

        async def later(i: int) -> Completion:
            for _ in range(rng.randint(0, 30)):
                await served.engine.health()  # a round trip: spreads arrivals over decode steps
            return await ask(served.engine, *jobs[i], f"crowd{i}", temperature=0.0)

        crowd = await asyncio.gather(*[later(i) for i in range(len(jobs))])
        for (ids, _), one, other in zip(jobs, alone, crowd, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=True)) if a != b), len(one.ids))
            if same < len(one.ids):  # only a tie may differ
                with torch.no_grad():
                    top = served.model(torch.tensor([ids + one.ids[:same]])).logits[0, -1].topk(2).values
                assert float(top[0] - top[1]) < 1e-4
            torch.testing.assert_close(
                torch.tensor(one.logprobs[:same]), torch.tensor(other.logprobs[:same]), atol=1e-4, rtol=0
            )

    served.run(work())


def test_a_short_request_overtakes_a_long_one(served: Served) -> None:
    async def work() -> None:
        order: list[str] = []

        async def run(name: str, tokens: int) -> None:
            await ask(served.engine, ids_of(9, tokens), tokens, name)
            order.append(name)

        long = asyncio.create_task(run("long", 240))
        while (await served.engine.health()).running == 0:
            pass
        await run("short", 2)
        await long
        assert order == ["short", "long"]

    served.run(work())


def test_a_group_with_one_prompt(served: Served) -> None:
    """Eight requests share their prompt's KV; each has its own tokens and exact log-probabilities."""

    async def work() -> None:
        ids = ids_of(60, 5)
        group = await asyncio.gather(*[ask(served.engine, ids, 10, f"g{i}") for i in range(8)])
        assert len({done.ids for done in group}) > 1
        for done in group:
            assert_logprobs(served.model, ids, done)

    served.run(work())


def test_seeded_requests_repeat(served: Served) -> None:
    async def work() -> None:
        ids = ids_of(10, 6)
        one, two = [await ask(served.engine, ids, 20, f"seed{i}", seed=9) for i in range(2)]
        other = await ask(served.engine, ids, 20, "seed2", seed=10)
        assert one.ids == two.ids != other.ids

    served.run(work())


def test_stop_ids_and_limits(served: Served) -> None:
    async def work() -> None:
        ids = ids_of(20, 8)
        free = await ask(served.engine, ids, 20, "free", temperature=0.0)
        stop = free.ids[6]
        first = free.ids.index(stop)
        done = await ask(served.engine, ids, 20, "stop", temperature=0.0, stop_ids=(stop,))
        assert done.ids == free.ids[: first + 1]
        assert done.finish == "stop"
        assert free.finish == "length"
        # 250 of 256 positions are taken: 6 tokens are left
        full = await ask(served.engine, ids_of(250, 9), 20, "full")
        assert (len(full.ids), full.finish) == (6, "length")
        with pytest.raises(EngineError, match="256 tokens and max_context is 256"):
            await ask(served.engine, ids_of(256, 9), 1, "over")
        with pytest.raises(EngineError, match=r"prompt ids range over 0..96, the model's over 0..95"):
            await ask(served.engine, (0, VOCABULARY), 1, "vocabulary")
        with pytest.raises(EngineError, match="images"):
            await served.engine.generate(Prompt((1,), (Image("x"),)), Sampling(1), session="image", deadline=5)

    served.run(work())


def test_filters_apply_and_logprobs_are_of_the_filtered_distribution(served: Served) -> None:
    async def work() -> None:
        ids = ids_of(12, 10)
        done = await ask(served.engine, ids, 8, "top_k", top_k=3)
        with torch.no_grad():
            logits = served.model(torch.tensor([ids + done.ids])).logits[0, len(ids) - 1 : -1]
        for row, token, logprob in zip(logits, done.ids, done.logprobs, strict=True):
            top = row.topk(3)
            assert token in top.indices.tolist()
            want = row[token] - torch.logsumexp(top.values, -1)
            assert logprob == pytest.approx(float(want), abs=1e-4)

    served.run(work())


def test_cancelling_frees_the_kv(served: Served) -> None:
    async def work() -> None:
        before = (await served.engine.health()).kv_tokens
        task = asyncio.create_task(ask(served.engine, ids_of(50, 11), 200, "cancelled"))
        while (await served.engine.health()).kv_tokens <= before:
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        health = await served.engine.health()
        assert (health.running, health.waiting) == (0, 0)
        assert health.kv_tokens <= before
        await ask(served.engine, ids_of(5, 11), 2, "cancelled")  # the session is free again

    served.run(work())


def test_a_deadline_raises_and_frees(served: Served) -> None:
    async def work() -> None:
        with pytest.raises(EngineError, match=r"no completion of session 'late' within 0.02 s"):
            await ask(served.engine, ids_of(50, 12), 200, "late", deadline=0.02)
        health = await served.engine.health()
        assert (health.running, health.waiting) == (0, 0)

    served.run(work())


def test_threads_change_between_steps(served: Served) -> None:
    async def work() -> None:
        await served.engine.set_threads(2)
        done = await ask(served.engine, ids_of(9, 20), 5, "threads")
        assert_logprobs(served.model, ids_of(9, 20), done)
        await served.engine.set_threads(1)
        with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
            await served.engine.set_threads(0)

    served.run(work())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "mean", "worst"), [("fp32", 3e-5, 1e-4), ("bf16", 0.08, 1.0)])
def test_the_embedded_model(smollm2: Path, precision: Any, mean: float, worst: float) -> None:
    """|Δ logprob| to a full fp32 forward pass over two turns; bf16 rounds weights' products and logits."""
    import transformers

    async def work() -> list[tuple[tuple[int, ...], Completion]]:
        ids, turns = tuple(range(100, 190)), []
        async with await TransformersEngine.start(smollm2, precision=precision, max_batch=2, max_context=512) as engine:
            for turn in range(2):
                done = await ask(engine, ids, 24, "s", seed=turn)
                turns.append((ids, done))
                ids = ids + done.ids + (5, 6, 7)
        return turns

    turns = asyncio.run(work())
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for prompt, done in turns:
        want = forward_logprobs(model, prompt + done.ids)[len(prompt) - 1 :]
        difference = (torch.tensor(done.logprobs) - want).abs()
        assert float(difference.mean()) < mean
        assert float(difference.max()) < worst
