"""``TransformersEngine`` end to end: client, worker process, shared-memory weights."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from areal_agents.engine import Sampling, WeightsRef
from areal_agents.engines.transformers import TransformersEngine
from areal_agents.errors import ConfigError, EngineError, ModelError
from areal_agents.types import Completion, Image, Prompt
from areal_agents.weights import SharedWeights
from tests.tiny_models import VOCABULARY, forward_logprobs, save_tiny, tiny_model

T = TypeVar("T")
CONTEXT = 256


class Served:
    """An engine on a loop of its own, with the model it serves."""

    def __init__(self, model: Any, folder: Path, **settings: Any) -> None:
        self.model = model
        self.runner = asyncio.Runner()
        options = {"precision": "fp32", "max_batch": 4, "kv_tokens": 1200, "max_context": CONTEXT} | settings
        self.engine = self.runner.run(TransformersEngine.start(save_tiny(folder, model), **options))

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


def ids_of(n: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCABULARY), k=n))


async def ask(
    engine: TransformersEngine, ids: tuple[int, ...], tokens: int, session: str, *, deadline: float = 50, **sampling: Any
) -> Completion:
    return await engine.generate(Prompt(ids), Sampling(tokens, **sampling), session=session, deadline=deadline)


def assert_logprobs(model: Any, prompt: tuple[int, ...], done: Completion, temperature: float = 1.0) -> None:
    want = forward_logprobs(model, prompt + done.ids, temperature)[len(prompt) - 1 :]
    torch.testing.assert_close(torch.tensor(done.logprobs), want, atol=1e-4, rtol=0)


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
            await served.engine.generate(
                Prompt((1,), (Image("x"),)), Sampling(1), session="image", deadline=5
            )

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


def test_an_inflight_update_changes_the_label_at_the_exact_token(served: Served) -> None:
    """Tokens before the update equal the old model's forward pass; the next turn, re-prefilled, equals the new one's."""

    async def work() -> None:
        old, new = served.model, tiny_model(seed=21)
        start = served.engine.version
        ids = ids_of(15, 13)
        task = asyncio.create_task(ask(served.engine, ids, 200, "mixed"))
        while (await served.engine.health()).running == 0:
            pass
        report = await served.update(new, start + 1)
        assert served.engine.version == report.version == start + 1
        assert report.requests_in_flight == 1
        assert report.tokens_recomputed > 15
        done = await task
        switch = done.versions.index(start + 1)
        assert 0 < switch < 200
        assert done.versions == (start,) * switch + (start + 1,) * (200 - switch)
        want = forward_logprobs(old, ids + done.ids)[len(ids) - 1 :]
        torch.testing.assert_close(torch.tensor(done.logprobs)[:switch], want[:switch], atol=1e-4, rtol=0)
        # The first token after the switch reads the old version's KV: neither model's forward pass gives its number.
        late = torch.tensor(done.logprobs)[switch:]
        assert float((late - forward_logprobs(new, ids + done.ids)[len(ids) - 1 :][switch:]).abs().max()) > 1e-3
        assert float((late - want[switch:]).abs().max()) > 1e-3
        longer = ids + done.ids + ids_of(3, 14)
        after = await ask(served.engine, longer, 8, "mixed")
        assert set(after.versions) == {start + 1}
        assert_logprobs(new, longer, after)

    served.run(work())


def test_idle_kv_is_recomputed_or_kept(served: Served) -> None:
    async def work() -> None:
        ids = ids_of(40, 15)
        one = await ask(served.engine, ids, 5, "kept")
        longer = ids + one.ids + (1, 2, 3)
        version = served.engine.version
        new = tiny_model(seed=22)
        kept = await served.update(new, version + 1, kv="keep")
        assert kept.tokens_recomputed == 0
        two = await ask(served.engine, longer, 5, "kept")
        want = forward_logprobs(new, longer + two.ids)[len(longer) - 1 :]
        assert float((torch.tensor(two.logprobs) - want).abs().max()) > 1e-3  # it read the old version's KV
        dropped = await served.update(tiny_model(seed=23), version + 2, kv="recompute")
        assert dropped.tokens_recomputed >= len(longer)
        three = await ask(served.engine, longer, 5, "kept")
        assert_logprobs(served.model, longer, three)

    served.run(work())


@pytest.mark.parametrize("mode", ["interrupt", "drain"])
def test_interrupt_and_drain(served: Served, mode: str) -> None:
    """After an interrupt, new tokens equal the new model's forward pass; a drained request has one version."""

    async def work() -> None:
        version = served.engine.version
        ids = ids_of(15, 16)
        task = asyncio.create_task(ask(served.engine, ids, 150, mode))
        while (await served.engine.health()).running == 0:
            pass
        old = served.model
        report = await served.update(tiny_model(seed=24 + version), version + 1, mode=mode)
        done = await task
        if mode == "drain":
            assert report.requests_in_flight == 0
            assert set(done.versions) == {version}
            assert_logprobs(old, ids, done)
        else:
            switch = done.versions.index(version + 1)
            got = torch.tensor(done.logprobs)
            for model, part in ((old, slice(0, switch)), (served.model, slice(switch, None))):
                want = forward_logprobs(model, ids + done.ids)[len(ids) - 1 :]
                torch.testing.assert_close(got[part], want[part], atol=1e-4, rtol=0)

    served.run(work())


