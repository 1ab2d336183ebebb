r"""Kinds of spelling that are not LaTeX textbooks': outward brackets, ^o, C(10,3), 0xFF, units without \text."""

from __future__ import annotations

import pytest

from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verify import verify

INTERVALS = [
    ("(0,1)", ["]0,1[", "]0;1[", r"\left]0,1\right[", r"\rbrack 0,1 \lbrack", r"\bigl]0;1\bigr["],
     ["[0,1[", "]0,2[", "]1,0[", "]0,1]", "]0,1,2["]),
    ("[0,1)", ["[0,1[", r"\lbrack 0,1 \lbrack", r"\left[0;1\right["], ["]0,1["]),
    ("(0,1]", ["]0,1]", r"\left]0;1\right]"], ["[0,1["]),
    ("[0,1]", [r"\lbrack 0,1 \rbrack"], ["]0,1[", "]0,1]", "[0,1["]),
    (r"(-\infty,3)", [r"]-\infty,3[", r"]-\infty;3["], [r"]-\infty;3]"]),
    (r"[2,\infty)", [r"[2,+\infty[", r"\left[2;+\infty\right["], [r"]2,+\infty["]),
    (r"(0,1)\cup(2,3)", [r"]0,1[\cup]2,3[", "]0;1[ ∪ ]2;3["], [r"]0,1[\cup[2,3["]),
    ("0<x<1", ["]0,1[", r"x\in]0,1[", r"x \in \left]0,1\right["], ["[0,1["]),
    (r"\mathbb{R}\setminus\{0\}", [r"]-\infty,0[\cup]0,+\infty["], [r"]-\infty,0]\cup]0,+\infty["]),
    ("]0,1[", ["(0,1)", "0<x<1"], ["[0,1]", r"\{0,1\}", "(0,2)"]),
    ("(0.5,1.5)", [r"\left]\frac12,\frac32\right["], []),
    (r"(\sqrt[3]{2},2)", [r"]\sqrt[3]{2},2["], []),
    ("[[1,2],[3,4]]", [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"], []),
    ("(1,2,3)", [], ["]1,2,3["]),
    ("5", [], ["]5[", "[5["]),
]  # fmt: skip
DEGREES = [
    (r"90^\circ", ["90", "90^o", "90^{o}", r"90^{\text{o}}", r"90^\text{o}", r"90^{\mathrm{o}}", "90º", "90˚", "90°",
                   "90 deg", r"90\deg", r"90\degree", r"90{}^\circ", r"\frac{\pi}{2}", r"\frac{\pi}{2} rad",
                   r"\frac{\pi}{2}\text{ radians}"],
     ["91^o", "90^0", "90^{oo}", "90 rad"]),
    (r"30^\circ 30'", ["30.5^o", "30°30′"], ["30^o"]),
    (r"30.26^\circ", [r"30^\circ 15' 36''", "30°15′36″", "30^\\circ 15' 36\""], [r"30^\circ 15'"]),
    (r"37^\circ C", ["37^oC", "37 °C", r"37^{\circ}\mathrm{C}"], ["37 °F"]),
    (r"\sin 30^o", ["1/2"], []),
    ("x^o", ["x^o"], ["x", r"x^\circ"]),
]  # fmt: skip
COUNTED = [
    (
        "120",
        [
            "C(10,3)",
            "C(10, 3)",
            "{10 \\choose 3}",
            r"10 \choose 3",
            "10 choose 3",
            "C_{10}^{3}",
            "C_{10}^3",
            "C^3_{10}",
            "_{10}C_3",
            "10C3",
            r"{}^{10}C_3",
            "^{10}C_{3}",
            "nCr(10,3)",
            "binom(10,3)",
            "binomial(10,3)",
            r"\mathrm{C}(10,3)",
            r"\text{C}(10,3)",
            r"\binom{10}3",
            r"\frac{10!}{3!7!}",
            "C(10,3) = 120",
        ],
        ["C(3,10)", "C(10,4)", "C(10,2)", "C_{10}^{4}", "P(10,3)", r"\frac{10!}{3!6!}"],
    ),
    ("720", ["P(10,3)", "10P3", "P_{10}^3", "_{10}P_3", "{}^{10}P_3", "A_{10}^3", "nPr(10,3)"], ["P(10,4)", "10C3"]),
    ("C(10,3)", ["120", r"\binom{10}{3}", "C(10,7)"], ["121"]),
    (r"\binom{n}{k}", ["C(n,k)", "C_n^k"], ["C(k,n)"]),
    (r"\frac{x^2}{2} + C", ["x^2/2 + C"], []),
    ("P(x)", ["P(x)"], ["P(y)"]),
]
BASES = [
    ("255", ["0xFF", "0xff", "0XFF", "FF_{16}", "ff_{16}", "(FF)_{16}", r"\texttt{0xFF}", "0b11111111", "0o377",
             "FF (base 16)", "377 (octal)"],
     ["0xFE", "0xFFF", "0b1111111"]),
    ("FF_{16}", ["0xFF", "255"], ["0xFE"]),
    ("0xFF", ["255", "FF_{16}", "0xff"], ["0"]),
    ("1010_2", ["10", "0b1010", "1010 (base 2)", "1010 base 2", "1010 in base 2", "1010_{two}", "(1010)_2",
                r"1010_{\text{base }2}", r"1010\text{ (base 2)}", r"\text{1010}_2"],
     ["0b1011", "1010 (base 3)", "1010_3"]),
    ("2.5", ["10.1_2"], ["10.01_2"]),
    ("2", ["10_2"], ["10.1_2"]),
    ("-255", ["-0xFF"], []),
    ("0", ["0x"], ["0xFF", "0b1"]),
    ("26", ["1a_{16}", "1A_{16}"], []),
    ("2a_3", ["2a_{3}"], ["2"]),
]  # fmt: skip
UNITS = [
    ("5 m^2", [r"5\text{ m}^2", "5m^2", "5 m²", "5 m**2", r"5\,\mathrm{m}^2", r"5\,m^2", "5 square meters", "5 sq. m",
               "50000 cm^2", r"5 \mathrm{m^2}", "A = 5 m^2", "5 m2", r"\frac{10}{2} m^2", r"5\text{ m$^2$}"],
     ["5", "5 m", "5 m^3", "6 m^2", "5 cm^2", "5 s^2", r"5\text{ m}"]),
    (r"5\text{ m/s}", ["5 m/s", "18 km/h", "5 m s^{-1}", r"5\text{ m s}^{-1}", r"5 m \cdot s^{-1}", "5 m·s⁻¹",
                       r"5\frac{\text{m}}{\text{s}}", r"5\frac{m}{s}", r"5\ \mathrm{\frac{m}{s}}",
                       "5 meters per second"],
     ["5", "5 m s", "5 m/s^2", "5 s/m", "6 m/s"]),
    ("5 m/s^2", [r"5\text{ m/s}^2", "5 m s^{-2}", "5 m/s/s", r"5 \frac{m}{s^2}"], [r"5\text{ m/s}"]),
    ("5 N", ["5 kg m/s^2", r"5\text{ kg m/s}^2"], ["5 kg m/s", "5 kg"]),
    ("5 J", ["5 N m", "5 N·m", "0.005 kJ"], ["5 N", "5 W"]),
    ("5 L", ["5000 mL", "5 dm^3", "0.005 m^3"], ["5 dm^2"]),
    ("18 MJ", ["5 kWh"], ["5 kW"]),
    (r"5\pi\text{ cm}^2", [r"5\pi cm^2", r"5\pi\,cm^2"], [r"5\pi cm", r"5\pi"]),
    (r"10\ \Omega", ["10 ohm", "10 Ω"], ["10 V"]),
    ("0.005 mm", ["5 µm", r"5\ \mu m"], ["5 m"]),
    ("5 g/cm^3", ["5000 kg/m^3", r"5\text{ g/cm}^3"], ["5 kg/m^3"]),
    (r"\frac{\pi}{2} rad", [r"\frac{\pi}{2}", "90°", r"\frac{\pi}{2}\text{ radians}"], ["90", "90 rad"]),
    ("$5", ["5 dollars", r"\$5", "$5.00"], ["5", "5 euros"]),
]  # fmt: skip
PLAIN = [
    ("5m^2+3", ["3+5m^2"], ["8"]),
    ("5m^2", ["5m^2", "m^2*5"], ["5", "5 s^2", "50000 cm^2 + 1"]),
    ("2m", ["m+m"], ["2", "2 s"]),
    ("5nm", ["5mn"], ["5"]),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), [*INTERVALS, *DEGREES, *COUNTED, *BASES, *PLAIN])
def test_without_options(gold: str, right: list[str], wrong: list[str]) -> None:
    _compared(gold, right, wrong, Options())


@pytest.mark.parametrize(("gold", "right", "wrong"), UNITS)
def test_with_units(gold: str, right: list[str], wrong: list[str]) -> None:
    _compared(gold, right, wrong, Options(units=True))


def test_a_decimal_comma_in_an_open_interval() -> None:
    _compared("(0.5,1.5)", ["]0,5;1,5["], ["]0,5;1,6["], Options(decimal_comma=True))


def _compared(gold: str, right: list[str], wrong: list[str], options: Options) -> None:
    found = {answer: verify(gold, answer, options=options).score for answer in [*right, *wrong]}
    assert found == dict.fromkeys(right, 1) | dict.fromkeys(wrong, 0)
    other_way = {answer: verify(answer, gold, options=options).score for answer in right}
    assert other_way == dict.fromkeys(right, 1)
