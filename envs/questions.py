r"""``areal/Questions-v0``: questions of a JSONL file, whose answers are verified as mathematics.

    {"question": "What is 6 times 7?", "answer": "6 * 7 = 42\n#### 42"}

The gold answer is what stands behind the last ``####``, else in the only ``\boxed{}``, else the whole answer. Several
golds, as a list, are all right. Of one file every eighth question or so is of the test split, by a hash of its text: a
question stays where it is when rows are added, moved or repeated. ``test_path`` names a file of its own for the tests.
Rows that ask one question with different answers are refused. Rows that repeat another stay, and are told.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import math
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from areal_agents.context import ContextLike
from areal_agents.env import Expert
from areal_agents.errors import ConfigError
from areal_agents.reward import sole_boxed
from areal_agents.rewards import boxed_math
from areal_agents.rewards.mathematics.pool import shared_pool
from areal_agents.sandbox import SandboxBackend
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task, content_hash
from areal_agents.utils.short_text import short

SAMPLE = str(Path(__file__).with_name("questions.jsonl"))
"""48 problems of algebra, which show the format: `examples/algebra_jsonl.py` writes more."""
_TEST_BUCKETS = 8
_NAMED = 10
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
"""GSM8K's notes for a calculator, which are no part of the text."""
Payload = Callable[[Mapping[str, Any], str, str], dict[str, Any]]


class LeftOut(ValueError):
    """A row that is no task, with the reason. It is counted and told, and the file's others are read."""


