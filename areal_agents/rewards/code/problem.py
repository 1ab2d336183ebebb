"""A programming problem: its tests, and how an output is compared with the one that is expected."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from areal_agents.rewards.code.languages import LANGUAGES, language_of

Whitespace = Literal["trailing", "all", "exact"]
Checker = Callable[[Any, Any, Any], "bool | Awaitable[bool]"]
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
    within: float = 0.0
    """How far the number that a whole program prints may be off, absolutely. It is this test's alone."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Tests with their rules.

    Without a test it can only be compiled.
    """

    tests: tuple[CodeTest, ...]
    function: str = ""
    """The function that tests with arguments call. Only Python has them."""
    language: str = "python"
    seconds: float = 5.0
    """Wall clock of one test."""
    total_seconds: float = 120.0
    """Wall clock of all tests that fail together: the rest then counts as ``timeout``. Right programs need no haste."""
    memory: int = 512 << 20
    """Bytes that the processes of one test may hold together, give or take what /work and /tmp hold."""
    whitespace: Whitespace = "trailing"
    """``trailing`` forgives white space at the ends of lines and of the output, ``all`` any amount between words."""
    float_tolerance: float = 0.0
    """Numbers may differ by so much, absolutely or relatively. Words are compared one by one."""
    checker: Checker | None = field(default=None, compare=False)
    """``checker(input, expected, output)`` decides, on the host, where several outputs are right. It may be async.

    A test with arguments gives it those, and values in place of texts."""
    checker_seconds: float = 10.0
    """Wall clock of one call of the checker."""

    def __post_init__(self) -> None:
        if len(self.tests) > MAX_TESTS:
            raise ValueError(f"a problem has at most {MAX_TESTS} tests, not {len(self.tests)}")
        object.__setattr__(self, "language", language_of(self.language))
        for name in ("seconds", "total_seconds", "checker_seconds"):
            if not 0 < _real(name, getattr(self, name)) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} is not over 0 and finite")
        needed = LANGUAGES[self.language].memory
        if not isinstance(self.memory, int) or self.memory < needed:
            raise ValueError(f"memory = {self.memory!r:.40} bytes: {self.language} needs at least {needed}")
        self._check_rules()
        for i, test in enumerate(self.tests):
            self._check_test(f"test {i}", test)
        if self.tests and not any(t.weight for t in self.tests):
            raise ValueError("all weights are 0")

    def _check_rules(self) -> None:
        if self.whitespace not in get_args(Whitespace):
            raise ValueError(f"unknown whitespace {self.whitespace!r:.40}: there are trailing, all and exact")
        if not 0 <= _real("float_tolerance", self.float_tolerance) < 1:
            raise ValueError(f"float_tolerance = {self.float_tolerance} is not at least 0 and below 1")
        if self.float_tolerance and self.whitespace == "exact":
            raise ValueError("float_tolerance compares words, and whitespace = 'exact' compares the whole text")
        if self.checker is not None and not callable(self.checker):
            raise ValueError(f"checker = {self.checker!r:.40} cannot be called")

    def _check_test(self, who: str, test: CodeTest) -> None:
        if not 0 <= _real(f"{who}: weight", test.weight) < math.inf:
            raise ValueError(f"{who}: the weight {test.weight} is not at least 0 and finite")
        if not 0 <= _real(f"{who}: within", test.within) < math.inf:
            raise ValueError(f"{who}: within = {test.within} is not at least 0 and finite")
        if test.within and (test.arguments is not None or not _NUMBER.fullmatch(str(test.expected))):
            raise ValueError(f"{who}: within = {test.within} goes with an output that is a number")
        if test.arguments is None:
            for what, text in (("input", test.stdin), ("output", test.expected)):
                if not isinstance(text, str):
                    raise ValueError(f"{who}: its {what} is no text, but {text!r:.80}")
                text.encode()  # a lone surrogate cannot be written: UnicodeEncodeError is a ValueError
        elif not isinstance(test.arguments, list | tuple):
            raise ValueError(f"{who}: its arguments are no list, but {test.arguments!r:.80}")
        elif not isinstance(self.function, str) or not self.function.isidentifier():
            raise ValueError(f"{who} has arguments, and function = {self.function!r:.80} is no name")
        elif self.language != "python":
            raise ValueError(f"{who} has arguments, which only python takes: {self.language} reads an input")
        else:
            json.dumps([test.arguments, test.expected])  # raises where JSON has no such value

    @classmethod
    def of(cls, given: Mapping[str, Any], **rules: Any) -> Problem:
        """Read a problem from a task's payload.

        ``tests`` is a list of {"input": TEXT, "output": TEXT}, or of {"arguments": [...], "expected": VALUE} for
        ``function``, each with a ``weight`` or without. An output that is a number may have a ``within``.

        Raises ValueError, TypeError or KeyError where it is none.
        """
        tests = []
        for i, row in enumerate(given["tests"]):
            names = {"arguments", "expected"} if "arguments" in row else {"input", "output"}
            wrong = not isinstance(row, Mapping) or set(row) - {"weight", "within"} not in (names, {"output"})
            if wrong or row.get("arguments", ()) is None:  # None would run the whole program
                raise ValueError(f"test {i} is neither an input with an output, nor arguments with what is expected")
            expected = row["expected"] if "arguments" in row else row["output"]
            counts = row.get("weight", 1.0), row.get("within", 0.0)
            tests.append(CodeTest(expected, row.get("input", ""), row.get("arguments"), *counts))
        taken = {n: given[n] for n in cls.__dataclass_fields__ if n in given and n not in ("tests", "checker")}
        return cls(tuple(tests), **{**taken, **rules})

    def passes(self, test: CodeTest, output: str) -> bool:
        """Say whether the output is the one that the test expects, by all rules but the checker."""
        if test.arguments is None:
            near = test.within > 0 and _within(test.expected, output.strip(), test.within)
            return near or same_text(test.expected, output, self.whitespace, self.float_tolerance)
        try:
            return same_value(json.loads(json.dumps(test.expected)), json.loads(output), self.float_tolerance)
        except (ValueError, RecursionError):
            return False


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} = {value!r:.40} is no number")
    return value


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
        both_nan = expected != expected and value != value
        return expected == value or both_nan or _near(expected, value, tolerance)
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
    if not tolerance or not _NUMBER.fullmatch(a) or not _NUMBER.fullmatch(b):
        return False
    overflows = any(math.isinf(float(word)) and "n" not in word.lower() for word in (a, b))  # 1e999 is no infinity
    return not overflows and _near(float(a), float(b), tolerance)


_NUMBER = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|infinity|nan)", re.ASCII | re.IGNORECASE
)
"""What C, Python and JavaScript print for a number."""


def _within(expected: str, output: str, off: float) -> bool:
    """Say whether one finite number stands there, at most ``off`` from the expected one."""
    return _NUMBER.fullmatch(output) is not None and abs(float(output) - float(expected)) <= off


def _near(a: float, b: float, tolerance: float) -> bool:
    """Compare a number with the expected one, ``a``. NaN is NaN, however it is written, an infinity itself alone."""
    if not tolerance:
        return False
    try:
        a, b = float(a), float(b)
    except OverflowError:  # an integer that no float holds
        return False
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b or (math.isnan(a) and math.isnan(b))
    return abs(a - b) <= tolerance * max(1.0, abs(a))


def _lines(text: str) -> list[str]:
    r"""Return the lines without white space at their ends, ``\r`` of Windows among it."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
