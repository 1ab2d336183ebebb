"""Hand-worked numbers, plain loops, exact enumeration and properties of the estimators in ``advantages.py``."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.algorithms.advantages import dr_grpo, maxrl, opo, opob, reinforce_pp, remax, rloo
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, per_turn
from areal_agents.algorithms.registry import ADVANTAGES, Choice
from areal_agents.errors import ConfigError, RewardError
from tests.algorithms.exact import STOP_OR_GO_ON, THREE_TURNS, Estimate, coin, expected_gradient, stop_or_go_on
from tests.algorithms.exact import true_gradient as gradient_of

Group = Sequence[EpisodeView]


def views(*rewards: tuple[float, ...], greedy: float | None = None) -> list[EpisodeView]:
    return [EpisodeView(r, greedy_return=greedy) for r in rewards]


@functools.cache
def chosen(kind: str, options: tuple[tuple[str, object], ...]) -> Estimator:
    return Estimator(Choice(kind, dict(options)))


def numbers(kind: str, **options: object) -> Estimate:
    """The estimator as training calls it, on a batch of one group."""
    estimator = chosen(kind, tuple(options.items()))
    return lambda group: [per_turn(a) for a in estimator(group)]


def firsts(kind: str, group: Group, **options: object) -> list[float]:
    return [a[0] for a in numbers(kind, **options)(list(group))]


# --- by hand --------------------------------------------------------------------------------------------------------


def test_dr_grpo_by_hand() -> None:
    assert [a.tolist() for a in dr_grpo(views((1.0, 2.0), (1.0,)))] == [[1.0, 1.0], [-1.0]]


def test_rloo_by_hand() -> None:
    # Others' means: (1 + 2)/2, (4 + 2)/2, (4 + 1)/2.
    assert [a.tolist() for a in rloo(views((3.0, 1.0), (1.0,), (2.0,)))] == [[2.5, 2.5], [-2.0], [-0.5]]


def test_remax_by_hand() -> None:
    assert [a.tolist() for a in remax(views((1.0, 0.0), (0.0,), greedy=0.25))] == [[0.75, 0.75], [-0.25]]


def test_opo_by_hand() -> None:
    # Lengths 3 and 1: b = (3·1 + 1·5)/4 = 2.
    group = [EpisodeView((0.0, 1.0), tokens_K=(1, 2)), EpisodeView((5.0,))]
    assert [a.tolist() for a in opo(group)] == [[-1.0, -1.0], [3.0]]


def weighed(*episodes: tuple[tuple[float, ...], tuple[int, ...], float]) -> list[EpisodeView]:
    return [EpisodeView(r, tokens_K=n, log_ratio=math.log(w)) for r, n, w in episodes]


def test_opob_by_hand() -> None:
    # w²·L: 4·3 = 12 and 1·1 = 1. b = (12·3 + 1·1)/13 = 37/13.
    group = weighed(((1.0, 2.0), (1, 2), 2.0), ((1.0,), (1,), 1.0))
    assert opob(group)[0].tolist() == pytest.approx([2 / 13] * 2)
    assert opob(group)[1].tolist() == pytest.approx([-24 / 13])
    # On policy it is opo, and no ratio is so large that the others' returns are lost to an overflow.
    even = weighed(((1.0, 2.0), (1, 2), 1.0), ((1.0,), (1,), 1.0))
    assert [a.tolist() for a in opob(even)] == [a.tolist() for a in opo(even)]
    far = [replace(e, log_ratio=x) for e, x in zip(even, (-500.0, 500.0), strict=True)]
    assert opob(far)[1].tolist() == pytest.approx([0.0], abs=1e-6)
    assert opob(far)[0].tolist() == pytest.approx([2.0] * 2)
    # Past the bound of 20, and past C, all count alike.
    past = [replace(e, log_ratio=x) for e, x in zip(even, (30.0, 500.0), strict=True)]
    assert [a.tolist() for a in opob(past, truncate=None)] == [a.tolist() for a in opo(even)]
    assert [a.tolist() for a in opob(past)] == [a.tolist() for a in opo(even)]
    with pytest.raises(ValueError, match="this group has no ratios"):
        opob(views((1.0,), (0.0,)))


def test_the_weight_of_opob_is_cut_where_the_corrections_is() -> None:
    # Weights 4 and 1, lengths 1, returns 1 and 0: b = 16/17; with C = 2 it is 4/5, with C = 1 or less the mean.
    group = weighed(((1.0,), (1,), 4.0), ((0.0,), (1,), 1.0))
    for truncate, baseline in ((None, 16 / 17), (5.0, 16 / 17), (2.0, 4 / 5), (1.0, 1 / 2), (0.25, 1 / 2)):
        assert -float(opob(group, truncate=truncate)[1]) == pytest.approx(baseline)
    assert [a.tolist() for a in opob(group)] == [a.tolist() for a in opob(group, truncate=2.0)]
    with pytest.raises(ValueError, match="truncate = 0"):
        opob(group, truncate=0)


@pytest.mark.parametrize("truncate", [None, 1.5])
def test_the_baseline_of_opob_has_the_least_variance(truncate: float | None) -> None:
    # Σ min(w, C)²·L·(R − b)², the second moment of the gradient's terms, over shifts of b.
    group = weighed(((1.0,), (3,), 2.0), ((0.0,), (1,), 0.5), ((0.25,), (7,), 1.25))
    advantages = [float(a[0]) for a in opob(group, truncate=truncate)]
    cut = [min(math.exp(e.log_ratio or 0.0), truncate or math.inf) for e in group]
    weights = [w**2 * e.tokens_K[0] for w, e in zip(cut, group, strict=True)]

    def moment(shift: float) -> float:
        return sum(w * (a - shift) ** 2 for w, a in zip(weights, advantages, strict=True))

    assert moment(0.0) < min(moment(0.01), moment(-0.01))


def test_reinforce_pp_by_hand() -> None:
    # Over the batch: mean 3, deviations −3, −1, 1, 3, std √5.
    groups = [views((0.0,), (2.0,)), views((4.0,), (6.0,))]
    found = [[a.item() for a in g] for g in reinforce_pp(groups)]
    root = math.sqrt(5)
    assert found == [pytest.approx([-3 / root, -1 / root]), pytest.approx([1 / root, 3 / root])]
    # Minus the group's mean: ±1 in both, std 1.
    found = [[a.item() for a in g] for g in reinforce_pp(groups, baseline="group")]
    assert found == [pytest.approx([-1.0, 1.0], rel=1e-5)] * 2


def test_reinforce_pp_by_tokens() -> None:
    # Tokens 3 and 1, returns 0 and 4: mean 1, variance (3·1 + 1·9)/4 = 3.
    groups = [[EpisodeView((0.0,), tokens_K=(3,)), EpisodeView((4.0,))]]
    found = [a.item() for a in reinforce_pp(groups, weight="token")[0]]
    assert found == pytest.approx([-1 / math.sqrt(3), 3 / math.sqrt(3)], rel=1e-5)


def test_pass_at_k_by_hand() -> None:
    # One success of 4, k = 2. The success: pairs with any other have 1, the others' pairs 0: 2·(1 − 0).
    # A failure: one of 3 partners is the success: 1/3; of the others' 3 pairs 2 hold it: 2/3: 2·(1/3 − 2/3).
    assert firsts("pass_at_k", views((1.0,), (0.0,), (0.0,), (0.0,))) == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3])
    # Two of 4: a success: 2·(1 − 1) over {1,0},{1,0},{0,0} → mean 2/3: 2·(1 − 2/3). A failure beside two: 2·(2/3 − 1).
    assert firsts("pass_at_k", views((1.0,), (1.0,), (0.0,), (0.0,))) == pytest.approx([2 / 3, 2 / 3, -2 / 3, -2 / 3])


def test_maxrl_by_hand() -> None:
    # Mean 1/4: (1 − 1/4)/(1/4) = 3 and −1.
    assert firsts("maxrl", views((1.0,), (0.0,), (0.0,), (0.0,))) == [3.0, -1.0, -1.0, -1.0]
    assert firsts("maxrl", views((0.0,), (0.0,))) == [0.0, 0.0]
    assert firsts("maxrl", views((1.0,), (1.0,))) == [0.0, 0.0]


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dr_grpo", "rloo", "opo", "pass_at_k", "maxrl"])
def test_a_group_of_one_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind} compares .* at least 2, got 1"):
        ADVANTAGES.function(kind)(views((1.0,)))


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        reinforce_pp([views((1.0,))])
    with pytest.raises(ValueError, match="baseline = 'group' compares"):
        reinforce_pp([views((1.0,)), views((1.0,), (2.0,))], baseline="group")
    with pytest.raises(ValueError, match="has none"):
        remax(views((1.0,), (0.0,)))
    with pytest.raises(RewardError, match=r"returns must be ≥ 0, and one is -0\.5"):
        maxrl(views((1.0,), (-0.5,)))
    empty = [EpisodeView((1.0,), tokens_K=(0,)), EpisodeView((0.0,), tokens_K=(0,))]
    with pytest.raises(ValueError, match="sampled tokens"):
        opo(empty)
    with pytest.raises(ValueError, match="sampled tokens"):
        reinforce_pp([empty], weight="token")


def test_k_must_be_less_than_the_group() -> None:
    Estimator(Choice("pass_at_k", {"k": 3})).require_size(4)
    Estimator(Choice("grpo")).require_size(2)
    with pytest.raises(ConfigError, match=r"algorithm\.advantage\.k = 4 .*rollout\.group_size = 4: raise it, or lower"):
        Estimator(Choice("pass_at_k", {"k": 4})).require_size(4)


# --- bias, by exact enumeration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcomes", [THREE_TURNS, STOP_OR_GO_ON, stop_or_go_on(0.2)])
@pytest.mark.parametrize("kind", ["rloo", "remax"])
@pytest.mark.parametrize("size", [2, 3])
def test_those_without_bias_have_none(kind: str, outcomes: list, size: int) -> None:  # type: ignore[type-arg]
    assert expected_gradient(outcomes, size, numbers(kind)) == pytest.approx(gradient_of(outcomes), abs=1e-6)


@pytest.mark.parametrize("outcomes", [THREE_TURNS, STOP_OR_GO_ON, coin(0.1)])
@pytest.mark.parametrize(("k", "size"), [(1, 2), (2, 3), (2, 4), (3, 4)])
def test_pass_at_k_ascends_the_best_of_k(outcomes: list, k: int, size: int) -> None:  # type: ignore[type-arg]
    found = expected_gradient(outcomes, size, numbers("pass_at_k", k=k))
    assert found == pytest.approx(gradient_of(outcomes, best_of=k), abs=1e-6)


def test_pass_at_k_of_a_group_that_lost_episodes_takes_the_largest_k_that_has_a_baseline() -> None:
    found = expected_gradient(THREE_TURNS, 3, numbers("pass_at_k", k=5))
    assert found == pytest.approx(gradient_of(THREE_TURNS, best_of=2), abs=1e-6)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_maxrl_ascends_the_first_terms_of_the_log_likelihood(size: int) -> None:
    terms = [[g / k for g in gradient_of(THREE_TURNS, best_of=k)] for k in range(1, size + 1)]
    first = [sum(column) for column in zip(*terms[:-1], strict=True)]
    found = expected_gradient(THREE_TURNS, size, numbers("maxrl"))
    assert found == pytest.approx(first, abs=1e-6)
    assert found != pytest.approx([sum(column) for column in zip(*terms, strict=True)], abs=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_dr_grpo_is_scaled_by_its_own_place_in_the_mean(size: int) -> None:
    scaled = [g * (size - 1) / size for g in gradient_of(THREE_TURNS)]
    assert expected_gradient(THREE_TURNS, size, numbers("dr_grpo")) == pytest.approx(scaled, abs=1e-6)


def test_grpo_weighs_a_hard_task_more_than_the_objective() -> None:
    ratios = [expected_gradient(coin(p), 4, numbers("grpo"))[0] / gradient_of(coin(p))[0] for p in (0.5, 0.1)]
    # c successes of 4: A = ((4 − c)/4, −c/4)/s, s² = c(4 − c)/12, so a group adds c(4 − c)/16/s = √(12·c(4 − c))/16.
    by_hand = [
        sum(math.comb(4, c) * p**c * (1 - p) ** (4 - c) * math.sqrt(12 * c * (4 - c)) / 16 for c in range(5))
        / (p * (1 - p))
        for p in (0.5, 0.1)
    ]
    assert ratios == pytest.approx(by_hand, rel=1e-4)
    assert ratios[1] > 1.04 * ratios[0]


@pytest.mark.parametrize(("p", "expected"), [(0.25, 0.078125), (0.75, 0.109375)])
def test_opo_is_not_merely_scaled(p: float, expected: float) -> None:
    # G = 2, lengths and returns 1 and 2. Mixed groups (2p(1 − p)) have b = 5/3: A = −2/3 short, 1/3 long.
    by_hand = 2 * p * (1 - p) / 2 * (-2 / 3 * -p + 1 / 3 * (1 - p))
    assert by_hand == pytest.approx(expected)
    assert expected_gradient(stop_or_go_on(p), 2, numbers("opo"))[0] == pytest.approx(expected, abs=1e-6)
    assert gradient_of(stop_or_go_on(p))[0] / 2 == pytest.approx(0.09375)  # the same for both, merely scaled


# --- plain loops ----------------------------------------------------------------------------------------------------

reward = st.integers(0, 8).map(lambda n: n / 4)
episode = st.lists(st.tuples(reward, st.integers(1, 5)), min_size=1, max_size=4).map(
    lambda turns: EpisodeView(tuple(r for r, _ in turns), tokens_K=tuple(n for _, n in turns), greedy_return=0.75)
)
groups_of_two = st.lists(episode, min_size=2, max_size=6)


def loop(kind: str, group: Group, **options: object) -> list[float]:
    """One number an episode, as slowly as can be."""
    returns = [sum(e.rewards_K) for e in group]
    n, mean = len(group), sum(returns) / len(group)
    rest = [returns[:i] + returns[i + 1 :] for i in range(n)]
    if kind == "dr_grpo":
        return [r - mean for r in returns]
    if kind == "rloo":
        return [r - sum(o) / (n - 1) for r, o in zip(returns, rest, strict=True)]
    if kind == "remax":
        return [r - 0.75 for r in returns]
    if kind == "opo":
        lengths = [sum(e.tokens_K) for e in group]
        b = sum(x * r for x, r in zip(lengths, returns, strict=True)) / sum(lengths)
        return [r - b for r in returns]
    if kind == "maxrl":
        return [(r - mean) / mean if mean else 0.0 for r in returns]
    if kind == "pass_at_k":
        k = min(int(str(options["k"])), n - 1)
        out = []
        for r, others in zip(returns, rest, strict=True):
            withs = [max((r, *s)) for s in itertools.combinations(others, k - 1)]
            without = [max(s) for s in itertools.combinations(others, k)]
            out.append(k * (sum(withs) / len(withs) - sum(without) / len(without)))
        return out
    assert kind == "reinforce_pp"
    copies = [1 if options["weight"] == "episode" else sum(e.tokens_K) for e in group]
    shifted = [r - mean for r in returns] if options["baseline"] == "group" else returns
    rows = [x for x, c in zip(shifted, copies, strict=True) for _ in range(c)]
    centre = sum(rows) / len(rows)
    std = math.sqrt(sum((x - centre) ** 2 for x in rows) / len(rows))
    return [(x - centre) / (std + 1e-6) for x in shifted]


CASES: list[tuple[str, dict[str, object]]] = [
    ("dr_grpo", {}), ("rloo", {}), ("remax", {}), ("opo", {}), ("maxrl", {}),
    ("pass_at_k", {"k": 1}), ("pass_at_k", {"k": 2}), ("pass_at_k", {"k": 4}),
    ("reinforce_pp", {"baseline": "batch", "weight": "episode"}),
    ("reinforce_pp", {"baseline": "batch", "weight": "token"}),
    ("reinforce_pp", {"baseline": "group", "weight": "episode"}),
    ("reinforce_pp", {"baseline": "group", "weight": "token"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), CASES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(group=groups_of_two)
def test_it_equals_the_loop(kind: str, options: dict[str, object], group: list[EpisodeView]) -> None:
    found = numbers(kind, **options)(group)
    assert [a[0] for a in found] == pytest.approx(loop(kind, group, **options), rel=1e-5, abs=1e-5)
    assert all(set(a) == {a[0]} and len(a) == len(e.rewards_K) for a, e in zip(found, group, strict=True))


# --- identities and properties --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(group=groups_of_two)
def test_identities(group: list[EpisodeView]) -> None:
    n = len(group)
    assert firsts("rloo", group) == pytest.approx([a * n / (n - 1) for a in firsts("dr_grpo", group)], abs=1e-5)
    assert firsts("pass_at_k", group, k=1) == pytest.approx(firsts("rloo", group), abs=1e-5)
    assert firsts("dr_grpo", group) == firsts("grpo", group, normalize=False)
    std = [a * math.sqrt((n - 1) / n) for a in firsts("reinforce_pp", group, baseline="group")]
    assert firsts("grpo", group) == pytest.approx(std, abs=1e-4)  # a batch of one group, n − 1 for n
    even = [EpisodeView((e.total,)) for e in group]
    assert firsts("opo", even) == pytest.approx(firsts("dr_grpo", even), abs=1e-5)


@pytest.mark.parametrize(("kind", "options"), CASES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), group=groups_of_two)
def test_the_order_of_a_group_does_not_matter(
    kind: str, options: dict[str, object], data: st.DataObject, group: list[EpisodeView]
) -> None:
    order = data.draw(st.permutations(range(len(group))))
    straight = firsts(kind, group, **options)
    assert firsts(kind, [group[i] for i in order], **options) == pytest.approx([straight[i] for i in order], abs=1e-5)


@pytest.mark.parametrize(("kind", "options"), [c for c in CASES if c[0] != "maxrl"])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(group=groups_of_two, shift=st.integers(-8, 8).map(lambda n: n / 4))
def test_a_shift_of_all_returns_changes_nothing(
    kind: str, options: dict[str, object], group: list[EpisodeView], shift: float
) -> None:
    shifted = [
        replace(e, rewards_K=(*e.rewards_K[:-1], e.rewards_K[-1] + shift), greedy_return=0.75 + shift) for e in group
    ]
    assert firsts(kind, shifted, **options) == pytest.approx(firsts(kind, group, **options), abs=1e-4)


@pytest.mark.parametrize(("kind", "options"), [("grpo", {}), *(c for c in CASES if "token" not in c[1].values())])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(group=groups_of_two, more=st.integers(1, 4))
def test_a_trajectory_counts_once_however_many_turns_it_has(
    kind: str, options: dict[str, object], group: list[EpisodeView], more: int
) -> None:
    first = group[0]
    # its tokens are the same, over more turns
    longer = replace(
        first,
        rewards_K=(*(0.0 for _ in range(more)), *first.rewards_K),
        tokens_K=(*(0 for _ in range(more)), *first.tokens_K),
        state_keys_K=(),
    )
    found = firsts(kind, [longer, *group[1:]], **options)
    assert found == pytest.approx(firsts(kind, group, **options), abs=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "opo", "pass_at_k", "maxrl", "reinforce_pp"])
@pytest.mark.parametrize("rewards", [[(0.7,)] * 3, [(0.1 + 0.2,), (0.3,)], [(0.1, 0.2), (0.3,)], [(0.95,)] * 7])
def test_equal_returns_give_exactly_zero(kind: str, rewards: list[tuple[float, ...]]) -> None:
    assert not any(firsts(kind, views(*rewards)))


def test_remax_gives_exactly_zero_where_all_are_as_good_as_the_greedy_one() -> None:
    assert firsts("remax", views((0.1 + 0.2,), (0.3,), greedy=0.3)) == [0.0, 0.0]
    assert firsts("remax", views((0.3,), (0.3,), greedy=1.0)) == pytest.approx([-0.7, -0.7])


def test_groups_of_different_sizes_share_a_batch() -> None:
    groups = [views((0.0,), (0.0,)), views((1.0, 1.0), (2.0,), (3.0,))]
    found = [[per_turn(a) for a in g] for g in Estimator(Choice("reinforce_pp")).of_batch(groups)]
    # Mean 7/5, variance (2·1.96 + 2·0.36 + 2.56)/5 = 1.44.
    expected = [[[-1.4], [-1.4]], [[0.6, 0.6], [0.6], [1.6]]]
    assert [[pytest.approx([x / 1.2 for x in a], rel=1e-5) for a in g] for g in expected] == found
