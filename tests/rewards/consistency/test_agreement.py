"""Agreement and majority: hand-worked votes, ties, missing answers, mathematics, and the claim about baselines."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from areal_agents.algorithms.advantages import grpo
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.turn_credit import turn_return
from areal_agents.errors import ConfigError, InfraError, RewardError
from areal_agents.group_reward import declaration, judge_group
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards import agreement, majority
from areal_agents.rewards.mathematics.pool import MathPool
from tests.test_group_reward import episode


def judged(reward: Any, answers: Sequence[str | None]) -> list[Verdict]:
    return list(asyncio.run(judge_group(reward, [episode(a) for a in answers])))


def scores(reward: Any, answers: Sequence[str | None]) -> list[float]:
    return [round(v.score, 6) for v in judged(reward, answers)]


@pytest.fixture(scope="module")
def pool() -> Iterator[MathPool]:
    pool = MathPool(1, deadline=30.0)
    yield pool
    pool.close()


def test_the_share_of_the_other_answers() -> None:
    boxed = agreement()
    assert scores(boxed, [r"\boxed{5}", r"so \boxed{5}", r"\boxed{6}", "5", None]) == [0.25, 0.25, 0.0, 0.0, 0.0]
    assert scores(agreement("answer"), ["5", " 5 ", "5", "6"]) == [round(2 / 3, 6)] * 3 + [0.0]
    assert scores(agreement("answer"), [None, None]) == [0.0, 0.0]  # nothing agrees with nothing
    assert scores(agreement("answer"), ["5"]) == [0.0]
    assert scores(agreement("answer", weight=-2.0), ["a", "a"]) == [-2.0, -2.0]


def test_an_answer_is_read_and_compared_by_functions() -> None:
    asked: list[tuple[str, str]] = []

    async def near(a: str, b: str) -> bool:
        asked.append((a, b))
        return abs(float(a) - float(b)) < 1.5

    def read(given: Episode) -> str | None:
        return given.answer

    third = round(1 / 3, 6)
    assert scores(agreement(read, equal=near), ["1", "2", "3", "1"]) == [round(2 / 3, 6), 1.0, third, round(2 / 3, 6)]
    assert sorted(asked) == [("1", "2"), ("1", "3"), ("2", "3")]  # each pair of different texts once
    with pytest.raises(RewardError, match=r"equal\('1', '2'\) returned 1: return True or False"):
        judged(agreement("answer", equal=lambda a, b: 1), ["1", "2"])  # type: ignore[arg-type,return-value]
    with pytest.raises(RewardError, match="read returned 3, which is no text nor None"):
        judged(agreement(lambda e: 3), ["1", "2"])  # type: ignore[arg-type,return-value]


def test_equal_mathematics_agrees(pool: MathPool) -> None:
    answers = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{2^{-1}}", r"\boxed{2}", r"\boxed{\frac{}", None]
    assert scores(agreement(equal="math", pool=pool), answers) == [0.4, 0.4, 0.4, 0.0, 0.0, 0.0]
    assert scores(majority(equal="math", pool=pool), answers) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert scores(agreement(equal="math", pool=pool, precision=2), [r"\boxed{1/3}", r"\boxed{0.333}"]) == [1.0, 1.0]


def test_what_cannot_be_compared_in_time_is_told() -> None:
    slow = MathPool(1, deadline=1e-6)
    try:
        found = judged(agreement("answer", equal="math", pool=slow), ["1", "2", None])
    finally:
        slow.close()
    assert [(v.score, v.status) for v in found] == [(0.0, "timeout"), (0.0, "timeout"), (0.0, "ok")]


def test_a_closed_verifier_is_infrastructure() -> None:
    closed = MathPool(1)
    closed.close()
    with pytest.raises(InfraError, match="the mathematics verifier failed"):
        judged(agreement("answer", equal="math", pool=closed), ["1", "2"])


def test_the_majority_is_the_label() -> None:
    label = majority("answer")
    assert scores(label, ["a", "b", "a", "c"]) == [1.0, 0.0, 1.0, 0.0]
    assert dict(judged(label, ["a", "b", "a"])[1].components) == {"majority": 0.0, "labelled": 1.0}
    assert scores(label, ["a", None, None, None]) == [0.0] * 4  # one vote is no majority
    assert scores(label, ["a", "a", None, None]) == [1.0, 1.0, 0.0, 0.0]
    assert scores(label, [None, None]) == [0.0, 0.0]


@pytest.mark.parametrize("order", list(itertools.permutations(["a", "a", "b", "b"], 4))[:6])
def test_a_tie_is_no_label_whatever_the_order(order: tuple[str, ...]) -> None:
    found = judged(majority("answer"), order)
    assert [v.score for v in found] == [0.0] * 4
    assert {v.components["labelled"] for v in found} == {0.0}


def test_a_label_may_need_a_share_of_the_whole_group() -> None:
    assert scores(majority("answer", at_least=0.5), ["a", "a", "b", None]) == [1.0, 1.0, 0.0, 0.0]
    assert scores(majority("answer", at_least=0.51), ["a", "a", "b", None]) == [0.0] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: agreement("text"), "read = 'text': it is one of boxed, final_line, answer"),  # type: ignore[arg-type]
        (lambda: agreement(equal="sympy"), "equal = 'sympy'"),  # type: ignore[arg-type]
        (lambda: agreement(precision=2), "options precision belong to equal = 'math'"),
        (lambda: agreement(equal="math", digits=2), "unknown option 'digits'"),
        (lambda: agreement(weight=float("nan")), "weight = nan must be finite"),
        (lambda: majority(at_least=2), "at_least = 2 is a share"),
    ],
)
def test_wrong_choices_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_they_declare() -> None:
    votes, label = declaration(agreement(adds=True), "it"), declaration(majority(), "it")
    assert (votes.adds, votes.reads_others, votes.leave_one_out) == (True, True, True)
    assert (label.adds, label.reads_others, label.leave_one_out) == (False, True, False)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_leave_one_out_votes_only_scale_the_gradient(n: int) -> None:
    """Changing one answer changes its advantage by (n − 2)/(n − 1) of what it changes its reward by, exactly."""

    def of_first(answers: tuple[str, ...]) -> tuple[float, float]:
        rewards = [v.score for v in judged(agreement("answer"), answers)]
        return rewards[0], float(turn_return([EpisodeView((r,)) for r in rewards])[0])

    for others in itertools.product("ab", repeat=n - 1):
        (r_a, a_a), (r_b, a_b) = of_first(("a", *others)), of_first(("b", *others))
        assert a_a - a_b == pytest.approx((n - 2) / (n - 1) * (r_a - r_b), abs=1e-6)


def test_votes_of_shorter_episodes_count_in_full_in_the_baseline_of_a_late_turn() -> None:
    """Episode 0 has two turns, 1 has two, 2 has one. At turn 1 the baseline is episode 1's, and m = 1."""

    def of_first(answers: tuple[str, ...]) -> list[float]:
        shares = [v.score for v in judged(agreement("answer"), answers)]
        group = [EpisodeView((0.0, shares[0])), EpisodeView((0.0, shares[1])), EpisodeView((shares[2],))]
        return [float(a) for a in turn_return(group)[0]]

    alone, with_long, with_short = of_first(("c", "a", "b")), of_first(("a", "a", "b")), of_first(("b", "a", "b"))
    assert alone == [0.0, 0.0]
    assert with_long == [0.25, 0.0]  # 1/2 · (1 − 1/2), 1/2 · (1 − 1/1)
    assert with_short == [0.25, 0.5]  # 1/2 · (1 − 1/2), 1/2
    whole = [[EpisodeView((v.score,)) for v in judged(agreement("answer"), a)] for a in (("a", "a", "b"), "cab")]
    moved = float(grpo(whole[0], normalize=False)[0]) - float(grpo(whole[1], normalize=False)[0])
    assert moved == pytest.approx((3 - 2) / 3 * 0.5)


