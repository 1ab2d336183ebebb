"""Two sound environments to plant holes in, and what one check says of an environment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Any, Literal

import pytest

from areal_agents import registry
from areal_agents.conformance import isolation, revealed, reward_audit
from areal_agents.conformance.contract import Subject, contract
from areal_agents.env import Expert
from areal_agents.errors import CheckError
from areal_agents.reward import Episode, boxed_number
from areal_agents.tool import call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task

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


def run(env: type[ToolEnv], check: str) -> str:
    """What one check says of an environment."""
    subject = Subject(registry.spec(f"{env.__module__}:{env.__name__}"), 30.0, None)
    return asyncio.run(CHECKS[check](subject))


def refused(env: type[ToolEnv], check: str) -> str:
    with pytest.raises(CheckError) as found:
        run(env, check)
    return str(found.value)
