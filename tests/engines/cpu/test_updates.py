"""Weight updates of a running ``TransformersEngine``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from areal_agents.errors import EngineError
from tests.served import Served, ask, assert_logprobs, ids_of
from tests.tiny_models import forward_logprobs, segmented_logprobs, tiny_model


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


def test_an_inflight_update_changes_the_label_at_the_exact_token(served: Served) -> None:
    """Tokens before it equal the old model's forward pass; the next turn, re-prefilled, equals the new one's."""

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


@pytest.mark.parametrize("kv", ["recompute", "keep"])
@pytest.mark.parametrize("mode", ["inflight", "interrupt", "drain"])
def test_every_token_has_the_probability_of_the_weights_and_kv_that_sampled_it(
    served: Served, mode: str, kv: str
) -> None:
    """Against transformers with a cache that the old weights wrote up to the token that the label names, and the
    new ones from there on: in the updated turn, and in the next one, which reuses that cache or does not."""

    async def work() -> None:
        old, new = served.model, tiny_model(seed=200 + served.engine.version)
        version = served.engine.version
        ids = ids_of(15, 300 + version)
        session = f"{mode}-{kv}"
        task = asyncio.create_task(ask(served.engine, ids, 200, session))
        while (await served.engine.health()).running == 0:
            pass
        report = await served.update(new, version + 1, mode=mode, kv=kv)
        done = await task
        switch = 200 if mode == "drain" else done.versions.index(version + 1)
        assert switch > 0
        assert (mode == "drain") == (switch == 200)
        assert done.versions == (version,) * switch + (version + 1,) * (200 - switch)
        assert report.requests_in_flight == (mode != "drain")
        # The first token of the new version comes from the new weights' pass over the last one of the old.
        seam = len(ids) + switch - 1
        turn = ids + done.ids
        first = [(old, turn[:seam]), (new, turn[seam:])]
        if mode == "interrupt":
            restarted = forward_logprobs(new, turn)[len(ids) - 1 :][switch:]
            want = torch.cat([forward_logprobs(old, turn)[len(ids) - 1 :][:switch], restarted])
        else:
            want = segmented_logprobs(first)[len(ids) - 1 :]
        torch.testing.assert_close(torch.tensor(done.logprobs), want, atol=1e-4, rtol=0)

        longer = turn + ids_of(3, 301)
        after = await ask(served.engine, longer, 8, session)
        assert after.versions == (version + 1,) * 8
        rest = longer + after.ids
        if kv == "recompute" or mode == "interrupt":
            want = forward_logprobs(new, rest)
        elif mode == "drain":
            want = segmented_logprobs([(old, turn[:-1]), (new, rest[len(turn) - 1 :])])
        else:
            want = segmented_logprobs([(old, turn[:seam]), (new, rest[seam:])])
        torch.testing.assert_close(torch.tensor(after.logprobs), want[len(longer) - 1 :], atol=1e-4, rtol=0)

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
