"""Problems of mathematics: answers against programs that search, files of others, and what is paid."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pytest

from areal_agents.envs import problems
from areal_agents.envs.mathematics import Mathematics
from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, judge
from areal_agents.types import Task
from tests.envs.test_games import task_of

KINDS = [kind for level in problems.LEVELS for kind in level]


def scores(*pairs: tuple[Task, str]) -> list[float]:
    async def main() -> list[float]:
        episodes = [Episode(task, (), rf"\boxed{{{said}}}", (), "answer") for task, said in pairs]
        return [(await judge(Mathematics.rubric, episode)).score for episode in episodes]

    return asyncio.run(main())


def test_answers_are_what_the_programs_find() -> None:
    drawn = [(kind.__name__, kind(Random(seed))) for kind in KINDS for seed in range(4)]
    # Each program in a namespace of its own, all in one process.
    script = "import json, sys\nfor code in json.load(sys.stdin):\n    exec(code, {})\n"
    codes = json.dumps([code for _, (_, _, code) in drawn])
    done = subprocess.run([sys.executable, "-c", script], input=codes, capture_output=True, text=True, check=True)
    printed = done.stdout.splitlines()
    assert len(printed) == len(drawn) == 4 * 13
    tasks = [task_of({"question": q, "answer": a}) for _, (q, a, _) in drawn]
    found = scores(*zip(tasks, printed, strict=True))
    assert [name for (name, _), score in zip(drawn, found, strict=True) if score != 1.0] == []
    # and of another problem's answer none is right, but where the two agree
    others = [printed[i - 4] for i in range(len(printed))]
    wrong = [(t, o) for t, o, p in zip(tasks, others, printed, strict=True) if o != p]
    assert sum(scores(*wrong)) == 0.0


def test_what_says_the_question_again_is_no_answer() -> None:
    """Each restates its problem with the problem's own numbers, and is equal to the answer."""
    restated = {
        "greatest common divisor of 48 and 36": ("12", r"\gcd(48, 36)"),
        "the remainder of 5 · 7 by 3": ("2", r"5 \cdot 7 - 3 \lfloor 5 \cdot 7 / 3 \rfloor"),
        "the remainder of 7^5 by 4": ("3", r"7^5 - 4 \lfloor 7^5 / 4 \rfloor"),
        "3x + 1 = x + 6": (r"\frac{5}{2}", r"\frac{6 - 1}{3 - 1}"),
        "all divisors of 12": ("28", "1 + 2 + 3 + 4 + 6 + 12"),
        "2x + y = 4, x - y = -1": ("(1, 2)", r"(\frac{-4 + 1}{-2 - 1}, \frac{-2 - 4}{-3})"),
    }
    tasks = [task_of({"question": question, "answer": answer}) for question, (answer, _) in restated.items()]
    assert scores(*zip(tasks, (said for _, said in restated.values()), strict=True)) == [0.0] * 6
    assert scores(*((task, str(task.payload["answer"])) for task in tasks)) == [1.0] * 6


def test_parts_of_problems_by_hand() -> None:
    assert problems.latex(Fraction(-7, 3)) == r"-\frac{7}{3}"
    assert problems.latex(Fraction(6, 3)) == "2"
    assert problems.equation((1, -1, 2), 5) == "x - y + 2z = 5"
    assert problems.equation((-3, 1), -4) == "-3x + y = -4"
    assert [problems._term(1, 1, 1, 1, n, 1000) for n in (1, 2, 3, 10, 12)] == [1, 1, 2, 55, 144]
    assert problems._term(2, 5, 3, 1, 4, 100) == 56  # 2, 5, 3 · 5 + 2 = 17, 3 · 17 + 5 = 56
    assert problems._determinant([(2, 0, 1), (1, 3, 2), (1, 1, 1)]) == 0
    assert problems._determinant([(2, 0, 1), (1, 3, 2), (0, 1, 1)]) == 3


STARTS = (
    ("What is the greatest", "What is the remainder of $", "Solve $", "What is the sum of the digits"),
    ("What is the remainder of $", "Find $(x, y)$", "A sequence begins", "Solve $x^2 - "),
    ("What is the smallest", "How many whole", "Find $(x, y, z)$", "A sequence begins", "What is the sum of all"),
)


@pytest.mark.parametrize(("level", "starts"), [(0.0, STARTS[0]), (0.5, STARTS[1]), (1.0, STARTS[2])])
def test_levels_have_their_own_kinds(level: float, starts: tuple[str, ...]) -> None:
    for split in ("train", "test"):
        asked = [str(task.payload["question"]) for task in Mathematics.tasks(split, difficulty=level)[:50]]
        assert all(question.startswith(starts) for question in asked)
        assert all(any(question.startswith(start) for question in asked) for start in starts)


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tasks_of(path: str) -> dict[str, Task]:
    return {t.payload["question"]: t for split in ("train", "test") for t in Mathematics.tasks(split, path=path)}


def test_files_of_gsm8k_and_of_math(tmp_path: Path) -> None:
    path = written(
        tmp_path / "x.jsonl",
        {"question": "a", "answer": "Half of 48 is <<48/2=24>>24.\n#### 1,072"},
        {"problem": "b", "solution": r"First \boxed{7}. Then \boxed{\frac{1}{2}}.", "level": "Level 5"},
        {"problem": "c", "solution": r"So it is \boxed{3}.", "answer": "3", "unique_id": "x"},
        {"problem": "d", "solution": "We do not know."},
        {"problem": "e", "answer": r"\frac{3}{4}"},
    )
    with pytest.warns(UserWarning, match=r"1 of 5 rows are left out: line 4: its solution has no \\boxed\{answer\}"):
        found = tasks_of(path)
    assert {q: t.payload["answer"] for q, t in found.items()} == {
        "a": "1,072", "b": r"\frac{1}{2}", "c": "3", "e": r"\frac{3}{4}",
    }  # fmt: skip
    assert found["a"].payload["solution"] == "Half of 48 is 24."
    assert found["c"].payload["solution"] == r"So it is \boxed{3}."
    assert scores((found["a"], "1072"), (found["b"], "0.5"), (found["b"], "7"), (found["e"], "0.75")) == [1, 1, 0, 1]
    expert = Mathematics.expert(found["e"])
    assert expert is not None
    assert next(expert) == r"\boxed{\frac{3}{4}}"


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "a"}, "line 1: it has no 'solution'"),
        ({"answer": "3"}, "line 1: it has no 'question'"),
        ({"problem": "a", "solution": 3}, "line 1: 'solution' is no text"),
        ({"problem": "a", "solution": "?"}, "1 of 1 rows are left out"),
        ({"problem": 5, "answer": "3"}, "is no text"),
    ],
)
def test_rows_that_cannot_be_read_are_named(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        Mathematics.tasks("train", path=written(tmp_path / "x.jsonl", row))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goes with a path, which is empty"):
        Mathematics.tasks("train", test_path="x")
    path = written(tmp_path / "x.jsonl", {"question": "a", "answer": "1"})
    with pytest.raises(ConfigError, match=r"areal/Math-v0 has no split 'dev'"):
        Mathematics.tasks("dev", path=path)
    with pytest.raises(ConfigError, match=r"'a' is a question of .* too"):
        Mathematics.tasks("test", path=path, test_path=written(tmp_path / "y.jsonl", {"question": "a", "answer": "1"}))
