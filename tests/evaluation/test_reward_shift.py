"""What changes when rewards change, by hand: means, flips, advantage signs, rank correlations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from areal_agents.algorithms.registry import Choice
from areal_agents.evaluation.rescore import Outcome, Rescored
from areal_agents.evaluation.reward_shift import SignChanges, advantage_shift, compare
from areal_agents.evaluation.statistics import spearman
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.trainer.batches import batch_of
from areal_agents.types import Group
from tests.saved_runs import TASKS, record


def rescored(group: str, task: str, old: tuple[float, ...], new: tuple[float, ...] | None, tokens: int = 2) -> Rescored:
    return Rescored(f"{group}/x", "train", 1, group, task, (tokens,) * len(old), old, new)


def outcome(*episodes: Rescored) -> Outcome:
    return Outcome(episodes, (), 0, ())


def test_the_comparison_by_hand() -> None:
    shift = compare(
        outcome(
            rescored("a", "t0", (0.0, 1.0), (1.0,)),
            rescored("a", "t0", (1.0,), (0.0,)),
            rescored("b", "t1", (0.0,), (0.5,)),
            rescored("b", "t1", (1.0,), (1.0,)),
            rescored("c", "t2", (1.0,), (0.0,)),
        ),
        reward="r",
    )
    assert (shift.scored, shift.tasks, shift.groups, shift.advantages) == (5, 3, 3, None)
    assert (shift.mean_old, shift.mean_new) == (0.8, 0.5)
    # Ranks less their mean: ½ ½ −2 ½ ½ and 1½ −1½ 0 1½ −1½, whose products sum to 0.
    assert shift.spearman == pytest.approx(0.0)
    assert shift.changed == 0.6
    assert (shift.pass_old, shift.pass_new, shift.episodes_flipped) == (0.8, 0.4, 2)
    # t0 passes 2 of 2, then 1 of 2 (half: it still passes); t1 1 of 2 both times; t2 1 of 1, then 0.
    assert [(f.task, f.old_pass, f.new_pass, f.episodes) for f in shift.flips] == [("t2", 1.0, 0.0, ("c/x",))]
    assert shift.tasks_flipped == pytest.approx(1 / 3)
    for line in ("mean reward 0.8 before, 0.5 now; changed on 60.0%", "t2    1.00       0.00       c/x"):
        assert line in shift.table()


def test_advantage_signs_by_hand() -> None:
    """turn_return with two single-turn episodes: the advantage is the difference to the other's reward."""
    shift = advantage_shift(
        [
            rescored("flips", "t0", (1.0,), (0.0,)),
            rescored("flips", "t0", (0.0,), (1.0,), tokens=5),
            rescored("loses", "t1", (1.0,), (1.0,)),
            rescored("loses", "t1", (0.0,), (1.0,)),
            rescored("gains", "t2", (0.25,), (0.5,), tokens=7),
            rescored("gains", "t2", (0.25,), (0.25,)),
            rescored("stays", "t3", (1.0,), (9.0,)),
            rescored("stays", "t3", (0.0,), (8.0,)),
            rescored("failed", "t3", (1.0,), None),
            rescored("failed", "t3", (0.0,), (1.0,)),
            rescored("alone", "t3", (0.0,), (1.0,)),
        ],
        AlgorithmConfig(),
    )
    assert (shift.groups, shift.skipped) == (6, 2)
    assert (shift.signal_old, shift.signal_new, shift.signal_lost, shift.signal_gained) == (3, 3, 1, 1)
    assert shift.tokens == SignChanges(total=24, flipped=7, to_zero=4, from_zero=9)


def test_turns_of_one_episode_change_apart() -> None:
    # Old: (0, 1) against (0, 0): +1 +1 and −1 −1. New: (1, −1) against (0, 0): 0 −1 and 0 +1.
    group = [
        replace(rescored("g", "t0", (0.0, 1.0), (1.0, -1.0)), tokens_K=(1, 2)),
        replace(rescored("g", "t0", (0.0, 0.0), (0.0, 0.0)), tokens_K=(4, 8)),
    ]
    expected = SignChanges(total=15, flipped=2 + 8, to_zero=1 + 4)
    assert advantage_shift(group, AlgorithmConfig()).tokens == expected


def test_rounding_is_no_signal() -> None:
    """Ten times 0.1 leaves 1e-17 over its mean, which GRPO divides by 1e-6."""
    group = [rescored("g", "t0", (0.1,), (100.1,)) for _ in range(10)]
    shift = advantage_shift(group, AlgorithmConfig(advantage=Choice("grpo")))
    assert (shift.signal_old, shift.signal_new) == (0, 0)


@pytest.mark.parametrize(
    "advantage",
    [
        Choice("turn_return"),
        Choice("turn_return", {"gamma": 0.5}),
        Choice("grpo"),
        Choice("grpo", {"normalize": False}),
    ],
)
def test_signs_are_those_that_training_computes(advantage: Choice) -> None:
    algorithm = AlgorithmConfig(advantage=advantage)
    rewards = [(0.0, 1.0), (0.5,), (1.0, -1.0, 0.25), (0.0,)]
    trajectories = tuple(record(0, i, *r).trajectory for i, r in enumerate(rewards))
    batch = batch_of([Group("g0", TASKS[0], trajectories, 0, 0)], algorithm, 0, 1.0)
    # All-equal new rewards make every new advantage 0 under both estimators while all turns are alive.
    changed = sum(
        bool(row.advantages[row.turns == k][0] != 0) for row in batch.rows for k in range(int(row.turns.max()) + 1)
    )
    zeros = [rescored("g", "t0", r, (0.0,) * len(r), tokens=1) for r in rewards]
    assert advantage_shift(zeros, algorithm).tokens == SignChanges(total=7, to_zero=changed)
    assert changed > 0


# --- rank correlation ------------------------------------------------------------------------------------------------


def test_rank_correlations_by_hand() -> None:
    # Σd² = 2: 1 − 6·2/(4·15).
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    # Mid-ranks 1.5 1.5 3 4 against 1 2 3 4: 4.5/√(4.5·5).
    assert spearman([0, 0, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert spearman([1, 2], [2, 1]) == -1.0


def test_rank_correlations_that_do_not_exist() -> None:
    assert spearman([1.0, 1.0], [0.0, 1.0]) is None
    assert spearman([3.0], [1.0]) is None
    assert spearman([], []) is None
    with pytest.raises(ValueError, match="finite"):
        spearman([1.0, math.nan], [1.0, 2.0])
    with pytest.raises(ValueError, match="equally many"):
        spearman([1.0], [1.0, 2.0])


def test_a_reward_that_differs_by_rounding_is_not_changed_and_has_no_signal() -> None:
    # 0.1 + 0.2 is 0.30000000000000004; ten times 0.1 is 0.9999999999999999, and passes.
    tenths = sum([0.1] * 10)
    both = outcome(
        rescored("a", "t0", (0.3,), (0.1 + 0.2,)),
        rescored("a", "t0", (0.1 + 0.2,), (0.3,)),
        rescored("b", "t1", (1.0,), (tenths,)),
        rescored("b", "t1", (0.0,), (0.0,)),
    )
    shift = compare(both, reward="r")
    assert (shift.changed, shift.pass_old, shift.pass_new, shift.episodes_flipped) == (0.0, 0.25, 0.25, 0)
    for kind in ("turn_return", "grpo"):
        advantages = advantage_shift(both.episodes, AlgorithmConfig(advantage=Choice(kind)))
        assert (advantages.signal_old, advantages.signal_new) == (1, 1)
        assert advantages.tokens == SignChanges(total=8)
