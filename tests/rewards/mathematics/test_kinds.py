r"""Pairs by kind, with the value that a mathematician gives, in both directions and well within the deadline."""

from __future__ import annotations

import pytest

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
}
UNEQUAL = {
    "absolute values": [(r"\ln|x|", r"\ln x"), (r"\sqrt{x^2}", "x")],
    "roots": [(r"\sqrt{x-5}", r"\sqrt{x-6}"), (r"\sqrt[3]{-8}", "2")],
    "factorials": [("n!", "(n+1)!"), (r"\binom{n}{2}", r"\binom{n}{3}")],
    "the shape of a matrix": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2&3&4\end{pmatrix}"),
    ],
}


def _pairs(kinds: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    return [pair for pairs in kinds.values() for pair in pairs]


@pytest.mark.parametrize(("a", "b"), _pairs(EQUAL))
def test_equal(a: str, b: str) -> None:
    assert [verify(a, b).status, verify(b, a).status] == ["ok", "ok"]


@pytest.mark.parametrize(("a", "b"), _pairs(UNEQUAL))
def test_unequal(a: str, b: str) -> None:
    assert [verify(a, b).status, verify(b, a).status] == ["wrong", "wrong"]
