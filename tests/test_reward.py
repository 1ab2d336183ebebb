from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sympy import Rational  # type: ignore[import-untyped]

from areal_agents.errors import RewardError, TaskError
from areal_agents.reward import (
    Episode,
    Gate,
    RewardLike,
    Verdict,
    WeightedSum,
    boxed,
    boxed_all,
    boxed_number,
    judge,
    number,
    sole_boxed,
)
from areal_agents.types import AssistantMessage, Task, Text, user


def episode(answer: str | None = None, *, turns: int = 2, gold: Any = "7") -> Episode:
    task = Task.make("t1", split="train", seed=0, payload={"answer": gold})
    said = AssistantMessage((Text(answer or ""),))
    return Episode(task, (user("?"), *[said] * turns), answer, (), "answer")


def run(reward: RewardLike, of: Episode | None = None) -> Verdict:
    return asyncio.run(judge(reward, of or episode()))


def half(_: Episode) -> float:
    return 0.5


def right(_: Episode) -> bool:
    return True


def wrong(_: Episode) -> bool:
    return False


async def later(_: Episode) -> float:
    return 0.25


class PerTurn:
    async def __call__(self, episode: Episode) -> Verdict:
        return Verdict(3.0, {"steps": 3.0}, (1.0, 2.0), "unverifiable")


def test_plain_functions_are_rewards() -> None:
    assert run(half) == Verdict(0.5, {"half": 0.5})
    assert run(right) == Verdict(1.0, {"right": 1.0})
    assert run(later) == Verdict(0.25, {"later": 0.25})

    def numpy_number(_: Episode) -> Any:
        return np.float32(0.5)

    assert run(numpy_number).score == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "1", [1.0], 1j, np.float32("nan")])
def test_a_reward_that_is_no_finite_number_raises(bad: Any) -> None:
    def broken(_: Episode) -> Any:
        return bad

    with pytest.raises(RewardError, match=r"reward 'broken' returned .* on task 't1': a reward is a finite number"):
        run(broken)


def test_every_number_of_a_verdict_is_checked() -> None:
    async def component(_: Episode) -> Verdict:
        return Verdict(1.0, {"style": float("nan")})

    async def turn(_: Episode) -> Verdict:
        return Verdict(1.0, turn_rewards=(0.0, float("-inf")))

    async def short(_: Episode) -> Verdict:
        return Verdict(1.0, turn_rewards=(0.0,))

    for reward, message in ((component, "'component.style'"), (turn, "turn_rewards"), (short, "1 turn rewards for 2")):
        with pytest.raises(RewardError, match=message):
            run(reward)
    with pytest.raises(RewardError, match=r"'outer\.style'"):
        run(WeightedSum({"outer": component}))


def test_weighted_sum() -> None:
    verdict = run(WeightedSum({"a": (half, 2.0), "b": later, "c": (right, -0.125)}))
    assert verdict == Verdict(1.125, {"a": 0.5, "b": 0.25, "c": 1.0})


def test_weighted_sum_adds_turn_rewards_and_puts_outcomes_on_the_last_turn() -> None:
    verdict = run(WeightedSum({"steps": (PerTurn(), 10.0), "outcome": (half, 4.0)}))
    assert verdict.turn_rewards == (10.0, 22.0)
    assert verdict.score == 32.0
    assert verdict.components == {"steps": 3.0, "outcome": 0.5}
    assert verdict.status == "unverifiable"


def test_gate_counts_the_others_only_where_the_answer_is_right() -> None:
    shut = run(Gate({"correct": wrong, "format": (right, 0.5)}))
    assert (shut.score, shut.components) == (0.0, {"correct": 0.0, "format": 1.0})
    opened = run(Gate({"correct": right, "format": (right, 0.5)}))
    assert (opened.score, opened.components) == (1.5, {"correct": 1.0, "format": 1.0})
    assert run(Gate({"correct": half, "format": right}, threshold=0.5)).score == 1.5
    assert run(Gate({"correct": half, "steps": PerTurn()})).turn_rewards is None
    with pytest.raises(ValueError, match=r"Gate\(on='right'\): no such reward; there are 'correct'"):
        Gate({"correct": right}, on="right")
    with pytest.raises(ValueError, match="weight of reward 'x' must be finite"):
        WeightedSum({"x": (right, float("nan"))})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{", None),
        (r"{} } \boxed{7} {", "7"),
        (r"\\boxed{8}", None),
        ("boxed{9}", None),
        (r"\boxed{}", ""),
        ("", None),
    ],
)
def test_boxed(text: str, expected: str | None) -> None:
    assert boxed(text) == expected


