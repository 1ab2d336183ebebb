"""Admission, staleness and batches: the state that keeps rollout and learning within the bound η of each other.

    admit ──▶ running ──▶ complete ──▶ buffered ──▶ take (B groups) ──▶ consumed
                 │                                     ▲
                 └── discard, refill (leave the count) ┘

A plain state machine without asyncio, so that its properties can be tested exhaustively; ``producer.py`` and
``trainer/loop.py`` wait on it. With v the learner's version (= batches consumed), a the lowest version that every
engine has acknowledged, B groups a batch and "alive" = running + buffered, a group is admitted while

    consumed + alive < (η + a + 1) · B        and the episodes that still play leave room for one more group.

Only episodes that play count there: a group whose longest episode goes on holds one place, not G. (Counted as G,
lengths with a long tail left 40 % of the engines' rows empty: log-normal, σ = 1, G = 16, one episode a row.)

**No stall, no token older than η** (``on_exceed = "wait"``). Tokens of a group admitted at version m are of version
≥ m, so it must be consumed by version m + η. Let D_j be the alive groups with m + η ≤ j. Invariant: for every
j ≥ v, |D_j| ≤ (j − v + 1)·B, that is, all deadlines can still be met.

* Admission at a keeps it: a new group enters D_j only for j ≥ a + η, and there
  |D_j| ≤ alive ≤ (η + a + 1)·B − v·B ≤ (j − v + 1)·B, since consumed = v·B.
* A step keeps it if the batch takes at least |D_j| − (j − v)·B groups of every D_j (``_required``). The B oldest
  groups always satisfy that, so waiting for running groups to finish must end: the learner waits for groups,
  groups wait for the engine and their environment, and neither waits for the learner.
* With fewer than B alive, consumed + alive < (v + 1)·B ≤ (η + a + 1)·B as soon as a ≥ v − η, so admission is open.
* A discarded group leaves the count at once; it only makes every D_j smaller. A group without signal that is refilled
  (``refill``) leaves in the same way, and the one admitted in its place is younger. Each batch refills at most
  ``max_refills``, so that waiting ends even where no group has a signal.

Looking at j = v alone is not enough: fast young groups then fill the batches until more than B old ones share
a deadline (η ≥ 2; ``tests/rollout/test_buffer.py`` holds the counter-example).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from areal_agents.errors import ConfigError
from areal_agents.types import Group

OnExceed = Literal["wait", "mask", "drop"]
Order = Literal["completion", "admission"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to run one group.

    ``version`` is the oldest policy that may sample its tokens.
    """

    order: int
    version: int


@dataclass(frozen=True, slots=True)
class BufferState:
    """A buffer between two batches, as a checkpoint keeps it."""

    version: int
    admitted: int
    discarded: int
    dropped: tuple[str, ...]
    running: tuple[Ticket, ...]
    buffered: tuple[Group, ...]
    refilled: int = 0
    refilled_now: int = 0
    dropped_of: tuple[tuple[str, int], ...] = ()


