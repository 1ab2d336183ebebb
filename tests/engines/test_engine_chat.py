"""EngineChat: an engine talks; its ids are the format's, and other loops may call it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.chat_model import ContextLengthError
from areal_agents.engine import ChatModel, Sampling
from areal_agents.engines.engine_chat import EngineChat
from areal_agents.errors import EngineError
from areal_agents.rollout.env_host import EnvHost
from areal_agents.tool import ToolSpec
from areal_agents.types import Completion, Prompt, system, user
from tests.tiny_tokenizer import CHATML, tiny

FMT = ChatFormat(tiny(CHATML))
TOOL = ToolSpec("calc", "Calculate.", {"type": "object", "properties": {}})
SAID = 'ok <tool_call>{"name": "calc", "arguments": {"x": 2}}</tool_call>'


@dataclass
class OneLineEngine:
    """Says one line whatever it is asked; keeps what it was asked, and on which thread."""

    text: str = SAID
    error: EngineError | None = None
    asked: list[tuple[Prompt, Sampling, str, float]] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    version: int = 4

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        self.asked.append((prompt, sampling, session, deadline))
        self.threads.add(threading.get_ident())
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        ids = FMT.encode_turn(self.text)[: sampling.max_tokens]
        finish = "stop" if ids[-1] in sampling.stop_ids else "length"
        return Completion(ids, (-1.0,) * len(ids), (4,) * len(ids), finish)  # type: ignore[arg-type]

    async def release(self, session: str) -> None:
        self.released.append(session)


def test_the_prompt_is_the_formats_and_the_reply_is_parsed() -> None:
    engine = OneLineEngine()

    async def talk() -> None:
        model: ChatModel = EngineChat(engine, FMT, deadline=7)  # type: ignore[arg-type]
        messages = (system("judge"), user("the task"))
        first = await model.chat(messages, (TOOL,), Sampling(99, temperature=0.0))
        assert first.text == SAID
        assert [(c.name, c.arguments, c.status) for c in first.tool_calls] == [("calc", {"x": 2}, "ok")]
        await model.chat((*messages, first, user("again")), (), Sampling(5, stop_ids=(3,)))

    asyncio.run(talk())
    (prompt, sampling, session, deadline), (again, own, other, _) = engine.asked
    assert prompt.ids == FMT.first_prompt((system("judge"), user("the task")), (TOOL,))
    assert (sampling.stop_ids, sampling.max_tokens, deadline) == (FMT.stop_ids, 99, 7)
    assert own.stop_ids == (3,)
    assert engine.released == [session, other]
    assert session != other
    said = FMT.parse(FMT.encode_turn(SAID), "stop")
    assert again.ids == FMT.first_prompt((system("judge"), user("the task"), said, user("again")))


def test_counts_and_a_length_stop() -> None:
    async def talk() -> None:
        reply = await EngineChat(OneLineEngine(), FMT).reply((user("u"),), (), Sampling(3))  # type: ignore[arg-type]
        assert (reply.prompt_tokens, reply.completion_tokens) == (len(FMT.first_prompt((user("u"),))), 3)
        assert reply.message.finish == "length"

    asyncio.run(talk())


def test_another_loop_is_carried_over_to_the_engines() -> None:
    """An environment's judge: the environment runs on the loop of an EnvHost, the engine on this one."""
    engine = OneLineEngine()

    async def talk() -> str:
        chat, host = EngineChat(engine, FMT), EnvHost()  # type: ignore[arg-type]
        try:
            message = await host.call(lambda: chat.chat((user("u"),), (), Sampling(99)), timeout=120, what="judge")
        finally:
            await host.close()
        return message.text

    assert asyncio.run(talk()) == SAID
    assert engine.threads == {threading.get_ident()}


def test_a_failing_engine_fails_the_call_and_is_released() -> None:
    engine = OneLineEngine(error=EngineError("dead"))

    async def talk() -> EngineChat:
        chat = EngineChat(engine, FMT)  # type: ignore[arg-type]
        with pytest.raises(EngineError, match="dead"):
            await chat.chat((user("u"),), (), Sampling(9))
        return chat

    chat = asyncio.run(talk())
    assert len(engine.released) == 1
    with pytest.raises(EngineError, match="loop of EngineChat's engine is closed"):
        asyncio.run(chat.chat((user("u"),), (), Sampling(9)))


def test_a_conversation_that_does_not_fit_is_told_as_one() -> None:
    @dataclass
    class Small(OneLineEngine):
        max_context: int = 0

    async def talk(longest: int) -> str:
        model: ChatModel = EngineChat(Small(max_context=longest), FMT)  # type: ignore[arg-type]
        return (await model.chat((user("the task"),), (), Sampling(99))).text

    used = len(FMT.first_prompt((user("the task"),)))
    for fits in (0, used + 1):  # 0: the engine does not say
        assert asyncio.run(talk(fits))
    with pytest.raises(ContextLengthError, match=f"the conversation has {used} tokens"):
        asyncio.run(talk(used))
