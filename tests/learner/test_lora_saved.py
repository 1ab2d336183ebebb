"""Adapters leave the learner: published, saved and taken up again, exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from areal_agents.errors import ConfigError, ModelError
from areal_agents.learner.learner import TorchLearner
from areal_agents.models import resolve
from areal_agents.settings.config import LearnerConfig
from areal_agents.settings.lora import LoraConfig
from areal_agents.weights.shared_memory import AttachedWeights
from tests.learner.test_lora import SMOOTH, changed, learner, one_thread, run, stirred
from tests.learner_data import make_batch
from tests.tiny_models import forward_logprobs, tiny_model

__all__ = ["one_thread"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_published_with_their_probe(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(tie_word_embeddings=True)
    made = stirred(learner(model, tmp_path / "m", publish_dtype=dtype))

    async def job(it: TorchLearner) -> Any:
        await it.step(make_batch(model))
        async with it.publish() as ref:
            with AttachedWeights(ref) as opened:
                return ref, {n: t.clone() for n, t in opened.tensors.items()}

    ref, published = run(made, job)
    assert (ref.kind, ref.version) == ("full", 1)
    assert set(published) == set(model.state_dict()) - {"lm_head.weight"}
    assert made.lora is not None
    a, b = (made.lora.adapters()[f"model.layers.1.mlp.up_proj.lora_{x}.weight"] for x in "AB")
    wanted = model.state_dict()["model.layers.1.mlp.up_proj.weight"] + 2.0 * (b @ a)
    torch.testing.assert_close(published["model.layers.1.mlp.up_proj.weight"], wanted.to(dtype), atol=1e-6, rtol=0)
    served = tiny_model(tie_word_embeddings=True)
    served.load_state_dict(published, strict=False)
    np.testing.assert_allclose(ref.probe.logprobs, forward_logprobs(served, ref.probe.ids).numpy(), atol=1e-4)


def test_adapters_alone_are_published_where_the_engine_takes_them(tmp_path: Path) -> None:
    model = tiny_model()
    made = stirred(learner(model, tmp_path / "m", publish_adapters=True))

    async def job(it: TorchLearner) -> Any:
        async with it.publish() as ref:
            with AttachedWeights(ref) as opened:
                return ref, {n: t.clone() for n, t in opened.tensors.items()}

    ref, published = run(made, job)
    assert ref.kind == "lora"
    assert made.lora is not None
    own = made.lora.adapters()
    assert set(published) == set(own)
    for name, tensor in published.items():
        assert torch.equal(tensor, own[name] * (2.0 if "lora_B" in name else 1.0)), name  # alpha/rank = 8/4
    assert ref.nbytes < 4 * sum(t.numel() for t in model.state_dict().values()) / 2
    served = tiny_model()
    served.load_state_dict(dict(made.tensors()))
    np.testing.assert_allclose(ref.probe.logprobs, forward_logprobs(served, ref.probe.ids).numpy(), atol=1e-4)
    with pytest.raises(ConfigError, match=r"learner\.lora\.rank, which is 0"):
        learner(model, tmp_path / "m", changed(lora=LoraConfig()), publish_adapters=True)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model = tiny_model()
    config = changed(lr=0.01, eps=1e-8, weight_decay=0.1)
    batches = [replace(make_batch(model, seed=v), version=v) for v in range(4)]

    async def whole(it: TorchLearner) -> None:
        for batch in batches:
            await it.step(batch)

    async def first(it: TorchLearner) -> None:
        for batch in batches[:2]:
            await it.step(batch)
        await it.save(tmp_path / "saved")

    async def second(it: TorchLearner) -> None:
        await it.load(tmp_path / "saved")
        assert it.version == 2
        for batch in batches[2:]:
            await it.step(batch)

    straight, again = learner(model, tmp_path / "m", config), learner(model, tmp_path / "m", config)
    run(straight, whole)
    run(learner(model, tmp_path / "m", config), first)
    run(again, second)
    assert again.version == 4
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, straight.tensors()[name]), name
    assert sorted(f.name for f in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "learner.pt",
    ]  # fmt: skip


def test_a_checkpoint_of_other_adapters_or_another_base_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    saved, full = tmp_path / "saved", tmp_path / "full"
    run(stirred(learner(model, tmp_path / "m")), lambda it: it.save(saved))
    run(learner(model, tmp_path / "m", changed(lora=LoraConfig())), lambda it: it.save(full))

    def refused(
        config: LearnerConfig, folder: Path, match: str, base: Path = tmp_path / "m", model: Any = model
    ) -> None:
        with pytest.raises(ModelError, match=match):
            run(learner(model, base, config), lambda it: it.load(folder))

    refused(changed(lora=LoraConfig(rank=8, alpha=8.0)), saved, "adapters of rank 4 and alpha 8")
    refused(changed(lora=LoraConfig(rank=4)), saved, "alpha 32")
    refused(changed(lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj",))), saved, "36 tensors differ")
    refused(changed(lora=LoraConfig()), saved, "set learner.lora as it was")
    refused(SMOOTH, full, "every weight trained there")
    refused(SMOOTH, saved, "another base model", tmp_path / "other", tiny_model(seed=1))
    for i, name in enumerate(("model.norm.weight", "model.layers.2.mlp.down_proj.weight", "lm_head.weight")):
        near = tiny_model()
        with torch.no_grad():
            near.state_dict()[name].view(-1)[-1] += 1e-3
        refused(SMOOTH, saved, "another base model", tmp_path / f"near{i}", near)


def test_the_export_is_a_merged_model_and_a_peft_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    made = stirred(learner(model, tmp_path / "m"))
    out = tmp_path / "out"
    run(made, lambda it: it.export(out))
    ids = (3, 1, 4, 1, 5, 9, 2, 6)
    merged = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in made.tensors().items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(base, str(out / "adapter")).eval()
    assert sum(t.numel() for n, t in wrapped.state_dict().items() if "lora_" in n) == 12 * (144 + 160 + 144 + 384)
    torch.testing.assert_close(forward_logprobs(wrapped, ids), forward_logprobs(merged, ids), atol=1e-5, rtol=0)
    assert (forward_logprobs(merged, ids) - forward_logprobs(model, ids)).abs().max() > 0.1
    said = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 8, str(tmp_path / "m"))
    assert said["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(ModelError, match="it is an adapter: name the merged model"):
        resolve(str(out / "adapter"))
