"""The scheduler against a store that remembers which token and version every KV entry came from."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.engine import KVPolicy, Sampling, UpdateMode
from areal_agents.engines.cpu.scheduler import Request, Scheduler, common_prefix
from areal_agents.errors import EngineError

Entry = tuple[int, int]
"""(token id, version that computed its KV)"""


@dataclass
class FakeStore:
    rows: dict[int, list[Entry]] = field(default_factory=dict)
    saved_tokens: int = 0

    def save(self, row: int, n: int) -> object:
        assert len(self.rows[row]) >= n
        return list(self.rows[row][:n])

    def load(self, saved: object, row: int, n: int) -> None:
        assert isinstance(saved, list)
        assert len(saved) >= n
        self.rows[row] = list(saved[:n])

    def copy(self, source: int, target: int, n: int) -> None:
        assert len(self.rows.get(source, [])) >= n
        self.rows[target] = list(self.rows.get(source, [])[:n])


class Loop:
    """The worker's loop without a model: 'computes' KV, samples token ids from a counter."""

    def __init__(self, *, max_batch: int = 3, kv_tokens: int = 60, max_context: int = 40) -> None:
        self.store = FakeStore()
        self.scheduler = Scheduler(self.store, max_batch=max_batch, kv_tokens=kv_tokens, max_context=max_context)
        self.finished: dict[int, tuple[int, ...]] = {}
        self.steps = 0

    def compute(self, request: Request, n: int) -> None:
        row = self.store.rows.setdefault(request.row, [])
        del row[request.computed :]
        for i in range(request.computed, request.computed + n):
            row.append((int(request.ids[i]), self.scheduler.version))
        request.computed += n

    def sample(self, request: Request) -> None:
        finish = request.append((request.id * 7 + request.length) % 5 + 1, -1.0, self.scheduler.version)
        if finish is not None:
            self.check(request)
            self.scheduler.finish(request)
            self.finished[request.id] = request.completion(finish).ids

    def check(self, request: Request) -> None:
        kv = self.store.rows.get(request.row, [])[: request.computed]
        assert [token for token, _ in kv] == request.ids[: request.computed].tolist()
        if request.kv_version >= 0:
            assert {version for _, version in kv} <= {request.kv_version}

    def step(self, budget: int = 6) -> None:
        s = self.scheduler
        self.steps += 1
        s.admit()
        for request, n in s.prefill_plan(budget):
            self.compute(request, n)
            if request.pending == 0:
                self.sample(request)
        assert s.compact() == len(s.running())
        assert [r.row for r in s.running()] == list(range(len(s.running())))
        for request in s.running():
            if request.pending == 1:
                self.compute(request, 1)
                self.sample(request)
        assert s.reserved + s.idle_tokens <= s.kv_tokens
        for request in s.running():
            self.check(request)

    def drain(self) -> None:
        for _ in range(2000):
            if not self.scheduler.waiting and not self.scheduler.running():
                return
            self.step()
        raise AssertionError("requests did not finish")


def greedy(n: int) -> Sampling:
    return Sampling(max_tokens=n, temperature=0.0)


operation = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 5), st.integers(1, 30), st.integers(1, 14), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(1, 30)),
    st.tuples(st.just("release"), st.integers(0, 5)),
    st.tuples(st.just("update"), st.sampled_from(["inflight", "interrupt"]), st.sampled_from(["recompute", "keep"])),
    st.tuples(st.just("step"), st.integers(1, 12)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(operation, max_size=40))
def test_any_order_of_operations_keeps_the_books(operations: list[tuple[object, ...]]) -> None:
    """No row leaks, the KV bound holds, KV is what its ids and version say, and every request finishes."""
    loop = Loop()
    s = loop.scheduler
    history: dict[str, list[int]] = {}
    accepted: set[int] = set()
    cancelled: set[int] = set()
    id = version = 0
    for op in operations:
        match op:
            case ("submit", int(n), int(length), int(tokens), extends):
                id += 1
                session = f"s{n}"
                base = history.get(session, []) if extends else []
                prompt = (base + [3, 1, 4, 1, 5, 2, 6, 5] * 5)[: max(length, len(base) + 2)]
                try:
                    s.submit(id, session, tuple(prompt), greedy(tokens))
                except EngineError:
                    continue
                accepted.add(id)
                history[session] = prompt
            case ("cancel", int(target)):
                s.cancel(target)
                if target in accepted and target not in loop.finished:
                    cancelled.add(target)
            case ("release", int(n)):
                s.release(f"s{n}")
                assert f"s{n}" not in s.idle
            case ("update", mode, kv):
                version += 1
                modes: dict[object, UpdateMode] = {"inflight": "inflight", "interrupt": "interrupt"}
                kvs: dict[object, KVPolicy] = {"recompute": "recompute", "keep": "keep"}
                s.update(version, mode=modes[mode], kv=kvs[kv])
            case ("step", int(budget)):
                loop.step(budget)
    loop.drain()
    assert set(loop.finished) == accepted - cancelled
    assert s.rows == [None] * 3
    assert s.reserved == 0
    assert not s._by_id
    assert not s._busy


def test_next_turn_computes_only_the_suffix() -> None:
    loop = Loop()
    loop.scheduler.submit(1, "a", tuple(range(1, 9)), greedy(3))
    loop.drain()
    done = loop.finished[1]
    # 8 prompt tokens and 3 sampled: the last sampled token has no KV yet.
    assert loop.scheduler.idle_tokens == 10
    loop.scheduler.submit(2, "a", (*range(1, 9), *done, 9, 9), greedy(2))
    loop.scheduler.admit()
    (request,) = loop.scheduler.running()
    assert (request.computed, request.pending) == (10, 3)
    assert loop.scheduler.tokens_reused == 10


