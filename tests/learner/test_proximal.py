"""The kept proximal policy: whose average it is, what it costs, and that a resumed run goes on with it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from areal_agents.algorithms.batch import Batch
from areal_agents.algorithms.objective import PolicyObjective
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ModelError
from areal_agents.learner.learner import TorchLearner
from areal_agents.learner.proximal import PROXIMAL
from areal_agents.learner.weight_copy import WeightCopy
from areal_agents.settings.config import AlgorithmConfig
from tests.learner.test_learner import SMOOTH, learner, one_thread, run, smooth_adamw
from tests.learner.test_lora import learner as lora_learner
from tests.learner_data import make_batch, naive_loss, row_logprobs
from tests.tiny_models import tiny_model

__all__ = ["one_thread"]  # a fixture
KEPT = AlgorithmConfig(correction=Choice("kept", {"decay": 0.5, "token_mask": None}))
SLOW = SMOOTH.model_copy(update={"lr": 0.05})


def averages(made: TorchLearner) -> dict[str, Tensor]:
    assert made._proximal._kept is not None
    return {n: t.clone() for n, t in made._proximal._kept.tensors.items()}


def test_the_average_by_hand() -> None:
    # Policies 8, 4, 0 at β = 0.5: 8; then (0.5·8 + 4)/1.5 = 16/3; then (0.25·8 + 0.5·4 + 0)/1.75 = 16/7.
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 8.0)
    copied, total, seen = WeightCopy(layer), 1.0, []
    for value in (4.0, 0.0):
        nn.init.constant_(layer.weight, value)
        total = 0.5 * total + 1.0
        copied.move(1.0 / total)
        seen.append(float(copied.tensors["weight"]))
    assert seen == pytest.approx([16 / 3, 16 / 7])
    with copied.in_place():
        assert layer.weight.item() == pytest.approx(16 / 7)
    assert layer.weight.item() == 0.0
    copied.move()
    assert float(copied.tensors["weight"]) == 0.0


def test_the_objective_says_which_policy_it_needs() -> None:
    for kind, needs, decay in (("bypass", False, None), ("decoupled", True, None), ("kept", True, 0.8)):
        made = PolicyObjective(loss=Choice("ppo"), correction=Choice(kind), aggregation="token")
        assert (made.needs_proximal, made.proximal_decay) == (needs, decay)
    half = PolicyObjective(loss=Choice("ppo"), correction=Choice("kept", {"decay": 0.5}), aggregation="token")
    assert half.proximal_decay == 0.5


def proximal_of(model: Any, batch: Batch) -> list[Any]:
    found = [np.zeros(len(r), np.float32) for r in batch.rows]
    with torch.no_grad():
        for row, p in zip(batch.rows, found, strict=True):
            p[row.mask] = row_logprobs(model, row, batch.temperature).numpy()
    return found


def test_three_steps_equal_a_naive_loop_with_the_average_of_its_policies(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", SLOW, KEPT)
    batches = [replace(make_batch(model, seed=s), version=s) for s in range(3)]
    optimizer, losses, policies = smooth_adamw(model, SLOW), [], [copy.deepcopy(model.state_dict())]
    for batch in batches:
        weights = [0.5 ** (len(policies) - 1 - j) for j in range(len(policies))]
        average = copy.deepcopy(model)
        average.load_state_dict(
            {n: sum(w * p[n] for w, p in zip(weights, policies, strict=True)) / sum(weights) for n in policies[0]}
        )
        loss = naive_loss(model, batch, range(len(batch.rows)), batch.episodes, KEPT, proximal_of(average, batch))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
        policies.append(copy.deepcopy(model.state_dict()))

    async def job(it: TorchLearner) -> list[dict[str, float]]:
        return [dict(await it.step(b)) for b in batches]

    metrics = run(made, job)
    assert [m["loss"] for m in metrics] == pytest.approx(losses, abs=1e-5)
    assert metrics[0]["off_policy/clip_fraction"] == 0.0, "π = p at the first batch"
    assert metrics[2]["off_policy/clip_fraction"] > 0.0, "and not at the later ones, with one minibatch a batch"
    own = made.tensors()
    assert max(float((own[n] - model.state_dict()[n]).abs().max()) for n in own) < 1e-5


def test_the_policy_itself_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", SLOW, KEPT)
    first, second = make_batch(model), make_batch(model, seed=1, version=1)

    async def job(it: TorchLearner) -> None:
        await it.step(first)
        before = {n: t.clone() for n, t in it.tensors().items()}
        found, _ = it._proximal.logprobs(second.rows, second.temperature)
        assert all(torch.equal(t, before[n]) for n, t in it.tensors().items())
        now = await it.logprobs(second)
        moved = max(float(np.abs(a - b).max()) for a, b in zip(found, now, strict=True))
        assert moved > 1e-4, "p is another policy"
        assert all(p.requires_grad for p in it._parameters)

    run(made, job)


def test_a_resumed_learner_goes_on_with_the_average(tmp_path: Path) -> None:
    model = tiny_model()
    batches = [replace(make_batch(model, seed=s), version=s) for s in range(4)]

    async def first(it: TorchLearner) -> Any:
        await it.sft_step(batches[0].rows, lr=0.01)  # the average begins behind the warm start
        await it.save(tmp_path / "begun")
        await it.step(batches[0])
        await it.step(batches[1])
        await it.save(tmp_path / "saved")
        kept = averages(it)
        return kept, [await it.step(batches[2]), await it.step(batches[3])]

    async def second(it: TorchLearner) -> Any:
        await it.load(tmp_path / "saved")
        kept = averages(it)
        return kept, [await it.step(batches[2]), await it.step(batches[3])]

    async def from_the_start(it: TorchLearner) -> Any:
        await it.load(tmp_path / "begun")
        await it.step(batches[0])
        await it.step(batches[1])
        return averages(it)

    kept, metrics = run(learner(model, tmp_path / "a", SLOW, KEPT), first)
    again, found = run(learner(model, tmp_path / "b", SLOW, KEPT), second)
    assert (tmp_path / "saved" / PROXIMAL).is_file()
    assert not (tmp_path / "begun" / PROXIMAL).exists()
    assert all(torch.equal(kept[n], again[n]) for n in kept)
    for a, b in zip(metrics, found, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    anew = run(learner(model, tmp_path / "c", SLOW, KEPT), from_the_start)
    assert all(torch.equal(kept[n], anew[n]) for n in kept)


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    model = tiny_model()

    async def save(it: TorchLearner) -> None:
        await it.step(make_batch(model))
        await it.save(tmp_path / "plain")

    run(learner(model, tmp_path / "a", SLOW), save)
    with pytest.raises(ModelError, match="1 steps behind it, in which no proximal policy was kept"):
        run(learner(model, tmp_path / "b", SLOW, KEPT), lambda it: it.load(tmp_path / "plain"))


def test_another_correction_keeps_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", SLOW, AlgorithmConfig(correction=Choice("decoupled")))

    async def job(it: TorchLearner) -> None:
        await it.step(make_batch(model))
        await it.save(tmp_path / "saved")

    run(made, job)
    assert made._proximal._kept is None
    assert not (tmp_path / "saved" / PROXIMAL).exists()


def test_with_adapters_only_they_are_copied(tmp_path: Path) -> None:
    model = tiny_model()
    made = lora_learner(model, tmp_path / "m", algorithm=KEPT)

    async def job(it: TorchLearner) -> dict[str, Tensor]:
        await it.step(make_batch(model))
        await it.step(make_batch(model, seed=1, version=1))
        return averages(it)

    kept = run(made, job)
    assert kept
    assert all(".lora_" in name for name in kept)
    assert sum(t.numel() for t in kept.values()) == sum(p.numel() for p in made._parameters)
    assert all(t.dtype == torch.float32 for t in kept.values())
