"""``VLLMEngine`` end to end: what it samples, for whom and when. The transformers engine passes the same tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from areal_agents.engine import Sampling
from areal_agents.errors import EngineError
from areal_agents.types import Image, Prompt
from tests.engines.vllm.serving import gaps
from tests.served import Served, ask, assert_logprobs, ids_of
from tests.tiny_models import VOCABULARY

pytestmark = pytest.mark.vllm


def test_logprobs_over_turns_equal_a_full_forward_pass(served: Served) -> None:
    """Three turns with the KV kept between them, at three temperatures."""

    async def work() -> None:
        ids = ids_of(70, 1)
        for turn, temperature in enumerate((1.0, 0.7, 1.5)):
            done = await ask(served.engine, ids, 12, "turns", temperature=temperature, seed=turn)
            assert (len(done.ids), done.finish, set(done.versions)) == (12, "length", {0})
            assert_logprobs(served.model, ids, done, temperature)
            ids = ids + done.ids + ids_of(5, turn)
        health = await served.engine.health()
        assert health.ok
        assert (health.running, health.waiting) == (0, 0)
        assert health.kv_tokens >= 64
        await served.engine.release("turns")
        assert (await served.engine.health()).kv_tokens <= health.kv_tokens - 64

    served.run(work())


def test_the_mismatch_to_the_forward_pass_in_fp32(
    served: Served, record_property: Callable[[str, object], None]
) -> None:
    async def work() -> None:
        prompts = [ids_of(20 + i, 50 + i) for i in range(8)]
        done = await asyncio.gather(*[ask(served.engine, ids, 100, f"m{i}") for i, ids in enumerate(prompts)])
        found = torch.cat([gaps(served.model, ids, each) for ids, each in zip(prompts, done, strict=True)])
        numbers = {"mean": found.mean(), "p99": found.quantile(0.99), "max": found.max()}
        print("fp32", record := {name: float(value) for name, value in numbers.items()})
        for name, value in record.items():
            record_property(name, value)
        assert record["max"] <= 1e-3
        assert record["mean"] <= 1e-4

    served.run(work())


def test_greedy_is_the_argmax_with_temperature_one_logprobs(served: Served) -> None:
    """Alone, and in a batch with requests that are not greedy, which takes another path through vLLM's sampler."""

    async def work() -> None:
        ids = ids_of(20, 2)
        alone = await ask(served.engine, ids, 15, "greedy", temperature=0.0)
        mixed, hot = await asyncio.gather(
            ask(served.engine, ids, 15, "mixed", temperature=0.0),
            ask(served.engine, ids, 15, "hot", temperature=1.7),
        )
        assert mixed.ids == alone.ids
        assert_logprobs(served.model, ids, alone)
        assert_logprobs(served.model, ids, mixed)
        assert_logprobs(served.model, ids, hot, 1.7)
        with torch.no_grad():
            logits = served.model(torch.tensor([ids + alone.ids])).logits[0, len(ids) - 1 : -1]
        top = logits.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > 1e-3
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(alone.ids)[clear])

    served.run(work())


def test_a_group_with_one_prompt_and_more_requests_than_the_batch(served: Served) -> None:
    async def work() -> None:
        ids = ids_of(60, 5)
        group = await asyncio.gather(*[ask(served.engine, ids, 10, f"g{i}") for i in range(12)])
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
        assert len(done.logprobs) == first + 1
        assert (done.finish, free.finish) == ("stop", "length")
        # 250 of 256 positions are taken: 6 tokens are left
        full = await ask(served.engine, ids_of(250, 9), 20, "full")
        assert (len(full.ids), full.finish) == (6, "length")
        with pytest.raises(EngineError, match="256 tokens and max_context is 256"):
            await ask(served.engine, ids_of(256, 9), 1, "over")
        with pytest.raises(EngineError, match=r"prompt ids range over 0..96, the model's over 0..95"):
            await ask(served.engine, (0, VOCABULARY), 1, "vocabulary")
        with pytest.raises(EngineError, match=r"temperature 0\.001 is below 0\.01"):
            await ask(served.engine, (0, 1), 1, "cold", temperature=0.001)
        with pytest.raises(EngineError, match="vLLM refused the request"):
            await ask(served.engine, (0, 1), 1, "refused", top_p=2.0)
        with pytest.raises(EngineError, match="images"):
            await served.engine.generate(Prompt((1,), (Image("x"),)), Sampling(1), session="image", deadline=5)
        assert served.engine.failure is None

    served.run(work())


