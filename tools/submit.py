"""The ``submit`` tool, which ends the episode with an answer, for environments whose answers are no plain messages."""

from __future__ import annotations

from typing import Protocol

from areal_agents.errors import EnvError
from areal_agents.tool import tool


class EndsWithAnswer(Protocol):
    """What the environment must be able to do. ``ToolEnv`` is."""

    def end_episode(self, answer: str | None = None) -> None: ...


@tool()
async def submit(answer: str, *, env: EndsWithAnswer) -> str:
    """Submit the final answer, which ends the task."""
    if not callable(getattr(env, "end_episode", None)):
        raise EnvError(f"submit: {type(env).__name__} has no end_episode(answer), as ToolEnv has")
    env.end_episode(answer)
    return "submitted"
