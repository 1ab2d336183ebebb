"""Weight updates of a running ``VLLMEngine``, of untied and tied models, proved by log-probabilities."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engine import Transport
from areal_agents.errors import EngineError
from areal_agents.types import Completion
from areal_agents.weights.transports import weights_buffers
from tests.engines.vllm.serving import BLOCK, like, probed, publish, sampling, update
from tests.served import Served, ask, assert_logprobs, ids_of
from tests.tiny_models import forward_logprobs, segmented_logprobs, vllm_model

UNTIED: dict[str, Any] = {"kind": "llama", "max_context": 2048}
TIED: dict[str, Any] = {"kind": "qwen3", "tied": True, "max_context": 2048}
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.parametrize("served", [UNTIED, TIED], indirect=True, ids=["untied", "tied"], scope="module"),
]


@pytest.mark.parametrize("kv", ["recompute", "keep"])
@pytest.mark.parametrize("mode", ["inflight", "interrupt", "drain"])
def test_every_token_has_the_probability_of_the_weights_and_kv_that_sampled_it(
    served: Served, mode: str, kv: str
) -> None:
    """Against transformers with a cache that the old weights wrote up to the token that the label names, and the
    new ones from there on: in the updated turn, and in the next one, which reuses whole blocks of that cache or none.
    """

    async def work() -> None:
        old, new = served.model, like(served, seed=200 + served.engine.version)
        version = served.engine.version
        ids = ids_of(45, 300 + version)
        session, n = f"{mode}-{kv}", 200 if mode == "drain" else 600  # long enough to be met in its middle
        task = asyncio.create_task(ask(served.engine, ids, n, session))

        async def begun() -> None:
            await sampling(served, 10)
            assert not task.done()

        report = await update(served, new, version + 1, after=begun(), mode=mode, kv=kv)
        done = await task
        assert served.engine.version == report.version == version + 1
        switch = n if mode == "drain" else done.versions.index(version + 1)
        assert switch >= 10
        assert done.versions == (version,) * switch + (version + 1,) * (n - switch)
        assert report.requests_in_flight == (mode != "drain")
        assert (report.tokens_recomputed == 0) == (kv == "keep" and mode != "interrupt")
        # The first token of the new version comes from the new weights' pass over the last one of the old.
        seam = len(ids) + switch - 1
        turn = ids + done.ids
        if mode == "interrupt":
            want = forward_logprobs(old, turn)[len(ids) - 1 :]
            want[switch:] = forward_logprobs(new, turn)[len(ids) - 1 :][switch:]
        else:
            want = segmented_logprobs([(old, turn[:seam]), (new, turn[seam:])])[len(ids) - 1 :]
        close(done.logprobs, want)
        if mode != "drain":  # a label that is off by one, or the wrong KV, would show
            other = segmented_logprobs([(old, turn[: seam + 1]), (new, turn[seam + 1 :])])[len(ids) - 1 :]
            assert float((want - other).abs()[switch]) > 1e-2

        longer = turn + ids_of(3, 301)
        after = await ask(served.engine, longer, 5, session)
        assert after.versions == (version + 1,) * 5
        rest = longer + after.ids
        reused = (len(turn) - 1) // BLOCK * BLOCK if kv == "keep" and mode != "interrupt" else 0
        cut = min(seam, reused)
        want = segmented_logprobs([(old, turn[:cut]), (new, rest[cut:])])
        close(after.logprobs, want[len(longer) - 1 :])
        if cut:
            assert float((want - forward_logprobs(new, rest))[len(longer) - 1 :].abs().max()) > 1e-2

    served.run(work())


def test_no_request_reads_kv_of_an_older_version_unless_its_policy_says_so(served: Served) -> None:
    """One prompt, cached under the old version, in requests that run, that have just begun and that wait."""

    async def work() -> None:
        old, new = served.model, like(served, seed=400 + served.engine.version)
        version = served.engine.version
        ids = ids_of(100, 17)
        await ask(served.engine, ids, 3, "first")
        running = [asyncio.create_task(ask(served.engine, ids, 400, f"r{i}")) for i in range(2)]
        late: list[asyncio.Task[Completion]] = []

        async def crowd() -> None:
            await sampling(served, 10)
            late.extend(asyncio.create_task(ask(served.engine, ids, 300, f"l{i}")) for i in range(6))

        report = await update(served, new, version + 1, after=crowd(), mode="inflight", kv="recompute")
        assert report.tokens_recomputed >= 2 * len(ids)
        assert report.requests_in_flight >= 2
        for done in await asyncio.gather(*running):
            assert_segments(old, new, ids, done)
        finished = await asyncio.gather(*late)
        for done in finished:
            assert_segments(old, new, ids, done)
        assert sum(set(done.versions) == {version + 1} for done in finished) >= 4  # these waited for the batch

    served.run(work())


def assert_segments(old: Any, new: Any, ids: tuple[int, ...], done: Completion) -> None:
    turn, switch = ids + done.ids, sum(v == done.versions[0] for v in done.versions)
    if switch == len(done.ids):
        assert_logprobs(new, ids, done)
    else:
        seam = len(ids) + switch - 1
        close(done.logprobs, segmented_logprobs([(old, turn[:seam]), (new, turn[seam:])])[len(ids) - 1 :])


def test_weights_that_are_rounded_to_bf16_on_the_way(served: Served) -> None:
    async def work() -> None:
        version = served.engine.version
        rounded = like(served, seed=500)
        with torch.no_grad():  # parameters alone: rotary frequencies are buffers, and nobody publishes them
            for parameter in rounded.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
        shared, ref = publish(rounded, version + 1, torch.bfloat16)
        await served.engine.update_weights(probed(ref, rounded))
        shared.close()
        served.model = rounded
        done = await ask(served.engine, ids_of(40, 18), 20, "rounded")
        assert_logprobs(rounded, ids_of(40, 18), done)

    served.run(work())


@pytest.mark.parametrize("transport", ["disk", "gloo"])
def test_weights_as_files_and_by_broadcast(served: Served, tmp_path: Path, transport: Transport) -> None:
    """Two updates in a row by one pair of buffers, each proved by the probe and by what is sampled afterwards."""

    async def work() -> None:
        first = dict(served.model.named_parameters())
        made = weights_buffers(transport, first, torch.float32, weights_dir=tmp_path, receivers=lambda: 1)
        try:
            for buffer in made:
                version = served.engine.version + 1
                new = like(served, seed=600 + version)
                ref = await asyncio.to_thread(buffer.fill, dict(new.named_parameters()), version)
                assert ref.transport == transport
                await served.engine.update_weights(probed(ref, new))
                served.model = new
                done = await ask(served.engine, ids_of(40, version), 20, f"{transport}-{version}")
                assert set(done.versions) == {version}
                assert_logprobs(new, ids_of(40, version), done)
        finally:
            for buffer in made:
                buffer.close()

    served.run(work())


def test_gone_damaged_or_foreign_weights_keep_the_old_ones(served: Served) -> None:
    async def work() -> None:
        version = served.engine.version
        shared, ref = publish(like(served, seed=3), version + 1)
        with pytest.raises(EngineError, match="checksum"):
            await served.engine.update_weights(replace(ref, checksum="adler32:00000000"))
        with pytest.raises(EngineError, match="2 missing"):
            await served.engine.update_weights(replace(ref, manifest=ref.manifest[2:]))
        shared.close()
        with pytest.raises(EngineError, match="are gone"):
            await served.engine.update_weights(ref)
        other, foreign = publish(vllm_model("qwen2", num_hidden_layers=2), version + 1)
        with pytest.raises(EngineError, match="do not fit the served model"):
            await served.engine.update_weights(foreign)
        other.close()
        assert served.engine.version == version
        done = await ask(served.engine, ids_of(9, 19), 6, "old weights")
        assert set(done.versions) == {version}
        assert_logprobs(served.model, ids_of(9, 19), done)

    served.run(work())


def close(logprobs: tuple[float, ...], want: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(logprobs), want, atol=2e-4, rtol=0)
