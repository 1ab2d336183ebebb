"""``VLLMEngine`` with adapters: the contract of updates, a learner's own adapters, and what is refused.

One engine serves all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from areal_agents.engine import WeightsRef
from areal_agents.errors import EngineError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.settings.lora import LoraConfig
from areal_agents.weights.shared_memory import SharedWeights
from tests.engine_update_suite import LOADING, UPDATES
from tests.engines.vllm.serving import BLOCK
from tests.learner_data import make_batch
from tests.served import ServedModel, ids_of, probed, publish
from tests.supervised import Engines, ReusedVLLM
from tests.tiny_models import save_tiny, vllm_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
RANK = 4
TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "layers.2.mlp.down_proj")
"""Parts of what vLLM packs into one layer, and one layer of one depth alone."""


def base() -> Any:
    return vllm_model("qwen3", tie_word_embeddings=True)


class ServedAdapters(ServedModel):
    """One base model with random adapters: each model that is made has them inside, and is published by them alone."""

    def __init__(self, learner: TorchLearner) -> None:
        assert learner.lora is not None
        self._like = {name: tensor.clone() for name, tensor in learner.lora.adapters().items()}
        super().__init__(self._made)

    def _made(self, *, seed: int | None = None) -> Any:
        model = base()
        if seed is None:
            return model
        numbers = torch.Generator().manual_seed(seed)
        model.adapters = {
            name: torch.randn(t.shape, generator=numbers) * (0.3 if "lora_B" in name else t.shape[1] ** -0.5)
            for name, t in self._like.items()
        }
        with torch.no_grad():
            for name, b in model.adapters.items():
                if "lora_B" in name:
                    layer = model.get_submodule(name.removesuffix(".lora_B.weight"))
                    layer.weight += b @ model.adapters[name.replace("lora_B", "lora_A")]
        return model

    def fill(self, model: Any, version: int) -> WeightsRef:
        if not self._buffers:
            self._buffers = [SharedWeights(self._like, torch.float32) for _ in range(2)]
        return replace(probed(self._buffers[version % 2].fill(model.adapters, version), model), kind="lora")


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchLearner]:
    it = TorchLearner(
        save_tiny(tmp_path_factory.mktemp("qwen3") / "m", base()),
        learner=LearnerConfig(precision="fp32", lr=0.05, lora=LoraConfig(rank=RANK, targets=TARGETS)),
        algorithm=AlgorithmConfig(), total_steps=3, publish_dtype=torch.float32, publish_adapters=True, threads=1,
    )  # fmt: skip
    yield it
    asyncio.run(it.close())


@pytest.fixture(scope="module")
def engines(learner: TorchLearner) -> Iterator[Engines]:
    settings = {"block_size": BLOCK, "lora_rank": RANK, "lora_targets": TARGETS}
    limits: dict[str, Any] = {"context": 2048, "kv_tokens": 3600, "block": BLOCK, "long": 120, "atol": 1e-4}
    it = Engines(ReusedVLLM.start, learner.source, ServedAdapters(learner), settings=settings, **limits)
    yield it
    it.close()


CHECKS = {
    name: (UPDATES | LOADING)[name]
    for name in (
        "a_turn_meets_an_update-inflight-keep",
        "a_turn_meets_an_update-interrupt-recompute",
        "no_turn_reads_older_kv_than_its_policy_allows",
    )
}


def test_the_learners_adapters_are_served_as_the_learner_computes_them(engines: Engines, learner: TorchLearner) -> None:
    """From the base model on; each version's tokens are scored by the learner that published it, before it trains on.

    The first that uses this engine.
    """
    it = engines.alone()

    async def work() -> None:
        ids = ids_of(60, 1)
        for version in range(3):
            if version:
                model = base()
                await learner.step(make_batch(model, version=version - 1))
                async with learner.publish() as ref:
                    assert (ref.kind, ref.version) == ("lora", version)
                    assert ref.nbytes < 4 * sum(p.numel() for p in model.parameters()) / 10
                    model.load_state_dict(dict(learner.tensors()), strict=False)
                    await it.serve(ref, model)
            done = await it.ask(ids, 20, f"v{version}")
            assert done.versions == (version,) * 20
            it.check(ids, done)

    it.run(work())


@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(engines: Engines, check: str) -> None:
    it = engines.alone()
    it.run(CHECKS[check](it))
    assert it.engine.failure is None


def test_what_is_no_adapter_of_the_model_is_refused_and_the_old_one_stays(engines: Engines) -> None:
    it = engines.alone()

    async def work() -> None:
        version, new = it.version, it.model.make(seed=5)
        ref = it.model.fill(new, version + 1)
        with pytest.raises(EngineError, match="checksum"):
            await it.engine.update_weights(replace(ref, checksum="adler32:00000000"))
        with pytest.raises(EngineError, match=r"layers\.0\.self_attn\.q_proj has no lora_A"):
            await it.engine.update_weights(replace(ref, manifest=ref.manifest[1:]))
        shared, whole = publish(base(), version + 1)
        with pytest.raises(EngineError, match="they are whole weights, and this engine was started for adapters"):
            await it.engine.update_weights(whole)
        shared.close()
        ids = ids_of(9, 19)
        done = await it.ask(ids, 6, "old")
        assert done.versions == (version,) * 6
        it.check(ids, done)
        await it.serve(ref, new)
        it.check(ids, await it.ask(ids, 6, "new"))

    it.run(work())
