"""The vLLM worker's processes: their deaths, their restarts, and weights that prove to be wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engine import Sampling
from areal_agents.engines.pool.supervised import SupervisedEngine
from areal_agents.engines.process_group_reaper import members
from areal_agents.engines.vllm.engine import VLLMEngine
from areal_agents.errors import EngineError
from areal_agents.types import Prompt
from areal_agents.weights.shared_memory import SharedWeights
from tests.engines.vllm.serving import probed, publish
from tests.served import ask, assert_logprobs, ids_of
from tests.tiny_models import save_tiny, vllm_model

pytestmark = pytest.mark.vllm
OPTIONS: dict[str, Any] = {"precision": "fp32", "max_batch": 4, "kv_tokens": 3200, "max_context": 1024}
LONG = 900
"""Tokens that take seconds to sample: what happens once they have begun, happens while they run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), vllm_model())


@dataclass
class Rig:
    """A supervised vLLM engine and what it logged."""

    folder: Path
    engine: SupervisedEngine = field(init=False)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    model: Any = field(default_factory=vllm_model)
    buffers: list[SharedWeights] = field(default_factory=list)

    async def start_one(self) -> VLLMEngine:
        return await VLLMEngine.start(self.folder, seed=len(self.events), **OPTIONS)

    def log(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    @property
    def worker(self) -> VLLMEngine:
        assert isinstance(self.engine.engine, VLLMEngine)
        return self.engine.engine

    async def update(self, seed: int, version: int) -> None:
        self.model = vllm_model(seed=seed)
        shared, ref = publish(self.model, version)
        self.buffers.append(shared)  # open until the end: a restart reads them again
        await self.engine.update_weights(probed(ref, self.model))

    def ask(self, i: int, tokens: int = LONG) -> Any:
        ask = self.engine.generate(Prompt(ids_of(9 + i, i)), Sampling(tokens), session=f"s{i}", deadline=200)
        return asyncio.create_task(ask)

    async def loses_its_requests(self, number: signal.Signals, *, version: int, reason: str) -> None:
        """EngineCore gets a signal while it samples three turns: all of them come from the engine that replaces it."""
        seen, pending, lost = len(self.events), [self.ask(i) for i in range(3)], self.worker
        await began(lost, 20)
        os.kill(child(lost, "EngineCore"), number)
        for i, done in enumerate(await asyncio.gather(*pending)):
            assert done.versions == (version,) * LONG
            assert_logprobs(self.model, ids_of(9 + i, i), done)
        kinds = self.kinds()[seen:]
        assert kinds[:2] == ["engine_lost", "engine_restarted"]
        assert reason in self.events[seen][1]["reason"]
        assert kinds.count("request_retried") == 3
        assert not members(lost.pid)


@contextlib.asynccontextmanager
async def rig(folder: Path, **options: Any) -> AsyncIterator[Rig]:
    it = Rig(folder)
    given = {"hang_seconds": 20.0, "health_interval": 0.1, "max_restarts": 8} | options
    try:
        async with SupervisedEngine(it.start_one, event=it.log, **given) as it.engine:
            yield it
    finally:
        for buffer in it.buffers:
            buffer.close()


def child(engine: VLLMEngine, name: str) -> int:
    """The process of the engine's group that vLLM calls ``name``."""
    for pid in members(engine.pid):
        if name in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"):
            return pid
    raise AssertionError(f"no {name} in the group of {engine.pid}")


async def began(engine: VLLMEngine, tokens: int) -> None:
    end = time.monotonic() + 60
    start = (await engine.health()).sampled_tokens
    while (await engine.health()).sampled_tokens < start + tokens:
        assert time.monotonic() < end


def test_dead_and_hung_engine_cores_are_replaced_with_the_weights_and_their_requests_are_repeated(folder: Path) -> None:
    """Killed while it samples, then in the middle of an update; then stopped while it samples: nobody says so, but it
    gives no sign of life. One supervised engine for all of it: each start takes half a minute.
    """

    async def work() -> None:
        async with rig(folder, hang_seconds=8.0, health_interval=0.5) as it:
            await it.update(seed=30, version=1)
            await it.loses_its_requests(signal.SIGKILL, version=1, reason="EngineCore")

            worker = it.worker
            change = asyncio.create_task(it.update(seed=31, version=2))
            while "loading" not in (await worker.health()).detail and not change.done():
                pass
            with contextlib.suppress(AssertionError, FileNotFoundError):
                os.kill(child(worker, "EngineCore"), signal.SIGKILL)
            await change
            done = await it.ask(7, tokens=20)
            assert done.versions == (2,) * 20
            assert_logprobs(it.model, ids_of(16, 7), done)
            assert it.kinds().count("engine_restarted") == 2

            await it.loses_its_requests(signal.SIGSTOP, version=2, reason="no sign of health for 8 s")

    asyncio.run(asyncio.wait_for(work(), 280))


def test_weights_that_do_not_prove_to_be_served_end_the_engine(folder: Path) -> None:
    """The probe's numbers are those of other weights: no completion of the new version ever leaves the worker.

    Before that, a core that is stopped: what asks is told in time, and it goes on when the core does.
    """

    async def work() -> None:
        engine = await VLLMEngine.start(folder, **OPTIONS)
        core = child(engine, "EngineCore")
        os.kill(core, signal.SIGSTOP)
        start = time.monotonic()
        health = await engine.health()
        assert time.monotonic() - start < 10
        assert not health.ok
        assert "EngineCore did not answer" in health.detail
        with pytest.raises(EngineError, match="no completion"):
            await engine.generate(Prompt((1, 2)), Sampling(5), session="hung", deadline=0.5)
        os.kill(core, signal.SIGCONT)
        assert (await engine.health()).ok

        prompt = Prompt(ids_of(20, 1))
        new = vllm_model(seed=7)
        shared, ref = publish(new, 1)
        wrong = probed(ref, new, off=0.002)
        running = asyncio.create_task(engine.generate(prompt, Sampling(LONG), session="running", deadline=60))
        await began(engine, 5)
        with pytest.raises(EngineError, match=r"not serve weights v1: on the probe prompt its max .* above 0\.001"):
            await engine.update_weights(wrong)
        shared.close()
        with pytest.raises(EngineError, match="does not serve weights v1"):
            await running
        assert engine.failure is not None
        assert engine.version == 0
        assert not (await engine.health()).ok
        await engine.kill()
        assert not members(engine.pid)

    asyncio.run(asyncio.wait_for(work(), 120))


_PARENT = """
import asyncio, sys
from areal_agents.engines.vllm.engine import VLLMEngine

async def main():
    engine = await VLLMEngine.start(sys.argv[1], precision="fp32", max_batch=2, max_context=256, kv_tokens=512,
                                    bind="auto")
    print(engine.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_all_processes_end_when_the_parent_is_killed(folder: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", _PARENT, str(folder)]
    environment = os.environ | {"PYTHONPATH": "."}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=environment) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        assert len(members(group)) >= 4  # the worker, its guard, EngineCore, vLLM's worker, which binds threads
        parent.kill()
    end = time.monotonic() + 20
    while members(group) and time.monotonic() < end:
        time.sleep(0.05)
    assert not members(group)


@pytest.mark.slow
def test_the_embedded_model_in_bf16(smollm2: Path) -> None:
    """|Δ log p| to transformers in fp32; an update with a probe, whose first load sets the bound for later ones."""
    import transformers

    from areal_agents.engine import WeightsProbe
    from tests.engines.vllm.serving import gaps
    from tests.tiny_models import forward_logprobs

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    rounded = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shared = SharedWeights(rounded, torch.bfloat16)
    prompt = tuple(range(100, 190))

    async def work() -> Any:
        options: dict[str, Any] = {"precision": "bf16", "max_batch": 8, "kv_tokens": 4096, "max_context": 512}
        async with await VLLMEngine.start(smollm2, **options) as engine:
            for version in (1, 2):
                ref = shared.fill(rounded, version)
                probe = WeightsProbe(prompt, tuple(forward_logprobs(model, prompt).tolist()))
                await engine.update_weights(replace(ref, probe=probe))
            asks = [engine.generate(Prompt(prompt), Sampling(64), session=f"b{i}", deadline=120) for i in range(4)]
            return await asyncio.gather(*asks)

    done = asyncio.run(asyncio.wait_for(work(), 200))
    shared.close()
    found = torch.cat([gaps(model, prompt, each) for each in done])
    print("bf16", {"mean": float(found.mean()), "p99": float(found.quantile(0.99)), "max": float(found.max())})
    assert all(each.versions == (2,) * len(each.ids) for each in done)
    assert float(found.mean()) < 0.1
    assert float(found.max()) < 1.0


def test_a_learners_weights_and_its_exported_folder_are_served(folder: Path, tmp_path: Path) -> None:
    """With long seeded prompts, which vLLM reads in several steps."""
    from areal_agents.learner.learner import TorchLearner
    from areal_agents.settings.config import AlgorithmConfig, LearnerConfig

    async def work() -> None:
        start = vllm_model(seed=61, tie_word_embeddings=True)
        learner = TorchLearner(
            save_tiny(tmp_path / "m", start), learner=LearnerConfig(precision="fp32"), algorithm=AlgorithmConfig(),
            total_steps=1, publish_dtype=torch.float32, threads=1,
        )  # fmt: skip
        try:
            await learner.export(tmp_path / "exported")
            prompt = ids_of(30, 62)
            async with await VLLMEngine.start(tmp_path / "exported", **OPTIONS) as engine:
                for version in range(2):
                    done = await engine.generate(Prompt(prompt), Sampling(20), session="s", deadline=60)
                    assert set(done.versions) == {version}
                    assert_logprobs(start, prompt, done)
                    async with learner.publish() as ref:
                        assert ref.probe is not None
                        await engine.update_weights(replace(ref, version=version + 1))
                # A seeded prompt is split when several have more tokens than a step takes, 2048; its noise stays.
                long = [ids_of(780, 63 + i) for i in range(4)]
                together = await asyncio.gather(*(ask(engine, ids, 6, f"a{i}", seed=i) for i, ids in enumerate(long)))
                alone = [await ask(engine, ids, 6, f"b{i}", seed=i) for i, ids in enumerate(long)]
                assert [each.ids for each in together] == [each.ids for each in alone]
                for ids, each in zip(long, together, strict=True):
                    assert_logprobs(start, ids, each)
        finally:
            await learner.close()

    asyncio.run(asyncio.wait_for(work(), 120))
