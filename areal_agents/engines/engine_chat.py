"""``EngineChat``: any engine as a ChatModel, so that judges and user simulators can be the policy itself.

    messages ──ChatFormat──▶ ids ──engine──▶ sampled ids ──ChatFormat──▶ AssistantMessage

Environments run on a loop of their own (``rollout/env_host.py``). An engine belongs to the loop that started it, so a
call from another loop is carried over. ``EngineChat`` holds no conversation. Every call is a whole prompt and a session
of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace

from areal_agents.chat.format import ChatFormat
from areal_agents.chat_model import ChatReply, ContextLengthError
from areal_agents.engine import Engine, Sampling, shortest_context
from areal_agents.errors import EngineError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Message, Prompt
from areal_agents.utils.outcomes import opened, outcome_of

_numbers = itertools.count()


class EngineChat:
    """A ChatModel over an engine, to be made on the engine's own loop.

    Args:
        engine: samples the replies. It stays the caller's, who closes it.
        fmt: the chat format of the engine's model.
        deadline: seconds for one reply.
    """

    def __init__(self, engine: Engine, fmt: ChatFormat, *, deadline: float = 300.0) -> None:
        self._engine, self._fmt, self._deadline = engine, fmt, deadline
        self._loop = asyncio.get_running_loop()

    async def chat(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> AssistantMessage:
        """Return the next assistant message.

        It raises what ``reply`` raises.
        """
        return (await self.reply(messages, tools, sampling)).message

    async def reply(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> ChatReply:
        """Return the next assistant message, with its counts of tokens.

        Where ``sampling.stop_ids`` is empty, the format's stop ids are used. Cancelling aborts the request.

        Raises:
            ContextLengthError: the conversation does not fit.
            EngineError: the engine is dead, refused, or missed the deadline.
            TemplateError: the template cannot render the messages.
        """
        if asyncio.get_running_loop() is self._loop:
            return await self._reply(messages, tools, sampling)
        if self._loop.is_closed():
            raise EngineError("the event loop of EngineChat's engine is closed: keep it open while the model is used")
        work = outcome_of(lambda: self._reply(messages, tools, sampling))
        return opened(await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop)))

    async def _reply(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> ChatReply:
        prompt = Prompt(self._fmt.first_prompt(messages, tools))
        used = len(prompt.ids)
        if shortest_context(used + 1, self._engine) <= used:
            raise ContextLengthError(f"the conversation has {used} tokens, which leave no room for an answer")
        sampling = replace(sampling, stop_ids=sampling.stop_ids or self._fmt.stop_ids)
        session = f"chat-{next(_numbers)}"
        try:
            done = await self._engine.generate(prompt, sampling, session=session, deadline=self._deadline)
        finally:
            # A dead engine has nothing to release, and the error of `generate` is the one to raise.
            with contextlib.suppress(EngineError):
                await self._engine.release(session)
        message = self._fmt.parse(done.ids, done.finish, prompt.ids, tools)
        return ChatReply(message, len(prompt.ids), len(done.ids))
