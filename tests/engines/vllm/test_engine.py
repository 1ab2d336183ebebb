"""``VLLMEngine`` end to end: the contract of engines, alone and supervised, what is its own, and its ends.

Two engines serve all of it, one after the other; the second one's processes are killed at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from areal_agents.engines.process_group_reaper import members
from areal_agents.errors import EngineError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.types import Completion
from tests.engine_suite import REQUESTS, SAMPLING, kill, turns_equal_a_forward_pass
from tests.engine_update_suite import LOADING, PASSED_ON, UPDATES
from tests.engines.vllm.serving import core, gaps, greedy_by_default, vllm_engines
from tests.served import ServedModel, ids_of, probed, publish
from tests.supervised import Engines, Rig
from tests.tiny_models import save_tiny, vllm_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
LONG = 900
"""Tokens that take seconds to sample: what happens once they have begun, happens while they run."""


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    model = ServedModel(vllm_model)
    it = vllm_engines(save_tiny(tmp_path_factory.mktemp("llama"), greedy_by_default(model.first)), model)
    yield it
    it.close()


EVERYTHING = REQUESTS | SAMPLING | UPDATES | LOADING


@pytest.mark.parametrize("check", EVERYTHING)
def test_the_contract(untied: Engines, check: str) -> None:
    it = untied.alone()
    it.run(EVERYTHING[check](it))
    assert it.engine.failure is None


SUPERVISED = REQUESTS | PASSED_ON


@pytest.mark.parametrize("check", SUPERVISED)
def test_the_contract_with_a_supervisor(untied: Engines, check: str) -> None:
    async def work() -> None:
        async with untied.supervised() as rig:
            await SUPERVISED[check](rig.it)
            assert rig.events == []

    untied.run(work())


def test_what_vllm_would_change_or_refuses_is_refused(untied: Engines) -> None:
    it = untied.alone()

    async def work() -> None:
        with pytest.raises(EngineError, match=r"temperature 0\.001 is below 0\.01"):
            await it.ask((0, 1), 1, "cold", temperature=0.001)
        with pytest.raises(EngineError, match="vLLM refused the request"):
            await it.ask((0, 1), 1, "refused", top_p=2.0)
        assert it.engine.failure is None

    it.run(work())


def test_the_mismatch_to_the_forward_pass_in_fp32(
    untied: Engines, record_property: Callable[[str, object], None]
) -> None:
    it = untied.alone()

    async def work() -> None:
        prompts = [ids_of(20 + i, 50 + i) for i in range(8)]
        done = await asyncio.gather(*[it.ask(ids, 100, f"m{i}") for i, ids in enumerate(prompts)])
        found = torch.cat([gaps(it.model.now, ids, each) for ids, each in zip(prompts, done, strict=True)])
        numbers = {"mean": found.mean(), "p99": found.quantile(0.99), "max": found.max()}
        print("fp32", record := {name: float(value) for name, value in numbers.items()})
        for name, value in record.items():
            record_property(name, value)
        assert record["max"] <= 1e-3
        assert record["mean"] <= 1e-4

    it.run(work())


def test_the_models_end_token_does_not_stop_unless_asked(untied: Engines) -> None:
    """Llama's configuration names token 2 as its end; only ``stop_ids`` ends a turn."""
    it = untied.alone()

    async def work() -> None:
        assert it.model.now.config.eos_token_id == 2
        while True:
            group = await asyncio.gather(*[it.ask(ids_of(9, i), 200, f"e{i}") for i in range(8)])
            assert all((done.finish, len(done.ids)) == ("length", 200) for done in group)
            if any(2 in done.ids[:-1] for done in group):
                return

    it.run(work())


def test_a_stopped_core_is_told_of_and_goes_on(untied: Engines) -> None:
    it = untied.alone()

    async def work() -> None:
        stopped = core(it.engine.pid)
        os.kill(stopped, signal.SIGSTOP)
        try:
            health = await it.until(lambda health: "EngineCore did not answer" in health.detail)
            assert not health.ok
            with pytest.raises(EngineError, match="no completion"):
                await it.ask((1, 2), 5, "hung", deadline=0.5)
        finally:
            os.kill(stopped, signal.SIGCONT)
        await it.until(lambda health: health.ok)

    it.run(work())


def test_weights_that_do_not_prove_to_be_served_end_the_engine(untied: Engines) -> None:
    """The probe's numbers are those of other weights: no completion of the new version ever leaves the worker.

    The last that uses this engine.
    """
    it = untied.alone()

    async def work() -> None:
        engine, version = it.engine, it.version
        new = it.model.make(seed=7)
        shared, ref = publish(new, version + 1)
        wrong = probed(ref, new, off=0.002)
        sampled = (await it.idle()).sampled_tokens
        running = asyncio.create_task(it.ask(ids_of(20, 1), 1900, "running"))
        await it.until(lambda health: health.sampled_tokens >= sampled + 5)
        says = rf"not serve weights v{version + 1}: on the probe prompt its max .* above 0\.001"
        with pytest.raises(EngineError, match=says):
            await engine.update_weights(wrong)
        shared.close()
        (end,) = await asyncio.gather(running, return_exceptions=True)
        if isinstance(end, Completion):  # it was quick
            assert end.versions == (version,) * 1900
        else:
            assert isinstance(end, EngineError)
            assert f"does not serve weights v{version + 1}" in str(end)
        assert engine.failure is not None
        assert engine.version == version
        assert not (await engine.health()).ok
        await engine.kill()
        assert not members(engine.pid)

    it.run(work())


