"""Publishing from the learner: how long a version stays, and what its probe says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents.engine import Transport, WeightsRef
from areal_agents.errors import ConfigError, EngineError
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.probe import probe_ids
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.weights.disk import DiskWeights
from areal_agents.weights.transports import WeightsBuffer, open_weights, weights_buffers
from tests.tiny_models import VOCABULARY, forward_logprobs, save_tiny, tiny_model


def make_learner(folder: Path, model: Any, transport: Transport, dtype: torch.dtype = torch.bfloat16) -> TorchLearner:
    return TorchLearner(
        save_tiny(folder / "m", model), learner=LearnerConfig(precision="bf16"), algorithm=AlgorithmConfig(),
        total_steps=10, publish_dtype=dtype, threads=1, transport=transport, weights_dir=folder / "w",
        receivers=lambda: 1, seed=5,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("transport", ["disk", "gloo"])
def test_the_learners_last_published_weights_stay_until_the_publish_after_the_next(
    tmp_path: Path, transport: Transport, tied: bool
) -> None:
    learner = make_learner(tmp_path, tiny_model(tie_word_embeddings=tied), transport, torch.float32)

    async def opened(ref: WeightsRef) -> float:
        with await asyncio.to_thread(open_weights, ref) as weights:
            assert ("lm_head.weight" in weights.tensors) is not tied
            return float(weights.tensors["model.norm.weight"][0])

    async def work() -> None:
        refs: list[WeightsRef] = []
        for version in range(4):
            with torch.no_grad():
                learner.tensors()["model.norm.weight"].fill_(float(version))
            async with learner.publish() as ref:
                refs.append(ref)
                for i in range(max(0, version - 1), version + 1):  # while the newest is being delivered
                    assert await opened(refs[i]) == i
            assert await opened(refs[-1]) == version  # and after its context closed: a late joiner
        with pytest.raises(EngineError):
            await opened(refs[-3])
        await learner.close()
        with pytest.raises(EngineError, match="gone"):
            await opened(refs[-1])

    asyncio.run(work())
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_probe_is_what_the_published_weights_say_in_fp32(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)  # it has biases
    learner = make_learner(tmp_path, model, "shm", dtype)
    before = {name: t.clone() for name, t in learner.tensors().items()}

    async def work() -> WeightsRef:
        try:
            async with learner.publish() as ref:
                with open_weights(ref) as opened:
                    model.load_state_dict(dict(opened.tensors), strict=False)
                return ref
        finally:
            await learner.close()

    unrounded = forward_logprobs(model, probe_ids(VOCABULARY, 5))
    ref = asyncio.run(work())
    assert ref.probe is not None
    assert ref.probe.ids == probe_ids(VOCABULARY, 5)
    assert len(ref.probe.ids) == 32
    found = torch.tensor(ref.probe.logprobs)
    torch.testing.assert_close(found, forward_logprobs(model, ref.probe.ids), rtol=0, atol=2e-5)
    changed = float((found - unrounded).abs().max())
    assert (changed > 1e-3) is (dtype == torch.bfloat16)
    for name, tensor in learner.tensors().items():
        assert torch.equal(tensor, before[name]), "publishing left the master weights alone"


def test_probe_ids_depend_on_the_vocabulary_and_the_seed_alone() -> None:
    assert probe_ids(1000, 1) == probe_ids(1000, 1) != probe_ids(1000, 2)
    assert 0 <= min(probe_ids(7, 0)) <= max(probe_ids(7, 0)) < 7


def test_a_buffer_that_cannot_be_made_closes_those_that_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[WeightsBuffer] = []

    def once(*args: Any) -> WeightsBuffer:
        if made:
            raise ConfigError("no second one")
        made.append(DiskWeights(*args))
        return made[0]

    monkeypatch.setattr("areal_agents.weights.disk.DiskWeights", once)
    with pytest.raises(ConfigError, match="no second one"):
        weights_buffers("disk", {"a": torch.ones(3)}, torch.float32, weights_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
