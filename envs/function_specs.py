"""Small functions that are described step by step: what each step says, does, and how a program writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a function on a list. ``K`` stands for a number that is drawn."""

    text: str
    work: Callable[[list[Any], int], Any]
    code: str
    """An expression of ``xs``."""
    numbers: tuple[int, int] = (2, 2)
    """The least and the most that ``K`` may be."""


NUMBERS: Final = (
    Step("keep the numbers that are divisible by K", lambda xs, k: [x for x in xs if x % k == 0],
         "[x for x in xs if x % K == 0]", (2, 4)),
    Step("drop the numbers that are greater than K", lambda xs, k: [x for x in xs if x <= k],
         "[x for x in xs if x <= K]", (5, 40)),
    Step("add K to each number", lambda xs, k: [x + k for x in xs], "[x + K for x in xs]", (2, 30)),
    Step("multiply each number by K", lambda xs, k: [x * k for x in xs], "[x * K for x in xs]", (2, 9)),
    Step("replace each number by its remainder modulo K", lambda xs, k: [x % k for x in xs], "[x % K for x in xs]",
         (7, 30)),
    Step("replace each number by its absolute value", lambda xs, k: [abs(x) for x in xs], "[abs(x) for x in xs]"),
    Step("replace each number by the sum of all up to and with it",
         lambda xs, k: [sum(xs[: i + 1]) for i in range(len(xs))], "[sum(xs[:i + 1]) for i in range(len(xs))]"),
    Step("replace the list by the differences of neighbours, each minus the one before it",
         lambda xs, k: [b - a for a, b in pairwise(xs)], "[b - a for a, b in zip(xs, xs[1:])]"),
    Step("sort the numbers, the smallest first", lambda xs, k: sorted(xs), "sorted(xs)"),
    Step("reverse the list", lambda xs, k: xs[::-1], "xs[::-1]"),
    Step("drop repeated numbers and keep the first of each", lambda xs, k: list(dict.fromkeys(xs)),
         "list(dict.fromkeys(xs))"),
    Step("keep every second number, beginning with the first", lambda xs, k: xs[::2], "xs[::2]"),
    Step("move the first K numbers to the end (all of them, in order, where there are no more)",
         lambda xs, k: xs[k:] + xs[:k], "xs[K:] + xs[:K]", (1, 3)),
)  # fmt: skip
NUMBER_ENDS: Final = (
    Step("return the list", lambda xs, k: xs, "xs"),
    Step("return the sum", lambda xs, k: sum(xs), "sum(xs)"),
    Step("return how many numbers there are that are greater than K", lambda xs, k: sum(x > k for x in xs),
         "sum(x > K for x in xs)", (2, 20)),
    Step("return the greatest minus the smallest number, or 0 for an empty list",
         lambda xs, k: max(xs) - min(xs) if xs else 0, "max(xs) - min(xs) if xs else 0"),
    Step("return the sum of each number times its position, where the first has position 1",
         lambda xs, k: sum(i * x for i, x in enumerate(xs, 1)), "sum(i * x for i, x in enumerate(xs, 1))"),
)  # fmt: skip
WORDS: Final = (
    Step("keep the words of at least K letters", lambda xs, k: [x for x in xs if len(x) >= k],
         "[x for x in xs if len(x) >= K]", (3, 5)),
    Step("reverse the letters of each word", lambda xs, k: [x[::-1] for x in xs], "[x[::-1] for x in xs]"),
    Step("cut each word after K letters", lambda xs, k: [x[:k] for x in xs], "[x[:K] for x in xs]", (2, 4)),
    Step("double the last letter of each word", lambda xs, k: [x + x[-1:] for x in xs], "[x + x[-1:] for x in xs]"),
    Step("delete the vowels (a, e, i, o, u) of each word, also where nothing is left of it",
         lambda xs, k: ["".join(c for c in x if c not in "aeiou") for x in xs],
         "[''.join(c for c in x if c not in 'aeiou') for x in xs]"),
    Step("sort the words, and keep the order of the alphabet", lambda xs, k: sorted(xs), "sorted(xs)"),
    Step("sort the words by their lengths, equal ones as they stood", lambda xs, k: sorted(xs, key=len),
         "sorted(xs, key=len)"),
    Step("reverse the list", lambda xs, k: xs[::-1], "xs[::-1]"),
    Step("drop repeated words and keep the first of each", lambda xs, k: list(dict.fromkeys(xs)),
         "list(dict.fromkeys(xs))"),
    Step("write each word K times in a row, as one word", lambda xs, k: [x * k for x in xs], "[x * K for x in xs]",
         (2, 3)),
)  # fmt: skip
WORD_ENDS: Final = (
    Step("return the list", lambda xs, k: xs, "xs"),
    Step("return the words as one text, joined by '-'", lambda xs, k: "-".join(xs), "'-'.join(xs)"),
    Step("return the number of all letters", lambda xs, k: sum(map(len, xs)), "sum(map(len, xs))"),
    Step("return a dictionary from each length to the number of words that have it, lengths as texts",
         lambda xs, k: {str(n): sum(len(x) == n for x in xs) for n in map(len, xs)},
         "{str(n): sum(len(x) == n for x in xs) for n in map(len, xs)}"),
    Step("return the longest word, the first of equal ones, or '' for an empty list",
         lambda xs, k: max(xs, key=len) if xs else "", "max(xs, key=len) if xs else ''"),
)  # fmt: skip
_LETTERS = "aabcdeefghiiklmnoorstu"
TESTS = 12
DIFFERENT = 4
"""How many different results the tests of a function expect at least: a program that always says one must fail."""


