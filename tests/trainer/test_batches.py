"""Batches for a critic: values are read, advantages made of them, and targets of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_agents.algorithms.advantages import opob
from areal_agents.algorithms.batch import Batch
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.refinement import Normalize
from areal_agents.algorithms.registry import Choice
from areal_agents.algorithms.value_advantages import bilevel_gae, gae, turn_gae
from areal_agents.errors import ConfigError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.settings.critic import CriticConfig
from areal_agents.trainer.batches import batch_for, batch_of
from areal_agents.trainer.credit import credit_metrics, signal_of
from areal_agents.types import AssistantMessage, Completion, Group, Ids, Tail, Task, Trajectory, Turn
from tests.learner.test_critic import critic_of, randomise
from tests.learner.test_learner import learner, one_thread, run
from tests.learner_data import row_logprobs
from tests.tiny_models import tiny_model

__all__ = ["one_thread"]  # a fixture
TASK = Task.make("t", split="train", seed=0, payload={})


def turn(shown: Ids, said: Ids, reward: float, parent: int | None) -> Turn:
    n = len(said)
    return Turn(shown, Completion(said, (-1.0,) * n, (0,) * n, "stop"), AssistantMessage(()), reward, parent=parent)


def episode(*turns: Turn, tail: Tail | None = None) -> Trajectory:
    cut = tail is not None
    return Trajectory("e", TASK, "g", turns, not cut, cut, "max_turns" if cut else "answer", tail=tail)


PLAIN = episode(turn((1, 2, 3), (4, 5), 0.5, None), turn((6, 7), (8,), 1.0, 0))
FORKED = episode(
    turn((1, 2, 3), (9, 10), 0.25, None), turn((6,), (11, 12), 0.0, 0), turn((7, 7), (13,), -1.0, 0),
)  # fmt: skip
CUT = episode(turn((1, 2, 3), (4, 4), 0.0, None), tail=Tail((6, 8), 0))
REWRITTEN = episode(turn((1, 2, 3), (5,), 0.0, None), turn((20, 21, 22), (9, 9), 2.0, None), tail=Tail((30, 31), None))
EPISODES = [PLAIN, FORKED, CUT, REWRITTEN]
GROUPS = [Group("g", TASK, (PLAIN, FORKED), 0, 0), Group("h", TASK, (CUT, REWRITTEN), 0, 1)]
CONTEXTS: list[list[Ids]] = [
    [(1, 2, 3), (1, 2, 3, 4, 5, 6, 7)],
    [(1, 2, 3), (1, 2, 3, 9, 10, 6), (1, 2, 3, 9, 10, 7, 7)],
    [(1, 2, 3), (1, 2, 3, 4, 4, 6, 8)],  # the last is the tail's
    [(1, 2, 3), (20, 21, 22), (30, 31)],
]


def naive_views(model: Any, head: torch.nn.Linear) -> list[EpisodeView]:
    """Each episode as an estimator should see it: V is read off a forward of each prefix alone."""

    @torch.no_grad()
    def v(ids: Ids) -> float:
        hidden = model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        return float(hidden @ head.weight[0] + head.bias)

    out = []
    for t, contexts in zip(EPISODES, CONTEXTS, strict=True):
        said = [x.completion.ids for x in t.turns]
        values = tuple(tuple(v(c + s[:i]) for i in range(len(s))) for c, s in zip(contexts, said, strict=False))
        tail = v(contexts[-1]) if t.tail else 0.0
        out.append(EpisodeView.of(t, values_K=values, tail_value=tail))
    return out


def algorithm(kind: str, *, normalize: Normalize = "none", **options: float) -> AlgorithmConfig:
    return AlgorithmConfig(advantage=Choice(kind, options), critic=CriticConfig(kind="trunk"), normalize=normalize)


def per_turn(batch: Batch, name: str = "") -> list[list[list[float]]]:
    """What each turn of each episode trains with."""
    out: list[list[list[float]]] = [[[] for _ in t.turns] for t in EPISODES]
    for row in batch.rows:
        numbers = row.columns[name] if name else row.advantages
        for k in set(row.turns[row.mask].tolist()):
            out[row.episode][k] = numbers[row.turns == k].tolist()
    return out


def made_by(tmp_path: Path, a: AlgorithmConfig) -> tuple[Batch, list[EpisodeView]]:
    model = tiny_model()
    made = learner(model, tmp_path / "m", algorithm=a)
    views = naive_views(model, randomise(made))
    return run(made, lambda it: batch_for(it, GROUPS, a, temperature=0.7)), views


def test_ratios_are_those_of_the_learners_policy_over_all_rows_of_an_episode(tmp_path: Path) -> None:
    model, a = tiny_model(), AlgorithmConfig(advantage=Choice("opob"))
    batch = run(learner(model, tmp_path / "m", algorithm=a), lambda it: batch_for(it, GROUPS, a, temperature=0.7))
    logs = [0.0] * 4
    for row in batch.rows:
        logs[row.episode] += row_logprobs(model, row, 0.7).sum().item() - float(row.logprobs[row.mask].sum())
    assert max(map(abs, logs)) > 1.0
    episodes = [EpisodeView.of(t) for t in EPISODES]
    views = [replace(view, log_ratio=log) for view, log in zip(episodes, logs, strict=True)]
    expected = [a for group in (views[:2], views[2:]) for a in opob(group)]
    for row in batch.rows:
        for k in set(row.turns[row.mask].tolist()):
            assert row.advantages[row.turns == k].tolist() == pytest.approx(
                [float(expected[row.episode][k])] * int((row.turns == k).sum()), abs=1e-4
            )
    assert credit_metrics(GROUPS, a)["groups_without_signal"] == 0.0
    same = replace(GROUPS[0], trajectories=(PLAIN, PLAIN))
    assert not signal_of(a)(same)


@pytest.mark.parametrize("kind", ["gae", "bilevel_gae"])
def test_advantages_and_targets_of_every_token(tmp_path: Path, kind: str) -> None:
    function = {"gae": gae, "bilevel_gae": bilevel_gae}[kind]
    batch, views = made_by(tmp_path, algorithm(kind, lam=0.8))
    assert (batch.episodes, batch.version, batch.temperature) == (4, 0, 0.7)
    found, values, returns = per_turn(batch), per_turn(batch, "values"), per_turn(batch, "returns")
    for i, (view, expected) in enumerate(zip(views, function(views, lam=0.8), strict=True)):
        assert view.values_K is not None
        for k, (a, v) in enumerate(zip(expected, view.values_K, strict=True)):
            assert found[i][k] == pytest.approx(a.tolist(), abs=1e-5)
            assert values[i][k] == pytest.approx(v, abs=1e-5)
            assert returns[i][k] == pytest.approx([x + y for x, y in zip(a.tolist(), v, strict=True)], abs=1e-5)
    assert sum(r.columns["fitted"].sum() for r in batch.rows) == sum(r.mask.sum() for r in batch.rows)
    assert abs(views[2].tail_value) > 1e-2
    assert abs(views[3].tail_value) > 1e-2


def test_a_turn_estimator_fits_the_values_before_the_turns(tmp_path: Path) -> None:
    batch, views = made_by(tmp_path, algorithm("turn_gae"))
    found, fitted, returns = per_turn(batch), per_turn(batch, "fitted"), per_turn(batch, "returns")
    for i, (view, expected) in enumerate(zip(views, turn_gae(views), strict=True)):
        assert view.values_K is not None
        for k, (a, v) in enumerate(zip(expected.tolist(), view.values_K, strict=True)):
            assert found[i][k] == pytest.approx([a] * len(v), abs=1e-5)
            assert fitted[i][k] == [1.0] + [0.0] * (len(v) - 1)
            assert returns[i][k][0] == pytest.approx(a + v[0], abs=1e-5)


def test_normalisation_comes_after_the_targets(tmp_path: Path) -> None:
    plain, _ = made_by(tmp_path / "a", algorithm("gae"))
    white, _ = made_by(tmp_path / "b", algorithm("gae", normalize="batch"))
    raw, found = (np.concatenate([r.advantages[r.mask] for r in batch.rows]) for batch in (plain, white))
    assert found == pytest.approx((raw - raw.mean()) / raw.std(), abs=1e-5)
    for a, b in zip(plain.rows, white.rows, strict=True):
        assert all(np.array_equal(a.columns[name], b.columns[name]) for name in a.columns)


def test_values_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    a = algorithm("gae")
    made = learner(tiny_model(), tmp_path / "m", algorithm=a)
    with torch.no_grad():
        critic_of(made).head.bias.fill_(math.inf)
    with pytest.raises(ConfigError, match=r"no finite numbers any more: .*lower algorithm.critic.lr"):
        run(made, lambda it: batch_for(it, GROUPS, a, temperature=1.0))


def first_value(group: Sequence[EpisodeView]) -> list[torch.Tensor]:
    return [torch.tensor([e.total - e.values_K[0][0]] * len(e.rewards_K)) for e in group if e.values_K]


first_value.reads_values = True  # type: ignore[attr-defined]


def test_an_estimator_of_an_author_reads_them_too(tmp_path: Path) -> None:
    batch, views = made_by(tmp_path, algorithm(f"{__name__}:first_value"))
    for found, view in zip(per_turn(batch), views, strict=True):
        assert view.values_K is not None
        assert found[0] == pytest.approx([view.total - view.values_K[0][0]] * view.tokens_K[0], abs=1e-5)


def test_who_reads_no_values_asks_nobody(tmp_path: Path) -> None:
    made, a = learner(tiny_model(), tmp_path / "m"), AlgorithmConfig()

    async def job(it: TorchLearner) -> Batch:
        return await batch_for(it, GROUPS, a, temperature=1.0)

    batch = run(made, job)
    for row, other in zip(batch.rows, batch_of(GROUPS, a, 0, 1.0).rows, strict=True):
        assert not row.columns
        assert np.array_equal(row.advantages, other.advantages)


def test_the_critic_comes_to_know_what_is_to_come(tmp_path: Path) -> None:
    """Its own targets, again and again: V of the plain episode nears 1.5 before turn 0 and 1 before turn 1."""
    a = AlgorithmConfig(advantage=Choice("gae"), critic=CriticConfig(kind="trunk", lr=0.05, warmup_steps=30))
    group = Group("g", TASK, (PLAIN, PLAIN), 0, 0)
    made = learner(tiny_model(), tmp_path / "m", LearnerConfig(precision="fp32"), a, total_steps=40)

    async def job(it: TorchLearner) -> Batch:
        for _ in range(30):
            await it.step(await batch_for(it, [group], a, temperature=1.0))
        return await batch_for(it, [group], a, temperature=1.0)

    values = per_turn(run(made, job), "values")[0]
    assert values[0] == pytest.approx([1.5, 1.5], abs=0.2)
    assert values[1] == pytest.approx([1.0], abs=0.2)
