"""Environments whose episodes are longer than a small context: pages that are read one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from areal_agents.context import Fold, Summary
from areal_agents.env import AgentEnv, Expert
from areal_agents.reward import Episode, RewardLike, Verdict
from areal_agents.tool import tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import AssistantMessage, Info, Observation, StopReason, Task, user

FILLER = "the quick brown fox jumps over the lazy dog " * 18
PAGES = 8


@tool()
async def page(number: int) -> str:
    """Read a page."""
    return f"page {number}: {FILLER}"


def call(number: int) -> str:
    return f"<tool_call>{json.dumps({'name': 'page', 'arguments': {'number': number}})}</tool_call>"


SEEN: list[Episode] = []
"""What the rubric of ``Pages`` was given, in order."""


async def right(episode: Episode) -> Verdict:
    """One for the answer, and a tenth for each turn: so that a turn's reward says which turn it is."""
    SEEN.append(episode)
    last = 1.0 if episode.answer == "dog" else 0.0
    turns = (*(0.1 * (k + 1) for k in range(episode.turns - 1)), last)
    return Verdict(sum(turns), {"right": last}, turns)


class Pages(ToolEnv):
    """Read every page, and say ``dog``."""

    system_prompt = "Read."
    tools = (page,)
    rubric: ClassVar[RewardLike] = right
    max_turns = PAGES + 2

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"n": i}) for i in range(4)]

    def prompt(self, task: Task) -> str:
        return f"task {task.payload['n']}"

    @classmethod
    def expert(cls, task: Task) -> Expert:
        for number in range(PAGES):
            yield call(number)
        yield "dog"


class Talk(AgentEnv):
    """Shows a long text after each turn, as a user, and pays for letters. Even a random model plays it."""

    turns: ClassVar[int] = 5
    scores_cut_messages = True

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"{split} {i}"}) for i in range(8)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.turn = 0
        return (user(f"talk {self.task.payload['word']}"),), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        self.turn += 1
        reward = sum("a" <= c <= "z" for c in action.text) / max(len(action.text), 1) / self.turns
        if self.turn == self.turns:
            return (), reward, True, False, {"stop_reason": "answer"}
        return (user(f"{self.turn}: {FILLER[:440]}"),), reward, False, False, {"state_key": f"s{self.turn}"}

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 0.0, {"stop_reason": reason}


class TalkFold(Talk):
    context = Fold(keep=1, at=0.9, roles=("tool", "user"))


class TalkSummary(Talk):
    context = Summary(prompt="sum up", at=0.8, max_tokens=8)
