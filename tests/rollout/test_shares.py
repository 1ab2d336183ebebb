"""Shares of environments hold at any moment, and follow from weights and seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.rollout.shares import Shares

weights_lists = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def places(weights: Sequence[float], n: int, seed: int = 0) -> list[int]:
    shares = Shares(weights, seed=seed)
    return [shares.at(i) for i in range(n)]


def test_two_to_one_by_hand() -> None:
    """p = (2/3, 1/3), k = 2, so a group is due from a lack of 1/2 on.

    Group 1: lacks 2/3 and 1/3, only the first is due. Group 2: 4/3 − 1 = 1/3 and 2/3, the second. Group 3: 2 − 1 = 1
    and 1 − 1 = 0, the first. Then everything is as at the start.
    """
    assert places([2.0, 1.0], 9) == [0, 1, 0] * 3
    assert places([4.0, 2.0], 9) == [0, 1, 0] * 3
    assert Shares([2.0, 1.0], seed=5).counts(7) == [5, 2]


def test_three_equal_ones_take_turns_in_an_order_of_the_seeds() -> None:
    orders = {tuple(places([1.0, 1.0, 1.0], 3, seed)) for seed in range(30)}
    assert len(orders) == 6
    for seed in range(5):
        first = places([1.0, 1.0, 1.0], 12, seed)
        assert first == first[:3] * 4
        assert sorted(first[:3]) == [0, 1, 2]


def test_a_rare_environment_comes_in_the_middle_of_its_turn() -> None:
    # Of ten groups it is due from the fifth on, where both lack 1/2 and the seed decides.
    ways = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert {tuple(places([9.0, 1.0], 20, seed)) for seed in range(20)} == {tuple(way * 2) for way in ways}


@given(weights_lists, st.integers(0, 10), st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_every_prefix_has_its_shares_to_within_one_group(weights: list[float], seed: int, n: int) -> None:
    shares, k = Shares(weights, seed=seed), len(weights)
    total = sum(map(Fraction, weights))
    bound = 1 - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
    counts = [0] * k
    for order in range(n):
        counts[shares.at(order)] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (order + 1) * Fraction(weight) / total) <= bound
    assert shares.counts(n) == counts
    assert shares.counts(n // 2) == [places(weights, n // 2, seed).count(i) for i in range(k)]


@given(st.tuples(st.floats(1e-2, 1e2), st.floats(1e-2, 1e2)), st.integers(1, 40), st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_any_window_of_two_environments_has_its_shares_to_within_one(
    weights: tuple[float, float], window: int, start: int
) -> None:
    found = places(weights, start + window)[start:]
    total = sum(map(Fraction, weights))
    for i, weight in enumerate(weights):
        assert abs(found.count(i) - window * Fraction(weight) / total) <= 1


def test_it_is_the_same_whenever_it_is_asked() -> None:
    weights = [0.1, 0.2, 0.7]  # no sum of them is exact in floating point
    whole, late = places(weights, 100, seed=3), Shares(weights, seed=3)
    assert late.at(99) == whole[99]
    assert [late.at(i) for i in range(100)] == whole
    assert [whole.count(i) for i in range(3)] == [10, 20, 70]
    assert max(b - a for a, b in pairwise([i for i, place in enumerate(whole) if place == 0])) <= 25


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_other_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive numbers"):
        Shares(weights, seed=0)
