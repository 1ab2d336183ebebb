r"""Pairs that are equal and pairs that are not, each in both directions."""

from __future__ import annotations

import pytest

from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verify import verify

EQUAL = [
    # numbers
    ("−5", "-5"),
    ("５", "5"),
    ("1,234", "1234"),
    ("1 234", "1234"),
    (r"11,\! 111", "11111"),
    ("5.0", "5"),
    (".5", "1/2"),
    ("1.23e5", "123000"),
    (r"1.23\times 10^{5}", "123000"),
    ("3×10⁵", "300000"),
    (r"0.\overline{3}", "1/3"),
    ("0.1(6)", "1/6"),
    ("2 1/3", "7/3"),
    (r"2\frac{1}{3}", "7/3"),
    (r"-2\frac12", "-2.5"),
    ("2½", "5/2"),
    ("1010_2", "10"),
    ("28%", "28 percent"),
    ("0.28", r"28\%"),
    ("007", "7"),
    ("12345678901234567890", "12345678901234567890.0"),
    # exact values
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"\frac{\sqrt3}{3}", r"\frac1{\sqrt3}"),
    (r"\log_2 8", "3"),
    (r"\ln e", "1"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"\sin(\pi/6)", "1/2"),
    (r"\sin 30^\circ", "0.5"),
    (r"\tan^{-1}(1)", r"\frac{\pi}{4}"),
    (r"e^{i\pi}", "-1"),
    ("2+3i", "3i+2"),
    ("i^2", "-1"),
    (r"\sqrt{-1}", "i"),
    (r"\lfloor 3.7\rfloor", "3"),
    ("√2", "2^{1/2}"),
    (r"\infty", "inf"),
    ("2^{10}", "1024"),
    (r"\frac{1}{1+\frac{1}{2}}", "2/3"),
    ("|-3|", "3"),
    (r"\gcd(12, 18)", "6"),
    (r"\gcd(84, 210)", "42"),
    (r"\gcd(84,210)", "42"),  # one number in a reading with thousands, of which SymPy makes no divisor
    (r"\gcd(-7)", "7"),
    ("(84, 210)", "(84,210)"),
    ("12, 144", "144, 12"),
    (r"\{5, 210\}", r"\{210,5\}"),
    (r"\operatorname{lcm}(3)", "3"),
    # with variables
    ("(a+b)^2", "a^2+2ab+b^2"),
    ("ab", "ba"),
    ("3x", "3*x"),
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
    ("|x|", r"\sqrt{x^2}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"2\sin b\cos a", r"\sin(a+b)-\sin(a-b)"),
    ("x²", "x^2"),
    # names and equations
    ("x=5", "5"),
    ("k = 1/3", r"\frac13"),
    ("f(x)=2x+1", "2x+1"),
    (r"\overline{AB} = 3", "3"),
    ("y = 3", "3 = y"),
    ("2x+4y-3=0", r"y=-\frac12x+\frac34"),
    ("x^2+y^2=1", "y^2+x^2-1=0"),
    ("(x,y)=(1,2)", "(1,2)"),
    ("W(n)=1", "W(x)=1"),
    # inequalities, intervals and sets
    ("x<3", "3>x"),
    ("2x<6", "x<3"),
    ("-2x<6", "x>-3"),
    (r"(-\infty,3)", "x<3"),
    (r"x\in(0,1)", "0<x<1"),
    ("[1,2]", r"1\le x\le 2"),
    (r"\mathbb{R}\setminus\{0\}", r"x\neq 0"),
    (r"(0,1)\cup(1,2)", r"(0,2)\setminus\{1\}"),
    (r"\emptyset", r"\{\}"),
    # several values
    (r"\{1,2,3\}", "3, 2, 1"),
    ("1 and 2", "2, 1"),
    (r"2\pm\sqrt3", r"2-\sqrt3, 2+\sqrt3"),
    ("x=1 or x=2", "1, 2"),
    ("(1,3)", "{1,3}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("2:3", "4:6"),
    ("12:30", "12:30"),
    # units and words
    ("5 cm", "0.05 m"),
    ("12 hours", "720 minutes"),
    ("60 mph", "60 miles per hour"),
    (r"90^\circ", r"\frac{\pi}{2}"),
    ("5", "5 cm"),
    (r"\$5", "5 dollars"),
    (r"4\text{ apples}", "4"),
    (r"\text{(C)}", "C"),
    (r"\text{odd}", "odd"),
    ("no solution", "No solution."),
    # too large to compute: compared as it is written
    ("10^{10^{10}}", "10^{10^{10}}"),
    ("99999!", "99999!"),
    (r"F_n=\sum_{k=0}^{n-1}F_kF_{n-k-1}", r"F_n=\sum_{k=0}^{n-1}F_{n-k-1}F_k"),
]
DIFFERENT = [
    ("(84, 210)", "84210"),
    ("84, 210", "84210"),
    (r"\{1, 234\}", "1234"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("9", "9%"),
    ("1/3", "0.3333"),
    (r"\pi/2", "1.5707963"),
    ("5", "5 or 6"),
    ("5", "x=5 or x=6"),
    ("x^2-1", "Simplify (x-1)(x+1)"),
    ("(1,2)", r"\{1,2\}"),
    ("(1,2)", "(2,1)"),
    ("5 cm", "5 m"),
    ("5 m", "5 s"),
    ("4 apples", "4 pears"),
    ("1010_2", "1010"),
    ("x>-3", "-2x<60"),
    ("-2x<6", "x<-3"),
    ("x<3", r"x\le 3"),
    ("(0,1)", "[0,1]"),
    ("2+3i", "2-3i"),
    ("a_1", "a_2"),
    ("x=5", "y=5"),
    ("7=11a+c", "11a+c"),
    ("2x+4y-3=0", "0"),
    ("1,2", "1,2,3"),
    ("10^{10^{10}}", "10^{10^{11}}"),
    ("x+1", "x+2"),
    ("d", r"\text{E}"),
    ("3", "3x"),
    ("x", "X"),
    (r"\sqrt{x}", "x"),
    ("12:30", "12:31"),
    ("1.234,5", "1234.5"),
    ("e", "2.718281828"),
    ("1e-40", "0"),
    ("2^{-200}", "0"),
    (r"\pi\cdot10^{-60}", "0"),
    ("0.999", "1"),
    ("0.(9)8", "1"),
]


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_in_both_directions(a: str, b: str) -> None:
    assert verify(a, b).status == "ok"
    assert verify(b, a).status == "ok"


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_in_both_directions(a: str, b: str) -> None:
    assert verify(a, b).status != "ok"
    assert verify(b, a).status != "ok"


@pytest.mark.parametrize(
    ("gold", "answer", "option"),
    [
        ("1/3", "0.333", {"precision": 3}),
        ("3.14", "3,14", {"decimal_comma": True}),
        ("1234.5", "1.234,5", {"decimal_comma": True}),
        ("100", "101", {"relative": 0.02}),
        ("5", "5.4", {"tolerance": 0.5}),
        (r"\begin{pmatrix}\frac13\\ \frac15\end{pmatrix}", r"\begin{pmatrix}0.33\\0.2\end{pmatrix}", {"precision": 2}),
    ],
)
def test_an_option_makes_them_equal(gold: str, answer: str, option: dict[str, object]) -> None:
    assert verify(gold, answer, options=Options.of(option)).status == "ok"


@pytest.mark.parametrize(
    ("gold", "answer", "option"),
    [
        ("5 cm", "5", {"units": True}),
        ("1, 2", "2, 1", {"ordered": True}),
        ("[1,2]", r"1\le x\le 2", {"intervals": False}),
        ("5", "x=5", {"names": False}),
        ("1/3", "0.334", {"precision": 3}),
    ],
)
def test_an_option_makes_them_different(gold: str, answer: str, option: dict[str, object]) -> None:
    assert verify(gold, answer, options=Options.of(option)).status == "wrong"


@pytest.mark.parametrize(
    ("option", "message"),
    [({"precison": 3}, "unknown option 'precison'"), ({"units": 1}, "is no bool"), ({"tolerance": "x"}, "is no float"),
     ({"precision": -1}, "between 0 and 100"), ({"tolerance": float("inf")}, "finite")],
)  # fmt: skip
def test_a_wrong_option_is_refused(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.of(option)


def test_several_gold_answers_and_verdicts() -> None:
    assert verify(["1", "2"], "2").status == "ok"
    assert verify(["1", "2"], "3").status == "wrong"
    assert verify("5", "").status == "no_answer"
    assert verify("5", r"nothing", slot="boxed").status == "no_answer"
    assert verify("5", r"\frac{1}{").status == "parse_error"
    assert verify(r"\frac{1}{", "5").status == "gold_error"
    assert verify(["(", "5"], "5").status == "ok"  # one of them can be read


@pytest.mark.parametrize(
    ("text", "slot", "gold", "status"),
    [
        (r"so \boxed{7}", "boxed", "7", "ok"),
        (r"\boxed{5} then \boxed{6}", "boxed", "6", "wrong"),
        (r"\boxed{5} and \boxed{6}", "boxed", "5, 6", "ok"),
        (r"\boxed{\frac{1}{2}", "boxed", "1/2", "no_answer"),
        ("a lot of work\nAnswer: 12\n", "final_line", "12", "ok"),
        ("12\nno", "final_line", "12", "wrong"),
        ("12", "tool", "12.0", "ok"),
        ("It is 3, or rather 4.", "text", "4", "ok"),
    ],
)
def test_slots(text: str, slot: str, gold: str, status: str) -> None:
    assert verify(gold, text, slot=slot).status == status  # type: ignore[arg-type]