# The second engine serves a folder that a learner exported, and then what the learner publishes.


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchLearner]:
    folder = save_tiny(tmp_path_factory.mktemp("qwen3"), greedy_by_default(tied_model()))
    it = TorchLearner(
        folder, learner=LearnerConfig(precision="fp32"), algorithm=AlgorithmConfig(), total_steps=1,
        publish_dtype=torch.float32, threads=1,
    )  # fmt: skip
    yield it
    asyncio.run(it.close())


tied_model = partial(vllm_model, "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tied(learner: TorchLearner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("exported")
    asyncio.run(learner.export(folder))
    it = vllm_engines(folder, ServedModel(tied_model))
    yield it
    it.close()


def test_a_learners_weights_and_its_exported_folder_are_served(tied: Engines, learner: TorchLearner) -> None:
    it = tied.alone()

    async def work() -> None:
        for version in range(2):
            assert it.version == version
            await turns_equal_a_forward_pass(it)
            async with learner.publish() as ref:
                assert ref.probe is not None
                await it.serve(replace(ref, version=version + 1), it.model.first)

    it.run(work())


def test_long_seeded_prompts_are_read_in_several_steps(tied: Engines) -> None:
    """A seeded prompt is split when several have more tokens than a step takes, 2048; its noise stays."""
    it = tied.alone()

    async def work() -> None:
        long = [ids_of(780, 63 + i) for i in range(4)]
        together = await asyncio.gather(*(it.ask(ids, 6, f"a{i}", seed=i) for i, ids in enumerate(long)))
        one_by_one = [await it.ask(ids, 6, f"b{i}", seed=i) for i, ids in enumerate(long)]
        assert [each.ids for each in together] == [each.ids for each in one_by_one]
        for ids, each in zip(long, together, strict=True):
            it.check(ids, each)

    it.run(work())


TIED = UPDATES | LOADING


@pytest.mark.parametrize("check", TIED)
def test_updates_of_tied_weights(tied: Engines, check: str) -> None:
    it = tied.alone()
    it.run(TIED[check](it))
    assert it.engine.failure is None


async def loses_its_requests(rig: Rig, number: signal.Signals, *, reason: str) -> None:
    """EngineCore gets a signal while it samples three turns: all of them come from the engine that replaces it."""
    seen, lost = len(rig.events), rig.process
    pending = [rig.ask(i, LONG) for i in range(3)]
    await rig.sampled(20)
    os.kill(stopped := core(lost.pid), signal.SIGSTOP)
    certain = rig.ask(3)
    await asyncio.sleep(0)
    os.kill(stopped, number)
    for i, done in enumerate(await asyncio.gather(*pending)):
        rig.check(i, done, LONG)
    rig.check(3, await certain)
    kinds = rig.kinds()[seen:]
    assert kinds[:2] == ["engine_lost", "engine_restarted"]
    assert reason in rig.events[seen][1]["reason"]
    retried = rig.named("request_retried")
    assert "s3" in {fields["session"] for fields in retried} <= {"s0", "s1", "s2", "s3"}
    assert not members(lost.pid)


def test_a_dead_core_is_replaced_with_the_weights_and_its_requests_are_repeated(tied: Engines) -> None:
    """Killed while it samples, then in the middle of an update."""

    async def work() -> None:
        async with tied.supervised() as rig:
            await rig.update()
            await loses_its_requests(rig, signal.SIGKILL, reason="EngineCore")

            process = rig.process
            change = asyncio.create_task(rig.update())
            while "loading" not in (await process.health()).detail and not change.done():
                pass
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.kill(core(process.pid), signal.SIGKILL)
            await change
            rig.check(7, await rig.ask(7))
            assert rig.kinds().count("engine_restarted") == 2

    tied.run(work())


def test_a_stopped_core_is_replaced_too(tied: Engines) -> None:
    """Nobody says so, but it gives no sign of life."""

    async def work() -> None:
        async with tied.supervised(hang_seconds=10.0, health_interval=0.5) as rig:
            await rig.update()
            await loses_its_requests(rig, signal.SIGSTOP, reason="no sign of health for 10 s")

    tied.run(work())


def test_a_killed_worker_fails_every_call(tied: Engines) -> None:
    """The last that uses this engine."""
    it = tied.alone()
    it.run(kill(it))
    assert not members(it.engine.pid)
