"""The policies whose turns are token ids, from which training rows are made.

    episode.observation ─▶ Conversation ─▶ sample (an engine, an expert) ─▶ ids ─▶ message

A generation slot of the engine is held for one request, never across ``astep``.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Engine, Sampling
from areal_agents.errors import EngineError, TaskError, TemplateError
from areal_agents.rollout.env_faults import refused
from areal_agents.rollout.episode import EpisodeDriver, Limits, Policy, Said
from areal_agents.rollout.seeds import request_seed
from areal_agents.types import Completion, Prompt, StopReason, Tail


class TokenPolicy(Policy):
    """A policy that keeps the conversation and the limits on tokens.

    Subclasses implement ``sample``.
    """

    def __init__(self, fmt: ChatFormat, limits: Limits) -> None:
        self.fmt, self.limits = fmt, limits
        self._conversation: Conversation | None = None

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        """Continue ``prompt``, which ends with ``episode.observation``."""
        raise NotImplementedError

    async def say(self, episode: EpisodeDriver) -> Said | StopReason:
        try:
            self._conversation = conversation = continued(self._conversation, self.fmt, episode)
        except TemplateError as error:
            raise refused(episode.task, len(episode.turns), f"cannot be rendered: {error}") from error
        prompt, limit = conversation.prompt, self.limits.max_context
        used = len(prompt.ids)
        if not episode.turns and used >= limit:
            raise TaskError(
                f"task {episode.task.id}: the first prompt has {used} tokens, model.max_context is {limit}: "
                "raise it or shorten the task"
            )
        room = self.limits.room(used=used, spent=episode.tokens)
        if isinstance(room, str):
            return room
        suffix, parent = conversation.suffix, conversation.parent
        completion = await self.sample(prompt, room, episode)
        if not completion.ids:
            raise EngineError(f"the engine returned no token for a prompt of {used} tokens")
        n = len(completion.ids)
        cut = self.limits.met(used=used + n, spent=episode.tokens + n) if completion.finish == "length" else None
        message = replace(conversation.add_completion(completion), tokens=n)
        return Said(message, completion, suffix, parent, n, cut)

    def tail(self, episode: EpisodeDriver) -> Tail | None:
        """Return the prompt that ends with the last observation.

        It is None where it leaves no room to sample, for then nothing more could have been earned. Where the template
        cannot show it, which it need not after a message that was cut, the metric ``tails_missing`` says so.
        """
        assert self._conversation is not None, "an episode that was cut has a turn"
        try:
            if self._conversation.waiting:
                self._conversation.add_observation(episode.observation)
        except TemplateError:
            episode.count("tails_missing")
            return None
        if len(self._conversation.prompt.ids) >= self.limits.max_context:
            return None
        return Tail(self._conversation.suffix, self._conversation.parent)


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


def continued(conversation: Conversation | None, fmt: ChatFormat, episode: EpisodeDriver) -> Conversation:
    """Add what the episode shows now to ``conversation``, or begin a new one where it is None."""
    if conversation is None:
        return Conversation(fmt, episode.observation, episode.tools)
    conversation.add_observation(episode.observation)
    return conversation
