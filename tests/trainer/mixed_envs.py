"""Two environments of one turn that a random model passes at times, and whose tasks have levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.env import AgentEnv
from areal_agents.types import AssistantMessage, Info, Observation, StopReason, Task, user
from tests.letters_env import share_of_letters


class Letters(AgentEnv):
    """Pays 1 where the share of lower-case letters is more than 0.4 + difficulty / 2, else that share."""

    name = "letters"
    scores_cut_messages = True

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = 0.0 if difficulty is None else difficulty
        return [
            Task.make(
                f"{split}-{level:g}-{i}", split=split, seed=i,
                payload={"word": f"{cls.name} {split} {level:g} {i}", "level": level},
            )
            for i in range(12)
        ]  # fmt: skip

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        return (user(str(self.task.payload["word"])),), {}

    def pay(self, text: str) -> float:
        share = share_of_letters(text)
        return 1.0 if share > 0.4 + float(self.task.payload["level"]) / 2 else share

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        return (), self.pay(action.text), True, False, {"stop_reason": "answer"}

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 0.0, {"stop_reason": reason}


class Hundred(Letters):
    """The same with rewards a hundred times as large: a mixture's advantages must not be of one size."""

    name = "hundred"

    def pay(self, text: str) -> float:
        return 100.0 * super().pay(text)
