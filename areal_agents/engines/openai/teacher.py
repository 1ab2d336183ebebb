"""``ServedTeacher``: the teacher of an on-policy distillation behind a server that scores prompts, as vLLM's does.

    rows' ids ──▶ slot ──▶ POST /v1/completions (prompt_logprobs = 0, one token) ──▶ log π of each sampled token
                   └── backoff ◀── 408, 409, 429, 5xx, no connection, no answer

``prompt_logprobs`` are log-probabilities at temperature 1, whatever a request says of its temperature: vLLM's sampling
settings act on what is sampled alone.

Waits for: a free slot, the server. Unblocked by: an answer, a timeout, cancellation. After ``max_retries`` further
tries an EngineError names the server and what went wrong last.

The server is not trusted: no redirect is followed, an answer is checked token by token, and the key is in no message.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from areal_agents.algorithms.batch import Row
from areal_agents.engines.openai.address import endpoint, key_of
from areal_agents.engines.openai.rate_limit import Backoff, retry_after
from areal_agents.errors import ConfigError, EngineError
from areal_agents.settings.teacher import TeacherConfig

_RETRIED = frozenset({408, 409, 429})
_SHOWN = 300
_IMPOSSIBLE = -9999.0
"""What vLLM writes for log 0."""


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
        self.root = path.copy_with(path=path.path.removesuffix("/chat/completions"))
        key = key_of(config.api_key_env or None)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    @property
    def name(self) -> str:
        """Its model and address, for messages."""
        return f"the teacher {self._config.model!r} at {self.root}"

    def client(self) -> httpx.AsyncClient:
        """Open a client of this server."""
        return httpx.AsyncClient(headers=self._headers, timeout=self._config.timeout, follow_redirects=False)

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
        answer = await self.post(client, f"{str(self.root).rstrip('/')}/completions", body)
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
        try:
            number = float(entry[str(id)]["logprob"])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.name} gave token {id} of a prompt no log-probability") from error
        if number > 1e-3:
            raise EngineError(
                f"{self.name} says {number:g} of a token, which is no log-probability: serve it with --logprobs-mode "
                "raw_logprobs"
            )
        return number if number > _IMPOSSIBLE else math.nan

    async def post(self, client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Any:
        """Send one request, again where that may help, and return its JSON.

        Raises EngineError after the last try, and at once for what another try would not change; ConfigError where the
        key is refused.
        """
        backoff, last = Backoff(random.Random()), ""
        for attempt in range(self._config.max_retries + 1):
            pause = None
            try:
                answer = await client.post(url, json=body)
                if answer.status_code == 200:
                    return self._json(answer)
                last = f"{answer.status_code} {answer.text[:_SHOWN]}"
                if answer.status_code in (401, 403):
                    raise ConfigError(f"{self.name} refuses the key: {last} (algorithm.teacher.api_key_env)")
                if answer.status_code not in _RETRIED and answer.status_code < 500:
                    raise EngineError(f"{self.name} refuses {url}: {last}")
                pause = retry_after(answer.headers.get("retry-after"), now=time.time())
            except httpx.TransportError as error:
                last = f"{type(error).__name__} {error}".strip()
            if attempt < self._config.max_retries:
                await asyncio.sleep(min(pause, 60.0) if pause is not None else backoff.pause(attempt))
        raise EngineError(f"{self.name} failed {self._config.max_retries + 1} times, at last with: {last}")

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise EngineError(f"{self.name} answered something else than JSON: {error}") from error
