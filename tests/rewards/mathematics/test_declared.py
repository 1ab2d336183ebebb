r"""Multiple choice, and dates and times where an option declares them."""

from __future__ import annotations

from typing import Any

import pytest

from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verify import look, verify

CHOICES = {"choices": {"A": "10 cm", "B": "12 cm", "C": "13 cm", "D": r"\frac{1}{2}"}}
DATES = {"dates": True}


def equal(gold: str, answer: str, option: dict[str, Any]) -> bool:
    options = Options.of(option)
    status = verify(gold, answer, options=options).status
    assert status in ("ok", "wrong", "parse_error"), status
    back = verify(answer, gold, options=options).status
    if back != "gold_error":
        assert (back == "ok") == (status == "ok")
    return status == "ok"


@pytest.mark.parametrize(
    "answer",
    ["B", "(B)", "b", "(b)", "B.", "B)", r"\text{(B)}", r"\textbf{(B)}\ 12\text{ cm}", r"\text{(B) } 12 cm", "B. 12 cm",
     "(B) 12 cm", "B: 12 cm", "12 cm", r"12\text{ cm}", "0.12 m", "option B", "The answer is (B)", "$B$", "**B**"],
)  # fmt: skip
def test_a_letter_or_its_text_is_the_choice(answer: str) -> None:
    assert equal("B", answer, CHOICES)


@pytest.mark.parametrize(
    "answer",
    ["A", "(C)", "B. 13 cm", "(B) 10 cm", "A or B", "(A) or (B)", "B or A", "A, B", "A and B", "13 cm", "12 s", "E", "",
     "(B) 12 cm or (C) 13 cm", "B. 12 cm, C. 13 cm", "not B", "B. not 12 cm", "10 cm or 12 cm", "ABCD"],
)  # fmt: skip
def test_another_choice_or_several_are_not(answer: str) -> None:
    assert verify("B", answer, options=Options.of(CHOICES)).status != "ok"


def test_choices_are_read_from_the_gold_answer_and_in_every_way() -> None:
    assert equal("B. 12 cm", "B", {})
    assert equal("B. 12 cm", "12 cm", {})
    assert equal("B. 12 cm", "(B) 0.12 m", {})
    assert not equal("B. 12 cm", "B. 13 cm", {})
    assert not equal("B. 12 cm", "C. 12 cm", {})
    assert not equal("B. 12 cm", "13 cm", {})
    assert equal("D", r"\textbf{(D)}\ \dfrac12", CHOICES)
    assert equal("D", "0.5", CHOICES)
    assert equal("12 cm", "B", CHOICES)  # a gold answer that is a text is the letter of it
    assert equal("A, C", "(C) and (A)", CHOICES)
    assert equal("A, C", "AC", CHOICES)
    assert not equal("A, C", "A", CHOICES)
    assert equal("B", "2", {"choices": ["1", "2", "3"]})


@pytest.mark.parametrize(
    ("answer", "right"),
    [("B. 12 cm", True), ("(B) 12 cm", True), ("(B)", True), (r"\text{(B)}", True), ("A or B", False),
     ("B or A", False), ("(B) or (A)", False), ("(B) (A)", False), ("B. 12 cm or C", False), ("B. C. D.", False),
     ("A. 12 cm", False), ("AB", False), ("B = 5", False)],
)  # fmt: skip
def test_a_letter_without_declared_choices(answer: str, right: bool) -> None:
    assert (verify("B", answer).status == "ok") is right
    assert look("B", Options()).status == "ok"


@pytest.mark.parametrize("choices", ["A", {"A": 3}, {"AB": "x"}, {"a": "x"}, [1], [["A", "1"], ["A", "2"]], 5])
def test_choices_that_are_none_are_refused(choices: Any) -> None:
    with pytest.raises(ValueError, match="choices"):
        Options.of({"choices": choices})


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2024-03-05", "March 5, 2024"),
        ("2024-03-05", "5 March 2024"),
        ("2024-03-05", "the 5th of March, 2024"),
        ("2024-03-05", r"\text{Mar. 5, 2024}"),
        ("2024-03-05", "Tuesday, March 5, 2024"),
        ("2024-03-05", "2024/3/5"),
        ("March 5", "5th March"),
        ("March 2024", "Mar 2024"),
        ("September 1", "1 Sept"),
        ("15:05", "3:05 pm"),
        ("3:05 pm", "3:05 P.M."),
        ("15:05", "15:05:00"),
        ("3 pm", "15:00"),
        ("12:00", "noon"),
        ("00:00", "12 am"),
        ("12 midnight", "0:00"),
        ("2024-03-05T15:05", "March 5, 2024 at 3:05 pm"),
        ("2024-03-05T15:05:00Z", "2024-03-05T17:05:00+02:00"),
        ("2024-03-05T23:30:00-02:00", "2024-03-06 01:30 UTC"),
        ("15:05Z", "3:05 pm"),
    ],
)
def test_dates_and_times_are_equal_where_declared(gold: str, answer: str) -> None:
    assert equal(gold, answer, DATES)
    assert look(gold, Options.of(DATES)).status == "ok"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2024-03-05", "2024-05-03"),
        ("2024-03-05", "March 6, 2024"),
        ("2024-03-05", "March 5"),
        ("2024-03-05", "Monday, March 5, 2024"),  # it was a Tuesday
        ("2024-03-05", "3/5/2024"),  # which of them is the month was not said
        ("2024-03-05", "2014"),
        ("2024-03-05", "2024-03-05 or 2024-03-06"),
        ("2023-02-28", "2023-02-29"),
        ("15:05", "3:05"),
        ("15:05", "3:05 am"),
        ("15:05", "15:05:01"),
        ("15:05", "25:05"),
        ("15:05", "3 pm"),
        ("15:05", "3:05 pm or 3:06 pm"),
        ("1 pm", "13 pm"),
        ("2024-03-05T15:05:00Z", "2024-03-05T15:05:00+02:00"),
        ("2024-03-05", "15:05"),
        ("March 5, 2024", "5 5 2024"),
        ("May 1", "maybe 1"),
    ],
)
def test_other_dates_and_times_are_not(gold: str, answer: str) -> None:
    assert not equal(gold, answer, DATES)


def test_the_order_of_day_and_month_is_an_option() -> None:
    assert equal("2024-03-05", "5/3/2024", {"dates": True, "date_order": "day"})
    assert equal("2024-03-05", "05.03.2024", {"dates": True, "date_order": "day"})
    assert equal("2024-03-05", "3/5/2024", {"dates": True, "date_order": "month"})
    assert not equal("2024-03-05", "3/5/2024", {"dates": True, "date_order": "day"})
    assert not equal("2024-12-25", "25/12/2024", {"dates": True, "date_order": "month"})
    assert not equal("2024-03-05", "March 5, 2024", {})  # not declared
    assert verify("1/2", "March 5", options=Options.of(DATES)).status == "gold_error"
    assert look("1/2", Options.of(DATES)).status == "gold_error"
    with pytest.raises(ValueError, match="date_order"):
        Options.of({"dates": True, "date_order": "year"})
    with pytest.raises(ValueError, match="means nothing"):
        Options.of({"date_order": "day"})
