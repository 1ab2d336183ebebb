"""Hand-worked numbers, plain loops, exact enumeration and properties of the estimators in ``turn_credit.py``.

``turn_return`` is in ``test_advantages.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, per_turn
from areal_agents.algorithms.registry import ADVANTAGES, Choice
from areal_agents.algorithms.turn_credit import anchor_sizes, gigpo
from tests.algorithms.exact import STOP_OR_GO_ON, THREE_TURNS, Estimate, expected_gradient, true_gradient

Group = Sequence[EpisodeView]


@functools.cache
def chosen(kind: str, options: tuple[tuple[str, object], ...]) -> Estimator:
    return Estimator(Choice(kind, dict(options)))


def numbers(kind: str, **options: object) -> Estimate:
    estimator = chosen(kind, tuple(options.items()))
    return lambda group: [per_turn(a) for a in estimator(group)]


def of(kind: str, group: Group, **options: object) -> list[list[float]]:
    return numbers(kind, **options)(list(group))


def nearly(expected: Sequence[Sequence[float]]) -> object:
    return [pytest.approx(list(e), abs=1e-5, rel=1e-5) for e in expected]


# --- by hand --------------------------------------------------------------------------------------------------------


def test_kevin_by_hand() -> None:
    # γ = 0.5: G = (1 + 0.5·2, 2) = (2, 2) and (5,). Mean 3, deviations −1, −1, 2, std √(6/2) = √3.
    group = [EpisodeView((1.0, 2.0)), EpisodeView((5.0,))]
    assert of("kevin", group, gamma=0.5, normalize=False) == [[-1.0, -1.0], [2.0]]
    root = math.sqrt(3)
    assert of("kevin", group, gamma=0.5) == nearly([[-1 / root, -1 / root], [2 / root]])


def test_kevin_weighs_by_rows() -> None:
    # One success of 1 turn, one failure of 5: +5/6 and −1/6, where a trajectory that counts once gets ±0.5.
    group = [EpisodeView((1.0,)), EpisodeView((0.0,) * 5)]
    assert of("kevin", group, normalize=False) == nearly([[5 / 6], [-1 / 6] * 5])


def test_gigpo_by_hand() -> None:
    # γ = 0.5. Returns 4, 2: A^E = 1, −1. G: (0 + 0.5·4, 4) = (2, 4) and (2, 0)... of (2, 0): (2, 0).
    # State a: 2 and 2: 0. State b: 4 and 0: 2, −2.
    group = [EpisodeView((0.0, 4.0), state_keys_K=("a", "b")), EpisodeView((2.0, 0.0), state_keys_K=("a", "b"))]
    assert of("gigpo", group, gamma=0.5, normalize=False) == nearly([[1.0, 3.0], [-1.0, -3.0]])
    assert of("gigpo", group, gamma=0.5, normalize=False, step_weight=0.5) == nearly([[1.0, 2.0], [-1.0, -2.0]])
    # std of 4 and 2 is √2, of 4 and 0 √8: ±1/√2, and ±2/√8 = ±1/√2.
    half = 1 / math.sqrt(2)
    assert of("gigpo", group, gamma=0.5) == nearly([[half, 2 * half], [-half, -2 * half]])


def test_gigpo_leaves_turns_alone_that_no_other_met() -> None:
    # None is no state, whoever else has none; "b" and "c" are met once.
    group = [EpisodeView((0.0, 4.0), state_keys_K=(None, "b")), EpisodeView((2.0, 0.0), state_keys_K=(None, "c"))]
    assert of("gigpo", group, normalize=False) == [[1.0, 1.0], [-1.0, -1.0]]
    assert anchor_sizes(group) == [[1, 1], [1, 1]]


def test_gigpo_counts_a_state_that_an_episode_meets_twice_twice() -> None:
    # γ = 1. G = (1, 1, 1), (0,). "a": 1, 1 and 0: mean 2/3.
    group = [EpisodeView((0.0, 0.0, 1.0), state_keys_K=("a", "a", "b")), EpisodeView((0.0,), state_keys_K=("a",))]
    found = gigpo(group, gamma=1.0, normalize=False)
    assert [a.tolist() for a in found] == nearly([[0.5 + 1 / 3, 0.5 + 1 / 3, 0.5], [-0.5 - 2 / 3]])
    assert anchor_sizes(group) == [[3, 3, 1], [3]]


def test_mt_grpo_by_hand() -> None:
    # Outcomes 1, 0, 0 less 1/3. Turn 0 of those that went on: 3 and 1, less 2.
    group = [EpisodeView((3.0, 1.0)), EpisodeView((1.0, 0.0)), EpisodeView((0.0,))]
    third = 1 / 3
    assert of("mt_grpo", group, normalize=False) == nearly([[1 + 2 * third, 2 * third], [-1 - third, -third], [-third]])
    found = of("mt_grpo", group, normalize=False, turn_weight=0.5)
    assert found == nearly([[0.5 + 2 * third, 2 * third], [-0.5 - third, -third], [-third]])
    # std of (1, 0, 0): √(1/3); of (3, 1): √2.
    o, t = math.sqrt(3) / 3, 1 / math.sqrt(2)
    assert of("mt_grpo", group) == nearly([[t + 2 * o, 2 * o], [-t - o, -o], [-o]])


def test_mt_grpo_of_one_turn_is_grpo() -> None:
    group = [EpisodeView((1.0,)), EpisodeView((0.0,)), EpisodeView((0.5,))]
    assert of("mt_grpo", group) == of("grpo", group)
    alone = [EpisodeView((5.0, 1.0)), EpisodeView((0.0,))]  # nobody to compare the 5 with
    assert of("mt_grpo", alone, normalize=False) == [[0.5, 0.5], [-0.5]]


def test_grpo_process_by_hand() -> None:
    # Rewards 1, 3, 2: mean 2, std 1. Less the mean: −1, 1 and 0; summed from the end: 0, 1 and 0.
    group = [EpisodeView((1.0, 3.0)), EpisodeView((2.0,))]
    assert of("grpo_process", group) == nearly([[0.0, 1.0], [0.0]])
    assert of("grpo_process", group, normalize=False) == [[0.0, 1.0], [0.0]]


@pytest.mark.parametrize("kind", ["kevin", "gigpo", "mt_grpo", "grpo_process"])
def test_a_group_of_one_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind} compares .* at least 2, got 1"):
        ADVANTAGES.function(kind)([EpisodeView((1.0, 0.0))])


# --- bias, by exact enumeration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_rewards_that_are_centred_before_they_are_summed_lose_the_gradient(size: int) -> None:
    # Every reward is 1, and so is every mean: the policy learns nothing of going on.
    assert true_gradient(STOP_OR_GO_ON)[0] == pytest.approx(0.25)
    assert expected_gradient(STOP_OR_GO_ON, size, numbers("grpo_process"))[0] == 0.0
    assert expected_gradient(STOP_OR_GO_ON, size, numbers("mt_grpo"))[0] == 0.0


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_process_is_no_scaled_gradient(size: int) -> None:
    found = expected_gradient(THREE_TURNS, size, numbers("grpo_process", normalize=False))
    ratios = [f / g for f, g in zip(found, true_gradient(THREE_TURNS), strict=True)]
    assert max(ratios) - min(ratios) > 0.05


def test_kevin_compares_late_turns_with_early_ones() -> None:
    # G = 2, γ = 1. Turn returns 1 (stop) or 2, 1. Mixed groups (1/2): mean 4/3, A = −1/3 short, 2/3 at its turn 0.
    # Two that go on (1/4): mean 3/2, A = 1/2 each. Two that stop: 0. With scores ∓1/2 of the first turn:
    by_hand = 1 / 2 * 1 / 2 * (1 / 3 / 2 + 2 / 3 / 2) + 1 / 4 * 1 / 2 * (2 * 1 / 2 / 2)
    found = expected_gradient(STOP_OR_GO_ON, 2, numbers("kevin", gamma=1.0, normalize=False))[0]
    assert found == pytest.approx(by_hand, abs=1e-6)
    assert found > 0.125 + 0.05  # more than the half that a mean over trajectories leaves


def test_gigpo_adds_what_an_inclusive_mean_of_each_state_leaves() -> None:
    # A^E leaves 3/4 of 0.05, 0.06, 0.05 for G = 4. A^S adds 1 − E[1/n] of it, n alive at the turn:
    # all four at turn 0; n = 1 + Bin(3, 0.5) at turn 1; n = 1 + Bin(3, 0.2) at turn 2.
    # E[1/n] = (1 − (1 − p)^4)/(4p): 0.46875 and 0.738.
    expected = [0.05 * 1.5, 0.06 * (0.75 + 1 - 0.46875), 0.05 * (0.75 + 1 - 0.738)]
    found = expected_gradient(THREE_TURNS, 4, numbers("gigpo", gamma=1.0, normalize=False))
    assert found == pytest.approx(expected, abs=1e-6)


# --- plain loops ----------------------------------------------------------------------------------------------------

reward = st.integers(-8, 8).map(lambda n: n / 4)
turn = st.tuples(reward, st.sampled_from([None, "a", "b", "c"]))
episode = st.lists(turn, min_size=1, max_size=4).map(
    lambda turns: EpisodeView(tuple(r for r, _ in turns), state_keys_K=tuple(key for _, key in turns))
)
groups = st.lists(episode, min_size=2, max_size=6)


def centred(values: Sequence[float], normalize: bool) -> list[float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1)) if len(values) > 1 else 1.0
    if len(values) < 2:
        return [0.0 for _ in values]
    return [(x - mean) / (std + 1e-6 if normalize else 1.0) for x in values]


def loop(kind: str, group: Group, normalize: bool, gamma: float = 0.9) -> list[list[float]]:
    places = [(i, k) for i, e in enumerate(group) for k in range(len(e.rewards_K))]
    rewards = {(i, k): group[i].rewards_K[k] for i, k in places}
    returns = {
        (i, k): sum(gamma ** (j - k) * group[i].rewards_K[j] for j in range(k, len(group[i].rewards_K)))
        for i, k in places
    }
    found: dict[tuple[int, int], float] = {}
    if kind == "kevin":
        found = dict(zip(places, centred([returns[p] for p in places], normalize), strict=True))
    elif kind == "grpo_process":
        parts = dict(zip(places, centred([rewards[p] for p in places], normalize), strict=True))
        found = {(i, k): sum(x for (j, m), x in parts.items() if j == i and m >= k) for i, k in places}
    elif kind == "gigpo":
        whole = centred([sum(e.rewards_K) for e in group], normalize)
        for i, k in places:
            key = group[i].state_keys_K[k]
            same = [p for p in places if key is not None and group[p[0]].state_keys_K[p[1]] == key]
            steps = dict(zip(same, centred([returns[p] for p in same], normalize), strict=True)) if same else {}
            found[i, k] = whole[i] + steps.get((i, k), 0.0)
    else:
        whole = centred([e.rewards_K[-1] for e in group], normalize)
        for i, k in places:
            last = k == len(group[i].rewards_K) - 1
            same = [p for p in places if p[1] == k and k < len(group[p[0]].rewards_K) - 1]
            parts = {} if last else dict(zip(same, centred([rewards[p] for p in same], normalize), strict=True))
            found[i, k] = whole[i] + parts.get((i, k), 0.0)
    return [[found[i, k] for k in range(len(e.rewards_K))] for i, e in enumerate(group)]


OPTIONS: dict[str, dict[str, object]] = {
    "kevin": {"gamma": 0.9}, "gigpo": {"gamma": 0.9}, "mt_grpo": {}, "grpo_process": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(OPTIONS))
@pytest.mark.parametrize("normalize", [True, False])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(group=groups)
def test_it_equals_the_loop(kind: str, normalize: bool, group: list[EpisodeView]) -> None:
    found = of(kind, group, normalize=normalize, **OPTIONS[kind])
    assert found == [pytest.approx(a, rel=1e-4, abs=1e-4) for a in loop(kind, group, normalize)]


@pytest.mark.parametrize("kind", list(OPTIONS))
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), group=groups)
def test_the_order_of_a_group_does_not_matter(kind: str, data: st.DataObject, group: list[EpisodeView]) -> None:
    order = data.draw(st.permutations(range(len(group))))
    straight = of(kind, group)
    assert of(kind, [group[i] for i in order]) == nearly([straight[i] for i in order])


@pytest.mark.parametrize(("kind", "options"), [("kevin", {"gamma": 1.0}), ("gigpo", {"gamma": 1.0})])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(group=groups, shift=st.integers(-8, 8).map(lambda n: n / 4))
def test_a_shift_of_the_last_rewards_shifts_all_returns_and_changes_nothing(
    kind: str, options: dict[str, object], group: list[EpisodeView], shift: float
) -> None:
    moved = [EpisodeView((*e.rewards_K[:-1], e.rewards_K[-1] + shift), state_keys_K=e.state_keys_K) for e in group]
    assert of(kind, moved, **options) == nearly(of(kind, group, **options))


@pytest.mark.parametrize("kind", list(OPTIONS))
@pytest.mark.parametrize("one", [(0.7,), (0.1, 0.2, 0.7), (0.95, 0.0), (0.3, 0.3, 0.3, 0.1)])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_episodes_of_equal_rewards_differ_by_turns_alone(kind: str, one: tuple[float, ...], size: int) -> None:
    keys = tuple(f"s{k}" for k in range(len(one)))
    found = of(kind, [EpisodeView(one, state_keys_K=keys)] * size)
    assert all(a == found[0] for a in found)
    if kind in ("gigpo", "mt_grpo") or len(one) == 1:
        assert not any(x for a in found for x in a)
