"""The ``ask_user`` tool, whose questions the environment answers, by a script or by a model that plays the user."""

from __future__ import annotations

from typing import Protocol

from areal_agents.errors import EnvError
from areal_agents.tool import ToolError, tool
from areal_agents.utils.short_text import short

MAX_QUESTION_CHARS = 10_000


class AnswersUser(Protocol):
    """What an environment implements to be asked.

    It may raise ``ToolError`` where the user does not answer. An engine's failure under it is the engine's.
    """

    async def answer_user(self, question: str) -> str:
        """Say what the user answers."""
        ...


@tool(timeout=120)
async def ask_user(question: str, *, env: AnswersUser) -> str:
    """Ask the user a question."""
    if not callable(getattr(env, "answer_user", None)):
        raise EnvError(f"ask_user: {type(env).__name__} must implement `async def answer_user(self, question)`")
    if len(question) > MAX_QUESTION_CHARS:
        raise ToolError(f"error: the question has {len(question)} characters, more than {MAX_QUESTION_CHARS}")
    said: object = await env.answer_user(question)
    if not isinstance(said, str):
        raise EnvError(f"{type(env).__name__}.answer_user returned {short(said)}, which is not a text")
    return said
