"""The critic over several steps: its warm-up, where it begins, its checkpoints, and what it learns beside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ModelError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import LearnerConfig
from areal_agents.settings.kl import KlConfig
from areal_agents.settings.lora import LoraConfig
from tests.learner.test_critic import UNMASKED, algorithm, critic_of, row_values, with_targets
from tests.learner.test_learner import SMOOTH, largest_difference, learner, one_thread, run
from tests.learner_data import make_batch
from tests.tiny_models import tiny_model

__all__ = ["one_thread"]  # a fixture

# --- warm-up and beginning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "own"])
@pytest.mark.parametrize("correction", [UNMASKED, Choice("decoupled")])
def test_while_it_warms_up_the_policy_stays_to_the_bit_and_the_version_counts(
    tmp_path: Path, kind: str, correction: Choice
) -> None:
    model = tiny_model()
    more: dict[str, Any] = {"coefficient": 0.5} if kind == "trunk" else {}
    a = algorithm(kind, lr=0.05, warmup_steps=2, **more).model_copy(update={"correction": correction})
    made = learner(model, tmp_path / "m", SMOOTH.model_copy(update={"weight_decay": 0.1, "minibatches": 2}), a)

    async def job(it: TorchLearner) -> None:
        losses = []
        for version in range(2):
            metrics = await it.step(with_targets(make_batch(model, version=version)))
            assert all(torch.equal(t, model.state_dict()[n]) for n, t in it.tensors().items())
            assert not it._optimizer.state, "nor has AdamW seen anything"
            assert (metrics["grad_norm"], metrics["minibatches_empty"], it.version) == (0.0, 0, version + 1)
            assert (metrics["lr"], metrics["critic/lr"]) == (0.0, 0.05), "what the policy moves by, and the critic"
            losses.append(metrics["critic/loss"])
        assert losses[1] < losses[0]
        metrics = await it.step(with_targets(make_batch(model, version=2)))
        assert largest_difference(it.tensors(), model) > 1e-3
        assert metrics["lr"] == 0.5

    run(made, job)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_one_of_its_own_begins_as_the_policy_that_the_warm_start_left(tmp_path: Path, rank: int, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    batch = make_batch(model)
    c = SMOOTH.model_copy(update={"lora": LoraConfig(rank=rank)})
    made = learner(model, tmp_path / "m", c, algorithm("own"))

    def same(it: TorchLearner) -> bool:
        own, policy = critic_of(it).module.state_dict(), it.tensors()
        layers = [name for name in own if "lm_head" not in name]
        assert len(layers) > 10
        return all(torch.equal(own[name], policy[name]) for name in layers)

    async def job(it: TorchLearner) -> None:
        assert same(it)
        await it.sft_step(batch.rows, lr=0.01)
        await it.sft_step(batch.rows, lr=0.01)
        assert largest_difference(it.tensors(), model) > 1e-3
        assert all(not v.any() for v in await it.values(batch)), "V = 0 at first"
        assert same(it), "when it is asked first"
        await it.save(tmp_path / "warm")
        await it.step(with_targets(batch))
        assert not same(it), "from then on it learns by itself"
        assert all(v.any() for v in await it.values(make_batch(model, version=1)))

    async def resumed(it: TorchLearner) -> None:
        await it.load(tmp_path / "warm")
        await it.values(batch)
        assert same(it)

    run(made, job)
    run(learner(model, tmp_path / "m2", c, algorithm("own")), resumed)


def test_one_that_is_new_to_a_warm_started_run_begins_as_its_policy(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)

    async def write(it: TorchLearner) -> None:
        await it.sft_step(batch.rows, lr=0.01)
        await it.save(tmp_path / "warm")

    async def read(it: TorchLearner) -> None:
        await it.load(tmp_path / "warm")
        await it.values(batch)
        own, policy = critic_of(it).module.state_dict(), it.tensors()
        assert all(torch.equal(own[n], policy[n]) for n in own if "lm_head" not in n)
        assert largest_difference(policy, model) > 1e-3

    run(learner(model, tmp_path / "a"), write)
    run(learner(model, tmp_path / "b", algorithm=algorithm("own")), read)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "own"])
def test_a_loaded_checkpoint_goes_on_bit_identically_and_an_export_has_no_critic(tmp_path: Path, kind: str) -> None:
    model = tiny_model(tie_word_embeddings=True)
    batches = [with_targets(make_batch(model, seed=s, version=s), seed=s) for s in range(3)]
    c = LearnerConfig(lr=1e-3, precision="fp32", token_budget=96, minibatches=2)
    more: dict[str, Any] = {"coefficient": 0.5} if kind == "trunk" else {}
    a = algorithm(kind, lr=1e-2, warmup_steps=1, **more)
    made = learner(model, tmp_path / "m", c, a, seed=3)

    async def whole(it: TorchLearner) -> Any:
        await it.step(batches[0])
        await it.step(batches[1])
        await it.save(tmp_path / "checkpoint")
        await it.export(tmp_path / "exported")
        await it.step(batches[2])
        return await it.values(batches[2])

    expected = run(made, whole)
    resumed = TorchLearner(
        tmp_path / "m", learner=c, algorithm=a, total_steps=10, publish_dtype=torch.float32, threads=1
    )

    async def rest(it: TorchLearner) -> Any:
        await it.load(tmp_path / "checkpoint")
        await it.step(batches[2])
        return await it.values(batches[2])

    found = run(resumed, rest)
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))
    assert all(torch.equal(t, resumed.tensors()[n]) for n, t in made.tensors().items())
    mine, theirs = critic_of(made).module.state_dict(), critic_of(resumed).module.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in mine.items())
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == sorted(
        p.name for p in (tmp_path / "m").iterdir()
    )


def test_a_checkpoint_of_another_critic_is_refused_once_one_has_learned(tmp_path: Path) -> None:
    model = tiny_model()
    none, trunk = learner(model, tmp_path / "a"), learner(model, tmp_path / "b", algorithm=algorithm())
    own = learner(model, tmp_path / "c", algorithm=algorithm("own"))

    async def write(it: TorchLearner) -> None:
        await it.save(tmp_path / "fresh")
        await it.step(make_batch(model))
        await it.save(tmp_path / "without")

    async def read(it: TorchLearner) -> None:
        await it.load(tmp_path / "fresh")  # as of a run that stopped after its warm start
        with pytest.raises(ModelError, match=r"version 1 holds no critic, but algorithm.critic.kind = 'trunk'"):
            await it.load(tmp_path / "without")
        await it.load(tmp_path / "fresh")
        await it.step(with_targets(make_batch(model)))
        await it.save(tmp_path / "trunk")

    async def other(it: TorchLearner) -> None:
        with pytest.raises(ModelError, match=r"holds a critic of kind 'trunk', but algorithm.critic.kind = 'own'"):
            await it.load(tmp_path / "trunk")

    run(none, write)
    run(trunk, read)
    run(own, other)


# --- beside adapters, a reference and an entropy bonus --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trunk", "own"])
@pytest.mark.parametrize("rank", [0, 4])
def test_it_learns_beside_a_reference_an_entropy_bonus_and_adapters(tmp_path: Path, kind: str, rank: int) -> None:
    model = tiny_model()
    more: dict[str, Any] = {"coefficient": 0.5} if kind == "trunk" else {}
    a = algorithm(kind, lr=0.05, warmup_steps=1, **more).model_copy(
        update={"kl": KlConfig(coef=0.1), "entropy": 0.01, "aggregation": "episode"}
    )
    c = SMOOTH.model_copy(update={"minibatches": 2, "lora": LoraConfig(rank=rank)})
    made = learner(model, tmp_path / "m", c, a)

    async def job(it: TorchLearner) -> list[float]:
        losses = []
        for version in range(3):
            before = {name: t.clone() for name, t in it.tensors().items()}
            metrics = await it.step(with_targets(make_batch(model, version=version)))
            moved = any(not torch.equal(t, before[name]) for name, t in it.tensors().items())
            assert moved == (version > 0), "the first step is the critic's"
            losses.append(metrics["critic/loss"])
        head, batch = copy.deepcopy(critic_of(it).head), make_batch(model)
        await it.save(tmp_path / "saved")
        await it.export(tmp_path / "exported")
        if kind == "trunk":  # of the layers as they are now, adapters inside
            now = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
            for row, found in zip(batch.rows, await it.values(batch), strict=True):
                expected = row_values(now, head, row).detach().numpy()
                assert np.abs(found[row.mask] - expected).max() < 1e-4
        values = await it.values(batch)
        await it.step(with_targets(make_batch(model, version=3)))
        await it.load(tmp_path / "saved")
        assert all(np.array_equal(x, y) for x, y in zip(values, await it.values(batch), strict=True))
        return losses

    losses = run(made, job)
    assert losses[1] < losses[0]
