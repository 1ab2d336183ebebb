"""Tasks of the same content: means over all of them as they were drawn, intervals and tests over the different ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from areal_agents.evaluation.compare import Evaluation, compare
from areal_agents.evaluation.copies import by_content, effective
from areal_agents.evaluation.curves import _reward_interval
from areal_agents.evaluation.held_out import Sample
from areal_agents.evaluation.leaderboard import _difference, _mean_difference, _score
from areal_agents.evaluation.paired import pass_interval
from areal_agents.evaluation.report import EvalReport, compare_table, summarize
from areal_agents.evaluation.statistics import clustered_interval, mean_interval, wilson_interval
from areal_agents.evaluation.suite import SuiteEntry
from areal_agents.tracking.trajectories import Record, shard_path, write_shard
from areal_agents.types import AssistantMessage, Completion, Task, Text, Trajectory, Turn

ONE_OF_TWO = (0.0945, 0.9055)
"""Wilson's interval of 1 of 2."""


def attempt(content: str, n: int, reward: float, group: str = "g") -> Trajectory:
    """An attempt at copy ``n`` of a task."""
    turn = Turn((1,), Completion((2,), (-1.0,), (0,), "stop"), AssistantMessage((Text("x"),)), reward)
    task = Task.make(f"{content}{n}", split="test", seed=n, payload={"content": content})
    return Trajectory(f"{content}{n}/{group}", task, group, (turn,), True, False, "answer")


def report(contents: str, rewards: Sequence[Sequence[float]]) -> EvalReport:
    tries = [[attempt(c, n, r) for r in row] for n, (c, row) in enumerate(zip(contents, rewards, strict=True))]
    return summarize(
        [(row[0].task, row) for row in tries],
        env="e", split="test", model="m", version=0, temperature=1.0, seed=0, seconds=1.0,
    )  # fmt: skip


def evaluation(name: str, contents: str, rewards: Sequence[float]) -> Evaluation:
    return Evaluation(
        name, {("test", f"{c}{n}", c): [r] for n, (c, r) in enumerate(zip(contents, rewards, strict=True))}
    )


def test_sums_and_numbers_of_copies() -> None:
    assert by_content("abac", [1, 0, 1, 5]) == ([2, 0, 5], [2, 1, 1])
    assert effective([3, 1]) == 1.6  # 4² / (9 + 1)
    assert effective([2, 2, 2]) == 3.0


def test_copies_that_agree_are_worth_one_task() -> None:
    """A and B three times each, all of A pass: 1 of 2, and not 3 of 6, whose interval is (0.19, 0.81)."""
    found = report("ababab", [[1.0], [0.0]] * 3)
    assert (found.n, found.copies, found.attempts, found.pass_at_1) == (2, 4, 6, 0.5)
    assert found.ci95 == pytest.approx(ONE_OF_TWO, abs=1e-4)
    assert found.ci95 == report("ab", [[1.0], [0.0]]).ci95
    assert found.pass_at_k_ci95 == pytest.approx(ONE_OF_TWO, abs=1e-4)
    text = compare_table({"e:test": found})
    assert "2 in 6" in text
    assert "note: 6 tasks have 2 different contents: copies count as one in intervals" in text
    assert ", n = 2 in 6, " in found.line("before")
    again = EvalReport.from_json(found.to_json())
    assert replace(again, sample=None) == found
    assert again.sample == Sample(6, None, None)


def test_uneven_copies_are_worth_fewer_tasks_than_there_are() -> None:
    """A three times and B once: the rate is 3/4, of 4² / (3² + 1²) = 1.6 tasks."""
    found = report("aaab", [[1.0], [1.0], [1.0], [0.0]])
    assert found.pass_at_1 == 0.75
    assert found.ci95 == pytest.approx((0.1691, 0.9779), abs=1e-4) == wilson_interval(0.75, 1.6)
    assert clustered_interval([3, 0], [3, 1]) == found.ci95


def test_copies_that_differ_tell_more_but_less_than_tasks() -> None:
    """Five contents with 3 of 4 copies passed and five with 1 of 4: 27.02 tasks, as four attempts at each of ten."""
    found = report("abcdefghij" * 4, ([[1.0]] * 5 + [[0.0]] * 5) * 3 + [[0.0]] * 5 + [[1.0]] * 5)
    assert found.ci95 == pytest.approx((0.3236, 0.6764), abs=1e-4)  # as test_statistics.py has it for ten tasks


def test_a_comparison_is_that_of_one_copy() -> None:
    contents = "abcdefgh"
    one = compare(evaluation("A", contents, [0] * 8), evaluation("B", contents, [1] * 6 + [0] * 2))
    three = compare(evaluation("A", contents * 3, [0] * 24), evaluation("B", contents * 3, ([1] * 6 + [0] * 2) * 3))
    assert (three.n, three.copies, one.copies) == (8, 16, 0)
    assert three.pass_at_1 == one.pass_at_1
    assert three.reward == one.reward
    assert three.p_value == one.p_value == 2 / 64  # six coins that fall alike
    assert (three.gained, three.lost, three.ties) == (("a0", "b1", "c2", "d3", "e4", "f5"), (), 2)
    assert "8 different tasks (24 with copies), 1 and 1 attempts a task" in three.table()
    assert "(sign-flip permutation test by task)" in three.table()
    assert "24 tasks have 8 different contents: copies count as one in interval and test" in three.notes


