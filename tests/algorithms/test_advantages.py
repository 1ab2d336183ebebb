"""Hand-worked numbers, loop references, and exact-enumeration bias tests of ``areal_agents.algorithms.advantages``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.advantages import grpo
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Advantages, per_turn
from areal_agents.algorithms.estimator import Estimator as ChosenEstimator
from areal_agents.algorithms.registry import Choice
from areal_agents.algorithms.turn_credit import turn_return
from areal_agents.errors import RewardError
from tests.algorithms.exact import STOP_OR_GO_ON, THREE_TURNS, Estimate, expected_gradient, true_gradient

Rewards = Sequence[tuple[float, ...]]


def episodes(rewards: Rewards) -> list[EpisodeView]:
    return [EpisodeView(r) for r in rewards]


def lists(advantages: Sequence[Advantages]) -> list[list[float]]:
    return [per_turn(a) for a in advantages]


def nearly(expected: Sequence[Sequence[float]], tolerance: float = 1e-5) -> object:
    return [pytest.approx(list(e), abs=tolerance, rel=tolerance) for e in expected]


# --- EpisodeView -------------------------------------------------------------------------------------------------


def test_an_episode_needs_a_turn_and_finite_rewards() -> None:
    with pytest.raises(ValueError, match="without a turn"):
        EpisodeView(())
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(RewardError, match="turn 1"):
            EpisodeView((0.0, bad))


def test_a_reward_that_is_too_large_to_compare_is_refused_and_named() -> None:
    for bad in (1e300, -1e300, 1.1e30):
        with pytest.raises(RewardError, match=r"turn 1 is -?1(\.1)?e\+\d+: rewards may be up to 1e\+30 in size"):
            EpisodeView((0.0, bad))
    # At the limit every estimator is still right: R = ±1e30, mean 0, std = sqrt(2) 1e30.
    group = episodes([(1e30,), (-1e30,)])
    assert lists(grpo(group)) == nearly([[math.sqrt(0.5)], [-math.sqrt(0.5)]])
    assert lists(grpo(group, normalize=False)) == nearly([[1e30], [-1e30]])
    assert lists(turn_return(group)) == nearly([[2e30], [-2e30]])
    assert lists(ChosenEstimator(Choice("grpo"))(group)) == lists(grpo(group))
    assert lists(ChosenEstimator(Choice("turn_return"))(group)) == lists(turn_return(group))


# --- grpo -----------------------------------------------------------------------------------------------------------


def test_grpo_by_hand() -> None:
    # R = 1, 0, 2 (0.5 + 1.5); mean 1; deviations 0, -1, 1; std = sqrt((0 + 1 + 1) / 2) = 1.
    group = episodes([(1.0,), (0.0, 0.0), (0.5, 1.5)])
    assert lists(grpo(group)) == nearly([[0.0], [-1.0, -1.0], [1.0, 1.0]])
    assert all(a.dtype == torch.float32 for a in grpo(group))


def test_grpo_divides_by_the_sample_std() -> None:
    # R = 1, 0, 0, 0: mean 0.25; squares 0.5625 + 3 * 0.0625 = 0.75; std = sqrt(0.75 / 3) = 0.5.
    # A = 0.75 / 0.5 = 1.5 and -0.25 / 0.5 = -0.5.
    assert lists(grpo(episodes([(1.0,), (0.0,), (0.0,), (0.0,)]))) == nearly([[1.5], [-0.5], [-0.5], [-0.5]])


def test_grpo_counts_a_trajectory_once() -> None:
    # One 1-turn success, one 5-turn failure. Mean over trajectories 1/2: +0.5 and -0.5.
    # Mean over the six turn rows 1/6: +5/6 = +0.83 and -1/6 = -0.17, which is wrong.
    rewards = [(1.0,), (0.0,) * 5]
    assert lists(grpo(episodes(rewards), normalize=False)) == [[0.5], [-0.5] * 5]
    rows = [sum(r) for r in rewards for _ in r]
    row_weighted = [sum(r) - sum(rows) / len(rows) for r in rewards]
    assert row_weighted == pytest.approx([0.83, -0.17], abs=0.005)


def test_grpo_of_equal_rewards_is_zero() -> None:
    # 0.1 is not a binary fraction: the mean is off by a rounding.
    assert lists(grpo(episodes([(0.1,), (0.1,), (0.1,)]))) == [[0.0]] * 3


def test_grpo_refuses_a_group_of_one() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        grpo(episodes([(1.0,)]))


# --- turn_return ----------------------------------------------------------------------------------------------------


def test_turn_return_by_hand() -> None:
    # G: (1, 2) -> 3, 2.   (4,) -> 4.   (0, 1, 5) -> 6, 6, 5.
    # k = 0: 3 - (4 + 6)/2 = -2;  4 - (3 + 6)/2 = -0.5;  6 - (3 + 4)/2 = 2.5.
    # k = 1: the second is over: 2 - 6 = -4;  6 - 2 = 4.     k = 2: nobody else: 5 - 0 = 5.
    group = episodes([(1.0, 2.0), (4.0,), (0.0, 1.0, 5.0)])
    assert lists(turn_return(group)) == [[-2.0, -4.0], [-0.5], [2.5, 4.0, 5.0]]
    assert all(a.dtype == torch.float32 for a in turn_return(group))


def test_turn_return_discounts_per_turn() -> None:
    # γ = 0.5. (1, 2, 4): G_2 = 4, G_1 = 2 + 2 = 4, G_0 = 1 + 2 = 3.   (0, 8): G_1 = 8, G_0 = 4.
    # k = 0: 3 - 4 = -1, 4 - 3 = 1.   k = 1: 4 - 8 = -4, 8 - 4 = 4.   k = 2: 4.
    assert lists(turn_return(episodes([(1.0, 2.0, 4.0), (0.0, 8.0)]), gamma=0.5)) == [[-1.0, -4.0, 4.0], [1.0, 4.0]]


def test_turn_return_keeps_the_scale_of_rewards() -> None:
    # Never divided by a std: (10, 0) stays ±10.
    assert lists(turn_return(episodes([(10.0,), (0.0,)]))) == [[10.0], [-10.0]]


def test_turn_return_of_one_episode_has_baseline_zero() -> None:
    assert lists(turn_return(episodes([(1.0, 2.0)]))) == [[3.0, 2.0]]


def test_turn_return_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        turn_return([])
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma"):
            turn_return(episodes([(1.0,)]), gamma=gamma)


# --- against plain loops --------------------------------------------------------------------------------------------

numbers = st.floats(-10.0, 10.0, allow_nan=False, width=32)
groups = st.lists(st.lists(numbers, min_size=1, max_size=5).map(tuple), min_size=2, max_size=6)


def loop_grpo(rewards: Rewards, normalize: bool) -> list[list[float]]:
    totals = [sum(r) for r in rewards]
    mean = sum(totals) / len(totals)
    std = math.sqrt(sum((t - mean) ** 2 for t in totals) / (len(totals) - 1))
    scale = std + 1e-6 if normalize else 1.0
    return [[(t - mean) / scale] * len(r) for t, r in zip(totals, rewards, strict=True)]


def loop_turn_return(rewards: Rewards, gamma: float = 1.0) -> list[list[float]]:
    def g(r: tuple[float, ...], k: int) -> float:
        return sum(gamma ** (j - k) * r[j] for j in range(k, len(r)))

    out = []
    for i, mine in enumerate(rewards):
        row = []
        for k in range(len(mine)):
            others = [g(r, k) for j, r in enumerate(rewards) if j != i and len(r) > k]
            row.append(g(mine, k) - (sum(others) / len(others) if others else 0.0))
        out.append(row)
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(groups, st.booleans())
def test_grpo_equals_the_loop(rewards: Rewards, normalize: bool) -> None:
    assert lists(grpo(episodes(rewards), normalize=normalize)) == nearly(loop_grpo(rewards, normalize), 1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(groups, st.floats(0.0, 1.0))
def test_turn_return_equals_the_loop(rewards: Rewards, gamma: float) -> None:
    assert lists(turn_return(episodes(rewards), gamma=gamma)) == nearly(loop_turn_return(rewards, gamma), 1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), groups)
def test_the_order_of_a_group_does_not_matter(data: st.DataObject, rewards: Rewards) -> None:
    order = data.draw(st.permutations(range(len(rewards))))
    for estimate in (grpo, turn_return):
        straight = lists(estimate(episodes(rewards)))
        shuffled = lists(estimate(episodes([rewards[i] for i in order])))
        assert shuffled == nearly([straight[i] for i in order], 1e-4)


# --- bias, by exact enumeration -------------------------------------------------------------------------------------


def on_rewards(estimate: Callable[[Rewards], list[list[float]]]) -> Estimate:
    return lambda group: estimate([e.rewards_K for e in group])


def package_turn_return(group: list[EpisodeView]) -> list[list[float]]:
    return lists(turn_return(group))


def zero_when_alone(rewards: Rewards) -> list[list[float]]:
    """turn_return, but A = 0 where no other trajectory is alive."""
    out = loop_turn_return(rewards)
    return [[a if sum(len(r) > k for r in rewards) > 1 else 0.0 for k, a in enumerate(row)] for row in out]


def inclusive_mean(rewards: Rewards) -> list[list[float]]:
    """G_k minus the mean over all trajectories alive at k, the trajectory itself included."""
    out = []
    for mine in rewards:
        alive = [[sum(r[k:]) for r in rewards if len(r) > k] for k in range(len(mine))]
        out.append([sum(mine[k:]) - sum(alive[k]) / len(alive[k]) for k in range(len(mine))])
    return out


def reward_centred(rewards: Rewards) -> list[list[float]]:
    """r_k minus the mean of r_k over those alive at k, then summed from k on."""
    out = []
    for mine in rewards:
        alive = [[r[k] for r in rewards if len(r) > k] for k in range(len(mine))]
        centred = [mine[k] - sum(alive[k]) / len(alive[k]) for k in range(len(mine))]
        out.append([sum(centred[k:]) for k in range(len(mine))])
    return out


def test_turn_return_is_unbiased_when_few_trajectories_live() -> None:
    assert true_gradient(THREE_TURNS) == pytest.approx([0.05, 0.06, 0.05])
    assert expected_gradient(THREE_TURNS, 4, package_turn_return) == pytest.approx([0.05, 0.06, 0.05], abs=1e-6)


def test_zero_advantage_when_alone_shrinks_late_turns() -> None:
    # Alone at turn 2 with probability 0.8³ = 0.512: 0.05 · (1 − 0.512) = 0.0244.
    assert expected_gradient(THREE_TURNS, 4, on_rewards(zero_when_alone))[2] == pytest.approx(0.0244, abs=1e-6)


def test_an_inclusive_mean_shrinks_late_turns() -> None:
    # Factor 1 − E[1/n], n = 1 + Bin(3, 0.2): E[1/n] = (1 − 0.8⁴) / (4 · 0.2) = 0.738; 0.05 · 0.262 = 0.0131.
    assert expected_gradient(THREE_TURNS, 4, on_rewards(inclusive_mean))[2] == pytest.approx(0.0131, abs=1e-6)


@pytest.mark.parametrize("group_size", [2, 4])
def test_centring_returns_is_unbiased_and_centring_rewards_is_not(group_size: int) -> None:
    assert true_gradient(STOP_OR_GO_ON)[0] == pytest.approx(0.25)
    assert expected_gradient(STOP_OR_GO_ON, group_size, package_turn_return)[0] == pytest.approx(0.25, abs=1e-6)
    # Every reward equals the mean reward of its turn, so nothing is left.
    assert expected_gradient(STOP_OR_GO_ON, group_size, on_rewards(reward_centred))[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("group_size", [2, 4])
def test_grpo_without_division_is_scaled_by_its_own_place_in_the_mean(group_size: int) -> None:
    # As its docstring says: (G − 1)/G of the true gradient.
    def estimate(group: list[EpisodeView]) -> list[list[float]]:
        return lists(grpo(group, normalize=False))

    expected = [g * (group_size - 1) / group_size for g in (0.05, 0.06, 0.05)]
    assert expected_gradient(THREE_TURNS, group_size, estimate) == pytest.approx(expected, abs=1e-6)


# --- equal rewards --------------------------------------------------------------------------------------------------

# As floating point sees them: 0.1 + 0.2 is 0.30000000000000004, and the mean of three 0.7 is 0.6999999999999998.
EQUAL: list[Rewards] = [
    [(0.7,)] * 3,
    [(0.1 + 0.2,), (0.3,)],
    [(0.95,)] * 7,
    [(0.1,)] * 7,
    [(0.1, 0.2), (0.3,), (0.2, 0.0, 0.1)],
    [(0.0, 0.7), (0.7,), (0.0, 0.0, 0.7)],
    [(-0.7, 1.4), (0.7,), (1.1, -0.4)],
    [(0.1,), (0.1 - 1e-17,), (0.1 + 1e-17,)],
    [(1e6 + 0.1,), (1e6 + 0.1,), (1e6 + 0.1,)],
    [(5e-324,), (0.0,)],
    [(0.0,)] * 3,
]


@pytest.mark.parametrize("rewards", EQUAL)
@pytest.mark.parametrize("normalize", [True, False])
def test_equal_returns_give_exactly_zero(rewards: Rewards, normalize: bool) -> None:
    assert all(x == 0.0 for a in grpo(episodes(rewards), normalize=normalize) for x in per_turn(a))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.7])
@pytest.mark.parametrize("one", [(0.7,), (0.1, 0.2, 0.7), (0.95, 0.0), (0.3, 0.3, 0.3, 0.1)])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_returns_from_a_turn_on_give_exactly_zero(one: tuple[float, ...], size: int, gamma: float) -> None:
    assert all(x == 0.0 for a in turn_return(episodes([one] * size), gamma=gamma) for x in per_turn(a))


def test_turns_with_equal_returns_give_zero_beside_turns_that_differ() -> None:
    # G at turn 0: 0.1 + 0.2, 0.3 and 0.2 + 0.1: the same. At turn 1: 0.2 and 0.1, one other each.
    found = lists(turn_return(episodes([(0.1, 0.2), (0.3,), (0.2, 0.1)])))
    assert [a[0] for a in found] == [0.0, 0.0, 0.0]
    assert [found[0][1], found[2][1]] == pytest.approx([0.1, -0.1])


def test_an_episode_at_the_mean_of_its_group_has_advantage_zero() -> None:
    # 0.7 is the mean of 0.6, 0.7 and 0.8, up to 1e-16.
    assert lists(grpo(episodes([(0.6,), (0.7,), (0.8,)])))[1] == [0.0]


def test_small_differences_are_no_rounding() -> None:
    assert lists(grpo(episodes([(0.5,), (0.5 + 1e-6,)]), normalize=False)) == nearly([[-5e-7], [5e-7]], 1e-9)


def test_turns_that_differ_little_keep_their_difference_at_equal_returns() -> None:
    # From turn 1 on 1 − 3e-5 and 1, each against the other: far over a rounding, and under 14 bits of the largest.
    group = episodes([(3e-5, 1 - 3e-5), (0.0, 1.0)])
    assert lists(ChosenEstimator(Choice("turn_return"))(group)) == nearly([[0.0, -3e-5], [0.0, 3e-5]], 1e-9)
    # The outcomes' part and the first turns' are 1.5e-5 over a deviation of 3e-5·√½, with opposite signs.
    share = 0.5 / (math.sqrt(0.5) + 1e-6 / 3e-5)
    assert lists(ChosenEstimator(Choice("mt_grpo"))(group)) == nearly([[0.0, -share], [0.0, share]])
    # Estimators of returns alone still say 0, whatever they make of a rounding.
    three = episodes([(3e-5, 0.7 - 3e-5), (0.0, 0.7), (0.7,)])
    for kind in ("grpo", "dr_grpo", "tests.algorithms.test_advantages:in_float32"):
        assert not any(x for a in lists(ChosenEstimator(Choice(kind))(three)) for x in a), kind
    # And where turns are the same but for a rounding there is nothing to keep.
    same = episodes([(0.1 + 0.2, 0.4), (0.3, 0.4)])
    assert lists(ChosenEstimator(Choice("turn_return"))(same)) == [[0.0, 0.0], [0.0, 0.0]]


def in_float32(group: Sequence[EpisodeView]) -> list[Tensor]:
    returns_G = torch.tensor([sum(e.rewards_K) for e in group])
    advantages_G = (returns_G - returns_G.mean()) / (returns_G.std() + 1e-8)
    return [a.expand(len(e.rewards_K)) for a, e in zip(advantages_G, group, strict=True)]


def uncentred(group: Sequence[EpisodeView]) -> list[Tensor]:
    return [torch.tensor(e.rewards_K) for e in group]


def below_one(group: Sequence[EpisodeView]) -> list[Tensor]:
    return [(1.0 - torch.tensor(e.rewards_K)).clamp(min=0.0) for e in group]


def chosen(function: Callable[..., list[Tensor]]) -> ChosenEstimator:
    return ChosenEstimator(Choice(f"{function.__module__}:{function.__name__}"))


@pytest.mark.parametrize("rewards", EQUAL)
def test_an_estimator_of_an_author_gives_exactly_zero_too(rewards: Rewards) -> None:
    assert all(x == 0.0 for a in chosen(in_float32)(episodes(rewards)) for x in per_turn(a))


def test_the_case_of_an_author_can_fail() -> None:
    # Without the guard, float32 makes 0.8 of seven rewards of 0.95: it divides 6e-8 by their spread.
    assert lists(in_float32(episodes([(0.95,)] * 7)))[0][0] > 0.5


def test_an_estimator_without_a_baseline_keeps_what_it_gives_for_equal_rewards() -> None:
    assert lists(chosen(uncentred)(episodes([(0.7,)] * 3))) == nearly([[0.7]] * 3, 1e-7)
    assert lists(chosen(below_one)(episodes([(0.7,)] * 3))) == nearly([[0.3]] * 3, 1e-7)
    assert lists(chosen(uncentred)(episodes([(0.0, 0.5), (0.5, 0.0)]))) == [[0.0, 0.5], [0.5, 0.0]]


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e9, 1e12])
def test_large_rewards_keep_their_normalised_advantages(scale: float) -> None:
    # Mean 4/3, variance (16 + 25 + 1)/9/2 = 7/3: -0.873, 1.091 and -0.218 at any scale, as ε is small.
    group = episodes([(0.0,), (3.0 * scale,), (1.0 * scale,)])
    found = [a[0] for a in lists(ChosenEstimator(Choice(kind="grpo"))(group))]
    assert found == pytest.approx([x / math.sqrt(7 / 3) for x in (-4 / 3, 5 / 3, -1 / 3)], rel=1e-5)


def test_small_rewards_of_turns_count_beside_equal_returns() -> None:
    # Both returns are 1. From turn 2 on the first has -0.0005 left and the second 0.
    group = episodes([(1.0, 0.0005, -0.0005), (1.0, 0.0, 0.0)])
    found = lists(ChosenEstimator(Choice(kind="turn_return"))(group))
    assert found == [pytest.approx([0.0, 0.0, -0.0005]), pytest.approx([0.0, 0.0, 0.0005])]