def spec(rng: Random, steps: int, *, wanted: Callable[[str], bool] = lambda structure: True) -> dict[str, Any] | None:
    """Draw a function of ``steps`` steps: a payload with its question, its tests and a program.

    Its tests follow from its steps alone. Returns None, before any test is computed, where its structure (the steps
    without their numbers) is not ``wanted``, and where its tests tell too little.
    """
    on_words = rng.random() < 0.5
    kinds, ends = (WORDS, WORD_ENDS) if on_words else (NUMBERS, NUMBER_ENDS)
    chosen = [*rng.sample(kinds, steps - 1), rng.choice(ends)]
    drawn = [(step, rng.randint(*step.numbers)) for step in chosen]
    structure = "\n".join(step.text for step in chosen)
    if not wanted(structure):
        return None
    said = [step.text.replace("K", str(k)) for step, k in drawn]
    what = "words of small letters" if on_words else "whole numbers"
    numbered = "\n".join(f"{i}. {text[0].upper()}{text[1:]}." for i, text in enumerate(said, 1))
    own = Random("\n".join(said))
    inputs = _different([_words(own) if on_words else _numbers(own) for _ in range(3 * TESTS)])
    example, *hidden = [{"arguments": [xs], "expected": _done(drawn, xs)} for xs in inputs]
    question = (
        f"Write a Python function f(xs) that takes a list of {what} and works in these steps:\n{numbered}\n"
        f"For example f({example['arguments'][0]!r}) is {example['expected']!r}."
    )
    lines = [f"    xs = {step.code.replace('K', str(k))}" for step, k in drawn[:-1]]
    last, k = drawn[-1]
    solution = "\n".join(["def f(xs):", *lines, f"    return {last.code.replace('K', str(k))}", ""])
    tests = [{"arguments": [[]], "expected": _done(drawn, [])}, *hidden[:TESTS]]
    if len({repr(test["expected"]) for test in tests}) < DIFFERENT:
        return None
    return {"question": question, "function": "f", "tests": tests, "solution": solution, "structure": structure}


def _done(drawn: Sequence[tuple[Step, int]], xs: list[Any]) -> Any:
    value: Any = list(xs)
    for step, k in drawn:
        value = step.work(value, k)
    return value


def _numbers(rng: Random) -> list[Any]:
    return [rng.randint(-30, 60) for _ in range(rng.randint(4, 9))]


def _words(rng: Random) -> list[Any]:
    words = ["".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 7))) for _ in range(rng.randint(4, 8))]
    return [*words, rng.choice(words)]


def _different(lists: list[list[Any]]) -> list[list[Any]]:
    return [xs for i, xs in enumerate(lists) if xs not in lists[:i]]
