"""Answers that are shown: each place is found and named, and what has to be read is none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Literal

import pytest

from areal_agents.conformance.contract import Skipped
from areal_agents.conformance.revealed import answers, copier
from areal_agents.tool import ToolError, ToolSpec, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Info, Observation, Task, system, user
from tests.conformance.planted import Choice, Sums, refused, run


class InThePrompt(Sums):
    def prompt(self, task: Task) -> str:
        return f"{super().prompt(task)} (The answer is {task.payload['answer']}.) Think well."


class AtTheEndOfThePrompt(Sums):
    def prompt(self, task: Task) -> str:
        return f"{super().prompt(task)} #{task.payload['answer']}"


class InTheSystemMessage(Sums):
    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        shown, info = await super().areset(seed=seed, options=options)
        return (system(f"You add numbers. key={self.task.payload['answer']};"), *shown), info


class InAThirdMessage(Sums):
    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        shown, info = await super().areset(seed=seed, options=options)
        return (user(f"[debug] gold: {self.task.payload['answer']}"), *shown), info


class InAnotherTool(Sums):
    """The tool differs from task to task."""

    def described(self, spec: ToolSpec) -> ToolSpec:
        return dataclasses.replace(spec, description=f"Say whether {self.task.payload['answer']} is even.")

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        shown = await super().areset(seed=seed, options=options)
        self.tools = tuple(self.described(spec) for spec in type(self).tools)
        return shown


class InTheSchema(InAnotherTool):
    def described(self, spec: ToolSpec) -> ToolSpec:
        number = {"type": "integer", "enum": [int(self.task.payload["answer"])]}
        return dataclasses.replace(spec, parameters={"type": "object", "properties": {"number": number}})


class ToolTells(Sums):
    @tool()
    async def hint(self) -> str:
        """Get a hint."""
        return f"Try {self.task.payload['answer']} first."


class ToolTellsTheLevel(Sums):
    """Whatever it is asked."""

    @tool()
    async def hint(self, level: Literal["small", "large"] = "small") -> str:
        """Get a hint."""
        return "Think." if level == "small" else f"It is {self.task.payload['answer']}"


class ErrorTells(Sums):
    @tool()
    async def is_even(self, number: int) -> str:
        """Say whether a number is even."""
        if number < 100:
            raise ToolError(f"{number} is no sum: expected {self.task.payload['answer']}")
        return "yes"


class TellsWhoIsWrong(Sums):
    """A wrong answer is corrected, and the episode goes on."""

    def is_final(self, action: Any) -> bool:
        return not action.tool_calls and (self.task.payload["answer"] in action.text or len(self._paid) > 4)

    async def astep(self, action: Any) -> Any:
        shown, *rest = await super().astep(action)
        if not (action.tool_calls or rest[1] or rest[2]):
            shown = (user(f"Wrong, it would have been {self.task.payload['answer']}"),)
        return (shown, *rest)


class InWords(Sums):
    """The answer is a word, shown in capitals."""

    rubric = lambda episode: float(episode.answer == f"<answer>{episode.task.payload['w']}</answer>")  # noqa: E731

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        words = ("apple", "pear", "plum", "cherry", "fig", "grape", "lemon", "melon")
        return [
            Task.make(f"{split}-{w}", split=split, seed=i, payload={"w": w, "split": split})
            for i, w in enumerate(words)
        ]

    def prompt(self, task: Task) -> str:
        return f"Task {task.seed}. Hint: {task.payload['w'].upper()}! Which fruit is it?"

    @classmethod
    def gold(cls, task: Task) -> str:
        return f"<answer>{task.payload['w']}</answer>"


@pytest.mark.parametrize(
    ("env", "where"),
    [
        (InThePrompt, "the user message that is shown first, first behind ' (The answer is '"),
        (AtTheEndOfThePrompt, "the user message that is shown first, first behind ' 1009? #'"),
        (InTheSystemMessage, "the system message that is shown first, first behind 'dd numbers. key='"),
        (InAThirdMessage, "the user message that is shown first, first behind 'ebug] gold: '"),
        (InAnotherTool, "the description of the tool 'is_even', first behind 'Say whether '"),
        (InTheSchema, "the schema of the tool 'is_even', "),
        (ToolTells, '\'<tool_call>{"name": "hint", "arguments": {}}</tool_call>\', first behind'),
        (ToolTellsTheLevel, "the reply to "),
        (ErrorTells, "the reply to "),
        (TellsWhoIsWrong, "the reply to 'I do not know.', "),
        (InWords, "the user message that is shown first, first before '! Which fruit is'"),
    ],
)
def test_an_answer_that_is_shown(env: type[ToolEnv], where: str) -> None:
    said = refused(env, "hidden")
    assert said.startswith("the gold answer stands in ")
    assert where in said, said
    assert "declare `reveals_gold = True` where the task is to copy it" in said


class Copies(InThePrompt):
    reveals_gold = True


class Reads(Sums):
    """The answer is one of many numbers of a text, at no fixed place: it has to be read."""

    def prompt(self, task: Task) -> str:
        draw, n = Random(task.id), task.payload["n"]
        lines = [f"Room {r}: {draw.randint(1000, 1999)} books." for r in range(n - 4, n + 5)]
        lines[4] = f"Room {n}: {task.payload['answer']} books."
        draw.shuffle(lines)
        return f"How many books are in room {n}?\n" + "\n".join(lines)


def test_an_answer_that_has_to_be_read_is_not_revealed() -> None:
    assert run(Reads, "hidden").startswith("12 gold answers stand at no fixed place")
    with pytest.raises(Skipped, match="reveals_gold"):
        run(Copies, "hidden")
    with pytest.raises(Skipped, match="fewer than two different answers are known"):
        run(Choice, "hidden")


def test_what_an_answer_may_look_like() -> None:
    task = Task.make("t", split="test", seed=0, payload={"Answer": "1,234", "n": 3})
    assert answers(task, r"So it is \boxed{1,234}.") == ("1234", "1,234")
    assert answers(Task.make("t", split="test", seed=0, payload={}), "```python\ndef f():\n    pass\n```") == (
        "def f():\n    pass",
    )
    assert answers(Task.make("t", split="test", seed=0, payload={}), call_text("submit", answer="Paris")) == ("Paris",)
    assert answers(Task.make("t", split="test", seed=0, payload={}), None) == ()


def test_a_rule_must_find_nearly_all_answers_and_different_ones() -> None:
    at_the_end = [(f"{n} and {n + 1}", (str(n + 1),)) for n in range(20)]
    assert copier(at_the_end) == "first behind 'and '"
    assert copier([(f"{n} {n + 1}", (str(n + 1),)) for n in range(20)]) == "at its end"
    assert copier([(f"{n} x{n + 1}", (str(n),)) for n in range(20)]) == "at its beginning"
    assert copier([*at_the_end, ("3 and 4", ("3",)), ("5 and 6", ("5",)), ("7 and 8", ("7",))]) is None  # 20 of 23
    assert copier([("Is it so? yes or no", ("yes",))] * 20) is None  # always the same: 'constant' finds that
    assert copier([(f"the sum of {n} and 1 is wanted", (str(n + 1),)) for n in range(20)]) is None
