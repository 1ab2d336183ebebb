"""``SupervisedEngine`` around real workers that are killed, stopped and refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engine import Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.errors import ConfigError, EngineError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.types import Completion, Prompt
from areal_agents.weights.shared_memory import AttachedWeights, SharedWeights
from tests.processes import MARKER, alive, marked, wait_gone, wait_marked
from tests.served import assert_logprobs, ids_of
from tests.tiny_models import save_tiny, tiny_chat_model, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), tiny_model())


@dataclass
class Rig:
    """A supervised engine, what it logged, and two buffers that are filled in turn, as the learner does."""

    folder: Path
    engine: SupervisedEngine = field(init=False)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    model: Any = field(default_factory=tiny_model)
    version: int = 0
    buffers: list[SharedWeights] = field(default_factory=list)

    async def start_one(self) -> TransformersEngine:
        return await TransformersEngine.start(
            self.folder, precision="fp32", max_batch=4, kv_tokens=1200, max_context=256, seed=len(self.events)
        )

    def log(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def of(self, kind: str) -> dict[str, Any]:
        return next(fields for k, fields in self.events if k == kind)

    @property
    def worker(self) -> TransformersEngine:
        assert isinstance(self.engine.engine, TransformersEngine)
        return self.engine.engine

    async def update(self, seed: int, before: Callable[[], None] = lambda: None) -> None:
        """Publish a model of ``seed`` as the next version; ``before`` runs between publishing and updating."""
        model = tiny_model(seed=seed)
        state = {name: p.detach() for name, p in model.named_parameters()}
        if not self.buffers:
            self.buffers = [SharedWeights(state, torch.float32) for _ in range(2)]
        ref = self.buffers[self.version % 2].fill(state, self.version + 1)
        before()
        report = await self.engine.update_weights(ref)
        assert report.version == self.version + 1
        self.model, self.version = model, self.version + 1

    def ask(self, i: int, tokens: int = 40, deadline: float = 50) -> asyncio.Task[Completion]:
        ask = self.engine.generate(Prompt(ids_of(9 + i, i)), Sampling(tokens), session=f"s{i}", deadline=deadline)
        return asyncio.create_task(ask)

    async def sampled(self, n: int) -> None:
        """Wait until the present worker has sampled ``n`` tokens."""
        start = (await self.worker.health()).sampled_tokens
        while (await self.worker.health()).sampled_tokens < start + n:
            pass

    def check(self, i: int, done: Completion, tokens: int = 40) -> None:
        """Its tokens are of the served version, with that version's log-probabilities."""
        assert done.versions == (self.version,) * tokens
        assert_logprobs(self.model, ids_of(9 + i, i), done)


@contextlib.asynccontextmanager
async def rig(folder: Path, **options: Any) -> AsyncIterator[Rig]:
    it = Rig(folder)
    given = {"hang_seconds": 3.0, "health_interval": 0.05, "max_restarts": 8} | options
    try:
        async with SupervisedEngine(it.start_one, event=it.log, **given) as it.engine:
            yield it
    finally:
        for buffer in it.buffers:
            buffer.close()


def run(work: Any, seconds: float = 100) -> None:
    asyncio.run(asyncio.wait_for(work, seconds))


def test_requests_survive_a_killed_worker_at_any_point_with_the_served_versions_numbers(folder: Path) -> None:
    async def work() -> None:
        async with rig(folder) as it:
            await it.engine.set_threads(1)
            for kill, tokens in enumerate((0, 40)):  # before a token exists, and in the middle
                await it.update(seed=30 + kill)
                pending = [it.ask(i) for i in range(4)]
                if tokens:
                    await it.sampled(tokens)
                else:
                    await asyncio.sleep(0)
                dead = it.worker.pid
                os.kill(dead, signal.SIGKILL)
                for i, done in enumerate(await asyncio.gather(*pending)):
                    it.check(i, done)
                assert not alive(dead)
                assert it.worker.pid != dead
                assert it.engine.version == kill + 1
            assert it.kinds().count("engine_lost") == it.kinds().count("engine_restarted") == 2
            assert "SIGKILL" in it.of("engine_lost")["reason"]
            assert [f["version"] for k, f in it.events if k == "engine_restarted"] == [1, 2]
            retried = [f for k, f in it.events if k == "request_retried"]
            assert {f["session"] for f in retried} == {"s0", "s1", "s2", "s3"}
            assert all(f["attempt"] == 1 for f in retried)
            # Dead while nobody asks: the next request finds out.
            os.kill(it.worker.pid, signal.SIGKILL)
            it.check(7, await it.ask(7))
            assert it.engine.max_context == 256

    run(work())


