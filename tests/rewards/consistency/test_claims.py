"""Declared statements: the grammar, decisions against truth tables, brute force and SymPy, and hostile texts."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest

from areal_agents.errors import ConfigError, TaskError
from areal_agents.reward import Episode, Verdict, judge
from areal_agents.rewards import consistent_claims
from areal_agents.rewards.consistency.claims import MAX_CLAIMS, claims_of
from areal_agents.rewards.consistency.decide import decide
from areal_agents.types import Task

CONSISTENT = [
    [],
    ["a or b", "not a"],
    ["a implies b", "not a"],
    ["a -> b -> c", "a", "not b"],  # a → (b → c)
    ["a iff b", "b iff c", "not a", "not c"],
    ["(a and not b) or (b and not a)"],
    ["true", "not false"],
    ["alice < bob < carol", "alice < carol"],
    ["x + y = 3", "x - y = 1"],
    ["2n = 1"],
    ["-2n + 3 = -n", "n = 3", "2e = 4", "-(n) < - 2 * - -1"],
    ["x != y", "x >= y"],
    ["x = 0.1 + 0.2", "x = 0.3"],
    ["x < 1 or x > 2", "x != 0"],
    ["2(x + 1) > 3x", "x = 1.999"],
    ["x/3 = 1/3", "x = 1"],
    ["raining implies t < 5", "raining", "t = 4"],
    ["größe > 3"],
    ["integer n, m", "3n + 5m = 1"],
    ["integer x, y, z", "6x + 10y - 15z = 1"],
]
CONTRADICTORY = [
    ["a", "not a"],
    ["a implies b", "a", "!b"],
    ["a or b", "¬a", "¬b"],
    ["a <-> b", "a", "not b"],
    ["p iff q iff r", "p", "q", "not r"],  # (p ↔ q) ↔ r
    ["not (a or b)", "a"],
    ["false"],
    ["a or b and c", "not a", "not b"],  # a or (b and c)
    ["x > 0 and y > 0 implies x + y > 0", "x > 0", "y > 0", "x + y <= 0 or false"],
    ["x = y = z", "x != z"],
    ["2x + 3y <= 12 && x >= 5 && y >= 1"],
    ["0.1 + 0.2 != 0.3"],
    ["1 < 0"],
    ["a < b < c", "c < a"],
    ["a ≤ b", "b ≤ c", "c ≤ a", "a ≠ c"],
    ["x + y = 3", "x - y = 1", "x != 2"],
    ["x < 1 or x > 2", "1 <= x <= 2"],
    ["(x + 1) * 2 < 2x"],
    ["-x < -3", "x < 3"],
    ["raining implies t < 5", "raining", "t = 6"],
    ["integer n", "2n = 1"],
    ["integer n", "0 < n < 1"],
    ["integer n, m", "0 < 2n - 2m < 2"],
    ["integer x, y", "x + y = 5", "x - y = 2"],
]
UNPARSED = [
    [""],
    ["a b"],
    ["(a"],
    ["a)"],
    ["x * y = 1"],
    ["1 / 0 = 1"],
    ["x / y = 1"],
    ["3"],
    ["a < b", "a"],  # a number and a proposition
    ["a and 3 < b and"],
    ["(a < b) < c"],
    ["not"],
    ["__import__('os').system('true')"],
    ["x = 1; y = 2"],
    ["integer"],
    ["integer 3"],
    ["integer n,"],
    ["integer n m"],
    ["x = 1e5"],
    ["x = 1e-5"],
    ["x ^ 2 = 4"],
    ["x² = 4"],
    ["a | b"],
    ["x > 1,000"],
    ["x = 50%"],
    ["x < ∞"],
]


@pytest.mark.parametrize("claims", CONSISTENT, ids="; ".join)
def test_what_can_be_true_at_once(claims: list[str]) -> None:
    assert decide(claims).status == "consistent"


@pytest.mark.parametrize("claims", CONTRADICTORY, ids="; ".join)
def test_what_contradicts_itself_and_needs_each_of_its_claims_or_not(claims: list[str]) -> None:
    assert decide(claims).status == "contradictory"
    assert decide(claims[::-1]).status == "contradictory"


@pytest.mark.parametrize("claims", UNPARSED, ids="; ".join)
def test_what_is_no_statement_has_a_reason(claims: list[str]) -> None:
    found = decide(claims)
    assert found.status == "unparsed"
    assert found.detail


# --- against other ways of deciding ----------------------------------------------------------------------------------

WORDS: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "implies": lambda a, b: not a or b,
    "iff": lambda a, b: a == b,
}


def random_formula(draw: random.Random, depth: int) -> tuple[str, Any]:
    """A formula as text, and its function of the values of p0 … p3."""
    if depth == 0:
        i = draw.randrange(4)
        return f"p{i}", lambda values: values[i]
    left, f = random_formula(draw, depth - 1)
    if draw.random() < 0.3:
        return f"not ({left})", lambda values: not f(values)
    right, g = random_formula(draw, depth - 1)
    word = draw.choice(list(WORDS))
    return f"({left}) {word} ({right})", lambda values: WORDS[word](f(values), g(values))


def test_propositions_against_truth_tables() -> None:
    draw, seen = random.Random(1), set()
    for _ in range(300):
        made = [random_formula(draw, draw.randrange(4)) for _ in range(draw.randrange(1, 7))]
        possible = any(all(f(v) for _, f in made) for v in itertools.product((False, True), repeat=4))
        found = decide([text for text, _ in made]).status
        assert found == ("consistent" if possible else "contradictory"), [text for text, _ in made]
        seen.add(found)
    assert len(seen) == 2


def joined(word: Callable[[bool, bool], bool], f: Any, g: Any, values: Any) -> bool:
    return word(f(values), g(values))


def test_comparisons_against_a_grid_of_values_and_sympy() -> None:
    """Differences of three names with constants in {0, ±1}: if any values fit, some in steps of 1/4 do."""
    draw, seen = random.Random(2), set()
    grid = [Fraction(i, 4) for i in range(-12, 13)]
    signs: dict[str, Callable[[Fraction, Fraction], bool]] = {
        "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, "=": lambda a, b: a == b, "!=": lambda a, b: a != b,
    }  # fmt: skip

    def comparison() -> tuple[str, Any]:
        i, j = draw.sample(range(3), 2)
        sign, c = draw.choice(list(signs)), draw.randrange(-1, 2)
        return f"x{i} {sign} x{j} + {c}" if c >= 0 else f"x{i} {sign} x{j} - {-c}", (
            lambda v: signs[sign](v[i], v[j] + c)
        )

    for _ in range(120):
        made = []
        for _ in range(draw.randrange(2, 6)):
            (a, f), (b, g) = comparison(), comparison()
            word = draw.choice(list(WORDS))
            h = WORDS[word]
            made.append((f"({a}) {word} ({b})", partial(joined, h, f, g)))
        # Only differences count, so that x0 is 0.
        possible = any(all(f((Fraction(0), a, b)) for _, f in made) for a in grid for b in grid)
        found = decide([text for text, _ in made]).status
        assert found == ("consistent" if possible else "contradictory"), [text for text, _ in made]
        seen.add(found)
    assert len(seen) == 2


def test_linear_systems_against_sympy() -> None:
    from sympy import Matrix  # type: ignore[import-untyped]

    draw, seen = random.Random(3), set()
    for _ in range(60):
        rows = [[draw.randrange(-2, 3) for _ in range(3)] for _ in range(draw.randrange(2, 5))]
        right = [draw.randrange(-2, 3) for _ in rows]
        claims = [
            " + ".join(f"({c}) * x{i}" for i, c in enumerate(row)) + f" = {b}" if b >= 0
            else " + ".join(f"({c}) * x{i}" for i, c in enumerate(row)) + f" = -{-b}"
            for row, b in zip(rows, right, strict=True)
        ]  # fmt: skip
        possible = Matrix(rows).rank() == Matrix([[*r, b] for r, b in zip(rows, right, strict=True)]).rank()
        found = decide(claims).status
        assert found == ("consistent" if possible else "contradictory"), claims
        seen.add(found)
    assert len(seen) == 2


def test_whole_numbers_against_all_of_a_box() -> None:
    draw, seen = random.Random(4), set()
    for _ in range(60):
        rows = [([draw.randrange(-4, 5) for _ in range(2)], draw.randrange(-6, 7)) for _ in range(3)]
        claims = ["integer n, m", "-3 <= n <= 3", "-3 <= m <= 3"]
        claims += [f"{a[0]}n + {a[1]}m <= {b}".replace("+ -", "- ") for a, b in rows]
        box = itertools.product(range(-3, 4), repeat=2)
        possible = any(all(a[0] * n + a[1] * m <= b for a, b in rows) for n, m in box)
        found = decide(claims).status
        assert found == ("consistent" if possible else "contradictory"), claims
        seen.add(found)
    assert len(seen) == 2


# --- hostile ---------------------------------------------------------------------------------------------------------


def whole_system(equations: int, names: int) -> list[str]:
    """Equations between whole numbers that have rational solutions."""
    draw = random.Random(0)
    sums = [" + ".join(f"{draw.randint(1, 99)}*x{i}" for i in range(names)) for _ in range(equations)]
    return ["integer " + ", ".join(f"x{i}" for i in range(names)), *(f"{s} = {draw.randint(1, 999)}" for s in sums)]


def pigeons(n: int) -> list[str]:
    """n + 1 pigeons in n holes: short to say, and exponential for every search of this kind."""
    homes = [" or ".join(f"p{i}_{j}" for j in range(n)) for i in range(n + 1)]
    return homes + [f"not (p{i}_{j} and p{k}_{j})" for j in range(n) for i in range(n + 1) for k in range(i)]


HOSTILE = [
    pigeons(8),
    ["(" * 100_000],
    ["(" * 1_000 + "a" + ")" * 1_000],
    ["not " * 1_500 + "a"],
    ["- " * 1_500 + "x < 1"],
    ["a implies " * 900 + "a"],
    ["a iff " * 900 + "a"],
    ["a" * 1_000_000],
    ["9" * 1_000_000 + " < x"],
    ["*".join(["9" * 59] * 200) + " < x"],
    ["+".join(f"x{i}" for i in range(900)) + " < 1"],
    whole_system(4, 10),
]


@pytest.mark.parametrize("claims", HOSTILE, ids=lambda claims: claims[0][:20])
def test_hostile_claims_cost_bounded_work(claims: list[str]) -> None:
    start = time.process_time()
    assert decide(claims).status == "too_large"
    assert time.process_time() - start < 30  # about 0.3; the work is bounded in steps, not in seconds


def test_ten_thousand_signs_that_say_nothing_are_decided() -> None:
    assert decide(["x <= " * 900 + "x"]).status == "consistent"
    assert decide(["x < " * 900 + "x"]).status == "contradictory"


# --- the reward ------------------------------------------------------------------------------------------------------


def scored(answer: str | None, reward: consistent_claims, **payload: Any) -> Verdict:
    task = Task.make("t", split="train", seed=0, payload=payload)
    return asyncio.run(judge(reward, Episode(task, (), answer, (), "answer")))


def test_claims_are_lines_that_begin_so() -> None:
    text = "I think:\n  <claim> a < b </claim>\r\nand <claim>not this</claim>\n<claim>b < c\n\n<claim></claim>"
    assert claims_of(text) == ["a < b", "b < c", ""]
    assert claims_of("x" * 1_000_000) == []


@pytest.mark.parametrize(
    ("answer", "score", "status", "contradictory"),
    [
        ("<claim>a\n<claim>b", 1.0, "ok", 0.0),
        ("<claim>a\n<claim>not a", 0.0, "ok", 1.0),
        ("<claim>a\n<claim>a b", 0.0, "unverifiable", 0.0),
        ("\n".join(f"<claim>{c}" for c in pigeons(8)), 0.0, "unverifiable", 0.0),
        ("<claim>a\n" * (MAX_CLAIMS + 1), 0.0, "unverifiable", 0.0),
        ("a and not a", 0.0, "ok", 0.0),
        (None, 0.0, "ok", 0.0),
    ],
)
def test_the_reward(answer: str | None, score: float, status: str, contradictory: float) -> None:
    found = scored(answer, consistent_claims())
    assert (found.score, found.status, found.components["contradictory"]) == (score, status, contradictory)


def test_so_many_claims_are_asked_for() -> None:
    assert scored("<claim>a", consistent_claims(at_least=2)).score == 0.0
    assert scored(None, consistent_claims(at_least=0)).score == 1.0
    with pytest.raises(ConfigError, match="at_least = -1 must be"):
        consistent_claims(at_least=-1)


def test_the_facts_of_the_task_hold_besides() -> None:
    reward = consistent_claims(facts="facts")
    facts = ["alice < bob", "bob < carol"]
    assert scored("<claim>alice < carol", reward, facts=facts).score == 1.0
    assert scored("<claim>carol < alice", reward, facts=facts).score == 0.0
    for bad, message in (
        (None, "is None, which is no list of statements"),
        (["a <"], "are unparsed, 'end of the statement' is not expected here"),
        (["a", "not a"], "are contradictory"),
    ):
        with pytest.raises(TaskError, match=rf"task 't'.*payload\['facts'\].*{message}"):
            scored("<claim>a", reward, facts=bad)
