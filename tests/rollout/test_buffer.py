"""Admission and staleness (DESIGN §5): no stall, no token older than the bound, under any interleaving."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.errors import ConfigError
from areal_agents.rollout.buffer import Buffer, OnExceed, Order, Ticket
from areal_agents.types import AssistantMessage, Completion, Group, Task, Trajectory, Turn

TASK = Task.make("t", split="train", seed=0, payload={})


def _group(ticket: Ticket, versions: tuple[int, ...]) -> Group:
    n = len(versions)
    turn = Turn((1,), Completion((2,) * n, (-1.0,) * n, versions, "stop"), AssistantMessage(()))
    one = Trajectory(f"e{ticket.order}", TASK, f"g{ticket.order}", (turn,), True, False, "answer")
    return Group(f"g{ticket.order}", TASK, (one, one), ticket.version, ticket.order)


def _buffer(**changes: object) -> Buffer:
    settings: dict[str, object] = {"groups": 2, "group_size": 2, "max_staleness": 1, "concurrency": 100}
    return Buffer(**{**settings, **changes})  # type: ignore[arg-type]


def test_admission_counts_by_hand() -> None:
    # η = 1, B = 2: (1 + 0 + 1) · 2 = 4 groups may be alive before the first acknowledgement.
    b = _buffer()
    tickets = []
    while b.can_admit():
        tickets.append(b.admit())
    assert len(tickets) == 4
    b.complete(_group(tickets[0], (0,)))
    assert b.take() is None  # one group is no batch
    b.complete(_group(tickets[3], (0,)))
    batch = b.take()
    assert batch is not None
    assert [g.order for g in batch] == [0, 3]
    assert (b.version, b.consumed, b.running) == (1, 2, 2)
    assert not b.can_admit()  # the engines still serve version 0
    b.acknowledge(1)
    assert b.can_admit()  # 2 + 2 < (1 + 1 + 1) · 2
    assert b.admit().version == 1


def test_a_discarded_group_leaves_the_count_at_once() -> None:
    b = _buffer(max_staleness=0, groups=1)
    for _ in range(50):  # with a cumulative count the second iteration would already be refused
        b.discard(b.admit())
    assert b.can_admit()
    assert b.discarded == 50


def test_refills_are_bounded_for_each_batch_and_leave_the_count_at_once() -> None:
    b = _buffer(max_staleness=0, groups=1, max_refills=2)
    for _ in range(2):
        assert b.can_refill()
        b.refill(b.admit())
    last = b.admit()
    assert not b.can_refill()
    with pytest.raises(RuntimeError, match="can_refill"):
        b.refill(last)
    again = _buffer(max_staleness=0, groups=1, max_refills=2)
    again.restore(b.state())
    assert not again.can_refill()  # a resumed run has no more of them
    b.complete(_group(last, (0,)))
    assert b.take() is not None
    assert b.can_refill()
    assert (b.refilled, b.discarded, b.admitted) == (2, 0, 3)


def test_sync_is_a_bound_of_zero() -> None:
    b = _buffer(max_staleness=0)
    first, second = b.admit(), b.admit()
    assert not b.can_admit()
    b.complete(_group(second, (0,)))
    b.complete(_group(first, (0,)))
    assert b.take() is not None
    assert not b.can_admit()
    b.acknowledge(1)
    assert b.can_admit()


def test_only_episodes_that_play_count_against_concurrency() -> None:
    b = _buffer(group_size=4, concurrency=8, max_staleness=9)
    first, second = b.admit(), b.admit()
    for ticket in (first, first, first, second):
        assert not b.can_admit()  # 8, 7, 6, 5 of 8 play
        b.episode_ended(ticket)
    assert b.playing == 4
    third = b.admit()
    assert (b.running, b.playing) == (3, 8)
    b.discard(third)  # its four leave with it
    b.episode_ended(first)
    with pytest.raises(ValueError, match="group 0 has no episode that plays"):
        b.episode_ended(first)
    b.complete(_group(first, (0,)))
    assert (b.running, b.playing) == (1, 3)

    again = _buffer(group_size=4, concurrency=8, max_staleness=9)
    again.restore(b.state())
    assert again.playing == 4  # the state holds groups; who restores it says which episodes need not play again
    again.episode_ended(second)
    assert again.playing == 3


def test_concurrency_must_hold_a_group() -> None:
    with pytest.raises(ConfigError, match="cannot hold one group of 8"):
        _buffer(group_size=8, concurrency=7)


def test_wait_holds_the_learner_for_a_straggler() -> None:
    b = _buffer(groups=1, max_staleness=1)
    slow = b.admit()
    fast = b.admit()
    b.complete(_group(fast, (0,)))
    assert b.take() is not None  # version 1; `slow` (admitted at 0) must be consumed at version 1
    b.acknowledge(1)
    young = b.admit()
    b.complete(_group(young, (1,)))
    assert b.take() is None  # taking `young` would leave `slow` for version 2: age 2 > 1
    b.complete(_group(slow, (0, 1)))
    batch = b.take()
    assert batch is not None
    assert batch[0].order == slow.order


def test_looking_at_the_next_deadline_alone_is_not_enough() -> None:
    """η = 3, B = 1: four groups start at version 0; were batches 1 and 2 filled with young ones, three would be due."""
    b = _buffer(groups=1, max_staleness=3)
    old = [b.admit() for _ in range(4)]
    b.complete(_group(old[0], (0,)))
    assert b.take() is not None
    b.acknowledge(1)
    young = b.admit()
    b.complete(_group(young, (1,)))
    # D_3 holds three groups for the versions 1, 2 and 3: the batch at version 1 must take one of them, though none of
    # them is due before version 3.
    assert b.take() is None
    b.complete(_group(old[2], (0,)))
    batch = b.take()
    assert batch is not None
    assert batch[0].order == old[2].order


def test_drop_removes_over_age_groups_and_reports_them() -> None:
    b = _buffer(groups=1, max_staleness=0, on_exceed="drop")
    b.complete(_group(b.admit(), (0,)))
    assert b.take() is not None
    b.acknowledge(1)
    b.complete(_group(b.admit(), (0, 1)))  # one of its tokens is of version 0: age 1
    assert b.take() is None
    assert len(b.dropped) == 1
    assert b.can_admit()


def test_acknowledging_the_future_is_refused() -> None:
    with pytest.raises(ValueError, match="acknowledged version 1"):
        _buffer().acknowledge(1)


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    groups=st.integers(1, 3),
    eta=st.integers(0, 4),
    slots=st.integers(1, 12),
    on_exceed=st.sampled_from(["wait", "mask", "drop"]),
    order=st.sampled_from(["completion", "admission"]),
    refills=st.integers(0, 3),
)
def test_never_stalls_and_never_exceeds_the_bound(
    data: st.DataObject, groups: int, eta: int, slots: int, on_exceed: OnExceed, order: Order, refills: int
) -> None:
    """An adversary picks which group finishes, is dropped, refilled or retried, and when engines acknowledge."""
    b = _buffer(
        groups=groups, max_staleness=eta, concurrency=2 * slots, on_exceed=on_exceed, order=order, total_batches=8,
        max_refills=refills,
    )  # fmt: skip
    running: dict[int, Ticket] = {}
    discards = 0
    for _ in range(600):
        if b.version == 8:
            break
        while b.can_admit():
            ticket = b.admit()
            running[ticket.order] = ticket
        if data.draw(st.integers(0, 15)) == 0:  # killed, and resumed with engines that serve the newest version
            state = b.state()
            b = _buffer(
                groups=groups, max_staleness=eta, concurrency=2 * slots, on_exceed=on_exceed, order=order,
                total_batches=8, max_refills=refills,
            )  # fmt: skip
            b.restore(state)
            assert dataclasses.replace(b.state(), dropped=state.dropped) == state
        version = b.version
        batch = b.take()
        if batch is not None:
            assert len(batch) == groups
            if on_exceed in ("wait", "drop"):
                assert all(version - t.min_version <= eta for g in batch for t in g.trajectories)
            continue
        if b.can_admit():  # take() dropped over-age groups, which left the count
            continue
        # the only moves left: an acknowledgement, a completion or a discard. One must exist, else it has stalled.
        moves = [("finish", o) for o in running] + ([("ack", 0)] if b.acknowledged < b.version else [])
        assert moves, f"stalled at version {b.version} with {b.buffered} buffered"
        kind, which = data.draw(st.sampled_from(moves))
        if kind == "ack":
            b.acknowledge(b.version)
            continue
        ticket = running.pop(which)
        if discards < 60 and data.draw(st.booleans()):
            discards += 1
            b.discard(ticket)
        elif b.can_refill() and data.draw(st.booleans()):
            b.refill(ticket)
        else:
            b.complete(_group(ticket, (data.draw(st.integers(ticket.version, b.acknowledged)),)))
    assert b.version == 8
    assert b.refilled <= refills * 9  # eight batches, and what was played beyond the last one
    assert b.admitted == b.consumed + b.discarded + b.refilled + len(b.dropped) + b.buffered + b.running
