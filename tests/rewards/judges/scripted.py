"""Judges that answer by a script, and how they read a prompt."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence

from areal_agents.chat_model import ChatReply
from areal_agents.engine import Sampling
from areal_agents.reward import Episode
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Finish, Message, Task, Text, user

QUESTION = "3 · 4?"


def episode(answer: str | None, *, id: str = "t", **payload: str) -> Episode:
    task = Task.make(id, split="train", seed=0, payload={"reference": "12", **payload})
    said = () if answer is None else (AssistantMessage((Text(answer),)),)
    return Episode(task, (user(QUESTION), *said), answer, (), "answer" if answer else "max_turns")


class Scripted:
    """A ChatModel that answers a prompt with what ``reply`` returns or raises, and keeps the prompts."""

    def __init__(
        self, reply: Callable[[str], str], *, tokens: int | None = 10, finish: Finish = "stop", thoughts: str = ""
    ) -> None:
        self._reply, self._tokens, self._finish, self._thoughts = reply, tokens, finish, thoughts
        self.prompts: list[str] = []

    async def chat(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> AssistantMessage:
        return (await self.reply(messages, tools, sampling)).message

    async def reply(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> ChatReply:
        (message,) = messages
        self.prompts.append(message.text)
        await asyncio.sleep(0)  # others are asked meanwhile
        text = self._thoughts + self._reply(message.text)
        return ChatReply(AssistantMessage((Text(text),), finish=self._finish), self._tokens, self._tokens)


def tag_of(prompt: str) -> str:
    found = re.search(r"two marks with the tag ([0-9a-f]{8})\.", prompt)
    assert found
    return found[1]


def slot(prompt: str, name: str) -> str:
    """The text between the slot's two marks, which stand there once each."""
    tag = tag_of(prompt)
    assert prompt.count(f"<<<{name} {tag}>>>\n") == prompt.count(f"\n<<<END {name} {tag}>>>") == 1
    return prompt.split(f"<<<{name} {tag}>>>\n")[1].split(f"\n<<<END {name} {tag}>>>")[0]


def outside(prompt: str) -> str:
    """The prompt without what stands in its slots."""
    tag = tag_of(prompt)
    return re.sub(rf"<<<(\w+) {tag}>>>\n.*?\n<<<END \1 {tag}>>>", "", prompt, flags=re.DOTALL)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  turns of one event loop
        await asyncio.sleep(0)


def gives(n: int) -> Callable[[str], str]:
    """Always the same score."""
    return lambda prompt: f"Because.\nSCORES {tag_of(prompt)}: quality={n}"


def knows(prompt: str) -> int:
    """5 for the right answer, which is 12, else 1."""
    return 5 if slot(prompt, "ANSWER").strip() == "12" else 1


def honest(prompt: str) -> str:
    return f"I have looked.\nSCORES {tag_of(prompt)}: quality={knows(prompt)}"


def prefers(key: Callable[[str], float]) -> Callable[[str], str]:
    """The answer for which ``key`` is higher."""

    def reply(prompt: str) -> str:
        a, b = key(slot(prompt, "FIRST")), key(slot(prompt, "SECOND"))
        return f"BETTER {tag_of(prompt)}: {'TIE' if a == b else 'FIRST' if a > b else 'SECOND'}"

    return reply
