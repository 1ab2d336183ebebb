r"""Write algebra problems as JSONL, the format that ``areal/Questions-v0`` reads.

    python examples/algebra_jsonl.py 2000 > algebra.jsonl
    areal-agents train gsm8k --env.kwargs.path algebra.jsonl --env.kwargs.test_path ""

Answers are fractions, radicals and pairs, which no comparison of texts would verify. No question holds its answer as an
expression: an echo of it would be right.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from random import Random


def latex(value: Fraction) -> str:
    """Write a fraction as LaTeX."""
    sign = "-" if value < 0 else ""
    return str(value) if value.denominator == 1 else rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def linear(rng: Random) -> tuple[str, str]:
    a, b, c = rng.randint(2, 12), rng.randint(1, 30), rng.randint(1, 30)
    return f"Solve ${a}x + {b} = {c}$ for $x$.", latex(Fraction(c - b, a))


def quadratic(rng: Random) -> tuple[str, str]:
    p, q = rng.randint(1, 12), rng.randint(2, 40)
    return f"Solve $x^2 - {2 * p}x + {p * p} = {q}$ for $x$.", rf"{p} \pm \sqrt{{{q}}}"


def pair(rng: Random) -> tuple[str, str]:
    x, y = rng.randint(-9, 9), rng.randint(-9, 9)
    return f"Find $(x, y)$ with $x + y = {x + y}$ and $x - y = {x - y}$.", f"({x}, {y})"


def slope(rng: Random) -> tuple[str, str]:
    (a, c), b, d = rng.sample(range(-9, 10), 2), rng.randint(-9, 9), rng.randint(-9, 9)
    return f"What is the slope of the line through $({a}, {b})$ and $({c}, {d})$?", latex(Fraction(d - b, c - a))


def rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Draw ``count`` different problems."""
    rng, seen = Random(seed), set[str]()
    while len(seen) < count:
        question, answer = rng.choice((linear, quadratic, pair, slope))(rng)
        if question not in seen:
            seen.add(question)
            yield {"question": question, "answer": answer}


if __name__ == "__main__":
    for row in rows(int(sys.argv[1])):
        print(json.dumps(row))
