"""``ServedTeacher``: the teacher of an on-policy distillation behind a server that scores prompts, as vLLM's does.

    rows' ids ──▶ slot ──▶ POST /v1/completions (prompt_logprobs = 0, one token) ──▶ log π of each sampled token
                   └── backoff ◀── 408, 409, 429, 5xx, no connection, no answer

``prompt_logprobs`` are log-probabilities at temperature 1, whatever a request says of its temperature: vLLM's sampling
settings act on what is sampled alone.

Waits for: a free slot, the server. Unblocked by: an answer, a timeout, cancellation. After ``max_retries`` further
tries an EngineError names the server and what went wrong last.

The server is not trusted: no redirect is followed, an answer is read up to a bound and checked token by token, and
neither the key nor the URL's query is in a message.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from areal_agents.algorithms.batch import Row
from areal_agents.engines.openai.address import endpoint, key_of, loopback
from areal_agents.engines.openai.rate_limit import Backoff, retry_after
from areal_agents.errors import ConfigError, EngineError
from areal_agents.settings.teacher import TeacherConfig
from areal_agents.utils.short_text import short

_RETRIED = frozenset({408, 409, 429})
_SHOWN = 300
_MAX_BYTES = 1 << 28
"""Longest answer that is read. A token's entry is about 100 bytes."""
_IMPOSSIBLE = -9999.0
"""What vLLM writes for log 0."""


class NoAnswer(Exception):
    """The server gave no answer, or no whole one. Another try may get it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said to one request."""

    status: int
    raw: bytes
    retry_after: str | None


