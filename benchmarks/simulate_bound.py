"""What a schedule could reach at best, computed without ``Buffer``.

``ideal_rate``: the *work-conserving ideal*, a computation of its own without ``Router`` and the simulated engines.
Groups start in order, as soon as the episodes that play leave room for one in ``concurrency`` and the staleness bound
does; all engines together are one pool that is perfectly balanced at any moment (the
rate is concave in the batch, so n sequences are never faster than with n / N on each of N engines); the learner starts
as early as the deadlines permit and takes first what is due first. Given the admissions, that step is the earliest:
with v the version, B groups a batch and R_j the running groups due by version j, batches v+1 … j can take (j − v)·B
groups, so a step may start if and only if B groups are complete and R_j ≤ (j − v)·B for all j ≥ v. The count is
necessary too: (m + η + 1)·B of the groups that were admitted by version m can be consumed in time, no more. It is not
the optimum: to admit as early as possible also sets the deadlines early.

``IdealSchedule`` is the same schedule on the simulated engines and the real router instead of the pool: what separates
it from ``wait`` is the choice of batches alone, what separates it from the pool is a session that stays on its
engine.

``any_schedule_seconds``: a bound that no schedule can beat which admits in order and drops nothing, an omniscient one
included. Let a(v) be the moment from which version v is served, s(v) when the step at v starts, D_b the shortest time
that the longest group of b·B … (b+1)·B − 1 can take. (1) By s(v), (v + 1)·B groups were admitted, and while version m
is served at most (m + η + 1)·B: a group of block b is admitted at some m with b − η ≤ m ≤ b. (2) It is complete by
s(m + η), so s(m + η) − a(m) ≥ D_b. (3) a(b − η) ≤ a(m) and s(m + η) ≤ s(b + η). Hence

    a(v + 1) ≥ a(v) + step,     a(v + 1) ≥ a(max(0, v − 2η)) + D_{v−η} + step     for v ≥ η,

with ``step`` the least time of a learner step with its update. The window spans 2η + 1 steps and not η + 1, because a
schedule that admits in bursts can hide several long groups behind one wait of the learner; the ideal above does not.
``tests/benchmarks/test_simulate.py`` searches all schedules of small instances: bound ≤ optimum ≤ ideal (in seconds).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import cast

from simulate_model import Calibration, Case, Workload, generation_capacity, learner_capacity
from simulate_run import Simulation

from areal_agents.rollout.buffer import Buffer, Ticket
from areal_agents.types import Group


class _Job:
    """One group of the ideal schedule."""

    __slots__ = ("open", "order", "tokens", "version")

    def __init__(self, order: int, version: int, lengths: Sequence[int]) -> None:
        self.order, self.version, self.open, self.tokens = order, version, len(lengths), sum(lengths)


class _Ideal:
    """The pool's clock: ``work`` is what a sequence that ran all the time has got."""

    def __init__(self, case: Case, calibration: Calibration, total: float) -> None:
        self.case, self.calibration, self.total = case, calibration, total
        self.workload = Workload(case, calibration)
        self.slots = case.engines * case.slots
        self.playing = 0
        """Episodes that have not ended: in an engine, its queue or a tool."""
        self.learner_rate = learner_capacity(case, calibration)
        self.now = self.work = 0.0
        self.version = self.consumed = self.admitted = self.sequence = 0
        self.running: list[tuple[float, int, _Job, int, int, int]] = []
        self.waiting: deque[tuple[_Job, int, int, int]] = deque()
        self.tools: list[tuple[float, int, _Job, int, int, int]] = []
        self.by_version: Counter[int] = Counter()
        self.complete: list[tuple[int, int, _Job]] = []
        self.steps: list[tuple[float, int]] = []
        """When each step ended with its update, and its tokens."""

    def rate(self) -> float:
        """Tokens/s of one running sequence."""
        n = len(self.running)
        return self.calibration.rate(n / self.case.engines) * self.case.engines / n if n else 0.0

    def begin(self, job: _Job, index: int, turn: int, left: int) -> None:
        if len(self.running) >= self.slots:
            self.waiting.append((job, index, turn, left))
            return
        self.sequence += 1
        end = self.work + min(left, self.calibration.turn_tokens)
        heappush(self.running, (end, self.sequence, job, index, turn, left))

    def admit(self) -> None:
        """At most ``concurrency`` episodes play, and a group starts with all of its."""
        limit = min(self.total, (self.case.eta + self.version + 1) * self.case.groups)
        while self.playing + self.case.group_size <= self.case.concurrency and self.admitted < limit:
            lengths = self.workload.lengths(self.admitted)
            job = _Job(self.admitted, self.version, lengths)
            self.admitted += 1
            self.by_version[job.version] += 1
            self.playing += len(lengths)
            for index, tokens in enumerate(lengths):
                self.begin(job, index, 0, tokens)

    def advance(self, until: float) -> None:
        """Run engines and tools to ``until``, or to the first moment at which a step could start."""
        while True:
            rate = self.rate()
            end = self.now + (self.running[0][0] - self.work) / rate if rate else math.inf
            tool = self.tools[0][0] if self.tools else math.inf
            at = min(end, tool, until)
            if at == math.inf:
                raise AssertionError("the ideal schedule is stuck")
            self.work += (at - self.now) * rate
            self.now = at
            if at == until:
                return
            if tool <= end:
                _, _, job, index, turn, left = heappop(self.tools)
                self.begin(job, index, turn, left)
                continue
            if self.turn_ends() and until == math.inf and self.ready():
                return

    def turn_ends(self) -> bool:
        """The first turn to end does; whether its group is complete now."""
        self.work, _, job, index, turn, left = heappop(self.running)
        left -= min(left, self.calibration.turn_tokens)
        if self.waiting:
            self.begin(*self.waiting.popleft())
        if left:
            self.sequence += 1
            back = self.now + self.workload.tool(job.order, index, turn)
            heappush(self.tools, (back, self.sequence, job, index, turn + 1, left))
            return False
        job.open -= 1
        self.playing -= 1
        if not job.open:
            self.by_version[job.version] -= 1
            heappush(self.complete, (job.version, job.order, job))
        self.admit()
        return not job.open

    def ready(self) -> bool:
        groups, due = self.case.groups, 0
        if len(self.complete) < groups:
            return False
        for m in range(self.version + 1):
            due += self.by_version[m]
            if due > max(0, m + self.case.eta - self.version) * groups:
                return False
        return True

    def step(self) -> None:
        """The groups that are due first; then the update, while nothing is generated."""
        batch = [heappop(self.complete)[2] for _ in range(self.case.groups)]
        tokens = sum(job.tokens for job in batch)
        self.advance(self.now + tokens / self.learner_rate)
        self.now += self.calibration.update_seconds
        self.tools = [(max(entry[0], self.now), *entry[1:]) for entry in self.tools]
        self.version += 1
        self.steps.append((self.now, tokens))
        self.admit()


