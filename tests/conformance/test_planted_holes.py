"""Holes planted in an environment that is otherwise sound: each is found by the check that is about it, and named.

Holes through which a gold answer shows are planted in ``test_revealed.py``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest

from areal_agents.reward import Episode, boxed
from areal_agents.tool import ToolError, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Info, Observation, StopReason, Task, user
from tests.conformance.planted import Choice, Sums, refused, run


def test_without_a_hole_nothing_is_found() -> None:
    assert run(Sums, "contract").endswith("splits train, test")
    assert run(Sums, "isolation") == "4 concurrent episodes equal one by one"
    assert run(Sums, "hidden").startswith("12 gold answers stand at no fixed place of ")
    said = run(Sums, "reward")
    assert said.startswith("16 gold answers and 4 expert episodes earn 1; empty 0.00, junk 0.00, long 0.00, stopped")
    assert "random 0.00 (chance 0)" in said


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class PaysAnyAnswer(Sums):
    rubric = lambda episode: float(bool(episode.answer and episode.answer.strip()))  # noqa: E731


class PaysLength(Sums):
    rubric = lambda episode: min(1.0, len((episode.answer or "").split()) / 300)  # noqa: E731


class PaysThePrompt(Sums):
    rubric = lambda episode: float("What is" in (episode.answer or ""))  # noqa: E731


def _near(episode: Episode) -> float:
    try:
        said = float(boxed(episode.answer or "") or "0")
    except ValueError:
        return 0.0
    return 0.0 if abs(said - float(episode.task.payload["answer"])) > 0.5 else 1.0


class PaysNan(Sums):
    """NaN is off by no more than anything."""

    rubric = _near


class RaisesOnDigits(Sums):
    """A digit for Unicode is none for int."""

    rubric = lambda episode: float((said := boxed(episode.answer or "") or "").isdigit() and int(said) == 7)  # noqa: E731


class PaysWhoIsStopped(Sums):
    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 1.0, {}


class MostlyYes(Sums):
    """Nine of ten answers are the same, and no prompt shows them."""

    rubric = lambda episode: float(episode.answer == episode.task.payload["answer"])  # noqa: E731

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        first = 300 if split == "train" else 700
        return [
            Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n, "answer": "no" if n % 10 == 0 else "yes"})
            for n in range(first, first + 64)
        ]

    @classmethod
    def gold(cls, task: Task) -> str:
        return str(task.payload["answer"])


class PaysAmongOthers(MostlyYes):
    """Whoever names all answers names the right one; neighbours have the same."""

    rubric = lambda episode: float(str(episode.task.payload["answer"]) in (episode.answer or ""))  # noqa: E731
    colours = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        first = 300 if split == "train" else 700
        return [
            Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n, "answer": cls.colours[(n - first) // 8]})
            for n in range(first, first + 64)
        ]


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


class HonestChoice(Choice):
    chance = 0.25


@pytest.mark.parametrize(
    ("env", "policy"),
    [
        (PaysAnyAnswer, "'junk' earns 1.000"),
        (PaysLength, "'long' earns 1.000"),
        (PaysThePrompt, "'echo' earns 1.000"),
        (PaysNan, "'junk' earns 0.094"),  # 6 of 64 episodes: one of twelve texts
        (PaysWhoIsStopped, "'stopped' earns 1.000"),
        (MostlyYes, "'constant' earns 0.891"),  # 57 of 64: the seven from 700 to 760 are "no"
        (PaysAmongOthers, "'several' earns 1.000"),
        (PaysCalls, "'random' earns 0."),
        (PaysRefusals, "'random' earns "),
        (Choice, "'random' earns 0."),
    ],
)
def test_a_reward_that_needs_no_skill(env: type[ToolEnv], policy: str) -> None:
    said = refused(env, "reward")
    assert f"the policy {policy}" in said
    assert said.endswith("declared chance is 0 (+ 0.05): tighten the reward, or declare `chance`")


def test_a_reward_that_raises_on_an_odd_answer() -> None:
    said = refused(RaisesOnDigits, "reward")
    assert said == (
        "against the policy 'junk', astep (task test-705, turn 0) raised ValueError: invalid literal for int() with "
        "base 10: '²'"
    )


def test_what_guessing_earns_may_be_declared() -> None:
    said = run(HonestChoice, "reward")
    assert said.startswith("4 expert episodes earn 1; ")
    earned = float(said.partition("random ")[2][:4])
    assert 0.1 <= earned <= 0.3  # every second episode calls for ever, the others at most twice, or say a word
    assert "(chance 0.25)" in said


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
