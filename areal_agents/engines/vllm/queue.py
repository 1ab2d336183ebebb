"""The queue of requests for vLLM and of their cache salts, as pure bookkeeping without vLLM.

    waiting ──admit──▶ running (inside vLLM) ──finish──▶ idle (KV that the next turn may reuse, LRU)

Invariant: the KV blocks of running requests (prompt and ``max_tokens``) fit into ``blocks``. So vLLM never preempts a
request, which would compute its KV again under other weights. Nor does it queue one. A request that it has not begun is
here, and gets the salt of the moment at which it is admitted.

vLLM keeps the blocks of finished requests until it needs them. ``idle`` is this side's estimate, in full blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from areal_agents.engine import KVPolicy, Sampling
from areal_agents.errors import EngineError
from areal_agents.types import Ids

COLDEST = 0.01
"""vLLM raises lower temperatures to this one."""
_SEEDS = 2**63
"""vLLM takes a seed of -1 for none, and larger ones do not fit into its messages."""
_INT32 = 2**31


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """One ``generate`` in the worker."""

    id: int
    session: str
    ids: Ids
    sampling: Sampling
    max_tokens: int
    """``sampling.max_tokens``, cut to what fits into the context."""
    blocks: int
    salt: str = ""
    running: bool = False
    stale: bool = False
    """Its KV is older than the policy allows later turns to read."""
    discard: bool = False
    """Its session was released meanwhile."""


@dataclass(slots=True)
class Queue:
    """A queue in which the first to come is the first served.

    ``block`` is the number of tokens in a KV block. ``blocks`` is the number of blocks for requests.
    """

    max_batch: int
    blocks: int
    block: int
    max_context: int
    vocabulary: int
    admitting: bool = True
    epoch: int = 0
    waiting: list[QueuedRequest] = field(default_factory=list)
    running: dict[int, QueuedRequest] = field(default_factory=dict)
    idle: OrderedDict[str, int] = field(default_factory=OrderedDict)
    """Tokens of KV by session, the least recently used first."""
    _sessions: set[str] = field(default_factory=set)

    def submit(self, id: int, session: str, ids: Ids, sampling: Sampling) -> QueuedRequest:
        """Queue a request.

        Args:
            id: of the client, unique and growing.
            session: the conversation whose KV may be reused. It has one request at a time.
            ids: token ids of the prompt.
            sampling: how to sample, and what ends the turn.

        Raises:
            EngineError: the request can never run.
        """
        if not ids:
            raise EngineError("the prompt is empty: at least one token id is needed")
        _check(sampling)
        if not (min(ids) >= 0 and max(ids) < self.vocabulary):
            raise EngineError(
                f"prompt ids range over {min(ids)}..{max(ids)}, the model's over 0..{self.vocabulary - 1}"
            )
        if len(ids) >= self.max_context:
            raise EngineError(
                f"the prompt has {len(ids)} tokens and max_context is {self.max_context}: "
                "no token could be sampled; shorten the conversation or raise max_context"
            )
        total = min(len(ids) + sampling.max_tokens, self.max_context)
        blocks = -(-total // self.block)
        if blocks > self.blocks:
            raise EngineError(
                f"prompt and max_tokens are {total} tokens, the engine's kv_tokens is {self.blocks * self.block}: "
                "this request can never run; lower max_tokens or raise kv_tokens"
            )
        if session in self._sessions:
            raise EngineError(f"session {session!r} already has a running request: one turn at a time")
        request = QueuedRequest(id, session, ids, sampling, total - len(ids), blocks)
        self._sessions.add(session)
        self.waiting.append(request)
        return request

    def admit(self) -> list[QueuedRequest]:
        """Take the requests that vLLM gets now, with their salt."""
        out: list[QueuedRequest] = []
        while self.admitting and self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            if self.reserved + request.blocks > self.blocks:
                break  # a smaller one that would fit must not overtake it: it might wait for ever
            self.waiting.pop(0)
            self.idle.pop(request.session, None)
            request.running, request.stale, request.salt = True, False, self.salt
            self.running[request.id] = request
            self._evict()
            out.append(request)
        return out

    def restart(self, request: QueuedRequest) -> None:
        """Put a running request back to its place, because vLLM gave it up before it had sampled a token."""
        del self.running[request.id]
        request.running = False
        self.waiting = sorted([request, *self.waiting], key=lambda r: r.id)

    def finish(self, request: QueuedRequest, computed: int = 0) -> None:
        """Take a request out.

        ``computed`` is the number of tokens whose KV exists and may be reused.
        """
        self._sessions.discard(request.session)
        if not request.running:
            self.waiting.remove(request)
            return
        request.running = False
        del self.running[request.id]
        tokens = computed // self.block * self.block
        if tokens and not (request.stale or request.discard):
            self.idle[request.session] = tokens
            self._evict()

    def release(self, session: str) -> None:
        """Forget a session's KV, at the end of the turn if one is running."""
        self.idle.pop(session, None)
        for request in self.running.values():
            if request.session == session:
                request.discard = True

    def update(self, *, kv: KVPolicy, cleared: bool, computed: Callable[[QueuedRequest], int]) -> int:
        """Note that the weights changed, and return the number of tokens whose KV no later turn reads.

        Args:
            kv: the policy for KV of older versions.
            cleared: vLLM's whole cache was dropped, and running requests begin anew. Else, unless ``kv`` is "keep",
                requests are admitted under a new salt from now on.
            computed: says how many tokens of KV a running request has.
        """
        if kv == "keep" and not cleared:
            return 0
        dropped = self.idle_tokens + sum(computed(r) for r in self.running.values() if cleared or not r.stale)
        self.idle.clear()
        if not cleared:
            self.epoch += 1
        for request in self.running.values():
            request.stale = request.salt != self.salt
        return dropped

    @property
    def salt(self) -> str:
        """The cache salt of requests that are admitted now. Prompts of different salts share no KV."""
        return f"areal-{self.epoch}"

    @property
    def reserved(self) -> int:
        return sum(request.blocks for request in self.running.values())

    @property
    def idle_tokens(self) -> int:
        return sum(self.idle.values())

    def _evict(self) -> None:
        room = (self.blocks - self.reserved) * self.block
        while self.idle_tokens > room:
            self.idle.popitem(last=False)


def _check(sampling: Sampling) -> None:
    """Raise EngineError for numbers that vLLM would change in silence, or fail on as a whole."""
    if sampling.max_tokens < 1:
        raise EngineError(f"max_tokens is {sampling.max_tokens}: at least 1 is needed")
    if 0 < sampling.temperature < COLDEST:
        raise EngineError(f"temperature {sampling.temperature:g} is below {COLDEST:g}, vLLM's coldest: use 0 (greedy)")
    if sampling.seed is not None and not 0 <= sampling.seed < _SEEDS:
        raise EngineError(f"seed {sampling.seed} is not in 0..{_SEEDS - 1}: choose another, or none")
    if not 0 <= sampling.top_k < _INT32:
        raise EngineError(f"top_k {sampling.top_k} is not in 0..{_INT32 - 1}: use 0 for the whole vocabulary")
    for id in sampling.stop_ids:
        if not 0 <= id < _INT32:
            raise EngineError(f"stop id {id} is not in 0..{_INT32 - 1}: token ids are needed")