def test_the_models_end_token_does_not_stop_unless_asked(served: Served) -> None:
    """Llama's configuration names token 2 as its end; only ``stop_ids`` ends a turn."""

    async def work() -> None:
        end = served.model.config.eos_token_id
        assert end == 2
        group = await asyncio.gather(*[ask(served.engine, ids_of(9, i), 200, f"e{i}") for i in range(8)])
        assert any(end in done.ids[:-1] for done in group)
        assert all(done.finish == "length" for done in group)

    served.run(work())


def test_filters_apply_and_logprobs_are_of_the_filtered_distribution(served: Served) -> None:
    async def work() -> None:
        ids = ids_of(12, 10)
        filters: dict[str, Any] = {"top_k": {"top_k": 3}, "top_p": {"top_p": 0.6}, "min_p": {"min_p": 0.2}}
        for name, options in filters.items():
            done = await ask(served.engine, ids, 8, name, **options)
            with torch.no_grad():
                logits = served.model(torch.tensor([ids + done.ids])).logits[0, len(ids) - 1 : -1]
            for row, token, logprob in zip(logits, done.ids, done.logprobs, strict=True):
                kept = {"top_k": top_k, "top_p": top_p, "min_p": min_p}[name](row)
                assert bool(kept[token])
                want = row[token] - torch.logsumexp(row[kept], -1)
                assert logprob == pytest.approx(float(want), abs=1e-3)

    served.run(work())


def top_k(row: torch.Tensor) -> torch.Tensor:
    return row >= row.topk(3).values[-1]


def top_p(row: torch.Tensor) -> torch.Tensor:
    ordered, index = torch.softmax(row, -1).sort(descending=True)
    kept = torch.zeros_like(row, dtype=torch.bool)
    kept[index[ordered.cumsum(-1) - ordered < 0.6]] = True
    return kept


def min_p(row: torch.Tensor) -> torch.Tensor:
    probabilities = torch.softmax(row, -1)
    return probabilities >= 0.2 * probabilities.max()


def test_cancelling_frees_the_kv(served: Served) -> None:
    """Six times the KV that there is, taken and cancelled: the last ones could not run if any of it were lost."""

    async def work() -> None:
        before, cancelled = (await served.engine.health()).kv_tokens, 0
        for i in range(15):
            tasks = [asyncio.create_task(ask(served.engine, ids_of(50, 4 * i + k), 200, f"c{k}")) for k in range(4)]
            await served.engine.health()  # answered behind the requests: they have begun
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            cancelled += sum(isinstance(result, asyncio.CancelledError) for result in results)
            while (health := await served.engine.health()).running:
                pass
            assert (health.running, health.waiting) == (0, 0)
        assert cancelled > 5  # others had finished: a tiny model needs a fraction of a second
        assert health.kv_tokens <= max(before, 2400)
        done = await asyncio.gather(*[ask(served.engine, ids_of(200, 70 + k), 50, f"c{k}") for k in range(4)])
        assert [len(each.ids) for each in done] == [50] * 4  # their sessions are free again too

    served.run(work())


def test_a_deadline_raises_and_frees(served: Served) -> None:
    async def work() -> None:
        with pytest.raises(EngineError, match=r"no completion of session 'late' within 0.05 s"):
            await ask(served.engine, ids_of(50, 12), 200, "late", deadline=0.05)
        while (await served.engine.health()).running:
            pass
        again = await ask(served.engine, ids_of(50, 12), 20, "late")  # the session is free
        assert len(again.ids) == 20

    served.run(work())