class Questions(ToolEnv):
    r"""Answer a question in ``\boxed{}``. The answer is compared with the gold one by SymPy."""

    system_prompt = r"Think step by step, then answer \boxed{answer}."
    rubric = boxed_math()
    max_turns = 1

    def __init__(
        self,
        *,
        path: str = SAMPLE,
        test_path: str = "",
        question: str = "question",
        answer: str = "answer",
        verify: Mapping[str, Any] | None = None,
        sandbox: SandboxBackend | str | None = None,
        max_turns: int | None = None,
        context: ContextLike | None = None,
    ) -> None:
        """Make an environment on a file.

        Args:
            path: of the JSONL file.
            test_path: of the file of the test split. Empty takes it from ``path``.
            question: the field that holds the question.
            answer: the field that holds the answer.
            verify: options of the verifier, such as ``{"tolerance": 0.01}``.
            sandbox: for the tools of a subclass.
            max_turns: as ``ToolEnv`` has it, for a subclass with tools.
            context: as ``ToolEnv`` has it.
        """
        super().__init__(sandbox=sandbox, max_turns=max_turns, context=context)
        self._source: dict[str, Any] = {"path": path, "test_path": test_path, "question": question, "answer": answer}
        if verify:
            self._rubric = boxed_math(**verify)

    @classmethod
    def tasks(
        cls, split: str, *, difficulty: float | None = None, path: str = SAMPLE, test_path: str = "",
        question: str = "question", answer: str = "answer",
    ) -> Sequence[Task]:  # fmt: skip
        """Return the tasks of a split, whose difficulty is that of the file.

        Raises ConfigError for a row that cannot be read, for rows that contradict each other, and for a question of
        ``test_path`` that is in ``path`` too.
        """
        if split not in ("train", "test"):
            raise ConfigError(f"{cls.__name__} has no split {split!r}: its splits are train, test")
        return file_tasks(cls.payload, split, path, test_path, question=question, answer=answer)

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", **self._source)

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    @classmethod
    def gold(cls, task: Task) -> str | None:
        golds = task.payload["answer"]
        return rf"\boxed{{{golds if isinstance(golds, str) else golds[0]}}}"

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        """Return the file's own solution, with the answer in a box."""
        return _said(f"{task.payload.get('solution', '')}\n{cls.gold(task)}".strip())

    @classmethod
    def payload(cls, row: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
        """Turn a row of the file into a task's payload, ``question`` among it. Raises ValueError where it cannot be."""
        golds = row[answer] if isinstance(row[answer], list) else [row[answer]]
        if not golds or not all(isinstance(g, str | int | float) and not isinstance(g, bool) for g in golds):
            raise ValueError(f"{answer!r} = {short(row[answer])} is neither a text, a number nor a list of them")
        if not all(math.isfinite(g) for g in golds if isinstance(g, float)):
            raise ValueError(f"{answer!r} = {short(row[answer])} is no finite number")
        found = [gold_of(str(g)) for g in golds]
        if not all(found):
            raise ValueError(f"{answer!r} = {short(row[answer])} is empty")
        solution = _CALCULATOR.sub("", str(golds[0]).rpartition("####")[0]).strip()
        worked = {"solution": solution} if solution else {}
        return {"question": row[question], "answer": found if len(found) > 1 else found[0]} | worked


def file_tasks(
    make: Payload, split: str, path: str, test_path: str, *, question: str = "question", answer: str = "answer"
) -> list[Task]:
    """Return the tasks of a split whose payloads ``make`` makes of a file's rows.

    Args:
        make: makes a payload with a ``question``, of a row and the names of its fields. It may raise LeftOut.
        split: ``train`` or ``test``.
        path: of the file.
        test_path: of the file of the test split. Empty takes it from ``path``.
        question: the field that holds the question.
        answer: the field that holds the answer.

    Raises:
        ConfigError: a row cannot be read, rows contradict each other, or a question is in both files.
    """
    found = _rows(make, file_key(test_path if split == "test" and test_path else path), question, answer)
    if test_path and split == "test":
        others = {t.payload["question"] for t in _rows(make, file_key(path), question, answer)}
        if shared := next((t for t in found if t.payload["question"] in others), None):
            raise ConfigError(f"{test_path}: {shared.payload['question']!r:.80} is a question of {path} too")
    return [
        Task.make(f"{split}-{t.id}", split=split, seed=t.seed, payload=t.payload)
        for t in found
        if test_path or split_of(t.payload["question"]) == split
    ]


def _said(text: str) -> Expert:
    yield text


def gold_of(text: str) -> str:
    r"""Return the answer at the end of a worked solution: behind ``####``, or in its only box, or all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    return (sole_boxed(text) or text).strip()


def split_of(question: str) -> str:
    """Return the split that a question belongs to where one file has both."""
    digest = hashlib.sha256(_spaced(question).encode("utf-8", "surrogatepass")).digest()
    return "test" if digest[0] % _TEST_BUCKETS == 0 else "train"


def _spaced(text: str) -> str:
    return " ".join(text.split())


def file_key(path: str) -> tuple[str, int, int]:
    """Return a path with what changes when its file does. Raises ConfigError where there is none."""
    file = Path(path).expanduser()
    try:
        status = file.stat()
    except OSError as error:
        raise ConfigError(f"env.kwargs: {path!r} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a path with a null character
        raise ConfigError(f"env.kwargs: {path!r} is no path: {error}") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for its writer
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise ConfigError(f"env.kwargs: {path!r} is {what}, and no file")
    return str(file), status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=8)
def _rows(make: Payload, key: tuple[str, int, int], question: str, answer: str) -> tuple[Task, ...]:
    """Read every row of a file, once."""
    path, tasks, left_out = key[0], list[Task](), list[str]()
    for number, row in json_lines(Path(path)):
        try:
            payload = make(row, question, answer)
            if not isinstance(payload["question"], str) or not payload["question"].strip():
                raise ValueError(f"{question!r} = {short(payload['question'])} is no text")
            tasks.append(Task.make(str(number), split="", seed=number, payload=payload))
        except LeftOut as reason:
            left_out.append(f"line {number}: {reason}")
        except KeyError as error:
            raise ConfigError(f"{path}, line {number}: it has no {error}, but {', '.join(map(repr, row))}") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
    if left_out:
        more = f"; and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        told = (
            f"{len(left_out)} of {len(left_out) + len(tasks)} rows are left out: {'; '.join(left_out[:_NAMED])}{more}"
        )
        if not tasks:
            raise ConfigError(f"{path}: {told}")
        warnings.warn(f"{path}: {told}", stacklevel=2)
    _look_for_repeats(path, tasks)
    return tuple(tasks)


def _look_for_repeats(path: str, tasks: Sequence[Task]) -> None:
    """Raise ConfigError where rows contradict each other, and warn of those that repeat another."""
    first, repeats, differ = dict[str, Task](), 0, list[tuple[Task, Task]]()
    for task in tasks:
        asked = {k: v for k, v in task.payload.items() if k not in ("answer", "solution")}
        key = content_hash({**asked, "question": _spaced(task.payload["question"])})
        earlier = first.setdefault(key, task)
        if earlier is task:
            continue
        if _golds(earlier) == _golds(task):
            repeats += 1
        else:
            differ.append((earlier, task))
    if differ:
        with ThreadPoolExecutor(1) as thread:  # this one may run an event loop already
            wrong = thread.submit(asyncio.run, _contradictions(differ)).result()
        repeats += len(differ) - len(wrong)
        if wrong:
            raise ConfigError(
                f"{path}: of {len(wrong)} questions there are two rows with different answers, of which one is wrong:"
                + "".join(f"\n  lines {a.seed} and {b.seed}: {short(_golds(a))} and {short(_golds(b))}"
                          for a, b in wrong[:_NAMED])
                + (f"\n  and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else "")
            )  # fmt: skip
    if repeats:
        warnings.warn(
            f"{path}: {repeats} of its {len(tasks)} rows ask what an earlier one asks, with the same answer, and are "
            "trained on as often as they are there",
            stacklevel=2,
        )


def _golds(task: Task) -> list[str]:
    golds = task.payload.get("answer")
    return list(map(str, golds)) if isinstance(golds, list | tuple) else [str(golds)]


async def _contradictions(pairs: Sequence[tuple[Task, Task]]) -> list[tuple[Task, Task]]:
    """Return the pairs of which no gold answer is the other's, as mathematics."""

    async def differs(one: Task, other: Task) -> bool:
        found = [await shared_pool().verify(_golds(one), gold) for gold in _golds(other)]
        return all(verdict.status == "wrong" for verdict in found)

    answers = await asyncio.gather(*(differs(*pair) for pair in pairs))
    return [pair for pair, wrong in zip(pairs, answers, strict=True) if wrong]


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Read the objects of a JSONL file, with their lines. Raises ConfigError for anything else in it."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ConfigError(f"{path}, line {number}: it is no JSON object, but {short(row)}")
                    yield number, row
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: it is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {number}: it is no JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read: {error.strerror}") from error