class ServedTeacher:
    """A model behind a server, which scores tokens.

    Raises ConfigError for a URL that is none, or a missing key.
    """

    def __init__(self, config: TeacherConfig, *, known: int) -> None:
        """Take the address. Nothing is sent yet.

        Args:
            config: the settings.
            known: ids from here on are no tokens of the tokenizer, which only a padded vocabulary has.
        """
        self._config, self._known = config, known
        path = endpoint(config.url)
        self._root = path.copy_with(path=path.path.removesuffix("/chat/completions"))
        self.root = str(self._root.copy_with(query=None)).rstrip("/")
        """The address up to ``/v1``, without the query, for messages."""
        self._key = key_of(config.api_key_env or None)
        # identity: a compressed answer could be a thousand times what its bytes on the wire are.
        self._headers = {"accept-encoding": "identity"} | (
            {"authorization": f"Bearer {self._key}"} if self._key else {}
        )

    @property
    def name(self) -> str:
        """Its model and address, for messages."""
        return f"the teacher {self._config.model!r} at {self.root}"

    def url(self, path: str) -> httpx.URL:
        """Return the address of ``path`` behind ``/v1``, with the query that the settings' URL has."""
        return self._root.copy_with(path=f"{self._root.path.rstrip('/')}/{path}")

    @property
    def tokenize_url(self) -> httpx.URL:
        """The address of vLLM's ``/tokenize``, which is not behind ``/v1``."""
        return self._root.copy_with(path=self._root.path.rstrip("/").removesuffix("/v1") + "/tokenize")

    def client(self) -> httpx.AsyncClient:
        """Open a client of this server. Raises ConfigError for a proxy of the environment that cannot be used."""
        try:
            return httpx.AsyncClient(
                headers=self._headers,
                timeout=self._config.timeout,
                limits=httpx.Limits(max_connections=self._config.concurrency),
                follow_redirects=False,
                trust_env=not loopback(self._root.host),  # a proxy cannot reach this host's loopback
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"{self.name}: a proxy that the environment names cannot be used ({error}): correct HTTP_PROXY, "
                "HTTPS_PROXY or ALL_PROXY, or put this host into NO_PROXY"
            ) from error

    async def logprobs(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        """Compute log π of the rows' sampled tokens at temperature 1, [T] a row, NaN where the teacher has none.

        It has none for an id that is no token of the tokenizer, and for what follows it in the row, and for a token
        that it could never write. Raises EngineError where the server fails, or answers something else.
        """
        slots = asyncio.Semaphore(self._config.concurrency)
        try:
            async with self.client() as client, asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._of_row(client, slots, row)) for row in rows]
        except ExceptionGroup as errors:  # the others were cancelled: the first is the cause
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _of_row(self, client: httpx.AsyncClient, slots: asyncio.Semaphore, row: Row) -> NDArray[np.float32]:
        out = np.where(row.mask, np.float32(np.nan), np.float32(0.0)).astype(np.float32)
        unknown = np.flatnonzero(row.ids >= self._known)
        n = int(unknown[0]) if len(unknown) else len(row)
        if not row.mask[:n].any():
            return out
        async with slots:
            found = await self.score(client, row.ids[:n].tolist())
        for t in np.flatnonzero(row.mask[:n]):
            out[t] = found[t]
        return out

    async def score(self, client: httpx.AsyncClient, ids: Sequence[int]) -> list[float]:
        """Return log π of each id after those before it, NaN for the first and where it is log 0.

        Raises EngineError where the server fails, or answers something else.
        """
        body = {
            "model": self._config.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0,
            "prompt_logprobs": 0, "add_special_tokens": False,
        }  # fmt: skip
        answer = await self.post(client, self.url("completions"), body)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError):
            entries = None
        if not isinstance(entries, list) or len(entries) != len(ids):
            raise EngineError(
                f"{self.name} returned no log-probabilities of the prompt (prompt_logprobs of /v1/completions): serve "
                "it with vLLM, or load it beside the learner (leave algorithm.teacher.url out)"
            )
        return [math.nan, *(self._number(e, i) for e, i in zip(entries[1:], ids[1:], strict=True))]

    def _number(self, entry: Any, id: int) -> float:
        found = entry.get(str(id)) if isinstance(entry, Mapping) else None
        number = found.get("logprob") if isinstance(found, Mapping) else None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise EngineError(f"{self.name} gave token {id} of a prompt no log-probability")
        if not number <= 1e-3:  # NaN too
            raise EngineError(
                f"{self.name} says {short(number)} of a token, which is no log-probability: serve it with "
                "--logprobs-mode raw_logprobs"
            )
        return float(number) if number > _IMPOSSIBLE else math.nan

    async def post(self, client: httpx.AsyncClient, url: httpx.URL, body: dict[str, Any]) -> Any:
        """Send one request, again where that may help, and return its JSON.

        Raises EngineError after the last try, and at once for what another try would not change; ConfigError where the
        key is refused.
        """
        backoff, last = Backoff(random.Random()), ""
        for attempt in range(self._config.max_retries + 1):
            pause = None
            try:
                answer = await self.ask(client, "POST", url, body)
                if answer.status == 200:
                    return self._json(answer)
                last = self.told(answer)
                if answer.status in (401, 403):
                    raise ConfigError(f"{self.name} refuses the key: {last} (algorithm.teacher.api_key_env)")
                if answer.status not in _RETRIED and answer.status < 500:
                    raise EngineError(f"{self.name} refuses {url.copy_with(query=None)}: {last}")
                pause = retry_after(answer.retry_after, now=time.time())
            except NoAnswer as error:
                last = str(error)
            if attempt < self._config.max_retries:
                await asyncio.sleep(min(pause, 60.0) if pause is not None else backoff.pause(attempt))
        raise EngineError(f"{self.name} failed {self._config.max_retries + 1} times, at last with: {last}")

    async def ask(
        self, client: httpx.AsyncClient, method: str, url: httpx.URL, body: dict[str, Any] | None = None
    ) -> Answer:
        """Send one request, once, and read its answer. Raises NoAnswer, and EngineError for one that cannot be read."""
        limit = self._config.timeout
        try:
            async with asyncio.timeout(limit), client.stream(method, url, json=body) as response:
                return Answer(response.status_code, await self._read(response), response.headers.get("retry-after"))
        except (TimeoutError, httpx.TimeoutException) as error:
            raise NoAnswer(f"no answer within {limit:g} s") from error
        except httpx.TransportError as error:
            raise NoAnswer(self._safe(f"{type(error).__name__} {error}".strip())) from error

    async def _read(self, response: httpx.Response) -> bytes:
        """Return the body as it came. Of an error the start is enough."""
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            if response.status_code != 200:
                return b""
            raise EngineError(f"{self.name} sent a compressed answer that was not asked for")
        parts, size = [], 0
        async for chunk in response.aiter_raw():
            parts.append(chunk)
            size += len(chunk)
            if response.status_code != 200 and size > 4 * _SHOWN:
                break
            if size > _MAX_BYTES:
                raise EngineError(f"{self.name} sent an answer of more than {_MAX_BYTES} bytes: it was not read")
        return b"".join(parts)

    def _json(self, answer: Answer) -> Any:
        try:
            return json.loads(answer.raw)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{self.name} answered something else than JSON: {self._safe(str(error))}") from error

    def told(self, answer: Answer) -> str:
        """Return the start of what the server said, for messages."""
        return self._safe(f"{answer.status} {answer.raw[: 4 * _SHOWN].decode('utf-8', 'replace')}")

    def _safe(self, text: str) -> str:
        """Return ``text`` of the server cut short, and without the key where the server repeats it."""
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN]
