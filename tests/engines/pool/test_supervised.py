"""``SupervisedEngine`` and a pool around real workers: the contract of engines, and workers killed and stopped."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engines.pool.pool import EnginePool
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.errors import EngineError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.weights.shared_memory import AttachedWeights
from tests.engine_suite import REQUESTS
from tests.engine_update_suite import UPDATES
from tests.processes import MARKER, alive, marked, wait_gone, wait_marked
from tests.served import SECONDS, ServedModel, ask, assert_logprobs, ids_of, publish
from tests.supervised import Engines, Reused, ReusedTransformers
from tests.tiny_models import save_tiny, tiny_chat_model, tiny_model

MARK = f"supervised-{os.getpid()}"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARKER, MARK)
        patch.setenv("PYTHONFAULTHANDLER", "1")
        model = ServedModel(tiny_model)
        it = Engines(ReusedTransformers.start, save_tiny(tmp_path_factory.mktemp("model"), model.first), model)
        yield it
        it.close()
    assert marked(MARK) == []


CONTRACT = REQUESTS | UPDATES


@pytest.mark.parametrize("check", CONTRACT)
def test_the_contract_without_a_restart(engines: Engines, check: str) -> None:
    async def work() -> None:
        async with engines.supervised() as rig:
            process = rig.process
            closed = process.closed
            await CONTRACT[check](rig.it)
            assert (rig.process, rig.events) == (process, [])
        assert process.closed == closed + 1

    engines.run(work())


def test_requests_survive_a_killed_worker_at_any_point_with_the_served_versions_numbers(engines: Engines) -> None:
    async def work() -> None:
        async with engines.supervised() as rig:
            first = rig.it.version
            for n, tokens in enumerate((0, 40)):  # before a token exists, and in the middle
                await rig.update()
                dead = rig.process.pid
                if not tokens:
                    os.kill(dead, signal.SIGSTOP)
                pending = [rig.ask(i, 200) for i in range(4)]
                await (rig.sampled(tokens) if tokens else asyncio.sleep(0))
                os.kill(dead, signal.SIGKILL)
                for i, done in enumerate(await asyncio.gather(*pending)):
                    rig.check(i, done, 200)
                assert not alive(dead)
                assert rig.process.pid != dead
                assert rig.it.version == first + n + 1
            assert rig.kinds().count("engine_lost") == rig.kinds().count("engine_restarted") == 2
            assert "SIGKILL" in rig.named("engine_lost")[0]["reason"]
            assert [fields["version"] for fields in rig.named("engine_restarted")] == [first + 1, first + 2]
            retried = rig.named("request_retried")
            assert {fields["session"] for fields in retried} == {"s0", "s1", "s2", "s3"}
            assert all(fields["attempt"] == 1 for fields in retried)
            # Dead while nobody asks: the next request finds out.
            os.kill(rig.process.pid, signal.SIGKILL)
            rig.check(7, await rig.ask(7))
            assert rig.it.engine.max_context == rig.it.context

    engines.run(work())


def test_a_stopped_worker_is_noticed_while_requests_are_pending(engines: Engines) -> None:
    async def work() -> None:
        async with engines.supervised(hang_seconds=3.0) as rig:
            await rig.update()
            stopped = rig.process.pid
            os.kill(stopped, signal.SIGSTOP)
            rig.check(0, await rig.ask(0, 200), 200)
            assert not alive(stopped)
            assert "no sign of health for 3 s with 1 calls" in rig.named("engine_lost")[0]["reason"]

    engines.run(work())


def test_an_update_is_applied_though_the_worker_died_during_it(engines: Engines) -> None:
    async def work() -> None:
        async with engines.supervised() as rig:
            await rig.update()
            pid, requests = rig.process.pid, [rig.ask(i, 200) for i in range(3)]
            await rig.sampled(5)
            os.kill(pid, signal.SIGSTOP)  # it cannot acknowledge
            old, version = rig.it.model.now, rig.it.version
            update = asyncio.create_task(rig.update())
            for _ in range(20):
                await asyncio.sleep(0)  # it is sent
            os.kill(pid, signal.SIGKILL)
            await update
            for i, done in enumerate(await asyncio.gather(*requests)):
                if done.versions == (version,) * 200:  # it had ended before the worker was stopped
                    assert_logprobs(old, ids_of(9 + i, i), done)
                else:  # no request was sent before the new version's weights were there
                    rig.check(i, done, 200)

    engines.run(work())


def test_the_limit_of_restarts_fails_everything_with_the_last_stderr(engines: Engines) -> None:
    async def work() -> None:
        async with engines.supervised(max_restarts=1) as rig:
            for n in range(2):
                pid = rig.process.pid
                os.kill(pid, signal.SIGSTOP)
                task = rig.ask(0, 200)
                await asyncio.sleep(0)
                os.kill(pid, signal.SIGABRT)
                os.kill(pid, signal.SIGCONT)
                if n:
                    with pytest.raises(EngineError, match=LIMIT):
                        await task
                else:
                    done = await task
                    rig.it.model.now = rig.it.model.first  # there was no update: it serves what it was started with
                    rig.check(0, done, 200)
            with pytest.raises(EngineError, match="after 1 restarts"):
                await rig.ask(1)
            with pytest.raises(EngineError, match="after 1 restarts"):
                await rig.update()
            health = await rig.it.engine.health()
            assert not health.ok
            assert "after 1 restarts" in health.detail
            assert rig.kinds() == ["engine_lost", "engine_restarted", "request_retried", "engine_lost"]
            assert "Fatal Python error" in rig.named("engine_lost")[0]["stderr"]

    engines.run(work())


LIMIT = r"after 1 restarts within 600 s(.|\n)*Fatal Python error: Aborted"


def test_a_model_that_cannot_be_loaded_again_is_an_error_of_every_request(engines: Engines) -> None:
    async def work() -> None:
        async with engines.supervised() as rig:
            pid = rig.process.pid
            os.kill(pid, signal.SIGSTOP)
            task = rig.ask(0, 200)
            await asyncio.sleep(0)
            away = engines.folder.rename(engines.folder.with_suffix(".away"))
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineError, match="the engine was not restarted"):
                await task
            away.rename(engines.folder)

    engines.run(work())


def test_requests_are_cancelled_and_the_engine_closed_in_the_middle_of_a_restart(engines: Engines) -> None:
    async def work() -> None:
        async with engines.supervised() as rig:
            dead = rig.process.pid
            assert marked(MARK) == [dead]
            os.kill(dead, signal.SIGSTOP)
            pending, cancelled = rig.ask(0, 200), rig.ask(1, 200)
            await asyncio.sleep(0)
            os.kill(dead, signal.SIGKILL)
            await asyncio.to_thread(stop_next, dead)  # the next worker, so that it goes on starting
            assert rig.it.engine.engine is None
            assert not (await rig.it.engine.health()).ok
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            with pytest.raises(EngineError, match="met its deadline while the engine was being restarted"):
                await rig.ask(2, 5, deadline=0.01)
            await rig.it.engine.close()
            with pytest.raises(EngineError, match="the engine was closed"):
                await pending
            assert wait_gone(marked(MARK), 60) == []
            assert rig.kinds() == ["engine_lost"]
            await rig.it.engine.close()
            with pytest.raises(EngineError, match="the engine was closed"):
                await rig.ask(3)

    engines.run(work())


def stop_next(dead: int) -> None:
    """Stop the process that is started in the place of ``dead``."""
    found = wait_marked(MARK, {dead}, SECONDS)
    assert found
    for pid in found:
        os.kill(pid, signal.SIGSTOP)


def test_a_pool_of_two_workers_serves_the_same_weights_and_outlives_one(engines: Engines) -> None:
    started: list[Reused] = []

    async def start(index: int) -> Restartable:
        started.append(await (engines.start(seed=1) if index else engines.take()))
        return started[-1]

    async def work() -> None:
        events: list[str] = []
        model = engines.model.make(seed=7)
        shared, ref = publish(model, 1)

        def event(kind: str, **fields: Any) -> None:
            events.append(kind)

        async with EnginePool(start, replicas=2, event=event, health_interval=0.05) as pool:
            assert (await pool.update_weights(ref)).version == 1
            first = engines.started[-1].pid
            os.kill(first, signal.SIGSTOP)
            pending = [asyncio.create_task(ask(pool, ids_of(9 + i, i), 200, f"s{i}")) for i in range(4)]
            await asyncio.sleep(0)
            os.kill(first, signal.SIGKILL)
            for i, done in enumerate(await asyncio.gather(*pending)):
                assert done.versions == (1,) * 200
                assert_logprobs(model, ids_of(9 + i, i), done)
            assert events.count("request_retried") == 2
        shared.close()
        await asyncio.gather(*(engine.end() for engine in started))

    engines.run(work())


def test_the_learners_last_published_weights_stay_whole_until_the_publish_after_the_next(tmp_path: Path) -> None:
    """What a restart relies on: with v acknowledged, v + 1 may be written, failed and closed without touching v."""
    learner = TorchLearner(
        tiny_chat_model(tmp_path / "m"), learner=LearnerConfig(), algorithm=AlgorithmConfig(), total_steps=10,
        publish_dtype=torch.float32, threads=1,
    )  # fmt: skip

    async def work() -> None:
        refs = []
        for version in range(5):
            with torch.no_grad():
                learner.tensors()["model.norm.weight"].fill_(float(version))
            async with learner.publish() as ref:
                refs.append(ref)
                for known in refs[-2:]:  # while the newest is being delivered
                    AttachedWeights(known)
            with AttachedWeights(refs[-1]) as attached:  # and after its context closed
                assert float(attached.tensors["model.norm.weight"].sum()) == 64.0 * version
            if version >= 2:
                with pytest.raises(EngineError, match="checksum"):
                    AttachedWeights(refs[-3])
        await learner.close()
        with pytest.raises(EngineError, match="gone"):
            AttachedWeights(refs[-1])

    asyncio.run(work())
