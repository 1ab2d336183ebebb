"""Paired statistics against tables and by hand."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.evaluation.statistics import mean_interval, sign_test, student_t_quantile


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


def test_the_sign_test_by_hand() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 0) == 2 / 32  # both tails of 5 heads in 5 throws
    assert sign_test(1, 5) == sign_test(5, 1) == 2 * (1 + 6) / 64
    assert sign_test(3, 3) == 1.0  # twice the half that holds the middle is more than 1
    assert sign_test(4000, 4000) == 1.0  # numbers beyond the floats' range
