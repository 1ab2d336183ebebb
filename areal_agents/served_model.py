"""``ServedModel``: a chat model named by where it is served, as a value that settings hold and processes exchange.

    "openai:MODEL@http://HOST:PORT/v1"  ─▶ ServedModel ─chat─▶ one client for each event loop ─▶ server

A client belongs to one event loop, but a reward is made when its module is imported and called on whatever loop plays
the episode. So the client is made where it is first needed. Equal models of one loop share it, with its limits on
requests. Its connections are closed whenever nothing is asked, so that nobody has to close a ``ServedModel``.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias
from weakref import WeakKeyDictionary

from areal_agents.chat_model import REMOTE, ChatReply
from areal_agents.engine import ChatModel, Sampling
from areal_agents.errors import ConfigError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Message
from areal_agents.utils.short_text import short

_CLIENT = "areal_agents.engines.openai.client"
_ADDRESS = re.compile(r"(?P<model>.+)@(?P<url>https?://.+)", re.DOTALL)
_NOT_VALUES = frozenset({"rng", "clock", "transport"})

ModelLike: TypeAlias = "ChatModel | str | Mapping[str, Any]"
"""A chat model, ``"openai:MODEL@URL"``, or the arguments of ``ServedModel`` by name, as a TOML table has them."""


class _Client(Protocol):
    async def reply(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> ChatReply: ...

    async def disconnect(self) -> None: ...


class _Shared:
    """A client and the number of requests that use it now."""

    def __init__(self, client: _Client) -> None:
        self.client, self.running = client, 0


_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Shared]] = WeakKeyDictionary()


class ServedModel:
    """A ChatModel behind an OpenAI-compatible server. It is picklable and belongs to no event loop.

    Its limits on requests hold for all equal ServedModels of one event loop together.
    """

    def __init__(self, model: str, url: str, **options: Any) -> None:
        """Check everything but the key, and open nothing yet.

        Args:
            model: name by which the server knows it.
            url: up to and including ``/v1``.
            options: further arguments of ``OpenAIChat``: ``api_key_env``, ``timeout``, ``concurrency``, …

        Raises:
            ConfigError: a URL that is none, an unknown option or one out of range.
        """
        if not isinstance(model, str) or not model:
            raise ConfigError(f"a served model needs the name by which its server knows it, not {short(model)}")
        self.model, self.url, self.options = model, url, dict(options)
        known = set(inspect.signature(_client_class()).parameters) - {"model", "base_url"} - _NOT_VALUES
        if unknown := set(options) - known:
            raise ConfigError(f"{self}: unknown option {min(unknown)!r}: there are {', '.join(sorted(known))}")
        try:
            self._key = json.dumps([model, url, self.options], sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self}: its options must be JSON values: {error}") from error
        try:
            self._make({name: value for name, value in options.items() if name != "api_key_env"})
        except TypeError as error:
            raise ConfigError(f"{self}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> ServedModel:
        """Read ``openai:MODEL@URL``. Raises ConfigError for any other text."""
        found = _ADDRESS.fullmatch(text.removeprefix(REMOTE)) if text.startswith(REMOTE) else None
        if found is None:
            raise ConfigError(f"{text[:120]!r} names no served model: write {REMOTE}MODEL@http://HOST:PORT/v1")
        return cls(found["model"], found["url"])

    def __repr__(self) -> str:
        return f"{REMOTE}{self.model}@{self.url}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.model, self.url, self.options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ServedModel) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    async def chat(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> AssistantMessage:
        """Return the next assistant message. It raises what ``OpenAIChat.reply`` raises."""
        return (await self.reply(messages, tools, sampling)).message

    async def reply(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> ChatReply:
        """Return the next assistant message and its costs. It raises what ``OpenAIChat.reply`` raises."""
        of_loop = _clients.setdefault(asyncio.get_running_loop(), {})
        shared = of_loop.get(self._key)
        if shared is None:
            shared = of_loop[self._key] = _Shared(self._make(self.options))
        shared.running += 1
        try:
            return await shared.client.reply(messages, tools, sampling)
        finally:
            shared.running -= 1
            if not shared.running:
                await shared.client.disconnect()

    def _make(self, options: Mapping[str, Any]) -> _Client:
        client: _Client = _client_class()(self.model, base_url=self.url, **options)
        return client


def chat_model(named: ModelLike) -> ChatModel:
    """Return the chat model that ``named`` is or describes. Raises ConfigError for anything else."""
    if isinstance(named, str):
        return ServedModel.parse(named)
    if isinstance(named, Mapping):
        if missing := {"model", "url"} - set(named):
            raise ConfigError(f"a served model's table lacks {', '.join(sorted(missing))}: {short(dict(named))}")
        return ServedModel(**named)
    if not callable(getattr(named, "chat", None)):
        raise ConfigError(f"{short(named)} is no chat model: give a ChatModel or {REMOTE}MODEL@http://HOST:PORT/v1")
    return named


def chat_models(named: Mapping[str, ModelLike]) -> dict[str, ChatModel]:
    """Return the models of ``named`` under their names. Raises ConfigError where one of them is none."""
    return {name: chat_model(model) for name, model in named.items()}


def models_of(kwargs: Mapping[str, Any]) -> dict[str, ChatModel]:
    """Return the models among an environment's arguments. Raises ConfigError as ``chat_models`` does."""
    given = kwargs.get("models")
    return chat_models(given) if isinstance(given, Mapping) else {}


def _client_class() -> Any:
    # By its name, because rooms above this file hold it: a judge is resolved like an engine or a backend.
    return importlib.import_module(_CLIENT).OpenAIChat


def _rebuilt(model: str, url: str, options: Mapping[str, Any]) -> ServedModel:
    return ServedModel(model, url, **options)
