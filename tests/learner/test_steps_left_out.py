"""Where there is no signal the optimizer takes no step, and a step that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from areal_agents.algorithms.losses import LossTerms
from areal_agents.algorithms.registry import Choice
from areal_agents.learner.learner import TorchLearner
from tests.learner.test_learner import SMOOTH, learner, run
from tests.learner_data import make_batch
from tests.tiny_models import tiny_model

MOMENTUM = SMOOTH.model_copy(update={"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1})


def copies(made: TorchLearner) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in made.tensors().items()}


def moved(made: TorchLearner, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(t, before[name]) for name, t in made.tensors().items())


def without_gradients(made: TorchLearner) -> bool:
    return all(p.grad is None for p in made._parameters)


def dead_loss(logprobs_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor) -> LossTerms:
    """A loss as it is where every token is clipped: it depends on nothing."""
    return LossTerms(0.0 * logprobs_T, torch.ones_like(advantages_T, dtype=torch.bool))


def test_a_gradient_of_zero_does_not_move_adamw_by_its_momentum(tmp_path: Path) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m", MOMENTUM)

    async def job(it: TorchLearner) -> Any:
        await it.step(make_batch(model))  # now there is momentum
        before = copies(it)
        it._policy = type(it._policy)(
            loss=Choice("tests.learner.test_steps_left_out:dead_loss"), correction=Choice("bypass"),
            aggregation="token", max_staleness=None,
        )  # fmt: skip
        metrics = await it.step(make_batch(model, version=1))
        assert not moved(it, before)
        return metrics

    metrics = run(made, job)
    assert (metrics["minibatches_empty"], metrics["skipped"], metrics["grad_norm"]) == (1, 0, 0)
    assert made.version == 2


@pytest.mark.parametrize("fails", ["in the loss", "in the optimizer", "by an advantage that is not finite"])
def test_no_way_out_of_a_step_leaves_a_gradient(tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m")
    batch = make_batch(model)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    async def job(it: TorchLearner) -> None:
        before = copies(it)
        if fails == "by an advantage that is not finite":
            batch.rows[0].advantages[batch.rows[0].mask] = np.inf
            assert (await it.step(batch))["skipped"] == 1
        else:
            if fails == "in the optimizer":
                monkeypatch.setattr(it._optimizer, "step", broken)
            else:  # the first pack is through: its gradients are there
                monkeypatch.setattr(it._passes, "_before", broken_call(it._passes._before, 2, broken))
            with pytest.raises(RuntimeError, match="out of memory"):
                await it.step(batch)
        assert without_gradients(it)
        assert not moved(it, before)

    run(made, job)


def broken_call(usual: Callable[[], None], at: int, broken: Callable[[], None]) -> Callable[[], None]:
    calls = iter(range(1, 1000))
    return lambda: broken() if next(calls) == at else usual()


def test_a_warm_start_step_that_fails_leaves_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    made = learner(model, tmp_path / "m")
    rows = make_batch(model).rows

    async def job(it: TorchLearner) -> None:
        def broken(*args: Any) -> Any:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(it._passes, "_before", broken_call(it._passes._before, 2, broken))
        with pytest.raises(RuntimeError, match="out of memory"):
            await it.sft_step(rows, lr=1e-3)
        assert without_gradients(it)

    run(made, job)
