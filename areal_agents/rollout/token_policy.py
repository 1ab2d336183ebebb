"""The policies whose turns are token ids, from which training rows are made.

    episode.observation ─▶ History ─▶ sample (an engine, an expert) ─▶ ids ─▶ message

A generation slot of the engine is held for one request, never across ``astep``.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Engine, Sampling
from areal_agents.errors import EngineError, TaskError, TemplateError
from areal_agents.rollout.env_faults import refused
from areal_agents.rollout.episode import EpisodeDriver, Limits, Policy, Said
from areal_agents.rollout.history import LimitedHistory, Next
from areal_agents.rollout.seeds import request_seed
from areal_agents.types import Completion, Prompt, StopReason, Tail


class TokenPolicy(Policy):
    """A policy that keeps the conversation and the limits on tokens.

    Subclasses implement ``sample``.
    """

    def __init__(self, fmt: ChatFormat, limits: Limits) -> None:
        self.fmt, self.limits = fmt, limits
        self._history: LimitedHistory | None = None

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        """Continue ``prompt``, which ends with ``episode.observation``."""
        raise NotImplementedError

    async def sample_summary(self, prompt: Prompt, max_tokens: int, asked: Next, episode: EpisodeDriver) -> Completion:
        """Continue ``prompt``, which ends with the request for a summary."""
        return await self.sample(prompt, max_tokens, episode)

    async def say(self, episode: EpisodeDriver) -> Said | StopReason:
        history = self._history = self._history or LimitedHistory(self.fmt, self.limits)
        try:
            now = await history.next(episode)
        except TemplateError as error:
            raise refused(episode.task, len(episode.turns), f"cannot be rendered: {error}") from error
        prompt, limit = now.conversation.prompt, self.limits.max_context
        used = len(prompt.ids)
        if not episode.turns and used >= limit:
            raise TaskError(
                f"task {episode.task.id}: the first prompt has {used} tokens, model.max_context is {limit}: "
                "raise it or shorten the task"
            )
        room = self.limits.room(used=used, spent=episode.tokens)
        if isinstance(room, str):
            return room
        suffix, parent = now.conversation.suffix, now.conversation.parent
        if now.request is None:
            completion = await self.sample(prompt, room, episode)
        else:
            completion = await self.sample_summary(prompt, min(room, now.most), now, episode)
        if not completion.ids:
            raise EngineError(f"the engine returned no token for a prompt of {used} tokens")
        n = len(completion.ids)
        message = replace(now.conversation.add_completion(completion), tokens=n)
        if now.request is not None:
            message = history.keep_summary(message)
            return Said(message, completion, suffix, parent, n, request=now.request)
        cut = self.limits.met(used=used + n, spent=episode.tokens + n) if completion.finish == "length" else None
        return Said(message, completion, suffix, parent, n, cut, now.rewritten)

    def tail(self, episode: EpisodeDriver) -> Tail | None:
        """Return the prompt that ends with the last observation, its history as it is.

        It is None where it leaves no room to sample, for then nothing more could have been earned. Where the template
        cannot show it, which it need not after a message that was cut, the metric ``tails_missing`` says so, and where
        a rewritten history might have had room.
        """
        assert self._history is not None, "an episode that was cut has a turn"
        try:
            conversation = self._history.show(episode)
        except TemplateError:
            episode.count("tails_missing")
            return None
        if len(conversation.prompt.ids) >= self.limits.max_context:
            if episode.context is not None:
                episode.count("tails_missing")
            return None
        return Tail(conversation.suffix, conversation.parent)


class EnginePolicy(TokenPolicy):
    """A policy that samples from an engine, with the episode's id as its session.

    Every request has a seed of its own (``request_seed``).
    """

    def __init__(self, engine: Engine, sampling: Sampling, fmt: ChatFormat, limits: Limits) -> None:
        super().__init__(fmt, limits)
        self._engine, self._sampling = engine, sampling

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        limit = min(max_tokens, self._sampling.max_tokens)
        sampling = replace(self._sampling, max_tokens=limit, seed=request_seed(episode))
        deadline = self.limits.request_timeout
        with episode.timed("generate_seconds"):
            return await self._engine.generate(prompt, sampling, session=episode.id, deadline=deadline)

    async def close(self, episode: EpisodeDriver) -> None:
        with contextlib.suppress(EngineError):  # a failed release must not hide why the episode ended
            await self._engine.release(episode.id)
