"""Holes planted in an environment that is otherwise sound: each is found by the check that is about it, and named."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar, Literal

import pytest

from areal_agents import registry
from areal_agents.conformance import isolation, revealed, reward_audit
from areal_agents.conformance.contract import Skipped, Subject, contract
from areal_agents.conformance.random_calls import random_arguments, words_of
from areal_agents.conformance.revealed import answers, copier
from areal_agents.env import Expert
from areal_agents.errors import CheckError
from areal_agents.reward import Episode, boxed_number
from areal_agents.tool import ToolError, ToolSpec, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Info, Observation, Task, system, user

CHECKS = {
    "contract": contract, "isolation": isolation.isolation, "hidden": revealed.hidden, "reward": reward_audit.reward,
}  # fmt: skip


class Sums(ToolEnv):
    """Add two numbers; a tool says whether a number is even."""

    rubric = boxed_number()

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        first = 300 if split == "train" else 700
        return [
            Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n, "answer": str(n + 41 * (n % 7) + 1009)})
            for n in range(first, first + 64)
        ]

    def prompt(self, task: Task) -> str:
        n = task.payload["n"]
        return f"What is {n} + {41 * (n % 7)} + 1009?"

    @tool()
    async def is_even(self, number: int) -> str:
        """Say whether a number is even."""
        return "no" if number % 2 else "yes"

    @classmethod
    def gold(cls, task: Task) -> str:
        return rf"\boxed{{{task.payload['answer']}}}"

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield call_text("is_even", number=4)
        yield cls.gold(task)


def run(env: type[ToolEnv], check: str) -> str:
    """What one check says of an environment."""
    subject = Subject(registry.spec(f"{__name__}:{env.__name__}"), 30.0, None)
    return asyncio.run(CHECKS[check](subject))


def refused(env: type[ToolEnv], check: str) -> str:
    with pytest.raises(CheckError) as found:
        run(env, check)
    return str(found.value)


def test_without_a_hole_nothing_is_found() -> None:
    assert run(Sums, "contract").endswith("splits train, test")
    assert run(Sums, "isolation") == "4 concurrent episodes equal one by one"
    assert run(Sums, "hidden").startswith("12 gold answers stand at no fixed place of ")
    said = run(Sums, "reward")
    assert said.startswith("16 gold answers and 4 expert episodes earn 1; empty 0.00, junk 0.00, long 0.00, echo 0.00")
    assert "random 0.00 (chance 0)" in said


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class PaysAnyAnswer(Sums):
    rubric = lambda episode: float(bool(episode.answer and episode.answer.strip()))  # noqa: E731


class PaysLength(Sums):
    rubric = lambda episode: min(1.0, len(episode.answer or "") / 2000)  # noqa: E731


class PaysThePrompt(Sums):
    rubric = lambda episode: float("What is" in (episode.answer or ""))  # noqa: E731


class PaysCalls(Sums):
    """Each call earns something, whatever it asks."""

    @tool()
    async def is_even(self, number: int) -> str:
        """Say whether a number is even."""
        self.reward_turn(0.05)
        return "yes"


class PaysRefusals(Sums):
    """A call that a tool refuses earns a reward."""

    @tool()
    async def is_even(self, number: int) -> str:
        """Say whether a number is even."""
        if number != 4:
            self.reward_turn(0.5)
            raise ToolError("no")
        return "yes"


Letter = Literal["A", "B", "C", "D"]


def _chosen(episode: Episode) -> float:
    return float(episode.state.get("chosen") == episode.task.payload["right"])


class Choice(ToolEnv):
    """Four choices, one of which is right, by a tool: guessing earns a quarter."""

    rubric = _chosen

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        first = 0 if split == "train" else 500
        draw = Random(split)
        return [
            Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n, "right": draw.choice("ABCD")})
            for n in range(first, first + 256)
        ]

    def new_state(self, task: Task) -> dict[str, Any]:
        return {}

    def prompt(self, task: Task) -> str:
        return f"Question {task.payload['n']}: A, B, C or D?"

    @tool()
    async def choose(self, letter: Letter) -> None:
        """Choose."""
        self.state["chosen"] = letter
        self.end_episode()

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield call_text("choose", letter=task.payload["right"])


class HonestChoice(Choice):
    chance = 0.25


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        (PaysAnyAnswer, "'junk' earns 1.000"),
        (PaysLength, "'long' earns 1.000"),
        (PaysThePrompt, "'echo' earns 1.000"),
        (PaysCalls, "'random' earns 0."),
        (PaysRefusals, "'random' earns "),
        (Choice, "'random' earns 0."),
    ],
)
def test_a_reward_that_needs_no_skill(env: type[ToolEnv], policy: str) -> None:
    said = refused(env, "reward")
    assert f"the policy {policy}" in said
    assert said.endswith("declared chance is 0 (+ 0.05): tighten the reward, or declare `chance`")


def test_what_guessing_earns_may_be_declared() -> None:
    said = run(HonestChoice, "reward")
    assert said.startswith("4 expert episodes earn 1; ")
    earned = float(said.partition("random ")[2][:4])
    assert 0.1 <= earned <= 0.3  # every second episode calls for ever, the others at most twice, or say a word
    assert "(chance 0.25)" in said


# ── answers that are shown ───────────────────────────────────────────────────────────────────────────────────────────


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


# ── seeds, tasks and what episodes share ─────────────────────────────────────────────────────────────────────────────


class PlaysAnotherTask(Sums):
    """The task is drawn by the seed, whatever was asked for."""

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        return await super().areset(seed=seed, options={"task": self.tasks("train")[-1]})


class SharesByTask(Sums):
    """Episodes of one task write on one board."""

    boards: ClassVar[dict[str, list[int]]] = defaultdict(list)

    def new_state(self, task: Task) -> None:
        self.boards[task.id] = []

    async def astep(self, action: Any) -> Any:
        self.boards[self.task.id].append(len(action.text))
        await asyncio.sleep(0)
        shown, *rest = await super().astep(action)
        board = self.boards[self.task.id]
        return ((*shown, user(f"{len(board)} on the board")) if not (rest[1] or rest[2]) else shown, *rest)


class KeepsWhatFailed(Sums):
    """A text that names no tool changes what later episodes see."""

    failures: ClassVar[list[str]] = []

    async def astep(self, action: Any) -> Any:
        self.failures.extend(call.name for call in action.tool_calls if call.name == "no_such_tool")
        shown, *rest = await super().astep(action)
        return ((*shown, user(f"{len(self.failures)} failures so far")) if not (rest[1] or rest[2]) else shown, *rest)


_paid_for: set[str] = set()


def _only_once(episode: Episode) -> float:
    right = episode.task.payload["answer"] in (episode.answer or "") and episode.task.id not in _paid_for
    if right:
        _paid_for.add(episode.task.id)
    return float(right)


class RewardRemembers(Sums):
    rubric = _only_once


class CountsInTheModule(Sums):
    count: ClassVar[Any] = itertools.count()

    def prompt(self, task: Task) -> str:
        return f"{super().prompt(task)} ({next(self.count)})"


@pytest.mark.parametrize(
    ("env", "check", "reason"),
    [
        (PlaysAnotherTask, "contract", "areset was given the task 'train-300' and plays 'train-363'"),
        (SharesByTask, "isolation", "an episode differs beside another one of the same task, call "),
        (KeepsWhatFailed, "isolation", "the same task and seed give another episode after other episodes, call"),
        (RewardRemembers, "isolation", "give another episode after other episodes, call 2 (astep), reward: 1.0 and 0"),
        (CountsInTheModule, "isolation", "give another episode after other episodes, call 0 (areset), observation"),
    ],
)
def test_seeds_and_shared_state(env: type[ToolEnv], check: str, reason: str) -> None:
    assert reason in refused(env, check)


# ── random calls ─────────────────────────────────────────────────────────────────────────────────────────────────────


@tool()
async def complicated(
    kind: Literal["a", "b"], count: int, share: float, sure: bool, names: list[str], size: int | None = None,
    table: dict[str, int] | None = None,
) -> str:  # fmt: skip
    """Take much."""
    return "ok"


def test_random_arguments_are_valid_and_differ() -> None:
    words = words_of(["Rooms 3 and 17, e-mail x@y.org: it's far-off.", "17 again"])
    assert words == ["Rooms", "3", "and", "17", "e-mail", "x", "y.org", "it's", "far-off", "again"]
    drawn = [random_arguments(complicated, words, Random(seed)) for seed in range(200)]
    assert all(isinstance(complicated.validate(arguments), dict) for arguments in drawn)
    assert {arguments["kind"] for arguments in drawn} == {"a", "b"}
    assert {type(arguments["sure"]) for arguments in drawn} == {bool}
    assert {name for arguments in drawn for name in arguments["names"]} == set(words)
    assert {arguments["count"] for arguments in drawn} == set(range(3, 18))  # between the numbers that were shown
    assert 60 < sum("size" in arguments for arguments in drawn) < 140
    assert random_arguments(complicated, words, Random(5)) == drawn[5]


def test_bounds_of_a_schema_are_kept() -> None:
    schema = {
        "properties": {
            "n": {"type": "integer", "minimum": 5, "exclusiveMaximum": 8},
            "word": {"type": "string", "pattern": "^[a-z]{3}$"},
            "items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "minItems": 2, "maxItems": 2},
            "either": {"anyOf": [{"type": "null"}, {"const": 4}]},
        },
        "required": ["n", "word", "items", "either"],
        "$defs": {"Item": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    }
    spec = ToolSpec("t", "", schema)
    drawn = [random_arguments(spec, ["900", "cat", "house"], Random(seed)) for seed in range(100)]
    assert {arguments["n"] for arguments in drawn} == {5, 6, 7}
    assert {arguments["word"] for arguments in drawn} == {"cat"}
    assert {arguments["either"] for arguments in drawn} == {None, 4}
    assert all(len(arguments["items"]) == 2 and "x" in arguments["items"][0] for arguments in drawn)
