"""Environments whose user goes on talking, so that a message without calls is said to the user.

message with calls ────▶ they run ─▶ next turn
message without calls ─▶ reply ─▶ the user's next message ─▶ next turn
                             └▶ None: the talk is over ─▶ rubric ─▶ terminated
"""

from __future__ import annotations

from typing import Any

from areal_agents.toolenv import ToolEnv
from areal_agents.types import AssistantMessage, Info, Observation, user


class Dialogue(ToolEnv):
    """The base class of environments whose user answers. Implement ``reply``."""

    _next: str | None = None

    async def reply(self, action: AssistantMessage) -> str | None:
        """Return what the user says to a message without calls, or None where the talk is over.

        It is not asked about a message that was cut. That ends the episode, as everywhere.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement reply")

    def is_final(self, action: AssistantMessage) -> bool:
        return not action.tool_calls and self._next is None

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        """Take one turn, as ``ToolEnv`` does. What the user says to it is the observation."""
        self._require_running()
        self._next = None
        if not action.tool_calls and action.cut(()) is None:
            said: Any = await self.reply(action)
            self._next = None if said is None else self._text("reply", said)
        observation, reward, terminated, truncated, info = await super().astep(action)
        if self._next is None or terminated or truncated:
            return observation, reward, terminated, truncated, info
        message = user(self._next)
        self._messages.append(message)
        return (*observation, message), reward, terminated, truncated, info
