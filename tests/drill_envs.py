"""Environments that misbehave on purpose, for ``tests/trainer/test_drills.py``."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from typing import ClassVar

from areal_agents.env import Expert
from areal_agents.reward import Episode
from areal_agents.tool import tool
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.python import python
from areal_agents.types import AssistantMessage, Info, Observation, Task
from tests.letters_env import Letters

Stepped = tuple[Observation, float, bool, bool, Info]


class Tripwires(Letters):
    """``at[n]()`` runs inside the n-th step that training makes, counted over all episodes from 1."""

    steps: ClassVar[int] = 0
    at: ClassVar[dict[int, Callable[[], None]]] = {}

    @classmethod
    def set(cls, at: dict[int, Callable[[], None]]) -> None:
        cls.steps, cls.at = 0, at

    async def astep(self, action: AssistantMessage) -> Stepped:
        if self.task.split == "train":
            Tripwires.steps += 1
            self.at.get(Tripwires.steps, lambda: None)()
        return await super().astep(action)


class NeverReturns(Letters):
    """The first ``hangs`` steps of training wait for something that never comes."""

    hangs: ClassVar[int] = 0

    async def astep(self, action: AssistantMessage) -> Stepped:
        if self.task.split == "train" and NeverReturns.hangs > 0:
            NeverReturns.hangs -= 1
            await asyncio.Event().wait()
        return await super().astep(action)


class BlocksTheLoop(Letters):
    """The first ``hangs`` steps of training hold the thread of all environments until ``release`` is set."""

    hangs: ClassVar[int] = 0
    release: ClassVar[threading.Event] = threading.Event()

    async def astep(self, action: AssistantMessage) -> Stepped:
        if self.task.split == "train" and BlocksTheLoop.hangs > 0:
            BlocksTheLoop.hangs -= 1
            self.release.wait(120)
        return await super().astep(action)


@tool(timeout=30, max_output_chars=2000)
async def flood() -> str:
    """Return 100 MB of text."""
    return "x" * 100_000_000


def paid(episode: Episode) -> float:
    """Whatever happens: a demonstration must earn something."""
    return 1.0


class Floods(ToolEnv):
    """The expert calls a tool that returns 100 MB, then programs that print forever, to stdout and to stderr."""

    system_prompt = "Flood."
    tools = (flood, python)
    rubric = paid
    max_turns = 4
    calls: ClassVar[Sequence[tuple[str, dict[str, str]]]] = (
        ("flood", {}),
        ("python", {"code": "while True: print('y' * 100000)"}),
        ("python", {"code": "import sys\nwhile True: sys.stderr.write('z' * 100000)"}),
    )

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"n": f"{split} {i}"}) for i in range(4)]

    def prompt(self, task: Task) -> str:
        return str(task.payload["n"])

    @classmethod
    def expert(cls, task: Task) -> Expert:
        for name, arguments in cls.calls:
            yield f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
        yield "done"


class Sleeps(Floods):
    """The expert's program sleeps for as long as the tool lets it, with a child that does too."""

    calls = (("python", {"code": "import os, time\nos.fork()\ntime.sleep(600)"}),)
