"""One episode played by a ChatModel: messages instead of token ids, for evaluation alone.

    areset ─▶ messages ─▶ reply ─▶ astep ─▶ … ─▶ (terminated | truncated | afinish) ─▶ Trajectory without ids

Environment, tools, rewards, limits and seeds are those of ``episode.py``. What a turn sampled is known as far as the
server reports it (``metrics["completion_tokens"]``, ``metrics["prompt_tokens"]``). No turn has token ids, so no
training row can be made of such an episode (``batch.rows_of`` refuses it).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import replace

from areal_agents.chat_model import ChatReply, ContextLengthError, RequestRefused, reply_of
from areal_agents.engine import ChatModel, Sampling
from areal_agents.env import AgentEnv
from areal_agents.errors import EngineError, EnvError
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeStates, Limits
from areal_agents.rollout.player import EventSink, HostPlayer, no_events
from areal_agents.types import AssistantMessage, Completion, Message, StopReason, Task, Trajectory

_REPORTED = ("prompt_tokens", "completion_tokens")


class ChatPlayer(HostPlayer):
    """Plays a ChatModel on an ``EnvHost`` of this process; an ``EpisodePlayer``.

    The model stays the caller's: ``close`` leaves it open. Every request has a seed of its own (``request_seed``).
    ``seen``: is told every reply.
    """

    def __init__(
        self,
        make_env: Callable[[], AgentEnv],
        model: ChatModel,
        sampling: Sampling,
        limits: Limits,
        *,
        event: EventSink = no_events,
        seen: Callable[[ChatReply], None] = lambda reply: None,
    ) -> None:
        super().__init__(make_env, limits, event=event)
        self._model, self._sampling, self._seen = model, sampling, seen

    async def _attempt(self, task: Task, host: EnvHost, *, id: str, group: str, seed: int) -> Trajectory:
        episode = _ChatEpisode(task, self._model, self._sampling, self._limits, id, host, self._seen, seed)
        return await episode.run(self._make_env, group=group, seed=seed)


def request_seed(seed: int, id: str, turn: int) -> int:
    """The sampling seed of an episode's turn, in [0, 2^31).

    A server draws the same noise for the same seed: episodes that share one would succeed and fail together, whatever
    their tasks.
    """
    return random.Random(f"{seed}/{id}/{turn}").getrandbits(31)


class _ChatEpisode(EpisodeStates):
    """The state machine of an episode whose turns are messages."""

    def __init__(
        self,
        task: Task,
        model: ChatModel,
        sampling: Sampling,
        limits: Limits,
        id: str,
        host: EnvHost,
        seen: Callable[[ChatReply], None],
        seed: int,
    ) -> None:
        super().__init__(task, limits, id, host)
        self.model, self.sampling, self._seen, self._id, self._seed = model, sampling, seen, id, seed
        self._spent = 0  # sampled tokens that the server reported
        self._context = 0  # tokens of the last prompt and its reply, as reported

    async def play(self) -> None:
        messages: list[Message | AssistantMessage] = list(self.observation)
        while True:
            room, reason = self._room()
            if reason is not None:
                return await self._finish(reason)
            try:
                reply = await self._reply(messages, room)
            except ContextLengthError as error:
                if self.state.turns:
                    return await self._finish("context")
                raise EnvError(f"task {self.task.id}: the first prompt does not fit the model: {error}") from error
            messages.append(reply.message)
            parent = len(self.state.turns) - 1 if self.state.turns else None
            await self._step(reply.message, Completion((), (), (), reply.message.finish), (), parent)
            if self.state.terminated or self.state.truncated:
                return None
            messages += self.observation

    def _tokens(self) -> int:
        return self._spent

    def _room(self) -> tuple[int, StopReason | None]:
        """Tokens the next turn may sample, or why there is none, as far as the server's numbers tell."""
        limits = self.limits
        if len(self.state.turns) >= limits.max_turns:
            return 0, "max_turns"
        if self._context >= limits.max_context:
            return 0, "context"
        if self._spent >= limits.max_episode_tokens:
            return 0, "tokens"
        left = limits.max_context - self._context, limits.max_episode_tokens - self._spent
        return min(limits.max_turn_tokens, self.sampling.max_tokens, *left), None

    async def _reply(self, messages: list[Message | AssistantMessage], room: int) -> ChatReply:
        start, limit = time.perf_counter(), self.limits.request_timeout
        seed = request_seed(self._seed, self._id, len(self.state.turns))
        sampling = replace(self.sampling, max_tokens=room, seed=seed)
        try:
            async with asyncio.timeout(limit):
                reply = await reply_of(self.model, messages, self._env_of().tools, sampling)
        except TimeoutError as error:
            raise EngineError(f"task {self.task.id}: the model did not answer within {limit:g} s") from error
        except RequestRefused as error:
            error.final = True  # another attempt would pay the turns before it once more
            raise
        self.state.count("generate_seconds", time.perf_counter() - start)
        for name in _REPORTED:
            value: int | None = getattr(reply, name)
            if value is not None:
                self.state.count(name, value)
        self._spent += reply.completion_tokens or 0
        if reply.prompt_tokens is not None:
            self._context = reply.prompt_tokens + (reply.completion_tokens or 0)
        self._seen(reply)
        return reply
