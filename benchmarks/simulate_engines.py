"""``Fleet``: engines that share their rate equally among the sequences they run, as discrete events.

An engine's *work clock* is the number of tokens that a sequence present all along would have got. A turn of k tokens
that starts at work w ends at w + k, whoever joins or leaves meanwhile: only the engine's next end must be known, and
moved when the number of running sequences changes. One event costs O(log slots + log engines), however many tokens
lie between. Time is *generation time*, which stands still while weights are replaced.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heapify, heappop, heappush


class Episode:
    """One episode: the tokens that are left, and the versions of those it has."""

    __slots__ = ("engine", "group", "index", "left", "session", "spans", "start_version", "start_work", "take", "turn")

    def __init__(self, group: object, index: int, session: str, tokens: int) -> None:
        self.group, self.index, self.session, self.left = group, index, session, tokens
        self.engine = self.turn = self.take = self.start_version = 0
        self.start_work = -1.0  # not running
        self.spans: dict[int, float] = {}
        """Tokens by the version that sampled them, in fractions: tokens flow."""


class Fleet:
    """``rates[n]`` is the tokens/s of one of n running sequences; ``slots`` of them run, the rest wait in order."""

    def __init__(self, engines: int, rates: list[float], slots: int) -> None:
        self.version = 0
        self.generated = 0.0
        self._rates, self._slots = rates, slots
        self._work = [0.0] * engines
        self._at = [0.0] * engines
        self._stamp = [0] * engines
        self._running: list[list[tuple[float, int, Episode]]] = [[] for _ in range(engines)]
        self._waiting: list[deque[Episode]] = [deque() for _ in range(engines)]
        self._marks: list[list[float]] = [[0.0] * engines]
        """Every engine's work at the moment each version began."""
        self._events: list[tuple[float, int, int]] = []
        self._sequence = 0
        self._idle = 0.0
        self._idle_since: dict[int, float] = dict.fromkeys(range(engines), 0.0)

    def submit(self, at: float, episode: Episode) -> None:
        """The next turn of ``episode`` (``take`` tokens on ``engine``) at generation time ``at``."""
        engine = episode.engine
        running = self._running[engine]
        if len(running) >= self._slots:
            self._waiting[engine].append(episode)
            return
        if running:
            self._work[engine] += (at - self._at[engine]) * self._rates[len(running)]
        else:
            self._idle += at - self._idle_since.pop(engine)
        self._at[engine] = at
        self._begin(engine, running, episode)
        self._schedule(engine, at, running)

    def _begin(self, engine: int, running: list[tuple[float, int, Episode]], episode: Episode) -> None:
        episode.start_work = work = self._work[engine]
        episode.start_version = self.version
        self._sequence += 1
        heappush(running, (work + episode.take, self._sequence, episode))

    def _schedule(self, engine: int, at: float, running: list[tuple[float, int, Episode]]) -> None:
        self._stamp[engine] = stamp = self._stamp[engine] + 1
        end = at + (running[0][0] - self._work[engine]) / self._rates[len(running)]
        heappush(self._events, (end, engine, stamp))

    def next_end(self) -> float:
        """When the next turn ends; infinity while nothing runs."""
        events, stamps = self._events, self._stamp
        while events:
            end, engine, stamp = events[0]
            if stamps[engine] == stamp:
                return end
            heappop(events)
        return math.inf

    def end(self) -> Episode:
        """The episode whose turn ends at ``next_end``, with its spans brought up to date."""
        at, engine, _ = heappop(self._events)
        running = self._running[engine]
        work, _, episode = heappop(running)
        self._work[engine], self._at[engine] = work, at
        self._credit(engine, episode, work)
        episode.left -= episode.take
        episode.start_work = -1.0
        if self._waiting[engine]:
            self._begin(engine, running, self._waiting[engine].popleft())
        if running:
            self._schedule(engine, at, running)
        else:
            self._stamp[engine] += 1
            self._idle_since[engine] = at
        return episode

    def _credit(self, engine: int, episode: Episode, work: float) -> None:
        """Tokens of the turn up to ``work``, each with the version in which it was sampled."""
        spans, reached = episode.spans, episode.start_work
        for version in range(episode.start_version, self.version):
            mark = self._marks[version + 1][engine]
            if mark > reached:
                spans[version] = spans.get(version, 0.0) + mark - reached
                self.generated += mark - reached
                reached = mark
        spans[self.version] = spans.get(self.version, 0.0) + work - reached
        self.generated += work - reached

    def begin_version(self, at: float) -> None:
        """All engines serve the next version from ``at`` on."""
        self._advance(at)
        self._marks.append(list(self._work))
        self.version += 1
        live = [event for event in self._events if self._stamp[event[1]] == event[2]]
        heapify(live)
        self._events = live

    def _advance(self, at: float) -> None:
        for engine, running in enumerate(self._running):
            if running:
                self._work[engine] += (at - self._at[engine]) * self._rates[len(running)]
            self._at[engine] = at

    def idle(self, at: float) -> float:
        """Seconds × engines without a request, from the start to ``at``."""
        return self._idle + sum(at - since for since in self._idle_since.values())

    def in_flight(self, at: float) -> float:
        """Tokens sampled in turns that still run at ``at``."""
        self._advance(at)
        return sum(
            self._work[engine] - episode.start_work
            for engine, running in enumerate(self._running)
            for _, _, episode in running
        )