def test_a_prompt_that_differs_is_recomputed_from_the_common_prefix() -> None:
    loop = Loop()
    loop.scheduler.submit(1, "a", (1, 2, 3, 4, 5, 6), greedy(1))
    loop.drain()
    loop.scheduler.submit(2, "a", (1, 2, 3, 9, 9), greedy(1))
    loop.scheduler.admit()
    assert loop.scheduler.running()[0].computed == 3


def test_update_drops_idle_kv_and_marks_running_kv_stale() -> None:
    loop = Loop()
    s = loop.scheduler
    s.submit(1, "idle", (1, 2, 3, 4), greedy(1))
    loop.drain()
    s.submit(2, "running", (5, 6, 7), greedy(4))
    loop.step()  # prefill samples one token, decode another: KV of 3 + 1 tokens
    assert s.running()[0].computed == 4
    assert s.update(1, mode="inflight", kv="recompute") == 4 + 4
    loop.drain()
    assert s.idle_tokens == 0
    s.submit(3, "running", (5, 6, 7, *loop.finished[2], 8), greedy(1))
    s.admit()
    assert s.running()[0].computed == 0


def test_update_with_keep_reuses_a_sessions_own_kv_only() -> None:
    loop = Loop()
    s = loop.scheduler
    s.submit(1, "a", (1, 2, 3, 4), greedy(1))
    loop.drain()
    assert s.update(1, mode="inflight", kv="keep") == 0
    s.submit(2, "b", (1, 2, 3, 4), greedy(1))
    s.submit(3, "a", (1, 2, 3, 4, 1, 2), greedy(1))
    s.admit()
    other, own = s.running()
    assert (other.session, other.computed, own.computed) == ("b", 0, 4)


def test_interrupt_recomputes_running_kv_under_the_new_version() -> None:
    loop = Loop()
    s = loop.scheduler
    s.submit(1, "a", (1, 2, 3, 4), greedy(5))
    loop.step()
    assert s.update(7, mode="interrupt", kv="recompute") == 5
    loop.drain()
    assert s.idle["a"].kv_version == 7
    assert len(loop.finished[1]) == 5


def test_requests_with_one_prompt_prefill_once() -> None:
    loop = Loop(max_batch=4, kv_tokens=400, max_context=100)
    prompt = tuple(range(1, 41))
    for id in range(1, 5):
        loop.scheduler.submit(id, f"s{id}", prompt, greedy(20))
    loop.step(budget=100)
    assert len(loop.scheduler.running()) == 1  # the others wait for its prefill
    loop.step(budget=100)
    assert len(loop.scheduler.running()) == 4
    assert loop.scheduler.tokens_reused == 3 * 39
    loop.drain()
    assert len(loop.finished) == 4


def test_idle_sessions_are_evicted_least_recently_used_first() -> None:
    loop = Loop(kv_tokens=30)
    s = loop.scheduler
    for id, session in enumerate("abc", start=1):
        s.submit(id, session, tuple(range(10 * id, 10 * id + 9)), greedy(1))
        loop.drain()
    assert list(s.idle) == ["a", "b", "c"]
    assert s.idle_tokens == 27
    s.submit(4, "d", (1, 2, 3, 4), greedy(2))
    s.admit()
    assert list(s.idle) == ["b", "c"]


def test_a_request_waits_for_reservations_and_keeps_its_place() -> None:
    loop = Loop(kv_tokens=40)
    s = loop.scheduler
    s.submit(1, "a", (1, 2), greedy(28))
    s.submit(2, "b", (3, 4), greedy(20))
    s.submit(3, "c", (5, 6), greedy(2))
    s.admit()
    assert [r.id for r in s.running()] == [1]  # 30 reserved; 22 more would pass 40, and 3 does not overtake 2
    loop.drain()
    assert list(loop.finished) == [1, 3, 2]


@pytest.mark.parametrize(
    ("prompt", "tokens", "message"),
    [
        ((), 1, "prompt is empty"),
        ((1,), 0, "max_tokens is 0"),
        (tuple(range(40)), 1, "the prompt has 40 tokens and max_context is 40"),
        (tuple(range(30)), 9, "prompt and max_tokens are 39 tokens, the engine's kv_tokens is 35"),
    ],
)
def test_requests_that_can_never_run_are_refused(prompt: tuple[int, ...], tokens: int, message: str) -> None:
    loop = Loop(kv_tokens=35)
    with pytest.raises(EngineError, match=message):
        loop.scheduler.submit(1, "a", prompt, greedy(tokens))
    assert not loop.scheduler.waiting


def test_one_turn_at_a_time_in_a_session() -> None:
    loop = Loop()
    loop.scheduler.submit(1, "a", (1,), greedy(1))
    with pytest.raises(EngineError, match="already has a running request"):
        loop.scheduler.submit(2, "a", (1,), greedy(1))
    loop.scheduler.cancel(1)
    loop.scheduler.submit(3, "a", (1,), greedy(1))


def test_common_prefix() -> None:
    a = np.array([1, 2, 3])
    assert common_prefix(a, np.array([1, 2, 4, 5])) == 2
    assert common_prefix(a, np.array([1, 2, 3, 4])) == 3
    assert common_prefix(a, np.array([], dtype=np.int64)) == 0
