"""The policy of a ChatModel, whose turns are messages instead of token ids, for evaluation alone.

Environment, tools, rewards, limits and seeds are those of training. How many tokens a turn sampled is known as far as
the server reports it (``metrics["completion_tokens"]``, ``metrics["prompt_tokens"]``). No turn has token ids, so no
training row can be made of such an episode (``batch.rows_of`` refuses it).

Whether a history comes near the limit (``context.py``) is known as far as the server reports it too: from its last
prompt and reply, without what the environment showed since. Where it says nothing, no history is rewritten, and the
metric ``context_unknown`` counts the replies.
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
from areal_agents.context import Messages
from areal_agents.engine import ChatModel, Sampling
from areal_agents.errors import EngineError, TaskError
from areal_agents.rollout.chat_history import ChatHistory
from areal_agents.rollout.env_faults import refused
from areal_agents.rollout.episode import EpisodeDriver, Limits, Policy, Said
from areal_agents.rollout.seeds import request_seed
from areal_agents.types import StopReason

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
        self._history = ChatHistory(limits)

    async def say(self, episode: EpisodeDriver) -> Said | StopReason:
        history, steps = self._history, episode.steps
        now = await history.next(episode)
        room = self._limits.room(used=history.tokens, spent=episode.tokens)
        if isinstance(room, str):
            return room
        most = min(room, self._sampling.max_tokens) if now.request is None else min(room, now.most)
        try:
            reply = await self._reply(episode, now.messages, most)
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
        turn = 1 + max(steps, default=-1)
        if now.request is not None:
            message = history.keep_summary(message)
            return Said.as_text(message, turn, tokens=tokens, request=now.request)
        history.keep(message, reply, episode)
        spent = episode.tokens + tokens
        cut = self._limits.met(used=history.tokens, spent=spent) if message.finish == "length" else None
        return Said.as_text(message, turn, tokens=tokens, cut=cut, rewritten=now.rewritten)

    async def _reply(self, episode: EpisodeDriver, messages: Messages, room: int) -> ChatReply:
        limit = self._limits.request_timeout
        sampling = replace(self._sampling, max_tokens=room, seed=request_seed(episode))
        try:
            async with asyncio.timeout(limit):
                with episode.timed("generate_seconds"):
                    reply = await reply_of(self._model, messages, episode.tools, sampling)
        except TimeoutError as error:
            raise EngineError(f"task {episode.task.id}: the model did not answer within {limit:g} s") from error
        except RequestRefused as error:
            error.final = True  # another attempt would pay the turns before it once more
            raise
        for name in _REPORTED:
            value: int | None = getattr(reply, name)
            if value is not None:
                episode.count(name, value)
        self._seen(reply)
        return reply
