"""Evaluation statistics by hand, by brute force and against tables."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.evaluation.statistics import (
    clustered_interval,
    mean_interval,
    pass_at_k,
    pass_hat_k,
    sign_flip_test,
    student_t_quantile,
)


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


def test_an_interval_of_large_numbers_is_that_of_small_ones() -> None:
    # 1 and 3: mean 2, std sqrt(2), t(0.975; 1) = 12.7062: 2 ± 12.7062 sqrt(2) / sqrt(2).
    for scale in (1.0, 1e300, 1e160):
        assert mean_interval([scale, 3 * scale]) == pytest.approx((-10.7062 * scale, 14.7062 * scale), rel=1e-5)


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


def test_few_tasks_do_not_tell_how_alike_their_attempts_are() -> None:
    """Two tasks that happen to agree, of tasks whose rates are all different, once gave 8 + 8 independent attempts."""
    # t has one degree of freedom, 12.71: 16 (1.96 / 12.71)² is less than one attempt a task, which is what there is.
    assert clustered_interval([4, 4], [8, 8]) == pytest.approx((0.0945, 0.9055), abs=1e-4)  # Wilson of 1 of 2
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):  # rates are uniform; 0.81 of the intervals held their mean without t
        wins = rng.binomial(8, rng.random(3))
        low, high = clustered_interval(wins.tolist(), [8] * 3)
        held += low <= 0.5 <= high
    assert held >= 930


def test_the_interval_of_several_attempts_by_hand() -> None:
    # Five tasks with 3 of 4 and five with 1 of 4: Var_binomial 0.25 / 40, Var_cluster 10/9 · 10 · 1² / 40², so that
    # N / deff = 40 · 0.9 = 36, times (1.95996 / 2.26216)² = 27.024; Wilson's half width of 13.512 in 27.024 is 0.1764.
    assert clustered_interval([3] * 5 + [1] * 5, [4] * 10) == pytest.approx((0.3236, 0.6764), abs=1e-4)


def test_a_perfect_score_keeps_an_interval() -> None:
    low, high = clustered_interval([1] * 20, [1] * 20)
    assert high == 1.0
    assert low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-4)


def test_nothing_attempted_is_an_error() -> None:
    with pytest.raises(ValueError, match="no attempt was scored"):
        clustered_interval([0], [0])


# --- paired -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "p", "value"),
    [  # Abramowitz and Stegun, table 26.10
        (1, 0.975, 12.706), (2, 0.975, 4.303), (3, 0.975, 3.182), (4, 0.975, 2.776), (9, 0.975, 2.262),
        (30, 0.975, 2.042), (120, 0.975, 1.980), (2, 0.95, 2.920), (7, 0.995, 3.499), (40, 0.5, 0.0),
    ],
)  # fmt: skip
def test_the_t_quantile_is_the_tables(df: int, p: float, value: float) -> None:
    assert student_t_quantile(p, df) == pytest.approx(value, abs=6e-4)


def test_the_t_quantile_in_closed_form() -> None:
    # One degree of freedom is the Cauchy distribution; two have t = (2p - 1) √(2 / (4p(1 - p))).
    assert student_t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)
    assert student_t_quantile(0.975, 2) == pytest.approx(0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)), rel=1e-12)


@given(st.integers(1, 600))
def test_the_t_quantile_falls_towards_the_normal_one(df: int) -> None:
    here, after = student_t_quantile(0.975, df), student_t_quantile(0.975, df + 1)
    assert here > after > NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(("p", "df"), [(0.4, 3), (1.0, 3), (0.975, 0)])
def test_the_t_quantile_refuses(p: float, df: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        student_t_quantile(p, df)


def test_the_interval_by_hand() -> None:
    # 1, 0, 1, 1, 0: mean 0.6, variance (3 · 0.16 + 2 · 0.36) / 4 = 0.3, half width 2.776 √(0.3 / 5)
    assert mean_interval([1, 0, 1, 1, 0]) == pytest.approx((0.6 - 0.68, 0.6 + 0.68), abs=1e-3)
    assert mean_interval([0.5]) is None
    assert mean_interval([0.5, 0.5, 0.5]) is None


def test_the_sign_flip_test_by_hand() -> None:
    assert sign_flip_test([]) == sign_flip_test([0, 0]) == 1.0
    assert sign_flip_test([1] * 5 + [0] * 11) == 2 / 32  # both tails of 5 heads in 5 throws
    assert sign_flip_test([1, -1, -1, -1, -1, -1]) == 2 * (1 + 6) / 64
    assert sign_flip_test([1, -1]) == 1.0
    assert sign_flip_test([1] * 4000 + [-1] * 4000) == 1.0
    # of the 8 sums of ±2 ±1 ±1, six are at least 2 away from 0
    assert sign_flip_test([Fraction(1, 2), Fraction(1, 4), Fraction(-1, 4)]) == 6 / 8
    assert sign_flip_test([0.3 - 0.2, 0.2 - 0.1, 0.1]) == 2 / 8  # rounding makes no other differences


def _share_of_signs(differences: list[Fraction]) -> Fraction:
    """Return the share of all 2^n signs whose sum is as far from 0, counted sum by sum."""
    sums = Counter({Fraction(): 1})
    for d in differences:
        after: Counter[Fraction] = Counter()
        for value, count in sums.items():
            after[value + d] += count
            after[value - d] += count
        sums = after
    far = sum(count for value, count in sums.items() if abs(value) >= abs(sum(differences, Fraction())))
    return Fraction(far, 2 ** len(differences))


def test_the_sign_flip_test_is_the_share_of_all_signs() -> None:
    rng = random.Random(0)
    for i in range(60):
        d = [Fraction(rng.randint(-4, 4), 4) for _ in range(rng.randint(1, 8) if i < 40 else rng.randint(30, 60))]
        exact = float(_share_of_signs([x for x in d if x]))
        assert sign_flip_test(d) == pytest.approx(exact, rel=1e-12)
        # and the same for numbers of another size, which floats round
        assert sign_flip_test([3e-6 * float(x) for x in d]) == pytest.approx(exact, rel=1e-12)
        assert sign_flip_test([0.7e6 * float(x) for x in d]) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("n", [10, 40])
def test_small_differences_are_not_rounded_away(n: int) -> None:
    """They are as far from 0 as large ones, and beside a large one they are still there."""
    assert sign_flip_test([1e-5] * n) == pytest.approx(2 / 2**n)
    assert sign_flip_test([0.5] + [3e-5] * (n - 1)) == pytest.approx(2 / 2**n, abs=0 if n == 10 else 2e-5)


def test_shares_of_many_attempts_are_exact() -> None:
    """pass@k of many attempts has denominators that are no small ones."""
    rng = random.Random(1)
    for n in (12, 24):
        rates = [pass_at_k(16, rng.randint(0, 16), 8) - pass_at_k(16, rng.randint(0, 12), 8) for _ in range(n)]
        exact = float(_share_of_signs([x for x in rates if x]))
        assert sign_flip_test(rates) == pytest.approx(exact, rel=1e-9)


def test_the_sign_flip_test_is_estimated_where_the_sums_are_many() -> None:
    rng = random.Random(0)
    d = [rng.gauss(0.0, 1.0) for _ in range(20)]
    sums = np.zeros(1)
    for x in d:
        sums = np.concatenate([sums + x, sums - x])
    exact = float((np.abs(sums) >= abs(sum(d)) - 1e-9).mean())
    assert 0 < abs(sign_flip_test(d) - exact) < 5 * math.sqrt(exact * (1 - exact) / 100_000)
    assert sign_flip_test(d[:12]) == _share_of_signs([Fraction(x) for x in d[:12]])  # few: exact
    assert sign_flip_test([1 + rng.random() for _ in range(60)]) == 1 / 100_001  # never 0
