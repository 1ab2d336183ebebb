"""A two-turn environment that even a random model can learn: say letters, and as many as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.env import AgentEnv
from areal_agents.types import AssistantMessage, Info, Observation, StopReason, Task, user


class Letters(AgentEnv):
    """Each turn pays the share of lower-case letters in what was said; two turns, so rewards differ by turn."""

    scores_cut_messages = True  # every text is worth its letters, and a random model seldom ends one

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"{split} {i}"}) for i in range(8)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.turn = 0
        return (user(str(self.task.payload["word"])),), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        self.turn += 1
        reward = share_of_letters(action.text) / 2
        if self.turn == 2:
            return (), reward, True, False, {"stop_reason": "answer"}
        return (user("again"),), reward, False, False, {}

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 0.0, {"stop_reason": reason}


def share_of_letters(text: str) -> float:
    return sum("a" <= c <= "z" for c in text) / max(len(text), 1)
