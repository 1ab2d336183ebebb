"""Questions whose verifier is watched, and killed."""

from __future__ import annotations

import os
import signal
from typing import ClassVar

from areal_agents.env import Expert
from areal_agents.envs.questions import Questions
from areal_agents.types import AssistantMessage, Task
from tests.processes import descendants


class Watched(Questions):
    """Demonstrates the answer alone, which a tiny model can learn, and kills the verifier before chosen answers."""

    answers: ClassVar[int] = 0
    kill_at: ClassVar[frozenset[int]] = frozenset()
    killed: ClassVar[list[int]] = []

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        def said() -> Expert:
            yield str(cls.gold(task))

        return said()

    def answer(self, action: AssistantMessage) -> str:
        cls = type(self)
        cls.answers += 1
        if cls.answers in cls.kill_at:
            for pid in verifiers(os.getpid()):
                os.kill(pid, signal.SIGKILL)
                cls.killed.append(pid)
        return super().answer(action)


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
