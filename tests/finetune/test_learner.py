"""The two kinds of steps against plain loops over transformers' own forward."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from areal_agents.algorithms.batch import Row
from areal_agents.finetune.examples import Sequences
from areal_agents.finetune.learner import FinetuneLearner
from areal_agents.settings.config import LearnerConfig
from tests.learner_data import row_logprobs
from tests.tiny_models import VOCABULARY, save_tiny, tiny_model

T = TypeVar("T")
CONFIG = LearnerConfig(precision="fp32", token_budget=64, logprob_chunk=7, lr=0.1, eps=1.0, grad_clip=1e9, threads=1)
"""With so large an ε a first step of AdamW is smooth in the gradient: 0.1·g/(|g| + 1)."""


def sequences(count: int, *, seed: int = 0) -> list[Sequences]:
    """Two by two they begin alike; the third has two rows, as of a template that rewrites its past."""
    rng = np.random.default_rng(seed)
    found: list[Sequences] = []
    for i in range(count):
        if i % 2 == 0:
            start = rng.integers(0, VOCABULARY, 20)
        rows = []
        for _ in range(2 if i == 2 else 1):
            ids = np.concatenate([start, rng.integers(0, VOCABULARY, rng.integers(6, 30))])
            mask = np.arange(len(ids)) >= 20
            mask[22:24] = False
            zeros = np.zeros(len(ids), np.float32)
            rows.append(Row(ids, mask, zeros, np.where(mask, 0, -1), np.where(mask, 0, -1), zeros, 0))
        found.append(Sequences(f"s{i}", tuple(rows)))
    return found


def run(folder: Path, model: Any, job: Callable[[FinetuneLearner], Awaitable[T]], config: LearnerConfig = CONFIG) -> T:
    async def go() -> T:
        made = FinetuneLearner(save_tiny(folder, model), learner=config, total_steps=10, seed=0, threads=1)
        try:
            return await job(made)
        finally:
            await made.close()

    return asyncio.run(go())


def sums(model: Any, batch: list[Sequences]) -> torch.Tensor:
    return torch.stack([sum((row_logprobs(model, r, 1.0).sum() for r in s.rows), torch.zeros(())) for s in batch])


def stepped(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights after one step of torch's own AdamW."""
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_imitation_is_the_mean_cross_entropy_of_the_targets(tmp_path: Path) -> None:
    model = tiny_model()
    batch = sequences(4)
    plain = copy.deepcopy(model)
    targets = sum(s.tokens for s in batch)
    loss = -sums(plain, batch).sum() / targets

    async def job(it: FinetuneLearner) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
        metrics = await it.imitate(batch)
        return metrics, {name: t.clone() for name, t in it.tensors().items()}, it.version

    metrics, weights, version = run(tmp_path, model, job)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert (metrics["tokens"], metrics["rows"], metrics["lr"], version) == (targets, 5.0, 0.1, 1)
    for name, expected in stepped(plain, loss).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_preferences_are_dpo_on_sums_of_targets(tmp_path: Path, beta: float, smoothing: float) -> None:
    model, reference = tiny_model(), tiny_model(seed=1)
    batch = sequences(6)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        ref = sums(reference, batch)
    found = sums(plain, batch)
    margin = beta * ((found[0::2] - ref[0::2]) - (found[1::2] - ref[1::2]))
    loss = -((1 - smoothing) * torch.log(torch.sigmoid(margin)) + smoothing * torch.log(torch.sigmoid(-margin))).mean()

    async def job(it: FinetuneLearner) -> tuple[Any, ...]:
        before = await it.sums(batch)
        metrics = await it.prefer(batch, ref.double().numpy(), beta=beta, label_smoothing=smoothing)
        return before, metrics, {name: t.clone() for name, t in it.tensors().items()}

    before, metrics, weights = run(tmp_path, model, job)
    np.testing.assert_allclose(before, found.detach().numpy(), rtol=1e-5)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert metrics["margin"] == pytest.approx(float(margin.detach().mean()), rel=1e-4)
    assert metrics["accuracy"] == float((margin > 0).float().mean())
    assert metrics["margin"] == pytest.approx(metrics["reward_chosen"] - metrics["reward_rejected"], abs=1e-9)
    for name, expected in stepped(plain, loss).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=2e-6, msg=name)


def test_any_micro_batches_give_the_same_step(tmp_path: Path) -> None:
    model, batch, found = tiny_model(), sequences(6), []
    for i, budget in enumerate((32, 4096)):
        config = CONFIG.model_copy(update={"token_budget": budget, "logprob_chunk": 3 + 100 * i})

        async def job(it: FinetuneLearner) -> dict[str, torch.Tensor]:
            await it.prefer(batch, np.arange(6, dtype=np.float64), beta=0.1, label_smoothing=0.0)
            await it.imitate(batch)
            return {name: t.clone() for name, t in it.tensors().items()}

        found.append(run(tmp_path / str(i), model, job, config))
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-5, atol=5e-6, msg=name)
