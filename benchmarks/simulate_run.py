"""``Simulation``: the real ``Buffer`` and ``Router`` on a virtual clock, with simulated engines, tools and learner.

The loop is ``Rollouts`` and ``train.learn`` without asyncio (``simulate_rollouts.py`` runs the real ``Rollouts`` and
must agree): an episode that ends makes room, groups are admitted, a finished group is completed, the learner asks for
its batch; a step lasts tokens / rate, then generation stands still for the update, then the engines acknowledge.
``Buffer.take`` and ``Buffer.can_admit`` are asked only when their answer can have changed (``ask_always``; a test
compares the two). ``buffer`` puts another schedule in the place of ``Buffer``.

Checked while it runs, with AssertionError: no token of a consumed group is older than η with ``wait`` and ``drop``; a
group is consumed once; something always can happen (no deadlock); every generated token is consumed, dropped, buffered
or still in an open group.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, cast

from simulate_engines import Episode, Fleet
from simulate_model import Calibration, Case, Workload, learner_capacity

from areal_agents.engines.pool.router import Router
from areal_agents.rollout.buffer import Buffer, Ticket
from areal_agents.types import Group, Task, Trajectory

TASK = Task.make("simulated", split="train", seed=0, payload={})
_STEP_ENDS, _UPDATE_ENDS = "step", "update"


class Record:
    """Stands for a group's trajectories: what ``Buffer`` and the statistics read of them."""

    __slots__ = ("min_version", "spans", "tokens")

    def __init__(self, spans: dict[int, float]) -> None:
        self.spans = spans
        self.min_version = min(spans)
        self.tokens = sum(spans.values())


class OpenGroup:
    __slots__ = ("episodes", "open", "ticket")

    def __init__(self, ticket: Ticket) -> None:
        self.ticket, self.open = ticket, 0
        self.episodes: list[Episode] = []


@dataclass(frozen=True)
class Outcome:
    """One run, over its measured window. Shares of time and of tokens are fractions."""

    seconds: float
    consumed_rate: float
    """Tokens of consumed groups a second."""
    trained_rate: float
    """The same without masked tokens."""
    generated_rate: float
    ages: dict[int, float]
    """Consumed tokens by age in versions."""
    masked_share: float
    dropped_share: float
    """Tokens of dropped groups over those of dropped and consumed ones."""
    learner_idle: float
    engine_idle: float
    """Engine-time without any request, pauses left out."""
    batches: tuple[tuple[float, tuple[int, ...]], ...]
    """Start of each step and the orders of its groups; of the whole run."""


@dataclass
class _Totals:
    """What is counted; the measured window is the difference of two of them."""

    time: float = 0.0
    consumed: float = 0.0
    masked: float = 0.0
    dropped: float = 0.0
    generated: float = 0.0
    learner_idle: float = 0.0
    engine_idle: float = 0.0


