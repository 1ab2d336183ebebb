"""The learner in a real Ray actor: the same numbers as here, and a prompt end of everything when it is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ConfigError, EngineError, LearnerLost, ModelError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.settings.critic import CriticConfig
from areal_agents.settings.kl import KlConfig
from areal_agents.settings.lora import LoraConfig
from areal_agents.settings.teacher import TeacherConfig
from areal_agents.weights.shared_memory import AttachedWeights
from tests.learner.test_critic import with_targets
from tests.learner_data import make_batch
from tests.processes import wait_gone
from tests.served import SECONDS
from tests.tiny_models import save_tiny, tiny_model
from tests.tiny_tokenizer import tiny

pytest.importorskip("ray")
from areal_agents.cluster.learner_actor import RemoteLearner
from tests.cluster.conftest import RaySession

pytestmark = pytest.mark.ray

SETTINGS: dict[str, Any] = {
    "learner": LearnerConfig(lr=0.01, precision="fp32", token_budget=96, logprob_chunk=7),
    "algorithm": AlgorithmConfig(),
    "total_steps": 10,
    "publish_dtype": torch.float32,
    "threads": 1,
}
TIMINGS = {"seconds", "tokens_per_second", "memory_peak_mb"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "m", tiny_model())


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4)], ids=["all weights", "adapters"])
def test_it_learns_what_a_local_learner_learns(
    session: RaySession, model: Path, tmp_path: Path, lora: LoraConfig
) -> None:
    torch.set_num_threads(1)
    settings = SETTINGS | {"learner": SETTINGS["learner"].model_copy(update={"lora": lora})}
    batches = [make_batch(tiny_model(), version=v, seed=v) for v in range(2)]

    async def learn() -> None:
        local = TorchLearner(model, **settings)
        async with await RemoteLearner.start(model, num_cpus=0, health_interval=0.2, **settings) as remote:
            assert remote.version == 0
            assert remote.pid != os.getpid()
            a, b = [await learner.sft_step(batches[0].rows[:2], lr=0.01) for learner in (local, remote)]
            assert a.keys() == b.keys()
            assert {k: a[k] for k in a.keys() - TIMINGS} == {k: b[k] for k in b.keys() - TIMINGS}
            for batch in batches:
                here, there = [await learner.logprobs(batch) for learner in (local, remote)]
                assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))
                a, b = [await learner.step(batch) for learner in (local, remote)]
                assert {k: a[k] for k in a.keys() - TIMINGS} == {k: b[k] for k in b.keys() - TIMINGS}
                assert a["grad_norm"] > 0
                assert remote.version == local.version == batch.version + 1
                async with local.publish() as mine, remote.publish() as theirs:
                    assert (theirs.version, theirs.checksum) == (mine.version, mine.checksum)
                    with AttachedWeights(theirs) as attached:  # another process's memory, read from here
                        assert all(torch.equal(t, local.tensors()[n]) for n, t in attached.tensors.items())
            await the_files_are_the_same(local, remote, tmp_path, settings)
            await a_publication_is_given_up(remote)
            with pytest.raises(ValueError, match="version"):  # a batch of the past: refused there as here
                await remote.step(batches[0])
            with pytest.raises(ModelError, match=r"holds no learner\.pt"):
                await remote.load(tmp_path / "nowhere")
        assert wait_gone([remote.pid], 60) == []
        with pytest.raises(LearnerLost, match="the learner was closed"):
            await remote.logprobs(batches[0])
        await local.close()

    session.run(learn())


def test_its_reference_and_its_teacher_say_the_same(session: RaySession, model: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = save_tiny(tmp_path / "teacher", tiny_model(seed=7))
    tiny().save_pretrained(folder)
    kl = KlConfig(coef=0.3, place="reward", target=0.01, horizon=4)
    algorithm = AlgorithmConfig(kl=kl, teacher=TeacherConfig(model=str(folder)))
    options = SETTINGS | {"algorithm": algorithm}

    async def learn() -> None:
        local = TorchLearner(model, **options)
        async with await RemoteLearner.start(model, num_cpus=0, health_interval=0.2, **options) as remote:
            for version in range(2):
                batch = make_batch(tiny_model(), version=version, seed=version)
                here, there = [await learner.teacher(batch) for learner in (local, remote)]
                assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))
                (here, coef), (there, other) = [await learner.reference(batch) for learner in (local, remote)]
                assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))
                assert coef == other
                assert (coef == 0.3) == (version == 0), "it adapts"
                rows = (replace(r, columns={"reference": c}) for r, c in zip(batch.rows, here, strict=True))
                asked = replace(batch, rows=tuple(rows))
                a, b = [await learner.step(asked) for learner in (local, remote)]
                assert {k: a[k] for k in a.keys() - TIMINGS} == {k: b[k] for k in b.keys() - TIMINGS}
        await local.close()

    session.run(learn())


def test_its_critic_says_and_learns_the_same(session: RaySession, model: Path) -> None:
    torch.set_num_threads(1)
    algorithm = AlgorithmConfig(advantage=Choice("gae"), critic=CriticConfig(kind="own", lr=0.01, warmup_steps=1))
    options = SETTINGS | {"algorithm": algorithm}

    async def learn() -> None:
        local = TorchLearner(model, **options)
        async with await RemoteLearner.start(model, num_cpus=0, health_interval=0.2, **options) as remote:
            for version in range(2):
                batch = with_targets(make_batch(tiny_model(), version=version))
                here, there = [await learner.values(batch) for learner in (local, remote)]
                assert all(np.array_equal(x, y) for x, y in zip(here, there, strict=True))
                assert any(v.any() for v in here) == (version > 0)
                a, b = [await learner.step(batch) for learner in (local, remote)]
                assert {k: a[k] for k in a.keys() - TIMINGS} == {k: b[k] for k in b.keys() - TIMINGS}
                assert a["critic/loss"] > 0
        await local.close()

    session.run(learn())


async def a_publication_is_given_up(remote: RemoteLearner) -> None:
    async with remote.publish(), remote.publish():
        given_up = asyncio.create_task(remote.publish().__aenter__())
        await remote.logprobs(make_batch(tiny_model(), version=remote.version))
        given_up.cancel()
        await asyncio.wait({given_up})
        assert given_up.cancelled()
    for _ in range(3):  # the one that was given up holds no buffer
        async with remote.publish() as ref:
            assert ref.version == remote.version


async def the_files_are_the_same(
    local: TorchLearner, remote: RemoteLearner, folder: Path, settings: dict[str, Any]
) -> None:
    await remote.save(folder / "saved")
    await remote.export(folder / "exported")
    await local.export(folder / "mine")
    name = "model.safetensors"
    assert (folder / "exported" / name).read_bytes() == (folder / "mine" / name).read_bytes()
    again = TorchLearner(local.source, **settings)
    await again.load(folder / "saved")
    assert again.version == 2
    assert all(torch.equal(t, local.tensors()[n]) for n, t in again.tensors().items())
    await again.close()
    await remote.sft_step(make_batch(tiny_model()).rows[:2], lr=0.1)
    await remote.load(folder / "saved")
    assert remote.version == 2
    async with local.publish() as mine, remote.publish() as theirs:
        assert theirs.checksum == mine.checksum


def test_a_killed_learner_ends_every_call_at_once(session: RaySession, model: Path) -> None:
    """Two publications are out, so a third waits: a call that is pending for certain when the process is lost.

    In one of the two the engines' update is under way: its weights vanish with their learner, and that is its loss.
    """

    async def lose() -> None:
        remote = await RemoteLearner.start(model, num_cpus=0, health_interval=0.2, **SETTINGS)
        pending = asyncio.Event()

        async def update(*, lost: bool) -> None:
            async with remote.publish():
                if lost:
                    pending.set()
                    while wait_gone([remote.pid], 0):  # noqa: ASYNC110  the kernel sends no event
                        await asyncio.sleep(0.01)
                raise EngineError("no replica took the weights")

        for _ in range(3):  # the learner lives: the error is the engine's, and the buffer free again
            with pytest.raises(EngineError, match="no replica"):
                await update(lost=False)
        updating = asyncio.create_task(update(lost=True))
        await pending.wait()
        async with remote.publish():  # left without an error of its own
            third = asyncio.create_task(remote.publish().__aenter__())
            assert await remote.logprobs(make_batch(tiny_model()))  # answered while the third waits
            assert not third.done()
            os.kill(remote.pid, signal.SIGKILL)
            with pytest.raises(LearnerLost, match="that commit is whole: go on with --resume") as lost:
                await third
            assert "died" in str(lost.value)
            with pytest.raises(LearnerLost, match="go on with --resume") as lost:
                await updating
        context: BaseException | None = lost.value
        while context is not None and not isinstance(context, EngineError):
            context = context.__context__
        assert str(context) == "no replica took the weights"
        await is_over(remote)

    session.run(lose())


def test_a_stopped_learner_is_lost_too(session: RaySession, model: Path) -> None:
    async def lose() -> None:
        remote = await RemoteLearner.start(model, num_cpus=0, hang_seconds=10.0, health_interval=0.2, **SETTINGS)
        async with remote.publish(), remote.publish():
            os.kill(remote.pid, signal.SIGSTOP)
            with pytest.raises(LearnerLost, match=r"no sign of health for 10 s.*go on with --resume"):
                await remote.publish().__aenter__()
        await is_over(remote)

    session.run(lose())


async def is_over(remote: RemoteLearner) -> None:
    """Nothing can be asked of a lost learner, and it is closed without asking."""
    with pytest.raises(LearnerLost):
        await remote.step(make_batch(tiny_model()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("areal_agents.cluster.learner_actor._CLOSE_SECONDS", 2 * SECONDS)
        await remote.close()
        await remote.close()
    assert wait_gone([remote.pid], 60) == []


def test_a_call_has_a_deadline(session: RaySession, model: Path) -> None:
    async def wait() -> None:
        remote = await RemoteLearner.start(model, num_cpus=0, **SETTINGS)
        async with remote.publish(), remote.publish():
            remote._seconds = 0.5  # ``call_seconds``, which the calls before must not meet
            with pytest.raises(LearnerLost, match=r"did not answer 'publish' within 0.5 s"):
                await remote.publish().__aenter__()
        await remote.close()

    session.run(wait())


def test_a_learner_that_cannot_start_says_why(session: RaySession, tmp_path: Path) -> None:
    async def start() -> None:
        with pytest.raises(ModelError):
            await RemoteLearner.start(tmp_path / "nothing", num_cpus=0, **SETTINGS)
        asked = r"a learner that asks for 1000 CPU, 3 disk was not placed within 1 s: the cluster has 8 CPU in all"
        options = {"resources": {"disk": 3}}
        with pytest.raises(ConfigError, match=f"{asked}.*cluster.learner_cpus"):
            await RemoteLearner.start(tmp_path, num_cpus=1000, options=options, place_seconds=1.0, **SETTINGS)

    session.run(start())
