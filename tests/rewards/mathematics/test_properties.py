"""Rewritten expressions stay equal, changed ones do not, and no text raises."""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from areal_agents.rewards.mathematics.verdict import Status
from areal_agents.rewards.mathematics.verify import verify

X, Y = sympy.symbols("x y")
LEAVES = st.one_of(
    st.sampled_from([X, Y, sympy.pi, sympy.sqrt(2), sympy.sqrt(3)]),
    st.integers(-9, 9).map(sympy.Integer),
    st.tuples(st.integers(-9, 9), st.integers(1, 9)).map(lambda pq: sympy.Rational(*pq)),
)


def _grown(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda ab: ab[0] + ab[1]),
        pair.map(lambda ab: ab[0] * ab[1]),
        st.tuples(inner, st.sampled_from([2, 3, -1])).map(lambda ae: ae[0] ** ae[1] if ae[0] != 0 else ae[0]),
        st.tuples(st.sampled_from([sympy.sin, sympy.cos, sympy.exp, sympy.Abs]), inner).map(lambda fa: fa[0](fa[1])),
    )


EXPRESSIONS = st.recursive(LEAVES, _grown, max_leaves=6)
PROFILE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROFILE
@given(EXPRESSIONS, st.sampled_from([sympy.expand, sympy.together, sympy.factor]))
def test_equivalent_rewrites_are_equal(expression: Any, rewrite: Any) -> None:
    assume(not expression.has(sympy.zoo, sympy.nan, sympy.oo))
    a, b = sympy.latex(expression), sympy.latex(rewrite(expression))
    assert verify(a, b).status == "ok"
    assert verify(b, a).status == "ok"


@PROFILE
@given(EXPRESSIONS, st.integers(2, 60))
def test_changed_values_are_not(expression: Any, n: int) -> None:
    assume(not expression.has(sympy.zoo, sympy.nan, sympy.oo))
    a = sympy.latex(expression)
    assert verify(a, sympy.latex(expression + sympy.Rational(1, n))).status == "wrong"
    if expression != 0:
        assert verify(a, sympy.latex(expression * sympy.Rational(n + 1, n))).status == "wrong"


SYMBOLS = r"""0123456789.,:;+-*/^_=<>(){}[]|!%$'" abcdefixyzπ√²½°≤∞ \frac \sqrt \left( \right) \{ \} \pm \cup \in
\text{ \boxed{ \overline{3} \begin{pmatrix} & \\ \end{pmatrix} \sin \log_ \infty and or cm percent"""
TEXTS = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(SYMBOLS.split() + list(SYMBOLS)), max_size=25).map("".join)
)


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
def test_no_text_raises_and_equality_is_symmetric(a: str, b: str) -> None:
    known: set[Status] = {"ok", "wrong", "no_answer", "parse_error", "gold_error"}
    first, second = verify(a, b), verify(b, a)
    assert first.status in known
    if {first.status, second.status} <= {"ok", "wrong"}:
        assert first.status == second.status
    if a.strip():
        assert verify(a, a).status in ("ok", "no_answer")
