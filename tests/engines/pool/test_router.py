"""``Router``: sticky, balanced, and never to a replica that is gone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.engines.pool.router import Router
from areal_agents.errors import EngineError

OPS = st.one_of(
    st.tuples(st.just("assign"), st.integers(0, 12)),
    st.tuples(st.just("release"), st.integers(0, 12)),
    st.tuples(st.just("begin"), st.integers(0, 4)),
    st.tuples(st.just("end"), st.integers(0, 4)),
    st.tuples(st.just("add"), st.integers(0, 4)),
    st.tuples(st.just("remove"), st.integers(0, 4)),
)


class Naive:
    """The same rules in O(n): what ``Router`` must agree with."""

    def __init__(self) -> None:
        self.present: set[int] = set()
        self.running = dict.fromkeys(range(5), 0)
        self.place: dict[int, int] = {}

    def load(self, replica: int) -> int:
        return sum(r == replica for r in self.place.values())

    def assign(self, session: int) -> int | None:
        if not self.present:
            return None
        if session not in self.place:
            self.place[session] = min(self.present, key=lambda r: (self.load(r), self.running[r], r))
        return self.place[session]

    def remove(self, replica: int) -> None:
        self.present.discard(replica)
        self.place = {s: r for s, r in self.place.items() if r != replica}


@settings(max_examples=80, deadline=None)
@given(st.lists(OPS, max_size=60))
def test_it_agrees_with_the_rules_written_down_plainly(ops: list[tuple[str, int]]) -> None:
    router, naive = Router(range(2)), Naive()
    naive.present = {0, 1}
    for op, x in ops:
        if op == "assign":
            want = naive.assign(x)
            if want is None:
                with pytest.raises(EngineError, match="no replica"):
                    router.assign(str(x))
            else:
                assert router.assign(str(x)) == want
        elif op == "release":
            router.release(str(x))
            naive.place.pop(x, None)
        elif op == "begin":
            router.begin(x)
            naive.running[x] += 1
        elif op == "end":
            if naive.running[x]:
                router.end(x)
                naive.running[x] -= 1
            else:
                with pytest.raises(ValueError, match=f"no request runs on replica {x}"):
                    router.end(x)
        elif op == "add":
            if x in naive.present:
                with pytest.raises(ValueError, match="already"):
                    router.add(x)
            else:
                router.add(x)
                naive.present.add(x)
        else:
            router.remove(x)
            naive.remove(x)
        assert router.loads() == {r: naive.load(r) for r in naive.present}
        assert len(router) == len(naive.present)
        assert [router.running(r) for r in range(5)] == list(naive.running.values())
        assert all(router.replica(str(s)) == naive.place.get(s) for s in range(13))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40))
def test_equal_sessions_are_spread_within_one(sessions: int, replicas: int) -> None:
    router = Router(range(replicas))
    places = [router.assign(str(i)) for i in range(sessions)]
    loads = router.loads().values()
    assert max(loads) - min(loads) <= 1
    assert places == [router.assign(str(i)) for i in range(sessions)]
    assert places[:replicas] == list(range(replicas))[:sessions]  # ties by the lowest number


def test_a_replica_that_comes_back_has_none_of_its_old_sessions() -> None:
    router = Router([0, 1])
    assert [router.assign(s) for s in "abcd"] == [0, 1, 0, 1]
    router.begin(0)
    router.remove(0)
    assert (0 in router, router.replica("a"), router.running(0)) == (False, None, 1)
    router.add(0)
    assert router.loads() == {0: 0, 1: 2}
    assert [router.assign(s) for s in "bdac"] == [1, 1, 0, 0]
    router.end(0)
    assert router.running(0) == 0


def test_running_requests_break_ties_between_equal_sessions() -> None:
    router = Router([0, 1, 2])
    for replica in (0, 0, 1):
        router.begin(replica)
    assert [router.assign(s) for s in "abc"] == [2, 1, 0]


def test_thousands_of_replicas_stay_cheap() -> None:
    """The heap may not outgrow the replicas, however many requests come and go."""
    router = Router(range(4096))
    for i in range(20_000):
        replica = router.assign(str(i))
        router.begin(replica)
        router.end(replica)
        router.release(str(i))
    assert set(router.loads().values()) == {0}
    assert len(router._heap) <= 2 * 4096 + 64
