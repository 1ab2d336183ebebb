"""Episodes whose gradient ``algorithm.overlong = "mask"`` takes: no term acts on their tokens, which still count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from areal_agents.algorithms.batch import LEFT_OUT, Batch
from areal_agents.algorithms.objective import live_rows
from areal_agents.algorithms.registry import Choice
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.settings.kl import KlConfig
from tests.learner.test_learner import SMOOTH, largest_difference, learner, one_thread, run
from tests.learner_data import make_batch
from tests.tiny_models import tiny_model

__all__ = ["one_thread"]  # a fixture
TERMS = {
    "entropy": AlgorithmConfig(entropy=0.5),
    "sampler": AlgorithmConfig(kl=KlConfig(sampler=1.0)),
    "both": AlgorithmConfig(entropy=0.5, kl=KlConfig(sampler=1.0), aggregation="episode"),
}


def without(batch: Batch, *left: int) -> Batch:
    """The batch, in which episodes are left out: no advantage, and the column says so."""
    rows = []
    for r in batch.rows:
        out = float(r.episode in left)
        column = np.where(r.mask, np.float32(out), np.float32(0))
        rows.append(replace(r, advantages=r.advantages * np.float32(1 - out), columns={LEFT_OUT: column}))
    return replace(batch, rows=tuple(rows))


def stepped(made: TorchLearner, batch: Batch) -> dict[str, float]:
    found: dict[str, float] = run(made, lambda it: it.step(batch))
    return found


@pytest.mark.parametrize("terms", TERMS)
def test_a_left_out_episode_moves_nothing(tmp_path: Path, terms: str) -> None:
    # All episodes are left out but for 4: the step is the one of a batch in which the others are unlike in everything
    # but their lengths, which are what still counts.
    model = tiny_model()
    batch = without(make_batch(model, noise=0.1), 0, 1, 2, 3, 5)
    others = tuple(
        r if r.episode == 4 else replace(r, ids=np.roll(r.ids, 1), logprobs=0.5 * r.logprobs) for r in batch.rows
    )
    made = [learner(model, tmp_path / str(i), algorithm=TERMS[terms]) for i in range(2)]
    for it, given in zip(made, (batch, replace(batch, rows=others)), strict=True):
        metrics = stepped(it, given)
        assert metrics["grad_norm"] > 0
        assert metrics["rows_skipped"] == len(batch.rows) - 1
    first, second = (it.tensors() for it in made)
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert largest_difference(first, model) > 1e-4


def test_without_the_column_the_terms_act(tmp_path: Path) -> None:
    model = tiny_model()
    batch = make_batch(model, noise=0.1)
    assert stepped(learner(model, tmp_path / "a", algorithm=TERMS["both"]), batch)["rows_skipped"] == 0
    metrics = stepped(learner(model, tmp_path / "b", algorithm=TERMS["both"]), without(batch, *range(7)))
    assert (metrics["minibatches_empty"], metrics["grad_norm"]) == (1.0, 0.0)
    assert metrics["tokens"] == sum(int(r.mask.sum()) for r in batch.rows)


def test_its_tokens_count_in_the_denominator_and_are_told(tmp_path: Path) -> None:
    model = tiny_model()
    batch = without(make_batch(model, noise=0.1), 0)
    # Where episodes are seen whole all rows go through the model: the tokens are masked there, and that is counted.
    a = TERMS["both"].model_copy(update={"loss": Choice("gspo")})
    metrics = stepped(learner(model, tmp_path / "m", SMOOTH, a), batch)
    mine = sum(int(r.mask.sum()) for r in batch.rows if r.episode == 0)
    assert metrics["off_policy/masked_share/by_overlong"] == pytest.approx(mine / metrics["off_policy/tokens"])
    assert metrics["off_policy/tokens"] == metrics["tokens"]


def test_which_rows_go_through_the_model() -> None:
    batch = without(make_batch(tiny_model()), 0, 4)
    rows = [i for i, r in enumerate(batch.rows) if r.episode not in (0, 4)]
    assert live_rows(batch, max_staleness=None, scope="token", always=True) == rows
    assert live_rows(batch, max_staleness=None, scope="episode", always=True) == list(range(len(batch.rows)))
    every = without(batch, *range(7))
    assert live_rows(every, max_staleness=None, scope="episode", always=True) == []
