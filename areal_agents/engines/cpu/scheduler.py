"""The schedule of one worker, as pure bookkeeping without tensors: who decodes when, and whose KV is where.

    waiting ──admit──▶ rows 0..n-1 (running) ──finish──▶ idle (KV between turns, LRU) ──evict, release──▶ gone
                          ▲                                 │
                          └──────── next turn: load ◀───────┘

Invariant: (tokens reserved by running requests) + (tokens of idle KV) ≤ ``kv_tokens``. A running request reserves its
prompt and ``max_tokens`` when it is admitted, so no running request ever waits for memory. There is no deadlock, and no
running request is evicted. A waiting request waits for a free row and for reservations to end. Both are bounded by
``max_tokens``.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from areal_agents.engine import KVPolicy, Sampling, UpdateMode
from areal_agents.errors import EngineError
from areal_agents.types import Completion, Finish, Ids

IdArray = NDArray[np.int64]

_MIXED = -1
"""KV that more than one version of the weights computed."""
_WAIT_FOR_SHARING = 16
"""Wait for another request's prefill only where it saves at least this many tokens."""


class KVStore(Protocol):
    """A mover of KV between rows of the batch and storage outside it.

    ``n`` counts tokens from the first.
    """

    def save(self, row: int, n: int) -> object: ...
    def load(self, saved: object, row: int, n: int) -> None: ...
    def copy(self, source: int, target: int, n: int) -> None: ...


@dataclass(eq=False, slots=True)
class Request:
    """One ``generate`` in the worker.

    ``ids[:length]`` are known. KV exists for ``ids[:computed]``.
    """

    id: int
    session: str
    sampling: Sampling
    ids: IdArray
    prompt: int
    length: int
    computed: int = 0
    row: int = -1
    kv_version: int = _MIXED
    stale: bool = False
    """Its KV is older than the policy and is to be recomputed: drop it when the turn ends."""
    discard: bool = False
    """It was cancelled or its session released: drop its KV when the turn ends."""
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """Number of known tokens whose KV is missing. 1 means ready to decode, more means prefill."""
        return self.length - self.computed

    @property
    def reserved(self) -> int:
        return len(self.ids)

    def uniform(self) -> float:
        """Return the number in [0, 1) that picks the next token.

        It is a function of the seed and of how many tokens were sampled. So it depends on no other request, and a turn
        that is computed again in its middle draws nothing twice.
        """
        assert self.sampling.seed is not None
        return uniform(self.sampling.seed, len(self.logprobs))

    def append(self, token: int, logprob: float, version: int) -> Finish | None:
        """Record one sampled token, and return how the turn ended, or None if it goes on."""
        self.ids[self.length] = token
        self.length += 1
        self.logprobs.append(logprob)
        self.versions.append(version)
        if token in self.sampling.stop_ids:
            return "stop"
        return "length" if self.length == len(self.ids) else None

    def completion(self, finish: Finish) -> Completion:
        ids = tuple(self.ids[self.prompt : self.length].tolist())
        return Completion(ids, tuple(self.logprobs), tuple(self.versions), finish)


