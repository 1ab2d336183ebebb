"""An environment that a chat model can play without a sandbox: sums, with a tool that adds."""

from __future__ import annotations

from collections.abc import Sequence

from areal_agents.reward import boxed_number
from areal_agents.tool import tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task


@tool()
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Sums(ToolEnv):
    system_prompt = "Add, then answer \\boxed{sum}."
    tools = (add,)
    rubric = boxed_number()
    max_turns = 10

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [
            Task.make(f"{split}-{i}", split=split, seed=i, payload={"a": 100 + i, "b": 7, "answer": str(107 + i)})
            for i in range(8)
        ]

    def prompt(self, task: Task) -> str:
        return f"{task.payload['a']}+{task.payload['b']}?"
