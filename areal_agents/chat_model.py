"""Models that are only talked to: messages in, one message out, no token ids.

    ChatModel (engine.py)   what a judge, a user simulator or an evaluation needs
    MeteredChatModel        also says what a reply cost, as far as its server reports it

``engines/openai/client.py`` and ``engines/engine_chat.py`` are implementations. None of them can be trained through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, runtime_checkable

from areal_agents.engine import ChatModel, Sampling
from areal_agents.errors import ConfigError, EngineError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Message

REMOTE = "openai:"
"""Before the name of a model that an OpenAI-compatible server serves, where a model is named."""


class ContextLengthError(EngineError):
    """The conversation is longer than the model's context.

    The server's limit is in the message.
    """


class RequestRefused(EngineError):
    """The server will not answer this conversation (a field it does not know, say)."""


class ContentFiltered(RequestRefused):
    """The server's filter refused the conversation."""


class MessageRefused(ConfigError):
    """A message holds what cannot be sent to a chat server, such as an image that is no URL."""


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One reply and what its server says of it."""

    message: AssistantMessage
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """Sampled tokens; None where the server does not say."""
    model: str = ""
    """The model that answered, by the server's own name for it; empty where it does not say."""


@runtime_checkable
class MeteredChatModel(Protocol):
    """A ChatModel that reports what its replies cost."""

    async def chat(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> AssistantMessage: ...

    async def reply(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> ChatReply: ...


async def reply_of(
    model: ChatModel, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
) -> ChatReply:
    """Ask ``model`` for a reply, and for its costs where it reports them.

    Args:
        model: any chat model.
        messages: the conversation so far.
        tools: what the model may call.
        sampling: how to sample.

    Returns:
        The reply; its costs are None where the model does not report them.
    """
    if isinstance(model, MeteredChatModel):
        return await model.reply(messages, tools, sampling)
    return ChatReply(await model.chat(messages, tools, sampling))


def remote_name(model: str) -> str | None:
    """Return MODEL of ``openai:MODEL``, or None for every other model.

    Raises ConfigError where the name is missing.
    """
    if not model.startswith(REMOTE):
        return None
    name = model.removeprefix(REMOTE)
    if not name:
        raise ConfigError(f"model {model!r} names no model: write {REMOTE}MODEL, as the server's /v1/models lists it")
    return name


def refuse_training(model: str) -> NoReturn:
    """Raise ConfigError for a model behind a chat API.

    It gives neither token ids nor log-probabilities (T1, T3).
    """
    raise ConfigError(
        f"{model} cannot be trained: a chat server returns text, but training needs the sampled token ids (T1) and the "
        "log-probability of each under the policy that sampled it (T3), and no weights could be sent back. Train a "
        "model folder or a hub id with the engine transformers or vllm; `areal-agents eval` and judges may use "
        f"{REMOTE}MODEL"
    )