def test_a_comparison_of_uneven_copies_by_hand() -> None:
    """Content a, drawn twice, is gained; b and c are not: the mean is 2/4, of three tasks with the weights 2, 1, 1."""
    found = compare(evaluation("A", "aabc", [0, 0, 0, 0]), evaluation("B", "aabc", [1, 1, 0, 0]))
    assert found.pass_at_1.difference == 0.5
    assert found.p_value == 1.0  # one coin
    # h = 1/2, 1/4, 1/4: Σh² = 3/8, Σh³ = 5/32; Σh² / (Σh²(1 + Σh²) - 2Σh³) = (3/8) / (13/64) = 24/13, and not 3/2.
    # 24/13 · ((2/4 · 1/2)² + 2 · (1/4 · 1/2)²) = 9/52; 8/3 equal tasks, rounded up 3: t(0.975; 2) = 4.30265
    half = 4.30265 * 3 / math.sqrt(52)
    assert mean_interval([1.0, 0.0, 0.0], [2, 1, 1]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    assert found.pass_at_1.ci95 == (-1.0, 1.0)
    assert pass_interval([0.0, 0.0], [3, 1]) == pytest.approx((-(1 - 0.025 ** (1 / 1.6)), 1 - 0.025 ** (1 / 1.6)))


def test_a_task_with_most_of_the_copies_does_not_make_the_interval_narrow() -> None:
    """One content fifty times, four others once: without the weights' own variance 7 to 43 % held the mean."""
    rng, copies, held, held_mean = np.random.default_rng(0), np.array([50, 1, 1, 1, 1]), 0, 0
    for _ in range(500):
        wins = rng.binomial(4 * copies, rng.random(5))  # rates are uniform
        low, high = clustered_interval(wins.tolist(), (4 * copies).tolist())
        held += low <= 0.5 <= high
        ends = mean_interval(rng.normal(size=5).tolist(), copies.tolist())
        assert ends is not None
        held_mean += ends[0] <= 0.0 <= ends[1]
    assert min(held, held_mean) >= 475


def test_few_that_ever_passed_do_not_tell_how_alike_attempts_are() -> None:
    """Thirty tasks with 40 attempts each, all of them failed, or all but one."""
    none, one = (clustered_interval([first] + [0] * 29, [40] * 30) for first in (0, 1))
    assert none == wilson_interval(0.0, 30)
    # Var_cluster is 30/29 · 29/30 / 1200², Var_binomial 1/1200 · 1199/1200 / 1200: N / deff = 1199, times
    # (1.95996 / 2.04523)² = 1101.1. One task of the ten that would tell: 30 + 1071.1 / 10 = 137.1.
    assert one == pytest.approx(wilson_interval(1 / 1200, 137.1), abs=1e-4)
    assert one[1] > 0.025  # 0.006 as of 1,101 tasks, where a single success would make less of all that failed
    rng, held = np.random.default_rng(0), 0
    for _ in range(500):  # rates are Beta(0.04, 1.96), 0.02 in the mean; 0.8 of the intervals held it
        low, high = clustered_interval(rng.binomial(40, rng.beta(0.04, 1.96, 30)).tolist(), [40] * 30)
        held += low <= 0.02 <= high
    assert held >= 460


def test_a_leaderboard_counts_different_tasks() -> None:
    entry = SuiteEntry(env="areal/Hanoi-v0", n=6, k=2, seeds=(0, 2))
    rewards = {("test", f"{c}{n}", c): [float(c == "a")] * 4 for n, c in enumerate("ababab")}
    found = _score(entry, "m", [], rewards, {})
    assert (found.n, found.copies, found.attempts, found.pass_at_1, found.pass_at_k) == (2, 4, 24, 0.5, 0.5)
    for interval in (found.ci95, found.pass_at_k_ci95, found.pass_hat_k_ci95):
        assert interval == pytest.approx(ONE_OF_TWO, abs=1e-4)
    alone = {key: value for key, value in rewards.items() if key[1] in ("a0", "b1")}
    assert replace(_score(entry, "m", [], alone, {}), copies=4, attempts=24) == found


def test_differences_of_a_leaderboard_count_different_tasks() -> None:
    first = {("test", f"{c}{n}", c): [0.0] for n, c in enumerate("abcd" * 5)}
    other = {key: [1.0] for key in first}
    found = _difference("m", "e", first, other)
    assert (found.n, found.difference, found.p_value) == (4, 1.0, 2 / 16)  # and not 2 / 2^20
    assert _mean_difference("m", [found], [(first, other)]).p_value == 2 / 16


def test_a_curves_interval_is_over_different_tasks(tmp_path: Path) -> None:
    """Groups of two tasks, one of which came twice and earned 1 both times: 2/3 of three groups, two tasks."""
    rows = [("a", 0, 1.0), ("a", 1, 1.0), ("b", 2, 0.0)]
    records = [Record("train", 4, attempt(c, n, r, f"g{n}")) for c, n, r in rows]
    write_shard(shard_path(tmp_path, "train", 4), records)
    # h = 2/3, 1/3: Σh² = 5/9, Σh³ = 1/3; (5/9) / (70/81 - 2/3) = 45/16. 45/16 · ((2/3 · 1/3)² + (1/3 · 2/3)²) = 5/18;
    # t(0.975; 1) = 12.7062
    half = 12.7062 * math.sqrt(5 / 18)
    assert _reward_interval(tmp_path, 4) == pytest.approx((2 / 3 - half, 2 / 3 + half), abs=1e-3)
