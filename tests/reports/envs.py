"""Environments of the cases: sums without a sandbox, each with the property that a report is about."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np

from areal_agents.env import AgentEnv, Expert
from areal_agents.reward import Episode, RewardLike, boxed_number
from areal_agents.tool import ToolSpec, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.python import python
from areal_agents.types import AssistantMessage, Info, Observation, StopReason, Task, user
from tests.scripted import block_the_loop


@tool()
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@tool()
async def list_orders(status: str = "all", limit: int = 100) -> str:
    """List orders."""
    return f"listing {limit} orders with status {status}"


@tool()
async def search(query: str) -> str:
    """Search."""
    return f"found {query}"


@tool()
async def clock() -> str:
    """Tell the time."""
    return "noon"


@tool()
async def echo(text: str) -> str:
    """Say it again."""
    return text


class Sums(ToolEnv):
    """Say the sum of two numbers; a tool adds them."""

    tools: tuple[ToolSpec, ...] = (add,)
    rubric: ClassVar[RewardLike] = boxed_number()
    max_turns = 6
    count = 40

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        first = 100 if split == "train" else 1000
        return [cls.task_of(split, i, first + i) for i in range(cls.count)]

    @classmethod
    def task_of(cls, split: str, i: int, a: int) -> Task:
        payload = {"a": a, "b": 7, "answer": str(a + 7)}
        return Task.make(f"{split}-{i}", split=split, seed=i, payload=payload)

    @classmethod
    def gold(cls, task: Task) -> str:
        return rf"\boxed{{{task.payload['answer']}}}"

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield cls.gold(task)

    def prompt(self, task: Task) -> str:
        return f"{task.payload['a']}+{task.payload['b']}?"


class Hundred(Sums):
    count = 100


class Several(Sums):
    tools = (list_orders, search, clock, echo)


class Coder(Sums):
    tools = (python,)


def odd_task(i: int) -> bool:
    """One task in twenty."""
    return i % 20 == 7


class LongPrompt(Sums):
    """One task in twenty does not fit the context."""

    def prompt(self, task: Task) -> str:
        return super().prompt(task) + " please" * (150 if odd_task(task.seed) else 0)


class BrokenPrompt(Sums):
    """One task in twenty has no prompt."""

    def prompt(self, task: Task) -> str:
        if odd_task(task.seed):
            raise KeyError("question")
        return super().prompt(task)


class BadGold(Sums):
    """One task in twenty has a gold answer that is no number."""

    @classmethod
    def task_of(cls, split: str, i: int, a: int) -> Task:
        payload = {"a": a, "b": 7, "answer": "a dozen" if odd_task(i) else str(a + 7)}
        return Task.make(f"{split}-{i}", split=split, seed=i, payload=payload)


def nothing(episode: Episode) -> float:
    """Score an episode with what is no number."""
    return float("nan")


class NotANumber(Sums):
    """Its reward is NaN, at every task."""

    rubric: ClassVar[RewardLike] = nothing


class Even(AgentEnv):
    """Pays every episode the same, over three turns."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"t": f"{split} {i}"}) for i in range(8)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.turn = 0
        return (user(str(self.task.payload["t"])),), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        self.turn += 1
        last = self.turn == 3
        return () if last else (user("on"),), 0.7, last, False, {"stop_reason": "answer"} if last else {}

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 0.0, {"stop_reason": reason}


class Stuck(Sums):
    """Of four tasks, one never returns from its reset, and one blocks its thread there."""

    count = 4

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        found = await super().areset(seed=seed, options=options)
        if self.task.seed == 1:
            await asyncio.Event().wait()
        if self.task.seed == 2:
            block_the_loop(8)
        return found


def numbers() -> dict[str, Any]:
    """The number 1 in the kinds that rewards come in."""
    import sympy  # type: ignore[import-untyped]
    import torch

    return {
        "bool": True, "numpy.bool_": np.all([True]), "numpy.float32": np.float32(1), "0-d array": np.array(1.0),
        "torch": torch.tensor(1.0), "Decimal": Decimal(1), "sympy.true": sympy.true, "sympy": sympy.Integer(1),
        "sympy.Rational": sympy.Rational(3, 3),
    }  # fmt: skip


class Kinds(Sums):
    """Its rubric returns the number 1 in the kind that ``kind`` names."""

    def __init__(self, *, kind: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rubric = lambda episode: numbers()[kind]


class KindsOfStep(Even):
    """Its steps pay the number 1 in the kind that ``kind`` names, and say in it whether the episode ended."""

    def __init__(self, *, kind: str) -> None:
        super().__init__()
        self.kind = kind

    async def astep(self, action: AssistantMessage) -> tuple[Observation, Any, bool, bool, Info]:
        observation, _, over, cut, info = await super().astep(action)
        return observation, numbers()[self.kind], over, cut, info