def test_gone_damaged_or_foreign_weights_keep_the_old_ones(tied: Served) -> None:
    async def work() -> None:
        version = tied.engine.version
        shared, ref = tied.publish(tiny_model("qwen3", tie_word_embeddings=True, seed=3), version + 1)
        with pytest.raises(EngineError, match="checksum"):
            await tied.engine.update_weights(replace(ref, checksum="adler32:00000000"))
        shared.close()
        with pytest.raises(EngineError, match="are gone"):
            await tied.engine.update_weights(ref)
        other, foreign = tied.publish(tiny_model("llama"), version + 1)
        with pytest.raises(EngineError, match="do not fit the served qwen3 model"):
            await tied.engine.update_weights(foreign)
        other.close()
        with pytest.raises(EngineError, match="not lora"):
            await tied.engine.update_weights(replace(ref, kind="lora"))
        assert tied.engine.version == version
        done = await ask(tied.engine, ids_of(9, 17), 6, "old weights")
        assert set(done.versions) == {version}
        assert_logprobs(tied.model, ids_of(9, 17), done)

    tied.run(work())


def test_tied_weights_are_updated(tied: Served) -> None:
    async def work() -> None:
        await tied.update(tiny_model("qwen3", tie_word_embeddings=True, seed=4), tied.engine.version + 1)
        done = await ask(tied.engine, ids_of(9, 18), 6, "new weights")
        assert_logprobs(tied.model, ids_of(9, 18), done)

    tied.run(work())


def test_weights_that_are_not_finite_fail_requests_and_recover(tied: Served) -> None:
    async def work() -> None:
        good, broken = tied.model, tiny_model("qwen3", tie_word_embeddings=True, seed=5)
        with torch.no_grad():
            broken.model.norm.weight.fill_(float("nan"))
        version = tied.engine.version
        await tied.update(broken, version + 1)
        with pytest.raises(EngineError, match=f"logits are not finite at version {version + 1}"):
            await ask(tied.engine, ids_of(9, 19), 6, "nan")
        await tied.update(good, version + 2)
        done = await ask(tied.engine, ids_of(9, 19), 6, "nan")
        assert_logprobs(good, ids_of(9, 19), done)

    tied.run(work())


def test_threads_change_between_steps(served: Served) -> None:
    async def work() -> None:
        await served.engine.set_threads(2)
        done = await ask(served.engine, ids_of(9, 20), 5, "threads")
        assert_logprobs(served.model, ids_of(9, 20), done)
        await served.engine.set_threads(1)
        with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
            await served.engine.set_threads(0)

    served.run(work())


def test_a_killed_worker_fails_every_pending_request(tmp_path: Path) -> None:
    it = Served(tiny_model(), tmp_path)

    async def work() -> None:
        tasks = [asyncio.create_task(ask(it.engine, ids_of(9, i), 240, f"k{i}")) for i in range(6)]
        while (await it.engine.health()).running == 0:
            pass
        os.kill(it.engine.pid, signal.SIGKILL)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert "exit code -9 (SIGKILL)" in str(result)
        with pytest.raises(EngineError, match="SIGKILL"):
            await ask(it.engine, (1,), 1, "later")
        health = await it.engine.health()
        assert not health.ok
        assert "SIGKILL" in health.detail
        await it.engine.release("k0")
        await it.engine.close()

    it.run(work())
    it.close()


def test_a_hung_worker_meets_the_deadline_and_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.engines.transformers._CLOSE_SECONDS", 0.3)
    it = Served(tiny_model(), tmp_path)

    async def work() -> None:
        os.kill(it.engine.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="no completion"):
            await ask(it.engine, (1, 2), 5, "hung", deadline=0.2)
        await it.engine.close()

    it.run(work())
    it.close()


_PARENT = """
import asyncio, sys
from areal_agents.engine import Sampling
from areal_agents.engines.transformers import TransformersEngine
from areal_agents.types import Prompt

async def main():
    engine = await TransformersEngine.start(sys.argv[1], precision="fp32", max_batch=2, max_context=512)
    task = asyncio.create_task(
        engine.generate(Prompt((1, 2, 3)), Sampling(500), session="busy", deadline=600)
    )
    while (await engine.health()).running == 0:
        pass
    print(engine.pid, flush=True)
    await task
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, tiny_model())
    root = Path(__file__).resolve().parents[1]
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(folder)], stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": "."}
    )
    assert parent.stdout is not None
    with parent, contextlib.ExitStack() as stack:
        stack.callback(parent.kill)
        worker = os.pidfd_open(int(parent.stdout.readline()))
        stack.callback(os.close, worker)
        parent.kill()
        ended, _, _ = select.select([worker], [], [], 20)
        assert ended == [worker]


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    import transformers

    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)

    async def work() -> None:
        with pytest.raises(ModelError, match="not 'gpt2'"):
            await TransformersEngine.start(tmp_path)
        with pytest.raises(ConfigError, match="max_batch must be at least 1"):
            await TransformersEngine.start(tmp_path, max_batch=0)

    asyncio.run(work())
