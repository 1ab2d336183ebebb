"""Evaluation statistics by hand and by brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.evaluation.statistics import clustered_interval, pass_at_k, pass_hat_k


def test_pass_at_k_by_hand() -> None:
    # 4 attempts, 1 success, k = 2: 3 of the 6 pairs hold the success; no pair is all success.
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_hat_k(4, 1, 2) == 0.0
    # 4 attempts, 3 successes, k = 2: every pair holds one; 3 of 6 pairs are all success.
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_hat_k(4, 3, 2) == pytest.approx(0.5)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_both_equal_the_share_of_subsets(outcomes: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(outcomes)))
    subsets = list(combinations(outcomes, k))
    n, c = len(outcomes), sum(outcomes)
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))
    assert pass_hat_k(n, c, k) == pytest.approx(sum(all(s) for s in subsets) / len(subsets))


def test_k_beyond_the_attempts_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3 needs"):
        pass_at_k(2, 1, 3)


def test_one_attempt_a_task_is_wilsons_interval() -> None:
    # 8 of 10: Wilson's 95 % interval is (0.4902, 0.9433).
    low, high = clustered_interval([1] * 8 + [0] * 2, [1] * 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


def test_identical_attempts_count_once() -> None:
    # Every task's four attempts agree: four times the attempts, no more knowledge.
    once = clustered_interval([1] * 6 + [0] * 4, [1] * 10)
    four = clustered_interval([4] * 6 + [0] * 4, [4] * 10)
    assert four == pytest.approx(once, abs=0.02)


def test_a_perfect_score_keeps_an_interval() -> None:
    low, high = clustered_interval([1] * 20, [1] * 20)
    assert high == 1.0
    assert low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-4)


def test_nothing_attempted_is_an_error() -> None:
    with pytest.raises(ValueError, match="no attempt was scored"):
        clustered_interval([0], [0])
