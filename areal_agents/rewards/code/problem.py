"""A programming problem: its tests, and how an output is compared with the one that is expected."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Whitespace = Literal["trailing", "all", "exact"]
Checker = Callable[[str, str, str], bool]
MAX_TESTS = 1000


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One run of the program, either with an input, or of one of its functions with arguments."""

    expected: Any
    """What it must print, or the value that the function must return, as JSON has it."""
    stdin: str = ""
    arguments: Sequence[Any] | None = None
    """Of the function. None runs the whole program with ``stdin``."""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Tests with their rules."""

    tests: tuple[CodeTest, ...]
    function: str = ""
    """The function that tests with arguments call."""
    language: str = "python"
    seconds: float = 5.0
    """Wall clock of one test."""
    memory: int = 512 << 20
    """Bytes that the processes of one test may hold together."""
    whitespace: Whitespace = "trailing"
    """``trailing`` forgives white space at the ends of lines and of the output, ``all`` any amount between words."""
    float_tolerance: float = 0.0
    """Numbers may differ by so much, absolutely or relatively. Words are compared one by one."""
    checker: Checker | None = field(default=None, compare=False)
    """``checker(stdin, expected, output)`` decides, on the host, where several outputs are right."""

    def __post_init__(self) -> None:
        if not self.tests or len(self.tests) > MAX_TESTS:
            raise ValueError(f"a problem has 1 to {MAX_TESTS} tests, not {len(self.tests)}")
        if not 0 < self.seconds < math.inf or self.memory < 1 << 20 or not 0 <= self.float_tolerance < 1:
            raise ValueError(
                "seconds and memory (at least 1 MiB) are over 0, float_tolerance is at least 0 and below 1"
            )
        if any(not 0 <= t.weight < math.inf for t in self.tests) or not any(t.weight for t in self.tests):
            raise ValueError("weights are finite, at least 0, and not all of them 0")
        for test in self.tests:
            if test.arguments is None and not isinstance(test.expected, str):
                raise ValueError(f"a test without arguments expects a text, not {test.expected!r:.80}")
            if test.arguments is not None and not self.function.isidentifier():
                raise ValueError(f"function = {self.function!r} is no name, and a test has arguments for it")

    @classmethod
    def of(cls, given: Mapping[str, Any], **rules: Any) -> Problem:
        """Read a problem from a task's payload.

        ``tests`` is a list of {"input": TEXT, "output": TEXT}, or of {"arguments": [...], "expected": VALUE} for
        ``function``, each with a ``weight`` or without.

        Raises ValueError where it is none.
        """
        tests = []
        for i, row in enumerate(given["tests"]):
            unknown = set(row) - {"input", "output", "arguments", "expected", "weight"}
            if unknown or ("arguments" in row) == ("output" in row):
                raise ValueError(f"test {i} is neither an input with an output, nor arguments with what is expected")
            expected = json.loads(json.dumps(row["expected"] if "arguments" in row else row["output"]))
            tests.append(CodeTest(expected, row.get("input", ""), row.get("arguments"), float(row.get("weight", 1.0))))
        names = ("function", "language", "seconds", "memory", "whitespace", "float_tolerance")
        return cls(tuple(tests), **{**{n: given[n] for n in names if n in given}, **rules})

    def passes(self, test: CodeTest, output: str) -> bool:
        """Say whether the output is the one that the test expects."""
        if test.arguments is not None:
            try:
                return same_value(test.expected, json.loads(output), self.float_tolerance)
            except (ValueError, RecursionError):
                return False
        if self.checker is not None:
            return bool(self.checker(test.stdin, test.expected, output))
        return same_text(test.expected, output, self.whitespace, self.float_tolerance)


def same_text(expected: str, output: str, whitespace: Whitespace, tolerance: float) -> bool:
    """Compare two outputs by a rule for white space, and number by number where ``tolerance`` is over 0."""
    if whitespace == "exact":
        return expected == output
    if whitespace == "all" or tolerance:
        left, right = expected.split(), output.split()
        return len(left) == len(right) and all(_same_word(a, b, tolerance) for a, b in zip(left, right, strict=True))
    return _lines(expected) == _lines(output)


def same_value(expected: Any, value: Any, tolerance: float) -> bool:
    """Compare two JSON values. 1 is 1.0, True is not 1, and the order of keys does not count."""
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    if isinstance(expected, int | float) and isinstance(value, int | float):
        return expected == value or _near(float(expected), float(value), tolerance)
    if isinstance(expected, list) and isinstance(value, list):
        return len(expected) == len(value) and all(
            same_value(a, b, tolerance) for a, b in zip(expected, value, strict=True)
        )
    if isinstance(expected, dict) and isinstance(value, dict):
        return expected.keys() == value.keys() and all(same_value(expected[k], value[k], tolerance) for k in expected)
    return type(expected) is type(value) and bool(expected == value)


def _same_word(a: str, b: str, tolerance: float) -> bool:
    if a == b:
        return True
    if not tolerance:
        return False
    try:
        return _near(float(a), float(b), tolerance)
    except ValueError:
        return False


def _near(a: float, b: float, tolerance: float) -> bool:
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