class Simulation:
    """One case from its start to the end of its last update."""

    def __init__(
        self, case: Case, calibration: Calibration, *, ask_always: bool = False, buffer: Buffer | None = None
    ) -> None:
        self.case = case
        self._ask_always = ask_always
        self._workload = Workload(case, calibration)
        self._turn_tokens = calibration.turn_tokens
        self._update_seconds = calibration.update_seconds
        self._learner_rate = learner_capacity(case, calibration)
        self.buffer = buffer or Buffer(
            groups=case.groups, group_size=case.group_size, max_staleness=case.eta, concurrency=case.concurrency,
            on_exceed=case.on_exceed, order=case.order,
        )  # fmt: skip
        self._playing = 0
        """Episodes that have not ended, counted apart from ``Buffer``."""
        self.router = Router(range(case.engines))
        rates = [0.0, *[calibration.rate(n) / n for n in range(1, case.slots + 1)]]
        self.fleet = Fleet(case.engines, rates, case.slots)
        self._wall: list[tuple[float, int, Any]] = []
        self._sequence = 0
        self._now = 0.0
        self._paused = 0.0
        """Seconds of all pauses that are over: generation time is the clock less these."""
        self._pause_began: float | None = None
        self._idle_since: float | None = 0.0
        self._updates = 0
        self._open: dict[int, OpenGroup] = {}
        self._running_by_version: Counter[int] = Counter()
        self._stale_arrived = False
        self._consumed_orders = bytearray()
        self._totals = _Totals()
        self._window = _Totals()
        """The totals where the measured window begins: at the end of an update, before the next batch."""
        self._ages: Counter[int] = Counter()
        self._batches: list[tuple[float, tuple[int, ...]]] = []
        self._records: dict[int, Record] = {}

    # --- the clock -------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Simulate. Raises AssertionError where an invariant does not hold."""
        collecting = gc.isenabled()
        gc.disable()  # millions of small objects without cycles
        try:
            return self._run()
        finally:
            if collecting:
                gc.enable()

    def _run(self) -> Outcome:
        self._admit()
        while self._updates < self.case.updates:
            self._next_event()
        self._check_conservation()
        return self._outcome(self._window, self._snapshot())

    def _next_event(self) -> None:
        ends = math.inf if self._pause_began is not None else self.fleet.next_end() + self._paused
        other = self._wall[0][0] if self._wall else math.inf
        if ends <= other:
            if ends == math.inf:
                raise AssertionError(f"deadlock at {self._now:.3f} s: {self.buffer.running} groups run, none can end")
            self._now = ends
            self._turn_ended(self.fleet.end())
            return
        self._now, _, what = heappop(self._wall)
        if what is _STEP_ENDS:
            self._pause_began = self._now
            self._at(self._now + self._update_seconds, _UPDATE_ENDS)
        elif what is _UPDATE_ENDS:
            self._update_ended()
        else:
            self._send(what)

    def _at(self, time: float, what: object) -> None:
        self._sequence += 1
        heappush(self._wall, (time, self._sequence, what))

    def _generation_time(self) -> float:
        return (self._now if self._pause_began is None else self._pause_began) - self._paused

    # --- episodes --------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        case = self.case
        while self._ask_always or self._playing + case.group_size <= case.concurrency:
            if not self.buffer.can_admit():
                return
            self._launch(self.buffer.admit())

    def _launch(self, ticket: Ticket) -> None:
        group = self._open[ticket.order] = OpenGroup(ticket)
        self._running_by_version[ticket.version] += 1
        for index, tokens in enumerate(self._workload.lengths(ticket.order)):
            episode = Episode(group, index, f"g{ticket.order}/{index}", tokens)
            group.episodes.append(episode)
            self._send(episode)
        group.open = len(group.episodes)
        self._playing += group.open

    def _send(self, episode: Episode) -> None:
        episode.engine = self.router.assign(episode.session)
        episode.take = min(episode.left, self._turn_tokens)
        self.router.begin(episode.engine)
        self.fleet.submit(self._generation_time(), episode)

    def _turn_ended(self, episode: Episode) -> None:
        self.router.end(episode.engine)
        group = cast(OpenGroup, episode.group)
        if episode.left:
            seconds = self._workload.tool(group.ticket.order, episode.index, episode.turn)
            episode.turn += 1
            self._at(self._now + seconds, episode)
            return
        self.router.release(episode.session)
        group.open -= 1
        self._playing -= 1
        self.buffer.episode_ended(group.ticket)
        self._admit()
        if not group.open:
            self._group_ended(group)

    def _group_ended(self, open: OpenGroup) -> None:
        ticket, spans = open.ticket, Counter[int]()
        for episode in open.episodes:
            for version, tokens in episode.spans.items():
                spans[version] += tokens  # type: ignore[assignment]  # tokens flow
        open.episodes.clear()  # no cycles: the collector is off
        del self._open[ticket.order]
        self._running_by_version[ticket.version] -= 1
        record = self._records[ticket.order] = Record(cast(dict[int, float], spans))
        trajectories = cast(tuple[Trajectory, ...], (record,))
        self.buffer.complete(Group(f"g{ticket.order}", TASK, trajectories, ticket.version, ticket.order))
        self._stale_arrived |= record.min_version < self.buffer.version - self.case.eta
        self._ask()

    # --- the learner -----------------------------------------------------------------------------------------------

    def _can_take(self) -> bool:
        """Whether ``take`` can give a batch or drop a group now; counted apart from ``Buffer``."""
        case, version = self.case, self.buffer.version
        if case.on_exceed == "drop" and self._stale_arrived:
            return True
        if self.buffer.buffered < case.groups:
            return False
        if case.on_exceed != "wait":
            return True
        late = sum(n for v, n in self._running_by_version.items() if v + case.eta < version)
        for deadline in range(version, version + case.eta + 1):
            late += self._running_by_version[deadline - case.eta]
            if late > (deadline - version) * case.groups:
                return False
        return True

    def _ask(self) -> None:
        """What ``Rollouts.next_batch`` does each time something has changed, while the learner waits."""
        while self._idle_since is not None and (self._ask_always or self._can_take()):
            expected = self._can_take()
            buffered, dropped, version = self._buffered_orders(), len(self.buffer.dropped), self.buffer.version
            batch = self.buffer.take()
            self._stale_arrived = False
            lost = len(self.buffer.dropped) > dropped
            if lost:
                self._drop(buffered - self._buffered_orders() - {g.order for g in batch or ()})
            given = batch is not None or lost
            exact = self.case.on_exceed != "drop" and self.case.order == "completion"
            if (given and not expected) or (expected and not given and exact):
                raise AssertionError(f"take() gave a batch: {batch is not None}, where {expected} was expected")
            if given:
                self._admit()
            if batch is not None:
                self._step(batch, version)
            elif not lost:
                return

    def _buffered_orders(self) -> set[int]:
        return {g.order for g in self.buffer.state().buffered} if self.case.on_exceed == "drop" else set()

    def _drop(self, orders: set[int]) -> None:
        for order in orders:
            self._totals.dropped += self._records.pop(order).tokens
            self._mark(order)

    def _mark(self, order: int) -> None:
        """``order`` leaves for good. A second time is a defect."""
        if len(self._consumed_orders) <= order:
            self._consumed_orders.extend(bytes(order + 1))
        if self._consumed_orders[order]:
            raise AssertionError(f"group {order} was consumed twice")
        self._consumed_orders[order] = 1

    def _step(self, batch: list[Group], version: int) -> None:
        eta, tokens, masked = self.case.eta, 0.0, 0.0
        if len(batch) != self.case.groups:
            raise AssertionError(f"a batch of {len(batch)} groups instead of {self.case.groups}")
        for group in batch:
            self._mark(group.order)
            record = self._records.pop(group.order)
            tokens += record.tokens
            for sampled, n in record.spans.items():
                self._ages[version - sampled] += n  # type: ignore[assignment]
                if version - sampled > eta:
                    masked += n
        if masked and self.case.on_exceed != "mask":
            raise AssertionError(f"{masked} tokens of the batch at version {version} are older than {eta}")
        self._totals.consumed += tokens
        self._totals.masked += masked
        self._totals.learner_idle += self._now - cast(float, self._idle_since)
        self._idle_since = None
        self._batches.append((self._now, tuple(g.order for g in batch)))
        self._at(self._now + tokens / self._learner_rate, _STEP_ENDS)

    def _update_ended(self) -> None:
        began = cast(float, self._pause_began)
        self.fleet.begin_version(began - self._paused)
        self._paused += self._now - began
        self._pause_began = None
        self._updates += 1
        self.buffer.acknowledge(self.buffer.version)
        self._idle_since = self._now
        self._stale_arrived = True  # the version has moved: groups in the buffer may be too old now
        if self._updates == self.case.warmup:
            self._window = self._snapshot()
            self._ages.clear()
        self._admit()
        if self._updates < self.case.updates:
            self._ask()

    # --- what is reported ------------------------------------------------------------------------------------------

    def _snapshot(self) -> _Totals:
        at = self._generation_time()
        waiting = self._now - self._idle_since if self._idle_since is not None else 0.0
        return _Totals(
            self._now, self._totals.consumed, self._totals.masked, self._totals.dropped,
            self.fleet.generated + self.fleet.in_flight(at), self._totals.learner_idle + waiting, self.fleet.idle(at),
        )  # fmt: skip

    def _check_conservation(self) -> None:
        generated = self.fleet.generated
        buffered = sum(r.tokens for r in self._records.values())
        running = sum(sum(e.spans.values()) for g in self._open.values() for e in g.episodes)
        found = self._totals.consumed + self._totals.dropped + buffered + running
        if not math.isclose(generated, found, rel_tol=1e-9, abs_tol=1e-6):
            raise AssertionError(f"{generated} tokens were generated, {found} are accounted for")
        if self.buffer.playing != self._playing:
            raise AssertionError(f"{self._playing} episodes play, the buffer counts {self.buffer.playing}")

    def _outcome(self, start: _Totals, end: _Totals) -> Outcome:
        seconds = end.time - start.time
        consumed, masked = end.consumed - start.consumed, end.masked - start.masked
        dropped = end.dropped - start.dropped
        return Outcome(
            seconds=seconds,
            consumed_rate=consumed / seconds,
            trained_rate=(consumed - masked) / seconds,
            generated_rate=(end.generated - start.generated) / seconds,
            ages={age: float(n) for age, n in sorted(self._ages.items())},
            masked_share=masked / consumed,
            dropped_share=dropped / (dropped + consumed),
            learner_idle=(end.learner_idle - start.learner_idle) / seconds,
            engine_idle=(end.engine_idle - start.engine_idle) / seconds / self.case.engines,
            batches=tuple(self._batches),
        )
