"""The distance between engine and learner on policy: measured once, before the policy moves, for masks that read it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from areal_agents.algorithms.batch import Batch
from areal_agents.algorithms.masks import leaves_noise
from areal_agents.algorithms.objective import PolicyObjective
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ConfigError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig
from tests.learner.test_learner import SMOOTH, learner, one_thread, run
from tests.learner_data import make_batch, row_logprobs
from tests.tiny_models import tiny_model

__all__ = ["one_thread"]  # a fixture
NARROW = AlgorithmConfig(mask=Choice("geometric", {"bounds": (0.999, 1.001)}), correction=Choice("bypass"))
SLOW = SMOOTH.model_copy(update={"lr": 1e-3})


@leaves_noise(cpa=None)
def misspelt(logprobs_T: Tensor, noise_T: Tensor, *, cap: float | None = None) -> Tensor:
    """Mask nothing, and declare a parameter that it has not."""
    return torch.ones_like(logprobs_T, dtype=torch.bool)


@leaves_noise(measured=False)
def of_a_number(logprobs_T: Tensor, noise_T: Tensor, *, measured: float = 0.0) -> Tensor:
    """Mask nothing, and read the noise at 0, which is not False."""
    return torch.ones_like(logprobs_T, dtype=torch.bool)


def test_a_mask_that_leaves_the_noise_names_its_own_parameter_and_value() -> None:
    def policy(mask: str) -> PolicyObjective:
        return PolicyObjective(
            loss=Choice("ppo"), correction=Choice("bypass"), aggregation="token", mask=Choice(f"{__name__}:{mask}")
        )

    with pytest.raises(ConfigError, match=r"@leaves_noise\(cpa = …\) names none of its parameters, which are cap"):
        _ = policy("misspelt").needs_noise
    assert policy("of_a_number").needs_noise


def apart(model: Any, batch: Batch, *, version: int) -> float:
    """Mean |log π − log μ| of the sampled tokens of ``version`` in rows with a gradient."""
    found = []
    for row in batch.rows:
        if (row.advantages != 0).any() or row.episode in {r.episode for r in batch.rows if (r.advantages != 0).any()}:
            own = row.versions[row.mask] == version
            logprobs = row_logprobs(model, row, batch.temperature).detach().numpy()
            found.append(np.abs(logprobs - row.logprobs[row.mask])[own])
    return float(np.concatenate(found).mean())


def test_it_is_that_of_the_first_steps_own_tokens_and_stays(tmp_path: Path) -> None:
    model = tiny_model()
    first = make_batch(model, noise=0.03, versions=(0,))
    later = replace(make_batch(model, noise=0.5, seed=1, versions=(0, 1)), version=1)
    expected = apart(model, first, version=0)
    made = learner(model, tmp_path / "m", SLOW, NARROW)

    async def job(it: TorchLearner) -> list[dict[str, float]]:
        metrics = [dict(await it.step(first)), dict(await it.step(later))]
        await it.save(tmp_path / "saved")
        return metrics

    metrics = run(made, job)
    assert metrics[0]["engine_noise"] == pytest.approx(expected, rel=1e-4)
    assert metrics[1]["engine_noise"] == metrics[0]["engine_noise"]
    # 4 times the noise is 3.2 standard deviations of it: on policy next to nothing is masked, and later much is.
    assert metrics[0]["off_policy/masked_share/by_mask"] == 0.0
    assert metrics[1]["off_policy/masked_share/by_mask"] > 0.5

    async def resumed(it: TorchLearner) -> None:
        await it.load(tmp_path / "saved")
        assert it._noise.value == metrics[0]["engine_noise"]
        found = await it.step(replace(make_batch(model, noise=0.5, seed=2), version=2))
        assert found["engine_noise"] == metrics[0]["engine_noise"]

    run(learner(model, tmp_path / "b", SLOW, NARROW), resumed)


def test_without_it_the_narrow_bound_masks_what_is_on_policy(tmp_path: Path) -> None:
    model = tiny_model()
    chosen = AlgorithmConfig(mask=Choice("geometric", {"bounds": (0.999, 1.001), "measured": False}))
    metrics = run(learner(model, tmp_path / "m", SLOW, chosen), lambda it: it.step(make_batch(model, noise=0.03)))
    assert metrics["off_policy/masked_share/by_mask"] > 0.5


def test_tokens_of_other_versions_are_no_measure(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", SLOW, NARROW)

    async def job(it: TorchLearner) -> None:
        await it.step(make_batch(model, versions=(0,)))
        it._noise.load({})  # as of a checkpoint that holds none
        old = await it.step(replace(make_batch(model, seed=1, versions=(0,)), version=1))
        assert "engine_noise" not in old
        batch = replace(make_batch(model, seed=2, versions=(0, 2)), version=2)
        found = [
            np.abs(logprobs - row.logprobs)[row.mask & (row.versions == 2)]
            for row, logprobs in zip(batch.rows, await it.logprobs(batch), strict=True) if row.episode != 1
        ]  # fmt: skip
        mixed = await it.step(batch)
        assert mixed["engine_noise"] == pytest.approx(float(np.concatenate(found).mean()), rel=1e-5)

    run(made, job)


def test_where_no_mask_reads_it_nothing_is_measured_and_no_pass_is_made(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model)

    def passes(mask: Choice, folder: str) -> tuple[list[int], dict[str, float]]:
        """The rows of each forward pass without gradient in one step, and its metrics."""
        made, rows = learner(model, tmp_path / folder, algorithm=AlgorithmConfig(mask=mask)), list[int]()
        usual = made._passes.logprobs

        def counted(given: Any, *rest: Any) -> Any:
            rows.append(len(given))
            return usual(given, *rest)

        made._passes.logprobs = counted  # type: ignore[method-assign,assignment]
        return rows, dict(run(made, lambda it: it.step(batch)))

    read, metrics = passes(Choice("geometric"), "read")
    assert (len(read), "engine_noise" in metrics) == (1, True)
    forwarded = metrics["tokens_forward"]
    for i, options in enumerate(({"measured": False}, {"shrink": False}, {"measured": False, "shrink": False})):
        unread, metrics = passes(Choice("geometric", options), f"unread{i}")
        assert (unread, "engine_noise" in metrics) == ([], False)
        assert metrics["tokens_forward"] < forwarded
    others, metrics = passes(Choice("trust_region"), "other")
    assert (others, "engine_noise" in metrics) == ([], False)
