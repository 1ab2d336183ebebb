"""Experts speak Hermes blocks, and their demonstrations are tokens in the model's own tool format."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.tool_formats import FORMATS
from areal_agents.chat.toolcalls import write_block
from areal_agents.env import Expert
from areal_agents.reward import Episode
from areal_agents.rollout.demonstrations import ExpertPolicy, demonstration_rows
from areal_agents.rollout.episode import Limits
from areal_agents.rollout.player import LocalPlayer
from areal_agents.tool import tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task, Trajectory
from tests.tiny_tokenizer import CHATML, OPENS_THINKING, tiny

LIMITS = Limits(
    max_context=8192,
    max_turn_tokens=2048,
    max_episode_tokens=8192,
    max_turns=8,
    step_timeout=60.0,
    request_timeout=60.0,
)


@tool()
async def add(a: int, b: int, note: str = "") -> str:
    """Add two numbers."""
    return f"{a + b} {note}"


class Sums(ToolEnv):
    """Two sums in one message, and the total."""

    tools = (add,)
    splits = ("train",)

    @staticmethod
    async def rubric(episode: Episode) -> float:  # type: ignore[override]
        return float(
            (episode.answer or "").strip() == "total 10" and [r.text for r in episode.tool_results] == ["3 007", "7 "]
        )

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make("t", split=split, seed=0, payload={})]

    def prompt(self, task: Task) -> str:
        return "Add."

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield write_block("add", '{"a": 1, "b": 2, "note": "007"}') + "\n" + write_block("add", '{"a": 3, "b": 4}')
        yield "total 10"


@pytest.mark.parametrize("template", [CHATML, OPENS_THINKING], ids=["plain", "opens thinking"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_experts_calls_run_in_every_format(name: str, template: str) -> None:
    fmt = ChatFormat(tiny(template), tool_format=name)
    task = Sums.tasks("train")[0]

    def policy(task: Task) -> Any:
        expert = Sums.expert(task)
        assert expert is not None
        return ExpertPolicy(expert, task, fmt, LIMITS)

    async def play() -> Trajectory:
        player = LocalPlayer(lambda: Sums(sandbox=None), policy, LIMITS)
        try:
            return await player.play(task, id="e", group="g", seed=0)
        finally:
            await player.close()

    episode = asyncio.run(play())
    assert episode.reward == 1.0
    calls = episode.turns[0].message.tool_calls
    assert [(c.name, c.status, c.format) for c in calls] == [("add", "ok", name)] * 2
    assert demonstration_rows([episode])
    assert ("<tool_call>{" in episode.turns[0].message.text) == (name == "hermes")
