"""Programs judged by hidden tests: assertions of files, functions that are made up, and who is paid."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.envs import function_specs
from areal_agents.envs.assertions import read_assertions
from areal_agents.envs.canonical_inside import canonical
from areal_agents.envs.programs import Programs, payload_of
from areal_agents.envs.questions import LeftOut
from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, judge
from areal_agents.rewards.code.problem import Problem
from areal_agents.types import Task
from tests.conftest import require
from tests.envs.test_games import task_of

HUMAN_EVAL = {
    "task_id": "X/0",
    "entry_point": "near",
    "prompt": "from typing import List\n\ndef half(x):\n    return x / 2\n\n"
    'def near(xs: List[float]) -> float:\n    """The half of the sum."""\n',
    "canonical_solution": "    return half(sum(xs))\n",
    "test": "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    'doc'\n    assert True, 'a message'\n"
    "    assert candidate([1.0, 2.0]) == 1.5\n    assert abs(candidate([1.0]) - (1 / 2)) < 1e-6, 'near'\n"
    "    assert 0 == candidate([])\n",
}  # fmt: skip
MBPP = {
    "text": "Write a function to swap a pair.",
    "code": "import math\r\ndef swap(pair):\r\n  return (pair[1], pair[0])",
    "test_list": ["assert swap((1, 2)) == (2, 1)", "assert set(swap((3, 3))) == set([3])"],
    "test_setup_code": "",
}


@pytest.mark.parametrize(
    ("line", "given", "output"),
    [
        ("assert candidate([1, 2]) == [2, 1]", "f([1, 2])", "[2, 1]"),
        ("assert f('a') is True", "f('a')", "1"),
        ("assert not candidate(3)", "bool(f(3))", "0"),
        ("assert candidate(3), 'why'", "bool(f(3))", "1"),
        ("assert (1, 2.0) == f(*[1])", "f(*[1])", "(1, 2,)"),
        ("assert sorted(f(x=1)) == [1]", "sorted(f(x=1))", "[1]"),
        ("assert f(1) == {'b': 1, 'a': None}", "f(1)", "{'a': None, 'b': 1}"),
        ("assert f(1) == 3 * 5 + 1", "f(1)", "16"),
        ("assert f([0] * 9) == -1", "f([0] * 9)", "-1"),
        ("assert f(1) == 1 + 2j", "f(1)", "(1 + 2j)"),
        ("assert f(1) == {2j, -0.5j}", "f(1)", "{(0 + -0.5j), (0 + 2j),}"),
    ],
)
def test_an_assertion_is_a_call_and_a_value_that_stays_outside(line: str, given: str, output: str) -> None:
    assert read_assertions(line, "f") == [{"input": given, "output": output}]


def test_each_assertion_says_how_far_its_own_number_may_be_off() -> None:
    lines = [
        "assert math.isclose(f(2), 200, rel_tol=0.001)", "assert math.isclose(f(3), 4.0, abs_tol=0.5)",
        "assert abs(f(4) - 1000) < 0.5", "assert f(5) == 30",
    ]  # fmt: skip
    found = read_assertions("\n".join(lines), "f")
    assert [test.get("within") for test in found] == [0.2, 0.5, 0.5, None]
    problem = Problem.of({"tests": found})
    judged = {
        0: {"200.2": True, "199.7": False}, 1: {"4.5": True, "3.4": False},
        2: {"1000.4": True, "600": False, "1001": False, "1000.4 1000": False, "nan": False, "inf": False},
        3: {"30": True, "30.4": False},
    }  # fmt: skip
    assert {i: {text: problem.passes(problem.tests[i], text) for text in some} for i, some in judged.items()} == judged


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("for i in range(3): assert f(i) == i", r"no assertion \(For\)"),
        ("assert f(1) == g(1)", "computes what it expects: g"),
        ("assert f(1) == 'x' * 10**9", "computes what it expects"),
        ("assert f(1) == 2 ** 99999999", "computes what it expects"),
        ("assert f(1) == 1 / 0", "computes what it expects"),
        ("assert f(1) != 2", "no comparison with a value"),
        ("assert f(f(1)) == f(1)", "does not compare a call of f with a value"),
        ("assert abs(f(1) - 2) < 5", "tolerance is 5"),
        ("assert abs(f(1) - 1e999) < 0.5", "how far inf may be off"),
        ("assert math.isclose(f(1), 'a')", "how far 'a' may be off"),
        ("assert f(1) == ...", "cannot be compared: <ellipsis>"),
        ("assert f(1) == {'a': [1, ...]}", "cannot be compared: {'a': "),
        ("import os", r"no assertion \(Import\)"),
        ("assert True", "it has no test"),
        ("assert (", "no Python"),
        ("(" * 5000, "no Python"),
    ],
)
def test_tests_that_compute_are_left_out(source: str, why: str) -> None:
    with pytest.raises(LeftOut, match=why):
        read_assertions(source, "f")


def test_equal_values_have_one_text() -> None:
    equal: list[tuple[Any, Any]] = [
        (1, True), (2, 2.0), ({2, 1}, frozenset((1, 2))), ({1: 2, 0: 1}, {0: 1, 1: 2}), (0, -0.0), (2, 2 + 0j),
    ]  # fmt: skip
    other: list[tuple[Any, Any]] = [
        ([1], (1,)), ("1", 1), ((1,), 1), (None, "None"), ([], ()), (b"a", "a"), ({1}, {1: 1}), (1j, 2j), (1j, 1),
    ]  # fmt: skip
    for one, two in equal:
        assert canonical(one) == canonical(two)
    for one, two in other:
        assert canonical(one) != canonical(two)
    assert canonical(1e300) == str(int(1e300))
    assert canonical([float("inf"), float("nan"), object]) == "[inf, nan, <type>]"


def judged(task: Task, *programs: str) -> list[float]:
    require("bwrap")

    async def main() -> list[float]:
        try:
            said = [f"```python\n{text}\n```" for text in programs]
            episodes = [Episode(task, (), text, (), "answer") for text in said]
            return [(await judge(Programs.rubric, episode)).score for episode in episodes]
        finally:
            await sandboxes.close_shared()

    return asyncio.run(main())


def test_human_evals_rows() -> None:
    task = task_of(payload_of(HUMAN_EVAL, "question", "answer"))
    assert task.payload["setup"] == "from typing import List\n\ndef half(x):\n    return x / 2"
    assert "1.5" not in task.payload["question"]
    assert [t["input"] for t in task.payload["tests"]] == ["near([1.0, 2.0])", "near([1.0])", "near([])"]
    body = "def near(xs):\n    return half(sum(xs))"
    assert judged(
        task,
        str(task.payload["solution"]),
        f"from __future__ import annotations\nprint('hello')\n{body}",  # helpers and imports of the prompt are there
        "list = eval = print = open = None\n" + body,  # names of its own do not matter
        body + " + 5e-7 * (len(xs) == 1)",  # of the one test that allows it
        body + " + 1e-3 * (len(xs) == 1)",
        body + " + 5e-7",
        "def near(xs):\n    return 1.5",
        "raise SystemExit(0)",
        "import sys\nprint('1.5')\nsys.exit(0)\n" + body,
        "def near(xs): return",
        "def near(xs:",
    ) == [1.0, 1.0, 1.0, 1.0, *[0.0] * 7]


def test_mbpps_rows() -> None:
    task = task_of(payload_of(MBPP, "question", "answer"))
    assert task.payload["question"] == "Write a function to swap a pair.\nIt is called like this: swap((1, 2))"
    tuples = "def swap(pair): return (pair[1], pair[0])"
    assert judged(task, str(task.payload["solution"]), tuples, "def swap(pair): return [pair[1], pair[0]]") == [1, 1, 0]


def test_a_file_is_split_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows: list[Any] = [MBPP | {"text": f"Number {i}."} for i in range(40)]
    rows.append(MBPP | {"test_list": ["assert swap((1, 2)) != (1, 2)"]})
    rows.append({"question": "Double it.", "function": "d", "tests": [{"arguments": [1], "expected": 2}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match="1 of 42 rows are left out: line 41: a test is no comparison with a value"):
        train, test = (Programs.tasks(split, path=str(path)) for split in ("train", "test"))
    assert (len(train) + len(test), len(test) > 0) == (41, True)
    assert not {t.payload["question"] for t in train} & {t.payload["question"] for t in test}
    (own,) = [t for t in (*train, *test) if t.payload["question"] == "Double it."]
    assert Programs.gold(own) is None
    for bad, why in (
        ({"question": "?", "tests": [{"arguments": [1], "expected": 2}]}, "line 1: test 0 has arguments, and function"),
        ({"question": "?"}, "line 1: it has neither entry_point, test_list nor tests"),
        (MBPP | {"test_list": "assert"}, "line 1: test_list = 'assert' is no list of texts"),
        (MBPP | {"test_list": ["assert x"]}, "1 of 1 rows are left out: line 1: its tests call no function"),
    ):
        path.write_text(json.dumps(bad) + "\n" * (1 + len(why)))  # another size: the file is read again
        with pytest.raises(ConfigError, match=why):
            Programs.tasks("train", path=str(path))
    with pytest.raises(ConfigError, match="goes with a path, which is empty"):
        Programs.tasks("train", test_path=str(path))


STEPS = (*function_specs.NUMBERS, *function_specs.NUMBER_ENDS, *function_specs.WORDS, *function_specs.WORD_ENDS)
RESULTS = {  # of [4, -3, 7, 4], and of ["abcd", "ee", "xyz", "ee"], with K = 3
    "divisible": [-3], "drop the numbers": [-3], "add K": [7, 0, 10, 7],
    "multiply": [12, -9, 21, 12], "remainder": [1, 0, 1, 1], "absolute": [4, 3, 7, 4],
    "sum of all up": [4, 1, 8, 12], "differences": [-7, 10, -3], "sort the numbers": [-3, 4, 4, 7],
    "repeated numbers": [4, -3, 7], "every second": [4, 7], "move the first": [4, 4, -3, 7], "return the sum$": 12,
    "how many numbers": 3, "greatest minus": 10, "times its position": 4 - 6 + 21 + 16,
    "at least K letters": ["abcd", "xyz"], "reverse the letters": ["dcba", "ee", "zyx", "ee"],
    "cut each": ["abc", "ee", "xyz", "ee"], "double the last": ["abcdd", "eee", "xyzz", "eee"],
    "vowels": ["bcd", "", "xyz", ""], "order of the alphabet": ["abcd", "ee", "ee", "xyz"],
    "by their lengths": ["ee", "ee", "xyz", "abcd"], "repeated words": ["abcd", "ee", "xyz"],
    "K times": ["abcd" * 3, "e" * 6, "xyz" * 3, "e" * 6], "joined": "abcd-ee-xyz-ee", "all letters": 11,
    "dictionary": {"4": 1, "2": 2, "3": 1}, "longest": "abcd",
}  # fmt: skip


def test_each_step_does_what_it_says_and_its_code_does_the_same() -> None:
    seen = 0
    for steps, xs in ((STEPS[:18], [4, -3, 7, 4]), (STEPS[18:], ["abcd", "ee", "xyz", "ee"])):
        for step in steps:
            written = eval(step.code.replace("K", "3"), {"xs": list(xs), "pairwise": None})
            assert step.work(list(xs), 3) == written
            assert step.work([], 3) == eval(step.code.replace("K", "3"), {"xs": []})
            known = [result for name, result in RESULTS.items() if name in f"{step.text}$"]
            if step.text not in ("reverse the list", "return the list"):
                assert known == [written], step.text
                seen += 1
    assert seen == len(STEPS) - 4
    assert STEPS[9].work([1, 2], 3) == [2, 1]


def test_a_structure_of_the_other_split_is_not_tested_and_the_next_is_drawn_as_ever() -> None:
    rng, again = Random(3), Random(3)
    drawn = [function_specs.spec(rng, 3) for _ in range(20)]
    short = [function_specs.spec(again, 3, wanted=lambda structure: structure < "m") for _ in range(20)]
    kept = [p if p is not None and p["structure"] < "m" else None for p in drawn]
    assert short == kept
    assert 0 < sum(p is not None for p in kept) < sum(p is not None for p in drawn)


@pytest.mark.parametrize(("level", "steps"), [(0.0, 3), (0.5, 4), (1.0, 6)])
def test_functions_of_the_same_steps_are_of_one_split(level: float, steps: int) -> None:
    found = {split: Programs.tasks(split, difficulty=level)[:60] for split in ("train", "test")}
    structures = {split: {t.payload["structure"] for t in some} for split, some in found.items()}
    assert not structures["train"] & structures["test"]
    for task in found["test"]:
        p = task.payload
        assert len(p["structure"].splitlines()) == steps
        assert p["question"].count("\n") == steps + 1
        assert (len(p["tests"]), p["tests"][0]["arguments"]) == (13, [[]])
        assert len({json.dumps(t["expected"]) for t in p["tests"]}) >= 4
        shown = p["question"].splitlines()[-1]
        assert not any(f"f({t['arguments'][0]!r})" in shown for t in p["tests"])
