"""Episodes made by hand."""

from __future__ import annotations

from areal_agents.reward import Episode
from areal_agents.tool import ToolResult
from areal_agents.types import AssistantMessage, CallStatus, Message, Task, Text, ToolCall, user

TASK = Task.make("t", split="train", seed=0, payload={"answer": "12"})


def call(name: str, status: CallStatus = "ok") -> ToolCall:
    return ToolCall("", name, {}, "", status)


def say(text: str, *calls: ToolCall, tokens: int | None = None, in_thought: bool = False) -> AssistantMessage:
    return AssistantMessage((Text(text),), calls, tokens=tokens, in_thought=in_thought)


def episode(*turns: AssistantMessage | str, results: tuple[ToolResult, ...] = (), ended: bool = True) -> Episode:
    messages: list[Message | AssistantMessage] = [user("3 · 4?")]
    messages += [say(t) if isinstance(t, str) else t for t in turns]
    last = messages[-1]
    answer = last.spoken if ended and isinstance(last, AssistantMessage) else None
    return Episode(TASK, tuple(messages), answer, results, "answer" if ended else "max_turns")
