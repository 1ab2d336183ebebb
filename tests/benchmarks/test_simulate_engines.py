"""The simulated engines, by hand and against a slow loop."""

from __future__ import annotations

import math
from typing import Any

import pytest

from areal_agents.engines.pool.router import Router
from areal_agents.rollout.buffer import Buffer
from areal_agents.types import Group
from tests.simulated import benchmarks_on_path, case, module

__all__ = ["benchmarks_on_path"]


def test_two_sequences_share_an_engine_by_hand() -> None:
    engines = module("simulate_engines")
    fleet = engines.Fleet(1, [0.0, 10.0, 6.0], 2)  # one alone 10 tokens/s, two 6 each
    a, b, c = (engines.Episode(None, i, str(i), n) for i, n in enumerate((30, 60, 10)))
    for episode in (a, b, c):
        episode.take = episode.left
    fleet.submit(1.0, a)
    fleet.submit(2.0, b)  # a has 10 of 30 by now; 20 more at 6 tokens/s
    fleet.submit(2.5, c)  # waits: two slots
    assert fleet.next_end() == pytest.approx(2 + 20 / 6)
    fleet.begin_version(3.0)  # a has 16, b has 6
    assert fleet.end() is a
    assert a.spans == pytest.approx({0: 16, 1: 14})
    # b has 20 of 60 when c begins: c ends first, 10 / 6 s later; then b runs alone, 30 left at 10 tokens/s
    ended = 2 + 20 / 6 + 10 / 6
    assert fleet.next_end() == pytest.approx(ended)
    assert fleet.end() is c
    assert c.spans == pytest.approx({1: 10})
    assert fleet.next_end() == pytest.approx(ended + 3)
    assert fleet.end() is b
    assert b.spans == pytest.approx({0: 6, 1: 54})
    assert fleet.generated == pytest.approx(100)
    assert fleet.next_end() == math.inf
    assert fleet.idle(ended + 5) == pytest.approx(1 + 2)


class Slow:
    """The same system by brute force: all sequences advance at every event, ``take`` is asked at every completion."""

    def __init__(self, chosen: Any, calibration: Any) -> None:
        model = module("simulate_model")
        self.case, self.rate, self.work = chosen, calibration.rate, model.Workload(chosen, calibration)
        self.calibration, self.learner = calibration, model.learner_capacity(chosen, calibration)
        self.buffer = Buffer(
            groups=chosen.groups, group_size=chosen.group_size, max_staleness=chosen.eta,
            concurrency=chosen.concurrency, on_exceed=chosen.on_exceed,
        )  # fmt: skip
        self.router = Router(range(chosen.engines))
        self.now, self.version, self.learner_until, self.pause_until = 0.0, 0, -1.0, -1.0
        self.queues: list[list[dict[str, Any]]] = [[] for _ in range(chosen.engines)]
        self.tools: list[dict[str, Any]] = []
        self.open: dict[int, list[dict[str, Any]]] = {}
        self.tickets: dict[int, Any] = {}
        self.batches: list[tuple[float, tuple[int, ...]]] = []
        self.tokens: dict[int, float] = {}

    def admit(self) -> None:
        while self.buffer.can_admit():
            ticket = self.buffer.admit()
            self.tickets[ticket.order] = ticket
            self.open[ticket.order] = [
                {"id": f"g{ticket.order}/{i}", "order": ticket.order, "index": i, "left": n, "turn": 0, "spans": {}}
                for i, n in enumerate(self.work.lengths(ticket.order))
            ]
            for episode in self.open[ticket.order]:
                self.send(episode)

    def send(self, episode: dict[str, Any]) -> None:
        episode["engine"] = self.router.assign(episode["id"])
        self.router.begin(episode["engine"])
        episode["need"] = float(min(episode["left"], self.calibration.turn_tokens))
        self.queues[episode["engine"]].append(episode)

    def running(self) -> list[tuple[dict[str, Any], float]]:
        """Every running episode and its tokens/s; the first ``slots`` of a queue run."""
        if self.pause_until >= 0:
            return []
        found = []
        for queue in self.queues:
            live = queue[: self.case.slots]
            found += [(episode, self.rate(len(live)) / len(live)) for episode in live]
        return found

    def run(self) -> list[tuple[float, tuple[int, ...]]]:
        self.admit()
        while self.version < self.case.updates:
            running = self.running()
            ends = [self.now + e["need"] / rate for e, rate in running]
            timers = [t for t in (self.learner_until, self.pause_until) if t >= 0] + [e["back"] for e in self.tools]
            at = min(ends + timers)
            for episode, rate in running:
                got = min(episode["need"], (at - self.now) * rate)
                episode["need"] -= got
                episode["spans"][self.version] = episode["spans"].get(self.version, 0.0) + got
            self.now = at
            self.happen([e for (e, _), end in zip(running, ends, strict=True) if end == at])
        return self.batches

    def happen(self, ended: list[dict[str, Any]]) -> None:
        for episode in ended:
            self.turn_ended(episode)
        for episode in [e for e in self.tools if e["back"] == self.now]:
            self.tools.remove(episode)
            self.send(episode)
        if self.learner_until == self.now:
            self.learner_until, self.pause_until = -1.0, self.now + self.calibration.update_seconds
        elif self.pause_until == self.now:
            self.pause_until, self.version = -1.0, self.version + 1
            self.buffer.acknowledge(self.buffer.version)
            self.admit()
            self.ask()

    def turn_ended(self, episode: dict[str, Any]) -> None:
        self.queues[episode["engine"]].remove(episode)
        self.router.end(episode["engine"])
        episode["left"] -= min(episode["left"], self.calibration.turn_tokens)
        if episode["left"]:
            episode["back"] = self.now + self.work.tool(episode["order"], episode["index"], episode["turn"])
            episode["turn"] += 1
            self.tools.append(episode)
            return
        self.router.release(episode["id"])
        group = self.open[episode["order"]]
        self.buffer.episode_ended(self.tickets[episode["order"]])
        self.admit()
        if any(e["left"] for e in group):
            return
        run = module("simulate_run")
        record: Any = run.Record({v: sum(e["spans"].get(v, 0.0) for e in group)
                                  for v in {v for e in group for v in e["spans"]}})  # fmt: skip
        ticket = self.tickets[episode["order"]]
        self.tokens[ticket.order] = record.tokens
        self.buffer.complete(Group(f"g{ticket.order}", run.TASK, (record,), ticket.version, ticket.order))
        self.ask()

    def ask(self) -> None:
        while self.learner_until < 0 and self.pause_until < 0:
            dropped = len(self.buffer.dropped)
            batch = self.buffer.take()
            if batch is None and len(self.buffer.dropped) == dropped:
                return
            self.admit()
            if batch is not None:
                self.batches.append((self.now, tuple(g.order for g in batch)))
                self.learner_until = self.now + sum(self.tokens[g.order] for g in batch) / self.learner


@pytest.mark.parametrize("mode", ["wait", "mask", "drop"])
@pytest.mark.parametrize("eta", [0, 1, 3])
def test_the_event_engine_is_the_slow_loop(mode: str, eta: int) -> None:
    model, run = module("simulate_model"), module("simulate_run")
    chosen = case(on_exceed=mode, eta=eta, seed=eta)
    fast = run.Simulation(chosen, model.MEASURED).run()
    slow = Slow(chosen, model.MEASURED).run()[: chosen.updates]
    assert [orders for _, orders in fast.batches] == [orders for _, orders in slow]
    assert [at for at, _ in fast.batches] == pytest.approx([at for at, _ in slow], rel=1e-9)