def test_a_stopped_worker_is_noticed_while_requests_are_pending(folder: Path) -> None:
    async def work() -> None:
        async with rig(folder, hang_seconds=1.5) as it:
            await it.update(seed=40)
            task, stopped = it.ask(0, 200), it.worker.pid
            await it.sampled(5)
            os.kill(stopped, signal.SIGSTOP)
            it.check(0, await task, 200)
            assert not alive(stopped)
            assert "no sign of health for 1.5 s with 1 calls" in it.of("engine_lost")["reason"]

    run(work())


def test_an_update_is_applied_though_the_worker_died_during_it(folder: Path) -> None:
    async def work() -> None:
        async with rig(folder) as it:
            await it.update(seed=50)
            requests = [it.ask(i, 200) for i in range(3)]
            await it.sampled(5)
            os.kill(it.worker.pid, signal.SIGSTOP)  # it cannot acknowledge
            update = asyncio.create_task(it.update(seed=51))
            await asyncio.sleep(0.01)
            os.kill(it.worker.pid, signal.SIGKILL)
            await update
            for i, done in enumerate(await asyncio.gather(*requests)):
                it.check(i, done, 200)  # of version 2 alone: no request was sent before its weights were back

    run(work())


def test_refused_requests_and_missed_deadlines_restart_nothing(folder: Path) -> None:
    async def work() -> None:
        async with rig(folder) as it:
            worker = it.worker.pid
            with pytest.raises(EngineError, match="the prompt has 300 tokens and max_context is 256"):
                await it.engine.generate(Prompt(ids_of(300, 0)), Sampling(5), session="long", deadline=50)
            with pytest.raises(EngineError, match="no completion of session 's0' within"):
                await it.ask(0, 240, deadline=0.001)
            with pytest.raises(ConfigError):
                await it.engine.set_threads(0)
            cancelled = it.ask(1, 240)
            await it.sampled(1)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert (await it.engine.health()).running == 0
            it.check(2, await it.ask(2))
            assert (it.worker.pid, it.events) == (worker, [])

    run(work())


def test_the_limit_of_restarts_fails_everything_with_the_last_stderr(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")

    async def work() -> None:
        async with rig(folder, max_restarts=1) as it:
            task = it.ask(0, 200)
            await it.sampled(5)
            os.kill(it.worker.pid, signal.SIGABRT)
            it.check(0, await task, 200)  # there was no update: it serves what it was started with
            task = it.ask(0, 200)
            await it.sampled(5)
            os.kill(it.worker.pid, signal.SIGABRT)
            with pytest.raises(EngineError, match=r"after 1 restarts within 600 s(.|\n)*Fatal Python error: Aborted"):
                await task
            with pytest.raises(EngineError, match="after 1 restarts"):
                await it.ask(1)
            with pytest.raises(EngineError, match="after 1 restarts"):
                await it.update(seed=60)
            health = await it.engine.health()
            assert not health.ok
            assert "after 1 restarts" in health.detail
            assert it.kinds() == ["engine_lost", "engine_restarted", "request_retried", "engine_lost"]
            assert "Fatal Python error" in it.of("engine_lost")["stderr"]

    run(work())


def test_a_model_that_cannot_be_loaded_again_is_an_error_of_every_request(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", tiny_model())

    async def work() -> None:
        async with rig(folder) as it:
            task = it.ask(0, 200)
            await it.sampled(1)
            shutil.rmtree(folder)
            os.kill(it.worker.pid, signal.SIGKILL)
            with pytest.raises(EngineError, match="the engine was not restarted"):
                await task

    run(work())


def test_requests_are_cancelled_and_the_engine_closed_in_the_middle_of_a_restart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"restart-{os.getpid()}-{folder.name}"
    monkeypatch.setenv(MARKER, mark)

    async def work() -> None:
        async with rig(folder) as it:
            dead = it.worker.pid
            assert marked(mark) == [dead]
            pending, cancelled = it.ask(0, 200), it.ask(1, 200)
            await it.sampled(5)
            os.kill(dead, signal.SIGKILL)
            assert await asyncio.to_thread(wait_marked, mark, {dead})  # the next worker's process; it is loading
            assert it.engine.engine is None
            assert not (await it.engine.health()).ok
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            late = it.ask(2, 5, deadline=0.01)
            with pytest.raises(EngineError, match="met its deadline while the engine was being restarted"):
                await late
            await it.engine.close()
            with pytest.raises(EngineError, match="the engine was closed"):
                await pending
            assert wait_gone(marked(mark), 5) == []
            assert it.kinds() == ["engine_lost"]
            await it.engine.close()
            with pytest.raises(EngineError, match="the engine was closed"):
                await it.ask(3)

    run(work())


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

    run(work())