def ideal_steps(case: Case, calibration: Calibration, *, finite: bool = False) -> list[tuple[float, int]]:
    """For each update of the work-conserving ideal: when it ended, and its tokens.

    ``finite``: there are no groups beyond those of the last update, instead of an endless stream.
    """
    ideal = _Ideal(case, calibration, case.updates * case.groups if finite else math.inf)
    ideal.admit()
    for _ in range(case.updates):
        if not ideal.ready():
            ideal.advance(math.inf)
        ideal.step()
    return ideal.steps


def ideal_rate(case: Case, calibration: Calibration) -> float:
    """Tokens/s of the work-conserving ideal on one pool, in the window that ``case`` measures."""
    steps = ideal_steps(case, calibration)
    began = steps[case.warmup - 1][0] if case.warmup else 0.0
    return sum(tokens for _, tokens in steps[case.warmup :]) / (steps[-1][0] - began)


class IdealSchedule:
    """The work-conserving ideal with ``Buffer``'s interface: a count, room to play, and what is due first."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.version = self.acknowledged = self._admitted = self.playing = self.running = 0
        self.dropped: list[str] = []
        self._running: Counter[int] = Counter()
        self._complete: list[tuple[int, int, Group]] = []

    @property
    def buffered(self) -> int:
        return len(self._complete)

    def can_admit(self) -> bool:
        limit = (self._case.eta + self.acknowledged + 1) * self._case.groups
        return self._admitted < limit and self.playing + self._case.group_size <= self._case.concurrency

    def admit(self) -> Ticket:
        ticket = Ticket(self._admitted, self.acknowledged)
        self._admitted += 1
        self.playing += self._case.group_size
        self.running += 1
        self._running[ticket.version] += 1
        return ticket

    def episode_ended(self, ticket: Ticket) -> None:
        """It makes room."""
        self.playing -= 1

    def complete(self, group: Group) -> None:
        self.running -= 1
        self._running[group.admitted_version] -= 1
        heappush(self._complete, (group.admitted_version, group.order, group))

    def acknowledge(self, version: int) -> None:
        self.acknowledged = version

    def take(self) -> list[Group] | None:
        """As soon as every deadline can still be met."""
        if len(self._complete) < self._case.groups:
            return None
        for j in range(self.version, self.version + self._case.eta + 1):
            due = sum(n for m, n in self._running.items() if m + self._case.eta <= j)
            if due > (j - self.version) * self._case.groups:
                return None
        self.version += 1
        return [heappop(self._complete)[2] for _ in range(self._case.groups)]


def schedule_rate(case: Case, calibration: Calibration) -> float:
    """Tokens/s of ``IdealSchedule`` on the simulated engines."""
    return Simulation(case, calibration, buffer=cast(Buffer, IdealSchedule(case))).run().consumed_rate


def any_schedule_seconds(longest: Sequence[float], *, updates: int, eta: int, step: float) -> float:
    """Least time to the end of ``updates`` updates. ``longest[b]``: D_b; all of a schedule's blocks must be in it."""
    began = [0.0]
    for v in range(updates):
        least = began[v] + step
        if v >= eta:
            least = max(least, began[max(0, v - 2 * eta)] + longest[v - eta] + step)
        began.append(least)
    return began[-1]


def any_schedule_rate(case: Case, calibration: Calibration) -> float:
    """Tokens/s that no schedule beats: both capacities, and the windows with every sequence alone on its engine."""
    workload, alone = Workload(case, calibration), calibration.rate(1)
    longest, tokens = [], 0
    for block in range(case.updates):
        groups = [workload.lengths(order) for order in range(block * case.groups, (block + 1) * case.groups)]
        tokens += sum(map(sum, groups))
        longest.append(max(map(max, groups)) / alone)
    generation, learner = generation_capacity(case, calibration), learner_capacity(case, calibration)
    step = tokens / case.updates / learner + calibration.update_seconds
    seconds = any_schedule_seconds(longest, updates=case.updates, eta=case.eta, step=step)
    return min(generation, tokens / seconds)
