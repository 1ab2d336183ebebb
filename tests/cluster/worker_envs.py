"""Environments that report to a folder what they do, for tests of rollout workers in other processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_agents.errors import SandboxError, SandboxUnavailable, TaskError
from areal_agents.rewards import Panel, pointwise
from areal_agents.sandbox import ProbeReport
from areal_agents.toolenv import ToolEnv
from areal_agents.types import AssistantMessage, Info, Observation, Task
from tests.letters_env import Letters

Stepped = tuple[Observation, float, bool, bool, Info]


class Reported(Letters):
    """Appends ``start pid task``, ``step pid task`` and ``close pid task`` lines to ``folder/log``.

    Its second step waits while the file ``folder/gate`` exists.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def report(self, what: str) -> None:
        with (self.folder / "log").open("a") as log:
            log.write(f"{what} {os.getpid()} {self.task.id}\n")

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        result = await super().areset(seed=seed, options=options)
        self.report("start")
        return result

    async def astep(self, action: AssistantMessage) -> Stepped:
        stepped = await super().astep(action)
        if self.turn == 2:
            self.report("step")
            while (self.folder / "gate").exists():  # noqa: ASYNC110  the test's process removes it
                await asyncio.sleep(0.02)
        return stepped

    async def aclose(self) -> None:
        self.report("close")


class Fails(Letters):
    """What goes wrong in the reset or in the second step depends on the task."""

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        result = await super().areset(seed=seed, options=options)
        if self.task.id.endswith("-3"):
            raise RuntimeError("cannot ask") from ConnectionRefusedError(111, "refused")
        if self.task.id.endswith("-4"):
            raise TaskError("its picture is damaged")
        if self.task.id.endswith("-5"):
            raise KeyError("question")
        return result

    async def astep(self, action: AssistantMessage) -> Stepped:
        stepped = await super().astep(action)
        if self.turn == 2 and self.task.id.endswith("-0"):
            raise ZeroDivisionError("the author's own")
        if self.turn == 2 and self.task.id.endswith("-1"):
            return stepped[0], float("nan"), *stepped[2:]
        if self.turn == 2 and self.task.id.endswith("-2"):
            error = SandboxError("the sandbox is gone")
            error.tool = "python"
            raise error from OSError("no space left")
        return stepped


class Refuses:
    """A sandbox backend that does not start anywhere but in the process that tests run in."""

    name = "refuses"

    async def probe(self) -> ProbeReport:
        raise SandboxUnavailable("refuses", f"process {os.getpid()} has a network", "unplug it")

    async def aclose(self) -> None: ...


class Judged(ToolEnv):
    """Asks a judge that its settings name."""

    rubric = pointwise(Panel(["judge"]), "Is it right?", question=lambda episode: f"in process {os.getpid()}")
    scores_cut_messages = True
    tasks = Letters.tasks

    def prompt(self, task: Task) -> str:
        return str(task.payload["word"])

    def answer(self, action: AssistantMessage) -> str:
        return f"It said {action.text!r}."  # a random model may say spaces alone, which is no answer