def test_beside_an_own_reward_the_votes_part_alone_is_scaled() -> None:
    own = (1.0, 0.0, 0.0, 0.25)
    votes = [v.score for v in judged(agreement("answer", adds=True, weight=0.6), ("a", "a", "b", "a"))]
    found = turn_return([EpisodeView((x + y,)) for x, y in zip(own, votes, strict=True)])
    # own: 1 − 0.25/3; votes: 0.6 · 2/3 less the mean of 0.4, 0 and 0.4
    assert float(found[0]) == pytest.approx(1 - 0.25 / 3 + 0.4 - 0.8 / 3)


@pytest.mark.parametrize("answers", [("5 m", "5"), ("5", "5 m")])
def test_equality_does_not_depend_on_the_order_of_two_answers(pool: MathPool, answers: tuple[str, str]) -> None:
    assert scores(agreement("answer", equal="math", pool=pool), answers) == [1.0, 1.0]


def test_the_same_text_agrees_also_where_mathematics_cannot_read_it(pool: MathPool) -> None:
    assert scores(agreement("answer", equal="math", pool=pool), [r"\frac{", r"\frac{", "3"]) == [0.5, 0.5, 0.0]
    assert asyncio.run(pool.verify(r"\frac{", r"\frac{")).status == "ok"  # as the verifier has it


def test_a_majority_changes_the_baseline_by_no_mere_scale() -> None:
    """Why it is refused. Beside (a, b) the answer a earns 1 with A = 1 − 1/2, and c, a tie, 0 with A = 0: half of it.
    Beside (a, a) a earns 1 with A = 1 − 1, and c 0 with A = 0 − 1: all of it."""

    def of_first(*answers: str) -> tuple[float, float]:
        rewards = [v.score for v in judged(majority("answer"), answers)]
        return rewards[0], float(turn_return([EpisodeView((r,)) for r in rewards])[0])

    assert (of_first("a", "a", "b"), of_first("c", "a", "b")) == ((1.0, 0.5), (0.0, 0.0))
    assert (of_first("a", "a", "a"), of_first("c", "a", "a")) == ((1.0, 0.0), (0.0, -1.0))