def test_boxes_that_differ_are_no_answer() -> None:
    assert boxed_all(r"\boxed{1} \boxed{2}") == ("1", "2")
    assert sole_boxed(r"\boxed{1} \boxed{2}") is None
    assert sole_boxed(r"\boxed{1} so \boxed{ 1 }") == "1"
    assert sole_boxed("1") is None


@given(st.text(alphabet=r"\boxed{}a"))
def test_boxed_contents_are_balanced_substrings(text: str) -> None:
    for content in boxed_all(text):
        assert content in text


@pytest.mark.timeout(30)
def test_boxed_takes_linear_time() -> None:
    n = 300_000  # a quadratic search takes hours
    assert boxed(r"\boxed{" * n + "}" * n) == r"\boxed{" * (n - 1) + "}" * (n - 1)
    assert boxed(r"\boxed{" * n) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("-42", -42),
        ("+7", 7),
        (" $1,234,567.50$ ", Fraction(123456750, 100)),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("007", 7),
        ("347.0", 347),
        ("-6/8", Fraction(-3, 4)),
        ("1,000/2", 500),
        ("-0", 0),
    ],
)
def test_number_reads_exactly(text: str, value: int | Fraction) -> None:
    exact = Fraction(value)
    assert number(text) == Rational(exact.numerator, exact.denominator)


@pytest.mark.parametrize(
    "text",
    ["", "$", ".", "5.", "+", "1,23", "12,3456", ",123", "1 234", "1e5", "1_000", "1/0", "1/2/3", "1.5/2", "--1", "- 1",
     "5 cm", "50%", "5 or 6", "x=5", "\\frac{1}{2}", "１２", "٣", "−5", "0x10", "inf", "nan", "__import__('os')",
     "2**99", "1" * 257, "1\n2", "(5)"],
)  # fmt: skip
def test_number_refuses_everything_else(text: str) -> None:
    assert number(text) is None


@given(st.integers(), st.integers(0, 30))
def test_number_agrees_with_exact_decimals(digits: int, places: int) -> None:
    sign, body = ("-" if digits < 0 else ""), str(abs(digits)).zfill(places + 1)
    text = f"{sign}{body[: len(body) - places]}" + (f".{body[-places:]}" if places else "")
    assert number(text) == Rational(digits, 10**places)
    assert number(f"{digits:,}") == digits


@given(st.text(max_size=40))
def test_number_never_raises(text: str) -> None:
    number(text)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (r"\boxed{7}", 1.0),
        (r"It is \boxed{14/2}", 1.0),
        (r"\boxed{7.00}", 1.0),
        (r"\boxed{8}", 0.0),
        ("7", 0.0),
        (r"\boxed{7} or \boxed{8}", 0.0),
        (r"\boxed{7 or 8}", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_boxed_number(answer: str | None, score: float) -> None:
    assert run(boxed_number(), episode(answer)) == Verdict(score, {"correct": score})


def test_boxed_number_names_a_task_without_a_number() -> None:
    with pytest.raises(TaskError, match=r"task 't1': payload\['answer'\] = 'seven' is no number"):
        run(boxed_number(), episode("x", gold="seven"))


def test_a_status_that_is_none_is_refused() -> None:
    with pytest.raises(RewardError, match="the status 'fine' on task 't1': use timeout, unverifiable, ok"):
        run(lambda of: Verdict(1.0, status="fine"))  # type: ignore[arg-type]


def test_boxed_number_names_a_task_without_the_key() -> None:
    with pytest.raises(TaskError, match="task 't1': its payload has no 'solution'"):
        run(boxed_number("solution"), episode("x", gold="7"))


def test_a_score_is_the_sum_of_its_turn_rewards() -> None:
    def short_of(_: Episode) -> Verdict:
        return Verdict(5.0, turn_rewards=(1.0, 0.5))

    says = r"reward 'short_of' returned the score 5 on task 't1', but its turn rewards add up to 1\.5"
    with pytest.raises(RewardError, match=says):
        asyncio.run(judge(short_of, episode()))

    def rounded(_: Episode) -> Verdict:
        return Verdict(0.3, turn_rewards=(0.1, 0.2))

    assert asyncio.run(judge(rounded, episode())).score == 0.3


@pytest.mark.parametrize("value", [[0.1, 0.2], (0.1, 0.2), np.array([0.1, 0.2])])
def test_a_list_of_rewards_is_told_of_turn_rewards(value: Any) -> None:
    def listed(_: Episode) -> Any:
        return value

    with pytest.raises(RewardError, match=r"one number a turn is Verdict\(sum\(turns\), turn_rewards=turns\)"):
        asyncio.run(judge(listed, episode()))
