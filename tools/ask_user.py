"""The ``ask_user`` tool, whose questions the environment answers, by a script or by a model that plays the user."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Protocol, TypeVar

from areal_agents.errors import EngineError, EnvError
from areal_agents.tool import ToolError, tool
from areal_agents.utils.short_text import short

MAX_QUESTION_CHARS = 10_000
ANSWER_SECONDS = 110.0
"""For an answer. It is less than the timeout of the tool that waits for it, which would be said to the policy."""
T = TypeVar("T")


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
    said: object = await answered(env.answer_user(question), "the user")
    if not isinstance(said, str):
        raise EnvError(f"{type(env).__name__}.answer_user returned {short(said)}, which is not a text")
    return said


async def answered(answer: Awaitable[T], who: str) -> T:
    """Wait for what the other side says. That it is late is no fault of the policy.

    Raises EngineError where ``who`` did not answer within ``ANSWER_SECONDS``.
    """
    clock = asyncio.timeout(ANSWER_SECONDS)
    try:
        async with clock:
            return await answer
    except TimeoutError as error:
        if not clock.expired():  # the author's own
            raise
        raise EngineError(f"{who} did not answer within {ANSWER_SECONDS:g} s") from error
