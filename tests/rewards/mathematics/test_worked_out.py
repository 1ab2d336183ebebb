"""Answers that leave something to compute, and answers that do not."""

from __future__ import annotations

import pytest

from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verify import verify

WORKED_OUT = Options(worked_out=True)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", r"\gcd(24, 36)"), ("12", r"x = \gcd(24, 36)"), ("12", r"\operatorname{lcm}(4, 6)"), ("12", r"3 \cdot 4"),
        ("12", "10 + 2"), ("12", "24 - 12"), ("12", r"25 - 13 \lfloor 25/13 \rfloor"), ("1024", "2^{10}"),
        ("5", r"\frac{7 + 3}{2}"), ("(1, 2)", "(4 - 3, 2)"), ("10", r"\binom{5}{2}"), ("120", "5!"), ("-6", "(-2)(3)"),
        ("3", r"\max(1, 3)"), ("2", r"|-2|"), ("7", r"\det\begin{pmatrix} 2 & 1 \\ 1 & 4 \end{pmatrix}"),
        ("12", r"\lceil 11.5 \rceil"), ("8", r"4 \div \frac12"), (r"3 + \sqrt5", r"1 + 2 + \sqrt5"),
    ],
)  # fmt: skip
def test_what_is_left_to_compute_is_no_answer(gold: str, answer: str) -> None:
    assert verify(gold, answer).status == "ok"
    assert verify(gold, answer, options=WORKED_OUT).status == "wrong"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "12"), ("12", "x = 12"), ("12", r"\gcd(24, 36) = 12"), ("1234567", "1,234,567"), ("-12", "-12"),
        (r"-\frac{7}{3}", "-7/3"), (r"-\frac{7}{3}", r"x = -\frac73"), ("5/2", "2.5"), ("7/3", "2 1/3"),
        (r"20 \pm \sqrt{356}", r"20 \pm 2\sqrt{89}"), (r"20 \pm \sqrt{356}", r"20 + 2\sqrt{89}, 20 - 2\sqrt{89}"),
        (r"20 \pm \sqrt{4}", r"\{18, 22\}"), (r"(-\frac32, 5)", r"x = -\frac32, y = 5"), ("(1, 2)", "(x, y) = (1, 2)"),
        (r"\frac{3 + \sqrt5}{2}", r"\frac{3}{2} + \frac{\sqrt5}{2}"), ("120000", r"1.2 \times 10^5"), ("0.5", r"50\%"),
        ("x^2 + 2x + 1", "(x + 1)^2"), (r"2\pi", r"2\pi"), ("2^{10}", "2^{10}"), (r"\log 7", r"\log 7"),
    ],
)  # fmt: skip
def test_values_in_their_usual_forms_are_worked_out(gold: str, answer: str) -> None:
    assert verify(gold, answer, options=WORKED_OUT).status == "ok"
