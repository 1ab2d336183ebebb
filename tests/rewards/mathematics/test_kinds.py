r"""Pairs by kind, with the value that a mathematician gives, in both directions and well within the deadline."""

from __future__ import annotations

import pytest

from areal_agents.rewards.mathematics.extract import Slot
from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verify import verify

EQUAL = {
    "laws of exponents": [("x^{a+b}", "x^a x^b"), ("x^a x^b x^c", "x^{a+b+c}"), ("(xy)^a", "x^a y^a")],
    "real roots": [
        (r"\sqrt[3]{-8}", "-2"),
        (r"\sqrt[3]{-x}", r"-\sqrt[3]{x}"),
        (r"\sqrt[3]{x}", "x^{1/3}"),
        (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}"),
    ],
    "logarithms": [(r"\ln x^2", r"2\ln x"), (r"\ln(xy)", r"\ln x+\ln y"), (r"\lg 100", "2")],
    "factorials": [
        ("n!", "n(n-1)!"),
        (r"\frac{n!}{(n-1)!}", "n"),
        (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"\binom{2n}{n}", r"\frac{(2n)!}{(n!)^2}"),
    ],
    "numbers that go on": [
        ("0.333...", "1/3"),
        (r"0.1666\ldots", "1/6"),
        (r"0.\dot{1}4285\dot{7}", "1/7"),
    ],
    "other bases": [
        ("FF_{16}", "255"),
        ("1A3_{16}", "419"),
        ("(1010)_2", "10"),
        (r"101_{\text{two}}", "5"),
        ("F_{16}", "F_{16}"),
    ],
    "units": [
        ("€5", "5"),
        ("36 km/h", "10 m/s"),
        ("3 m/s", r"3\ \mathrm{m/s}"),
        ("5 ft 3 in", "63 inches"),
        ("2 hours 30 minutes", "150 minutes"),
        (r"30^\circ 30'", r"30.5^\circ"),
        (r"20^\circ C", "20"),
    ],
    "mixed numbers": [
        (r"33\frac13\%", "1/3"),
        ("2 1/2 hours", "150 minutes"),
        (r"2\times 3\frac12", "7"),
    ],
    "typesetting": [
        (r"\color{red}{5}", "5"),
        (r"\bf 5", "5"),
        (r"\text{(1,2)}", "(1,2)"),
        (r"{n+1 \over 2}", r"\frac{n+1}2"),
        (r"{10 \choose 3}", "120"),
        (r"\approx 5", "5"),
    ],
    "matrices": [
        (r"\frac{1}{2}\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\[4pt]2\end{pmatrix}"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"),
        ("[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ],
    "inequalities": [
        ("x<1 or x>2", r"(-\infty,1)\cup(2,\infty)"),
        ("x>1 and x<2", "(1,2)"),
        ("x=1 or x>2", r"\{1\}\cup(2,\infty)"),
        ("|x|<1", "(-1,1)"),
        (r"|x-1|\ge 2", r"(-\infty,-1]\cup[3,\infty)"),
        (r"\{x : x > 3\}", r"(3,\infty)"),
        (r"\{x\in\mathbb{R} : x\ne 0\}", r"x\neq 0"),
    ],
    "functions": [
        ("5!!", "15"),
        (r"f^{-1}(x)=\frac{x-1}{2}", r"\frac{x-1}{2}"),
        ("f(t)=t^2", "f(x)=x^2"),
        (r"2\operatorname{cis}\frac{\pi}{2}", "2i"),
    ],
    "a choice with its text": [
        ("B", r"\textbf{(B)}\ 12"),
        (r"\textbf{(B) } 12", "B"),
        ("(B) 12", "B. 12.0"),
        ("(C) 5", "5"),
        ("A", "A)"),
        ("A", "option (A)"),
        (r"(B) \frac12", "B) 0.5"),
    ],
    "words": [
        ("5", "five"),
        (r"\mathbb{R}", "all real numbers"),
        (r"\emptyset", "no solution"),
        (r"\text{January 3}", "January 3"),
    ],
    "the sign of n": [
        ("(-1)^{2n}", "1"),
        (r"\cos(n\pi)", "(-1)^n"),
        ("2^n 3^n", "6^n"),
    ],
    "sums of matrices": [
        (
            r"\begin{pmatrix}1\\2\end{pmatrix}+t\begin{pmatrix}1\\1\end{pmatrix}",
            r"\begin{pmatrix}1+t\\2+t\end{pmatrix}",
        ),
    ],
    "large counts": [
        (r"\$3 million", "3000000"),
        (r"2\text{ dozen}", "24"),
    ],
    "lengths": [
        ("90 min", "1 h 30 min"),
        ("5 sec", "5 seconds"),
        ("f^{-1}(5)=2", "2"),
        ("5 m 30 cm", "5.3 m"),
        (r"2\text{ hours and }30\text{ minutes}", "150 minutes"),
    ],
    "either logarithm": [
        (r"\log 100", "2"),
        (r"\log e", "1"),
        (r"\log 2", r"\lg 2"),
        ("+/- 3", "3, -3"),
    ],
    "a computation": [("16", "2^4 = 16"), ("16", "16 = 2^4"), (r"4 \pmod 7", "4"), (r"\Large 4", "4")],
}
UNEQUAL = {
    "absolute values": [(r"\ln|x|", r"\ln x"), (r"\sqrt{x^2}", "x")],
    "roots": [(r"\sqrt{x-5}", r"\sqrt{x-6}"), (r"\sqrt[3]{-8}", "2")],
    "factorials": [("n!", "(n+1)!"), (r"\binom{n}{2}", r"\binom{n}{3}")],
    "the shape of a matrix": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"),
    ],
    "variables": [
        ("x > 2", "y > 2"),
        ("f(t)=t^2", "f(x)=t^2"),
        ("f^{-1}(x)=x+1", "f(x)=x+1"),
    ],
    "or": [
        ("x>1 or x<2", "(1,2)"),
        ("5", "5 or 6"),
    ],
    "other units": [
        ("€5", "£5"),
        ("20°C", "20°F"),
    ],
    "other values": [
        ("3!!", "6!"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ],
    "two choices": [
        ("A", "(A) 5 or (B) 6"),
        ("A", "A. 5, B. 6"),
        ("A", "(A) or B"),
        ("A", r"(A) \text{ or } (B)"),
        ("A", "(A), (B)"),
        ("5", "(A) 5 or (B) 6"),
    ],
    "another choice": [
        ("(B) 12", "(B) 13"),
        ("(B) 12", "(C) 12"),
        ("B", "(C) 12"),
        ("A", "A or B"),
        ("A", "Option B"),
    ],
    "pairs that look like numbers": [
        ("(1,200)", "1200"),
        ("[0,100]", "100"),
        ("(0,100)", "100"),
        (r"\{1,200\}", "1200"),
    ],
    "values said twice": [
        ("2, 2, 5", "2, 5"),
    ],
    "a date": [
        ("2024-01-05", "2018"),
        ("2024-01-05", "2024-01-06"),
    ],
    "other times": [
        ("2, 2, 3", "2, 3, 3"),
        ("a>0, b>0", "a>0"),
        ("x>0 and y<1", "x>0 and y<2"),
    ],
    "parity": [
        ("(-1)^n", "(-1)^{n+1}"),
        ("(-1)^n", "1"),
    ],
    "a bare count": [
        ("3", "3 million"),
    ],
    "either sign": [
        ("|a|", "a"),
        ("|b|", "b"),
        ("|c|", "c"),
        ("|d|", "d"),
        ("|f|", "f"),
        ("|g|", "g"),
        ("|t|", "t"),
        ("|o|", "o"),
        ("|D|", "D"),
        ("|x|", "x"),
        ("|y|", "y"),
        ("|z|", "z"),
        (r"\sqrt{x^2y}", r"x\sqrt{y}"),
    ],
    "a wrong computation": [("15", "2^4 = 15"), ("16", "2^4 = 15"), (r"n\equiv 4\pmod 7", "4")],
}


def _pairs(kinds: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    return [pair for pairs in kinds.values() for pair in pairs]


@pytest.mark.parametrize(("a", "b"), _pairs(EQUAL))
def test_equal(a: str, b: str) -> None:
    assert [verify(a, b).status, verify(b, a).status] == ["ok", "ok"]


@pytest.mark.parametrize(("a", "b"), _pairs(UNEQUAL))
def test_unequal(a: str, b: str) -> None:
    assert verify(a, b).status in ("wrong", "parse_error")
    assert verify(b, a).status in ("wrong", "gold_error")


@pytest.mark.parametrize(
    ("text", "slot"),
    [
        ("**Answer:** 72", "final_line"),
        ("**Answer: 72**", "final_line"),
        ("48 + 24\n#### 72", "final_line"),
        (r"so \fbox{72}", "boxed"),
        (r"so $\boxed 72$", "boxed"),
    ],
)
def test_where_answers_stand(text: str, slot: Slot) -> None:
    assert verify("She sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72", text, slot=slot).status == "ok"


@pytest.mark.parametrize(
    ("gold", "pred", "status"),
    [
        ("January 5, 2024", "2024-01-05", "ok"),
        ("January 5, 2024", "Friday, 5th Jan. 2024", "ok"),
        ("January 5", "5 January", "ok"),
        ("January 5, 2024", "January 6, 2024", "wrong"),
        ("3:00 PM", r"3\text{ p.m.}", "ok"),
        ("15:00", "3 PM", "ok"),
        ("12:30 PM", "12:30 AM", "wrong"),
        ("12:00 AM", "0:00", "ok"),
        ("Jan 5, 2024 at 3 pm", "2024-01-05 15:00", "ok"),
        ("12:30", "25:99", "wrong"),
        ("February 30", "March 1", "gold_error"),
        ("12/1/2024", "2024-12-01", "gold_error"),
    ],
)
def test_dates_and_times_where_they_are_declared(gold: str, pred: str, status: str) -> None:
    assert verify(gold, pred, options=Options(dates=True)).status == status
