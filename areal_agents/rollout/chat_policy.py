"""The policy of a ChatModel, whose turns are messages instead of token ids, for evaluation alone.

Environment, tools, rewards, limits and seeds are those of training. How many tokens a turn sampled is known as far as
the server reports it (``metrics["completion_tokens"]``, ``metrics["prompt_tokens"]``). No turn has token ids, so no
training row can be made of such an episode (``batch.rows_of`` refuses it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from areal_agents.chat_model import (
    ChatReply,
    ContentFiltered,
    ContextLengthError,
    MessageRefused,
    RequestRefused,
    reply_of,
)
from areal_agents.engine import ChatModel, Sampling
from areal_agents.errors import EngineError, TaskError
from areal_agents.rollout.env_faults import refused
from areal_agents.rollout.episode import EpisodeDriver, Limits, Policy, Said
from areal_agents.rollout.seeds import request_seed
from areal_agents.types import AssistantMessage, Message, StopReason

_REPORTED = ("prompt_tokens", "completion_tokens")


class ChatPolicy(Policy):
    """A policy that says what a ChatModel replies.

    The model stays the caller's: ``close`` leaves it open. Every request has a seed of its own (``request_seed``).
    """

    def __init__(
        self,
        model: ChatModel,
        sampling: Sampling,
        limits: Limits,
        *,
        seen: Callable[[ChatReply], None] = lambda reply: None,
    ) -> None:
        """Prepare for one episode.

        Args:
            model: is asked for each message.
            sampling: of every request. The room that ``limits`` leave may lower ``max_tokens``.
            limits: on the tokens of the episode and on the seconds of a request.
            seen: is called with every reply.
        """
        self._model, self._sampling, self._limits, self._seen = model, sampling, limits, seen
        self._messages: list[Message | AssistantMessage] = []
        self._context = 0  # tokens of the last prompt and its reply, as reported

    async def say(self, episode: EpisodeDriver) -> Said | StopReason:
        room = self._limits.room(used=self._context, spent=episode.tokens)
        if isinstance(room, str):
            return room
        self._messages += episode.observation
        try:
            reply = await self._reply(episode, min(room, self._sampling.max_tokens))
        except ContextLengthError as error:
            if episode.turns:
                return "context"
            raise TaskError(f"task {episode.task.id}: the first prompt does not fit the model: {error}") from error
        except MessageRefused as error:
            raise refused(episode.task, len(episode.turns), f"cannot be sent: {error}") from error
        except ContentFiltered as error:
            if episode.turns:
                return "content_filter"
            raise TaskError(f"task {episode.task.id}: the server's filter refuses the first prompt: {error}") from error
        message, tokens = replace(reply.message, tokens=reply.completion_tokens), reply.completion_tokens or 0
        if message.finish == "stop" and not message.text.strip() and not message.tool_calls:
            message = replace(message, finish="empty")
        self._messages.append(message)
        spent = episode.tokens + tokens
        cut = self._limits.met(used=self._context, spent=spent) if message.finish == "length" else None
        return Said.as_text(message, len(episode.turns), tokens=tokens, cut=cut)

    async def _reply(self, episode: EpisodeDriver, room: int) -> ChatReply:
        limit = self._limits.request_timeout
        sampling = replace(self._sampling, max_tokens=room, seed=request_seed(episode))
        try:
            async with asyncio.timeout(limit):
                with episode.timed("generate_seconds"):
                    reply = await reply_of(self._model, self._messages, episode.tools, sampling)
        except TimeoutError as error:
            raise EngineError(f"task {episode.task.id}: the model did not answer within {limit:g} s") from error
        except RequestRefused as error:
            error.final = True  # another attempt would pay the turns before it once more
            raise
        for name in _REPORTED:
            value: int | None = getattr(reply, name)
            if value is not None:
                episode.count(name, value)
        if reply.prompt_tokens is not None:
            self._context = reply.prompt_tokens + (reply.completion_tokens or 0)
        self._seen(reply)
        return reply