class Buffer:
    """The counts, the queues and the choice of the next batch.

    It is not thread-safe: one event loop owns it.
    """

    def __init__(
        self,
        *,
        groups: int,
        group_size: int,
        max_staleness: int,
        concurrency: int,
        on_exceed: OnExceed = "wait",
        order: Order = "completion",
        total_batches: int | None = None,
        max_refills: int = 0,
    ) -> None:
        """Start with nothing admitted, at version 0.

        Args:
            groups: B, groups a batch.
            group_size: episodes that a group plays: G, and its greedy one where there is one.
            max_staleness: η, in versions.
            concurrency: most episodes that play at once.
            on_exceed: ``wait`` lets no group grow too old, ``drop`` throws those that did away, ``mask`` leaves them to
                the learner.
            order: ``completion`` takes the groups that finished first, ``admission`` those that were admitted first.
            total_batches: the run's length; no group is admitted that no batch of it would take. None: no end.
            max_refills: most finished groups that may be given up between two batches, to be replaced by others.

        Raises:
            ConfigError: where no group would ever start.
        """
        self.groups = groups
        self.group_size = group_size
        self.max_staleness = max_staleness
        self.set_concurrency(concurrency)
        self.on_exceed = on_exceed
        self.order = order
        self.total_batches = total_batches
        self.max_refills = max_refills
        self.version = 0
        self.acknowledged = 0
        self.admitted = 0
        self.discarded = 0
        self.dropped: list[str] = []
        """Task ids of the groups that were too old (``drop``)."""
        self.dropped_of: Counter[str] = Counter()
        """How many these are by the labels of their environments."""
        self._just_dropped: list[Group] = []
        self.refilled = 0
        """Groups given up by ``refill``."""
        self._refilled_now = 0
        """Those of them since the last batch."""
        self._running: dict[int, Ticket] = {}
        self._ended: dict[int, int] = {}
        """By running group: episodes that have ended, well or not."""
        self._over = 0
        """Their sum."""
        self._buffered: list[Group] = []

    def set_concurrency(self, episodes: int) -> None:
        """Set the most episodes that play at once.

        Those that are too many now play to their end. Raises ConfigError where no group would ever start.
        """
        if episodes < self.group_size:
            raise ConfigError(
                f"concurrency = {episodes} episodes cannot hold one group of {self.group_size}: none would ever start"
            )
        self.concurrency = episodes

    def state(self) -> BufferState:
        """Return what ``restore`` needs to go on from here."""
        return BufferState(
            self.version,
            self.admitted,
            self.discarded,
            tuple(self.dropped),
            tuple(self._running.values()),
            tuple(self._buffered),
            self.refilled,
            self._refilled_now,
            tuple(self.dropped_of.items()),
        )

    def restore(self, state: BufferState) -> None:
        """Go on from ``state``, whose version every engine must serve already.

        The running groups run again. The caller repeats ``episode_ended`` for episodes that need not.

        Their tickets stay: what they sample now is of ``state.version``, no older than the ticket says. So the bound
        and its proof hold as if the groups had only been slow.
        """
        self.version = self.acknowledged = state.version
        self.admitted, self.discarded, self.dropped = state.admitted, state.discarded, list(state.dropped)
        self._running, self._ended, self._over = {t.order: t for t in state.running}, {}, 0
        self._buffered = list(state.buffered)
        self.refilled, self._refilled_now = state.refilled, state.refilled_now
        self.dropped_of = Counter(dict(state.dropped_of))

    @property
    def consumed(self) -> int:
        """Groups consumed: every batch has exactly B."""
        return self.version * self.groups

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def playing(self) -> int:
        """Episodes of running groups that have not ended."""
        return self.running * self.group_size - self._over

    @property
    def buffered(self) -> int:
        return len(self._buffered)

    def can_admit(self) -> bool:
        """Say whether a group may start now.

        Unblocked by: a take, an acknowledgement, a discard, the end of an episode.
        """
        alive = self.consumed + self.buffered + self.running
        if self.total_batches is not None and alive >= self.total_batches * self.groups:
            return False
        if alive >= (self.max_staleness + self.acknowledged + 1) * self.groups:
            return False
        return self.playing + self.group_size <= self.concurrency

    def admit(self) -> Ticket:
        """Start a group.

        Raises RuntimeError where ``can_admit`` is False.
        """
        if not self.can_admit():
            raise RuntimeError("admit() while can_admit() is False")
        ticket = Ticket(self.admitted, self.acknowledged)
        self.admitted += 1
        self._running[ticket.order] = ticket
        return ticket

    def episode_ended(self, ticket: Ticket) -> None:
        """Count an episode of a running group that has ended, well or not.

        Raises ValueError for one too many.
        """
        ended = self._ended.get(ticket.order, 0) + 1
        if ticket.order not in self._running or ended > self.group_size:
            raise ValueError(f"group {ticket.order} has no episode that plays")
        self._ended[ticket.order] = ended
        self._over += 1

    def complete(self, group: Group) -> None:
        """Queue a running group that has finished, to wait for its batch."""
        del self._running[group.order]
        self._over -= self._ended.pop(group.order, 0)
        self._buffered.append(group)

    def discard(self, ticket: Ticket) -> None:
        """Give up a running group that cannot be used, which leaves the count at once."""
        del self._running[ticket.order]
        self._over -= self._ended.pop(ticket.order, 0)
        self.discarded += 1

    def can_refill(self) -> bool:
        """Say whether ``refill`` may give up one more group before the next batch."""
        return self._refilled_now < self.max_refills

    def refill(self, ticket: Ticket) -> None:
        """Give up a running group that has finished, so that another one takes its place.

        It leaves the count at once. Raises RuntimeError where ``can_refill`` is False.
        """
        if not self.can_refill():
            raise RuntimeError("refill() while can_refill() is False")
        self.discard(ticket)
        self.discarded -= 1
        self.refilled += 1
        self._refilled_now += 1

    def acknowledge(self, version: int) -> None:
        """Note that every engine serves ``version`` (or a later one) now."""
        if version > self.version:
            raise ValueError(f"engines acknowledged version {version}, but the learner is at {self.version}")
        self.acknowledged = max(self.acknowledged, version)

    def take(self) -> list[Group] | None:
        """Return the next batch of B groups, or None while it must wait.

        Advances ``version``.

        Waits for: B complete groups, and with ``wait`` for those that a later batch could not take in time. Unblocked
        by: ``complete``.
        """
        if self.on_exceed == "drop":
            self._drop_overage()
        if self.buffered < self.groups:
            return None
        chosen = self._oldest() if self.order == "admission" else self._first_complete()
        if chosen is None:
            return None
        orders = {g.order for g in chosen}
        self._buffered = [g for g in self._buffered if g.order not in orders]
        self.version += 1
        self._refilled_now = 0
        # Which groups these are may depend on time. What the learner computes from them, and its rounding, does not.
        return sorted(chosen, key=lambda g: g.order)

    def _drop_overage(self) -> None:
        oldest = self.version - self.max_staleness
        stale = [g for g in self._buffered if min((t.min_version for t in g.trajectories), default=oldest) < oldest]
        self.dropped += [g.task.id for g in stale]
        self.dropped_of.update(g.env for g in stale)
        self._just_dropped += stale
        orders = {g.order for g in stale}
        self._buffered = [g for g in self._buffered if g.order not in orders]

    def take_dropped(self) -> list[Group]:
        """Return the groups that were dropped since the last call."""
        found, self._just_dropped = self._just_dropped, []
        return found

    def _oldest(self) -> list[Group] | None:
        """Choose the B groups admitted first, or None while one of them still runs."""
        chosen = sorted(self._buffered, key=lambda g: g.order)[: self.groups]
        last = chosen[-1].order
        return None if any(order < last for order in self._running) else chosen

    def _required(self, deadline: int) -> int:
        """Count how many of the groups due by version ``deadline`` the next batch must hold (may be negative)."""
        versions = [t.version for t in self._running.values()] + [g.admitted_version for g in self._buffered]
        due = sum(v + self.max_staleness <= deadline for v in versions)
        return due - (deadline - self.version) * self.groups

    def _first_complete(self) -> list[Group] | None:
        """Choose B complete groups, first finished first, after those that ``_required`` demands.

        Returns None while one of those still runs.
        """
        chosen: dict[int, Group] = {}
        if self.on_exceed == "wait":
            for deadline in range(self.version, self.version + self.max_staleness + 1):
                due = [g for g in self._buffered if g.admitted_version + self.max_staleness <= deadline]
                rest = [g for g in due if g.order not in chosen]
                missing = self._required(deadline) - (len(due) - len(rest))
                if missing > len(rest):
                    return None
                chosen |= {g.order: g for g in rest[: max(missing, 0)]}
        rest = [g for g in self._buffered if g.order not in chosen]
        return [*chosen.values(), *rest[: self.groups - len(chosen)]]
