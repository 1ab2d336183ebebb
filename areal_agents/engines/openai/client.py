"""``OpenAIChat``: a model behind any OpenAI-compatible server (``POST /v1/chat/completions``), through httpx.

    messages ──messages.py──▶ slot ──▶ pace ──▶ POST ──▶ reply
                               ▲                  │ 408, 409, 429, 5xx, no connection, no answer
                               └── backoff ◀──────┘     (Retry-After honoured, all within the deadline)

It is for evaluation, judges and user simulators. It cannot be trained through (``chat_model.refuse_training``).

Waits for: a free slot, the pace, the server. Unblocked by: a reply, a timeout, the deadline, cancellation.

The server is not trusted: no redirect is followed, a reply is read up to a bound, and the key stands in no message.
Not covered: streaming, the Responses API, client certificates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from areal_agents.chat.tool_formats import named_format
from areal_agents.chat_model import ChatReply, ContentFiltered, ContextLengthError, RequestRefused
from areal_agents.engine import Sampling
from areal_agents.engines.openai.address import endpoint, key_of, loopback
from areal_agents.engines.openai.messages import (
    FILTERED,
    ReasoningForm,
    error_text,
    read_reply,
    reasoning_form,
    request_messages,
    request_tools,
)
from areal_agents.engines.openai.rate_limit import Backoff, Clock, Pace, retry_after
from areal_agents.errors import ArealError, ConfigError, EngineError, ModelError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Message
from areal_agents.utils.closing import AsyncClosing

_RETRIED = frozenset({408, 409, 429})
_ERROR_BYTES = 65_536
_SHOWN = 300
_CONTEXT = re.compile(
    r"context.{0,10}(length|size|window)|(maximum|max).{0,20}context"
    r"|(prompt|input)s?`? is too long|(maximum|max)[ _](prompt|input|model)('s)?[ _]len"
    r"|\b(prompt|input)s?\b.{0,24}\b(tokens?|length)\b.{0,40}(exceed|must be <=|longer than|less than)"
    r"|too many tokens.{0,40}prompt|reduce the length of the (messages|prompt|input)",
    re.I,
)
"""What servers say where a conversation is too long for the model. Most have no code for it."""
_FULL = ("context_length_exceeded", "exceed_context_size_error")


class _Transient(Exception):
    """A failure that another try may not meet.

    ``after`` is the pause that the server asks for, in seconds.
    """

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class OpenAIChat(AsyncClosing):
    """A ChatModel behind an OpenAI-compatible server.

    It is an async context manager, and belongs to one event loop.

    Args:
        model: name by which the server knows it.
        base_url: up to and including ``/v1``.
        api_key_env: environment variable that holds the key. It is read once, here. None sends no key.
        timeout: seconds for one request.
        deadline: seconds for one reply, retries and waiting included.
        max_retries: further tries after the first.
        retry_after_cap: longest Retry-After that is honoured, in seconds.
        concurrency: most requests at once.
        requests_per_minute: most requests started in a minute, retries included. None sets no limit.
        max_response_bytes: longest reply that is read.
        stop: strings that end a reply (evaluation only, because training ends turns on token ids).
        max_tokens_field: the field that bounds a reply. Some models want ``max_completion_tokens``.
        text_calls: False for servers that insist on an entry in tool_calls for every tool result, see ``messages.py``.
        send_reasoning: send the thinking that the server returned with a turn back with it, as it came.
        tool_format: how calls are written that the server leaves in the text, see ``chat/tool_formats``. ``auto`` is
            Hermes.
        extra: further fields of each request, for example ``{"chat_template_kwargs": {...}}``.
        rng: of the backoff's jitter.
        clock: replaced by tests.
        transport: replaced by tests.

    Raises:
        ConfigError: a URL that is none, a missing key, or a setting out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key_env: str | None = None,
        timeout: float = 120.0,
        deadline: float = 600.0,
        max_retries: int = 6,
        retry_after_cap: float = 60.0,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        max_response_bytes: int = 8 << 20,
        stop: Sequence[str] = (),
        max_tokens_field: str = "max_tokens",
        text_calls: bool = True,
        send_reasoning: bool = False,
        tool_format: str = "auto",
        extra: Mapping[str, Any] | None = None,
        rng: random.Random | None = None,
        clock: Clock | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        for name, value, least in (
            ("timeout", timeout, 0.001), ("deadline", deadline, 0.001), ("max_retries", max_retries, 0),
            ("retry_after_cap", retry_after_cap, 0), ("concurrency", concurrency, 1),
            ("max_response_bytes", max_response_bytes, 1),
        ):  # fmt: skip
            if not value >= least:
                raise ConfigError(f"OpenAIChat: {name} is {value}: it must be at least {least}")
        if requests_per_minute is not None and not requests_per_minute > 0:
            raise ConfigError(f"OpenAIChat: requests_per_minute is {requests_per_minute}: it must be above 0, or None")
        self.model = model
        self._url = endpoint(base_url)
        self.url = str(self._url.copy_with(query=None))
        """Where requests go, without the query."""
        self._key_env, self._key = api_key_env, key_of(api_key_env)
        self._timeout, self._deadline, self._max_retries = timeout, deadline, max_retries
        self._cap, self._max_bytes, self._concurrency = retry_after_cap, max_response_bytes, concurrency
        self._fixed: dict[str, Any] = {"stop": list(stop)} if stop else {}
        self._fixed |= dict(extra or {})
        self._max_tokens_field, self._text_calls = max_tokens_field, text_calls
        self._send_reasoning = send_reasoning
        self._reasoning: ReasoningForm | None = None
        """The form in which the server gave the model's thinking last."""
        self._format = named_format(tool_format)
        self._clock = clock or Clock()
        self._backoff = Backoff(rng or random.Random())
        self._pace = Pace(requests_per_minute, self._clock)
        self._slots = asyncio.Semaphore(concurrency)
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        self._closed = False

    async def close(self) -> None:
        """Close the connections.

        Later calls raise EngineError. May be called twice.
        """
        self._closed = True
        await self.disconnect()

    async def disconnect(self) -> None:
        """Close the connections, which no request may be using. The next request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

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
        """Return the next assistant message and what the server says that it cost.

        Raises:
            ContextLengthError: the conversation does not fit.
            RequestRefused: the server will not answer it.
            EngineError: there was no usable reply before the deadline or the last try.
            ModelError: there is no such model.
            ConfigError: a refused key, a used-up quota, a redirect, or sampling that a server cannot do.
        """
        body = self._body(messages, tools, sampling)
        try:
            async with asyncio.timeout(self._deadline):  # waiting for a slot is bounded by this one
                return await self._until_answered(body, tools)
        except TimeoutError as error:
            raise self._late("no reply") from error

    async def require_answer(self, *, within: float = 10.0) -> None:
        """Raise EngineError where nothing speaks HTTP at the URL within ``within`` seconds.

        Every answer will do. There is no retry, and no key is sent.
        """
        models = self._url.copy_with(path=self._url.path.removesuffix("/chat/completions") + "/models")
        try:
            async with asyncio.timeout(within), self._http().stream("GET", models):
                return
        except (TimeoutError, httpx.TimeoutException) as error:
            raise EngineError(
                f"{self.url}: no answer within {within:g} s: is the server up, and the URL right?"
            ) from error
        except httpx.TransportError as error:
            raise EngineError(f"{self.url}: {self._safe(str(error))}: is the server up, and the URL right?") from error

    def _body(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[ToolSpec], sampling: Sampling
    ) -> bytes:
        if sampling.stop_ids:
            raise ConfigError(
                f"sampling.stop_ids = {sampling.stop_ids[:4]} mean nothing to {self.url}: leave them empty, and give "
                "OpenAIChat stop strings where its own end of turn is not enough"
            )
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request_messages(
                messages,
                text_calls=self._text_calls,
                reasoning=(self._reasoning or "reasoning_content") if self._send_reasoning else None,
            ),
            self._max_tokens_field: sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if tools:
            body["tools"] = request_tools(tools)
        optional = {"seed": sampling.seed, "top_k": sampling.top_k or None, "min_p": sampling.min_p or None}
        body |= {name: value for name, value in optional.items() if value is not None}
        return json.dumps(body | self._fixed, ensure_ascii=False, allow_nan=False).encode()

    async def _until_answered(self, body: bytes, tools: Sequence[ToolSpec]) -> ChatReply:
        """Try until there is a reply.

        A pause that would end after the deadline is not begun.
        """
        end = self._clock.monotonic() + self._deadline
        for attempt in range(self._max_retries + 1):
            try:
                async with self._slots:
                    if not await self._pace.turn(end):
                        raise self._late("requests_per_minute left no turn for the request")
                    return await self._attempt(body, end, tools)
            except _Transient as failure:
                failed = failure
            if attempt == self._max_retries:
                break
            asked = min(failed.after or 0.0, self._cap)
            pause = asked + self._backoff.pause(attempt)  # jitter too: everybody was told the same
            if self._clock.monotonic() + pause >= end:
                raise self._late(str(failed))
            await self._clock.sleep(pause)  # without the slot, which another request may use meanwhile
        raise EngineError(
            f"{self._who()}: gave up after {self._max_retries + 1} tries. The last: {failed}. Is the server up, and "
            "can it bear this many requests (concurrency, requests_per_minute)?"
        )

    async def _attempt(self, body: bytes, end: float, tools: Sequence[ToolSpec]) -> ChatReply:
        """Send one request and read its reply.

        Raises _Transient where another try may do better, and ArealError where none will.
        """
        limit = min(self._timeout, end - self._clock.monotonic())
        if limit <= 0:
            raise self._late("the time was spent on retries")
        try:
            async with asyncio.timeout(limit), self._open(body) as response:
                raw, whole = await self._read(response)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Transient(f"no answer within {limit:g} s") from error
        except httpx.TransportError as error:
            raise _Transient(self._safe(f"{type(error).__name__}: {error}")) from error
        if response.status_code != 200:
            raise self._failure(response, raw)
        if not whole:
            raise EngineError(
                f"{self._who()}: the reply is longer than {self._max_bytes} bytes (max_response_bytes): it was not read"
            )
        try:
            answer = json.loads(raw)
            reply = read_reply(answer, text_calls=self._text_calls, form=self._format, tools=tools)
            self._reasoning = reasoning_form(answer) or self._reasoning
            return reply
        except (ValueError, RecursionError) as error:
            start = self._safe(raw.decode("utf-8", "replace"))[:60]
            raise EngineError(
                f"{self._who()}: the reply is no JSON ({start!r}): is the URL that of an OpenAI-compatible server, "
                "ending in /v1?"
            ) from error
        except EngineError as error:
            raise EngineError(f"{self._who()}: no chat completion: {self._safe(str(error))}") from error

    def _open(self, body: bytes) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        # identity: a compressed reply could be a thousand times what its bytes on the wire are.
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        return self._http().stream("POST", self._url, content=body, headers=headers)

    def _http(self) -> httpx.AsyncClient:
        if self._closed:
            raise EngineError(f"{self._who()}: this OpenAIChat is closed: use it inside `async with`")
        if self._client is None:
            try:
                self._client = self._new_client()
            except (ImportError, ValueError, httpx.InvalidURL) as error:
                raise ConfigError(
                    f"{self._who()}: a proxy that the environment names cannot be used ({error}): correct HTTP_PROXY, "
                    "HTTPS_PROXY or ALL_PROXY, or put this host into NO_PROXY"
                ) from error
        return self._client

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            timeout=httpx.Timeout(self._timeout, connect=min(10.0, self._timeout), pool=None),
            limits=httpx.Limits(max_connections=self._concurrency),
            trust_env=not loopback(self._url.host),  # a proxy of the environment cannot reach this host's loopback
            transport=self._transport,
        )

    async def _read(self, response: httpx.Response) -> tuple[bytes, bool]:
        """Return the body, and whether that is all of it.

        An error's body is only read in part, a compressed one not at all.
        """
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            if response.status_code != 200:
                return b"", False
            raise EngineError(f"{self._who()}: the server sent a compressed reply that was not asked for")
        most = self._max_bytes if response.status_code == 200 else min(_ERROR_BYTES, self._max_bytes)
        parts, size = [], 0
        async for chunk in response.aiter_raw():
            parts.append(chunk)
            size += len(chunk)
            if size > most:
                return b"".join(parts)[:most], False
        return b"".join(parts), True

    def _failure(self, response: httpx.Response, raw: bytes) -> ArealError | _Transient:
        status = response.status_code
        said, code = error_text(raw)
        told = f"HTTP {status}: {self._safe(said)}" if said else f"HTTP {status}"
        if code == "insufficient_quota":
            return ConfigError(f"{self._who()}: {told}. The account has no quota left: no retry will help")
        full = code in _FULL or _CONTEXT.search(said)
        if full and (status in (400, 413, 422) or (status == 500 and "exceed" in said)):  # llama.cpp answers with 500
            return ContextLengthError(f"{self._who()}: {told}")
        if status in _RETRIED or status >= 500:
            return _Transient(told, retry_after(response.headers.get("retry-after"), now=self._clock.wall()))
        if status in (401, 403):
            action = (
                f"check the key in {self._key_env}"
                if self._key_env
                else "name the environment variable that holds the key (--api-key-env, api_key_env)"
            )
            return ConfigError(f"{self._who()}: {told}: {action}")
        if status == 404:
            known = self.url.removesuffix("/chat/completions") + "/models"
            return ModelError(
                f"{self._who()}: {told}: no such model, or no such path. {known} lists the models; the URL ends in /v1"
            )
        if 300 <= status < 400:
            where = response.headers.get("location", "").partition("?")[0]
            return ConfigError(f"{self._who()}: HTTP {status}, a redirect to {self._safe(where)!r}: use that URL")
        if code in FILTERED:
            return ContentFiltered(f"{self._who()}: {told}: the server's filter refused the conversation")
        return RequestRefused(f"{self._who()}: {told}: the server refused the request")

    def _late(self, why: str) -> EngineError:
        return EngineError(f"{self._who()}: no reply within {self._deadline:g} s (deadline): {why}")

    def _who(self) -> str:
        return f"{self.url}, model {self.model!r}"

    def _safe(self, text: str) -> str:
        """Return ``text`` of the server cut short, and without the key where the server repeats it."""
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
