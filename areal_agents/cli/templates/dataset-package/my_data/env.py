"""The environment ``my_data/Measures-v0``: questions of a file, a tool that has what they need, and a reward."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence

from areal_agents import Message, Task, ToolEnv

from .measures import look_up
from .questions import tasks_of
from .rubric import rubric


class Measures(ToolEnv):
    """Convert old measures. The model must look up how large one is, and multiply."""

    system_prompt = r"Look the measure up, then answer \boxed{number}."
    tools = (look_up,)
    rubric = rubric
    max_turns = 4

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return tasks_of(split)

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    @classmethod
    def expert(cls, task: Task) -> Generator[str, tuple[Message, ...], None]:
        """Demonstrate ``task`` for the warm start."""
        call = json.dumps({"name": "look_up", "arguments": {"unit": task.payload["unit"]}})
        yield f"<tool_call>{call}</tool_call>"
        yield cls.gold(task)

    @classmethod
    def gold(cls, task: Task) -> str:
        """Return an answer that deserves the full reward, which the reward audit tries."""
        return rf"\boxed{{{task.payload['answer']}}}"