def uniform(seed: int, n: int) -> float:
    """Return the ``n``-th number of ``seed``'s stream, a multiple of 2^-53 in [0, 1)."""
    digest = hashlib.blake2b(b"%d/%d" % (seed, n), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


@dataclass(eq=False, slots=True)
class Idle:
    """The KV of a session between its turns."""

    ids: IdArray
    kv_version: int
    saved: object


def common_prefix(a: IdArray, b: IdArray) -> int:
    """Return the number of leading ids that two arrays share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


class Scheduler:
    """The rows, the waiting line and the idle KV of one worker.

    Args:
        store: moves the KV.
        max_batch: number of rows.
        kv_tokens: bound on reserved and idle tokens together.
        max_context: longest prompt plus completion, in tokens.
        version: of the first weights.
    """

    def __init__(self, store: KVStore, *, max_batch: int, kv_tokens: int, max_context: int, version: int = 0) -> None:
        self.store = store
        self.max_batch, self.kv_tokens, self.max_context = max_batch, kv_tokens, max_context
        self.version = version
        self.waiting: list[Request] = []
        self.rows: list[Request | None] = [None] * max_batch
        self.idle: OrderedDict[str, Idle] = OrderedDict()
        self.admitting = True
        self.tokens_reused = 0
        """Prompt tokens whose KV was copied instead of computed, since the start."""
        self._by_id: dict[int, Request] = {}
        self._busy: set[str] = set()

    # --- what comes from the client -------------------------------------------------------------------------------

    def submit(self, id: int, session: str, prompt: Ids, sampling: Sampling) -> Request:
        """Queue a request.

        Args:
            id: of the client, unique.
            session: the conversation whose KV may be reused. It has one request at a time.
            prompt: token ids.
            sampling: how to sample, and what ends the turn.

        Raises:
            EngineError: the request can never run.
        """
        if not prompt:
            raise EngineError("the prompt is empty: at least one token id is needed")
        if sampling.max_tokens < 1:
            raise EngineError(f"max_tokens is {sampling.max_tokens}: at least 1 is needed")
        if len(prompt) >= self.max_context:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens and max_context is {self.max_context}: "
                "no token could be sampled; shorten the conversation or raise max_context"
            )
        total = min(len(prompt) + sampling.max_tokens, self.max_context)
        if total > self.kv_tokens:
            raise EngineError(
                f"prompt and max_tokens are {total} tokens, the engine's kv_tokens is {self.kv_tokens}: "
                "this request can never run; lower max_tokens or raise kv_tokens"
            )
        if session in self._busy:
            raise EngineError(f"session {session!r} already has a running request: one turn at a time")
        ids = np.zeros(total, dtype=np.int64)
        ids[: len(prompt)] = prompt
        request = Request(id, session, sampling, ids, len(prompt), len(prompt))
        self._by_id[id] = request
        self._busy.add(session)
        self.waiting.append(request)
        return request

    def cancel(self, id: int) -> None:
        """Abort a request and drop its session's KV, if the id is known."""
        request = self._by_id.get(id)
        if request is None:
            return
        if request.row < 0:
            self.waiting.remove(request)
            self.idle.pop(request.session, None)
        request.discard = True
        self.finish(request)

    def release(self, session: str) -> None:
        """Drop a session's KV, at the end of the turn if one is running."""
        self.idle.pop(session, None)
        for request in self.running():
            if request.session == session:
                request.discard = True

    def update(self, version: int, *, mode: UpdateMode, kv: KVPolicy) -> int:
        """Label tokens with ``version`` from now on.

        Returns the number of tokens whose KV is thrown away.
        """
        self.version = version
        dropped = 0
        if kv == "recompute":
            dropped += sum(len(entry.ids) for entry in self.idle.values())
            self.idle.clear()
        for request in self.running():
            if mode == "interrupt" or (kv == "recompute" and not request.logprobs):
                # Nothing sampled yet (or asked to re-prefill): start over, so that the turn's KV is of one version.
                dropped += request.computed
                request.computed, request.kv_version, request.stale = 0, version, False
            elif not request.computed:
                request.kv_version = version
            else:
                request.kv_version = _MIXED
                if kv == "recompute" and not request.stale:
                    request.stale = True
                    dropped += request.computed
        return dropped

    # --- what the decode loop asks ---------------------------------------------------------------------------------

    def running(self) -> list[Request]:
        return [request for request in self.rows if request is not None]

    @property
    def reserved(self) -> int:
        return sum(request.reserved for request in self.running())

    @property
    def idle_tokens(self) -> int:
        return sum(len(entry.ids) for entry in self.idle.values())

    @property
    def kv_in_use(self) -> int:
        """Number of tokens whose KV exists, of idle sessions and of running requests so far."""
        return self.idle_tokens + sum(request.computed for request in self.running())

    def admit(self) -> None:
        """Give free rows to waiting requests, in order of arrival, with the longest prefix of KV that exists."""
        if not self.admitting:
            return
        for request in list(self.waiting):
            if None not in self.rows or self.reserved + request.reserved > self.kv_tokens:
                return  # a smaller one that would fit must not overtake it: it might wait for ever
            self._admit_one(request)

    def _admit_one(self, request: Request) -> None:
        prompt = request.ids[: request.prompt - 1]  # the last token is always computed: its logits are needed
        own = self.idle.get(request.session)
        own_n = common_prefix(own.ids, prompt) if own else 0
        best_n, best = own_n, own
        donor: Request | None = None
        promised = 0
        for other in self.running():
            if other.kv_version != self.version:
                continue
            shared = common_prefix(other.ids[: other.length], prompt)
            promised = max(promised, shared)
            if (n := min(shared, other.computed)) > best_n:
                best_n, best, donor = n, None, other
        if promised >= best_n + _WAIT_FOR_SHARING:
            return  # a running request computes this prefix already: wait, and copy it
        for entry in self.idle.values():
            if entry.kv_version == self.version and (n := common_prefix(entry.ids, prompt)) > best_n:
                best_n, best, donor = n, entry, None
        self.waiting.remove(request)
        self.idle.pop(request.session, None)
        # This may evict `best` too: it stays alive here until it is loaded.
        self._evict(self.kv_tokens - self.reserved - request.reserved)
        request.row = self.rows.index(None)
        request.kv_version = self.version
        if donor is not None:
            self.store.copy(donor.row, request.row, best_n)
        elif best is not None and best_n:
            self.store.load(best.saved, request.row, best_n)
            request.kv_version = self.version if best.kv_version == self.version else _MIXED
        request.computed = best_n
        self.tokens_reused += best_n
        self.rows[request.row] = request

    def _evict(self, room: int) -> None:
        """Drop idle sessions, the least recently used first, until their KV fits into ``room`` tokens."""
        while self.idle_tokens > room:
            self.idle.popitem(last=False)

    def compact(self) -> int:
        """Move running requests into rows 0..n-1, and return n.

        Attention then reads one slice of the KV.
        """
        count = sum(request is not None for request in self.rows)
        for target in range(count):
            if self.rows[target] is not None:
                continue
            source = max(i for i, request in enumerate(self.rows) if request is not None)
            request = self.rows[source]
            assert request is not None
            self.store.copy(source, target, request.computed)
            self.rows[source], self.rows[target] = None, request
            request.row = target
        return count

    def prefill_plan(self, budget: int) -> list[tuple[Request, int]]:
        """Return the requests that need prefill, oldest first, and how many tokens each gets from ``budget``."""
        plan: list[tuple[Request, int]] = []
        for request in sorted((r for r in self.running() if r.pending > 1), key=lambda r: r.id):
            if budget <= 0:
                break
            n = min(request.pending, budget)
            plan.append((request, n))
            budget -= n
        return plan

    def finish(self, request: Request) -> None:
        """Take a request out.

        Its KV stays as its session's idle KV, unless it is to be discarded.
        """
        del self._by_id[request.id]
        self._busy.discard(request.session)
        if request.row < 0:
            return
        self.rows[request.row] = None
        if not (request.discard or request.stale):
            saved = self.store.save(request.row, request.computed)
            ids = request.ids[: request.computed].copy()
            self.idle[request.session] = Idle(ids, request.kv_version, saved)
            self.idle.move_to_end(request.session)
        request.row = -1
