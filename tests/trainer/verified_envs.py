"""Questions whose verifier is watched, and killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import ClassVar

from areal_agents.env import Expert
from areal_agents.envs.questions import Questions
from areal_agents.reward import WeightedSum
from areal_agents.rewards import code
from areal_agents.toolenv import ToolEnv
from areal_agents.types import AssistantMessage, Task
from tests.processes import descendants


class Watched(Questions):
    """Demonstrates the answer alone, which a tiny model can learn, and kills the verifier before chosen answers."""

    answers: ClassVar[int] = 0
    kill_at: ClassVar[frozenset[int]] = frozenset()
    killed: ClassVar[list[int]] = []

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        return _said(str(cls.gold(task)))

    def answer(self, action: AssistantMessage) -> str:
        cls = type(self)
        cls.answers += 1
        if cls.answers in cls.kill_at:
            for pid in verifiers(os.getpid()):
                os.kill(pid, signal.SIGKILL)
                cls.killed.append(pid)
        return super().answer(action)


class Programs(ToolEnv):
    """Programs that print a number, which a tiny model can learn by heart."""

    rubric = WeightedSum({"correct": code(mode="fraction", seconds=20.0), "compiles": (code(mode="compiles"), 0.1)})
    max_turns = 1

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        numbers = range(8) if split == "train" else range(8, 10)
        return [
            Task.make(
                f"{split}-{i}", split=split, seed=i,
                payload={"n": i, "tests": [{"output": str(i)}, {"input": "x", "output": str(i)}, {"output": "-"}]},
            )
            for i in numbers
        ]  # fmt: skip

    def prompt(self, task: Task) -> str:
        return f"print {task.payload['n']}"

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        return _said(f"```\nprint({task.payload['n']})\n```")


def _said(text: str) -> Expert:
    yield text


def verifiers(pid: int) -> list[int]:
    """The verifier's processes below ``pid``."""
    found = []
    for child in descendants(pid):
        try:
            with open(f"/proc/{child}/cmdline", "rb") as file:
                if b"areal_agents.rewards.mathematics.worker" in file.read():
                    found.append(child)
        except OSError:  # it ended meanwhile
            continue
    return found
