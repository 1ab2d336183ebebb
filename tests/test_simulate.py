"""The simulation's clock against a slow loop, its bound against all schedules, and the real ``Rollouts``."""

from __future__ import annotations

import importlib
import itertools
import math
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from areal_agents.buffer import Buffer
from areal_agents.engines.routing import Router
from areal_agents.types import Group

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import their neighbours, as scripts do."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def module(name: str) -> Any:
    return importlib.import_module(name)


def case(**chosen: Any) -> Any:
    settings: dict[str, Any] = {
        "engines": 2, "slots": 4, "groups": 3, "group_size": 3, "sigma": 1.0, "eta": 2, "on_exceed": "wait",
        "updates": 10, "warmup": 3, "oversubscription": 1.5,
    }  # fmt: skip
    return module("simulate_model").Case(**settings | chosen)


# --- the rates -----------------------------------------------------------------------------------------------------


def test_the_rate_is_linear_between_measured_points_and_flat_beyond() -> None:
    measured = module("simulate_model").MEASURED
    assert [measured.rate(n) for n in (0, 1, 8, 20, 64, 100)] == [0, 56, 292, 390.5, 574, 574]
    each = [measured.rate(n) / n for n in range(1, 65)]
    assert all(a >= b for a, b in itertools.pairwise(each))


def test_a_trace_replaces_what_it_names_and_refuses_what_it_cannot(tmp_path: Path) -> None:
    model = module("simulate_model")
    path = tmp_path / "trace.json"
    path.write_text('{"rates": [[1, 10], [4, 20]], "update_seconds": 2}')
    read = model.Calibration.read(path)
    assert (read.rate(1), read.rate(4), read.update_seconds, read.learner_rate) == (10, 20, 2, 212)
    path.write_text('{"rate": 3}')
    with pytest.raises(ValueError, match=r"unknown \['rate'\]"):
        model.Calibration.read(path)
    path.write_text('{"rates": [[1, 10], [2, 30]]}')
    with pytest.raises(ValueError, match="ever smaller slopes"):
        model.Calibration.read(path)


def test_episodes_have_the_mean_and_the_cap_and_depend_on_the_seed_alone() -> None:
    model = module("simulate_model")
    one, two = (model.Workload(case(sigma=1.0, seed=s, group_size=16), model.MEASURED) for s in (0, 1))
    lengths = [n for order in range(1024) for n in one.lengths(order)]
    assert max(lengths) == 8 * 1024
    # E[min(X, 8)] of a log-normal of mean 1: Φ(ln 8 − 1/2) + 8·(1 − Φ(ln 8 + 1/2)) = 0.9828
    assert sum(lengths) / len(lengths) == pytest.approx(0.9828 * 1024, rel=0.02)
    assert one.lengths(1500) == model.Workload(case(seed=0, group_size=16), model.MEASURED).lengths(1500)
    assert one.lengths(0) != two.lengths(0)
    assert [one.turns(n) for n in (1, 512, 513, 8192)] == [1, 1, 2, 16]


# --- engines -------------------------------------------------------------------------------------------------------


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


# --- the whole run -------------------------------------------------------------------------------------------------


def constant(tokens: float, *, update: float) -> Any:
    """Every sequence gets 1 token/s whatever the batch; no tools within an episode of at most ``tokens``."""
    return module("simulate_model").Calibration(
        rates=((1, 1.0), (64, 64.0)), update_seconds=update, tool_seconds=(0.0, 0.0), learner_rate=1.0,
        mean_tokens=tokens, turn_tokens=1 << 20,
    )  # fmt: skip


def fix_lengths(monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int], size: int = 1) -> None:
    monkeypatch.setattr(
        module("simulate_model").Workload, "lengths", lambda self, order: [lengths[order % len(lengths)]] * size
    )


def test_a_hand_worked_schedule_with_a_bound_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # B = 1, one episode a group, 1 token/s each; the learner trains 4 tokens/s; an update takes 1 s (generation stops).
    fix_lengths(monkeypatch, [4, 12, 4, 4])
    chosen = case(engines=1, slots=4, groups=1, group_size=1, eta=1, updates=3, warmup=0, oversubscription=1.0)
    outcome = module("simulate_run").Simulation(chosen, constant(4, update=1.0)).run()
    # At 0: groups 0 and 1 (2 = (η + 1)·B). Group 0 is complete at 4; the step takes 1 s, the update 1 s: version 1 at
    # 6 with 1 token of group 1 … it has 5 by then. Group 2 is admitted at 6; it is complete at 10, but group 1 (of
    # version 0) is due at version 1: it ends after 12 s of generation, at 13. That step ends at 16, the update at 17:
    # group 3 begins, and group 2 has waited since 10: the third step begins at 17.
    assert outcome.batches == ((4.0, (0,)), (13.0, (1,)), (17.0, (2,)))
    # third step 17 to 18, update to 19. 20 tokens in 19 s; ages: group 1 has 5 tokens of version 0 at version 1;
    # group 2 has 4 of version 1 at version 2
    assert outcome.seconds == 19
    assert outcome.consumed_rate == pytest.approx(20 / 19)
    assert outcome.ages == pytest.approx({0: 4 + 7, 1: 5 + 4})
    assert outcome.learner_idle == pytest.approx((4 + 7) / 19)


def test_masked_and_dropped_tokens_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # As above without waiting: group 2 is taken at 10 (age 0), group 1 at version 2.
    fix_lengths(monkeypatch, [4, 12, 4, 4])
    run, calibration = module("simulate_run"), constant(4, update=1.0)
    chosen = {"engines": 1, "slots": 4, "groups": 1, "group_size": 1, "eta": 1, "updates": 3, "warmup": 0,
              "oversubscription": 1.0}  # fmt: skip
    masked = run.Simulation(case(on_exceed="mask", **chosen), calibration).run()
    # group 2's step 10 to 11, update to 12: group 1 has 5 + 5 tokens; 2 more at version 2: complete at 14
    assert masked.batches == ((4.0, (0,)), (10.0, (2,)), (14.0, (1,)))
    assert masked.masked_share == pytest.approx(5 / 20)  # the 5 tokens of version 0 are 2 old
    dropped = run.Simulation(case(on_exceed="drop", **chosen), calibration).run()
    # group 1 is dropped at 14. Group 3, admitted at 12, is complete at 16
    assert dropped.batches == ((4.0, (0,)), (10.0, (2,)), (16.0, (3,)))
    assert dropped.dropped_share == pytest.approx(12 / 24)
    assert max(dropped.ages) <= 1


def test_an_episode_that_ended_makes_room_before_its_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two episodes a group, of 1 and 9 s; four may play. Groups 0 and 1 begin at 0, group 2 at 1, in the place of their
    # short ones: it is complete at 10. A group that held its places to its end would let it begin at 9.
    monkeypatch.setattr(module("simulate_model").Workload, "lengths", lambda self, order: [1, 9])
    chosen = case(engines=1, slots=4, groups=1, group_size=2, eta=8, updates=3, warmup=0, oversubscription=1.0,
                  balance=10.0)  # fmt: skip
    calibration = constant(4, update=0.0)  # the learner: 10 tokens at 10 × 4 tokens/s
    bound, run = module("simulate_bound"), module("simulate_run")
    for buffer in (None, bound.IdealSchedule(chosen)):
        assert run.Simulation(chosen, calibration, buffer=buffer).run().batches == (
            (9.0, (0,)),
            (9.25, (1,)),
            (10.0, (2,)),
        )
    assert bound.ideal_steps(chosen, calibration) == [(9.25, 10), (9.5, 10), (10.25, 10)]


@pytest.mark.parametrize("eta", [1, 6])
def test_no_schedule_lets_more_episodes_play_than_the_concurrency(eta: int) -> None:
    model, run, bound = module("simulate_model"), module("simulate_run"), module("simulate_bound")
    chosen = case(eta=eta, oversubscription=1.25)  # 10 episodes, 3 a group
    ideal = bound._Ideal(chosen, model.MEASURED, math.inf)
    schedules = (run.Simulation(chosen, model.MEASURED).buffer, bound.IdealSchedule(chosen), ideal)
    for schedule in schedules[:2]:
        admitted = 0
        while schedule.can_admit():
            schedule.admit()
            admitted += 1
        assert (admitted, schedule.playing) == (3, 9)
    ideal.admit()
    assert (ideal.admitted, ideal.playing) == (3, 9)


@pytest.mark.parametrize("mode", ["wait", "mask", "drop"])
def test_asking_the_buffer_only_when_its_answer_can_change_changes_nothing(mode: str) -> None:
    model, run = module("simulate_model"), module("simulate_run")
    chosen = case(on_exceed=mode, updates=14, seed=3)
    once, again = (run.Simulation(chosen, model.MEASURED).run() for _ in range(2))
    always = run.Simulation(chosen, model.MEASURED, ask_always=True).run()
    assert once == again == always
    assert once != run.Simulation(case(on_exceed=mode, updates=14, seed=4), model.MEASURED).run()


@pytest.mark.parametrize("mode", ["wait", "mask", "drop"])
def test_the_real_rollouts_make_the_same_batches(mode: str) -> None:
    model, run = module("simulate_model"), module("simulate_run")
    chosen = case(on_exceed=mode)
    ours = run.Simulation(chosen, model.MEASURED).run().batches
    real = module("simulate_rollouts").rollouts_batches(chosen, model.MEASURED)
    assert [orders for _, orders in ours] == [orders for _, orders in real]
    assert [at for at, _ in ours] == pytest.approx([at for at, _ in real], rel=1e-9)


def test_a_group_cannot_be_consumed_twice_and_a_stall_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = module("simulate_model"), module("simulate_run")
    with monkeypatch.context() as patched:
        taken: list[Any] = []
        take = Buffer.take

        def again(self: Buffer) -> Any:
            batch = take(self)
            if batch is not None:
                taken.append(batch)
            return taken[0] if batch is not None else None

        patched.setattr(Buffer, "take", again)
        with pytest.raises(AssertionError, match="consumed twice"):
            run.Simulation(case(), model.MEASURED).run()
    monkeypatch.setattr(Buffer, "acknowledge", lambda self, version: None)
    with pytest.raises(AssertionError, match="deadlock"):
        run.Simulation(case(eta=0), model.MEASURED).run()


def test_a_token_over_the_bound_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = module("simulate_model"), module("simulate_run")
    monkeypatch.setattr(Buffer, "_required", lambda self, deadline: -100)  # ``wait`` would not wait
    monkeypatch.setattr(run.Simulation, "_can_take", lambda self: self.buffer.buffered >= self.case.groups)
    with pytest.raises(AssertionError, match="older than 1"):
        run.Simulation(case(eta=1), model.MEASURED).run()


# --- bounds --------------------------------------------------------------------------------------------------------


def optimum(durations: Sequence[int], *, groups: int, eta: int, rate: float) -> float:
    """Least time of any in-order schedule that takes every group in time: all admissions and batches are tried.

    Engines are unlimited: a group that begins at t is complete at t + its duration; a step takes the sum of its
    groups' durations over ``rate``. To begin later than an acknowledgement gains nothing: the deadline depends on the
    version alone.
    """
    updates = len(durations) // groups

    @cache
    def best(version: int, now: float, admitted: int, alive: tuple[tuple[float, int, int], ...]) -> float:
        """``alive``: completion time, deadline and duration of the groups that no batch has taken."""
        if version == updates:
            return now
        found = math.inf
        for more in range(len(durations) - admitted + 1):
            begun = tuple((now + d, version + eta, d) for d in durations[admitted : admitted + more])
            have = alive + begun
            for chosen in itertools.combinations(range(len(have)), groups):
                rest = tuple(sorted(g for i, g in enumerate(have) if i not in chosen))
                if any(deadline <= version for _, deadline, _ in rest):
                    continue
                start = max([now, *(have[i][0] for i in chosen)])
                end = start + sum(have[i][2] for i in chosen) / rate
                found = min(found, best(version + 1, end, admitted + more, rest))
        return found

    return best(0, 0.0, 0, ())


@pytest.mark.parametrize(("groups", "eta"), [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)])
def test_the_bound_the_optimum_of_all_schedules_and_the_ideal(
    monkeypatch: pytest.MonkeyPatch, groups: int, eta: int
) -> None:
    bound = module("simulate_bound")
    monkeypatch.setattr(bound, "learner_capacity", lambda *_: 2.0)
    rng, apart = random.Random(eta), 0
    for _ in range(8):
        durations = [rng.choice((1, 2, 9)) for _ in range(6)]
        fix_lengths(monkeypatch, durations)
        least = optimum(durations, groups=groups, eta=eta, rate=2.0)
        longest = [max(durations[b : b + groups]) for b in range(0, 6, groups)]
        shortest_step = sum(sorted(durations)[:groups]) / 2.0
        below = bound.any_schedule_seconds(longest, updates=6 // groups, eta=eta, step=shortest_step)
        chosen = case(engines=1, slots=64, groups=groups, group_size=1, eta=eta, updates=6 // groups, warmup=0)
        ideal = bound.ideal_steps(chosen, constant(4, update=0.0), finite=True)[-1][0]
        assert below <= least <= ideal + 1e-9
        apart += least < ideal - 1e-9
    assert eta > 0 or apart == 0  # a bound of 0 leaves one schedule


def test_later_admission_can_beat_the_earliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the ideal is not the optimum: who is admitted later is due later, and two long groups share one wait."""
    bound = module("simulate_bound")
    monkeypatch.setattr(bound, "learner_capacity", lambda *_: 10.0)
    durations = [10, 10, 10, 10, 100, 10, 100]
    fix_lengths(monkeypatch, durations)
    chosen = case(engines=1, slots=64, groups=1, group_size=1, eta=1, updates=7, warmup=0)
    ideal = bound.ideal_steps(chosen, constant(4, update=0.0), finite=True)[-1][0]
    least = optimum(durations, groups=1, eta=1, rate=10.0)
    below = bound.any_schedule_seconds(durations, updates=7, eta=1, step=1.0)
    assert (below, least, ideal) == (114.0, 144.0, 242.0)


# --- the report ----------------------------------------------------------------------------------------------------


def sample(engines: int, eta: int, mode: str, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "engines": engines, "sigma": 1.0, "eta": eta, "on_exceed": mode, "seed": 0, "trained_tokens_s": rate,
        "consumed_tokens_s": rate, "trained_share": rate / 100, "consumed_share": rate / 100, "generated_share": 1.0,
        "masked_share": 0.0, "dropped_share": 0.0, "learner_idle": 0.1, "engine_idle": 0.0, "age_mean": 1.0,
        "age_max": eta, **more,
    }  # fmt: skip


def test_rows_compare_with_the_sync_run_of_the_same_seed() -> None:
    simulate = module("simulate")
    samples = [sample(4, 0, "wait", 30), sample(4, 8, "mask", 96)]
    samples += [s | {"seed": 1, "trained_tokens_s": s["trained_tokens_s"] * 2} for s in samples]
    row = simulate.summarize(samples)[1]
    assert (row["over sync"], row["trained/limit"], row["on_exceed"]) == (3.2, 0.96, "mask")
    assert simulate.summarize(samples)[0]["on_exceed"] == "sync"
    assert [c.holds for c in simulate.limit_checks(samples)] == [True, True]
    late = simulate.limit_checks([sample(4, 8, "mask", 94)])
    assert not late[0].holds
    assert "learner idle 10.0%" in late[0].reason
    assert not simulate.age_checks([sample(4, 2, "drop", 1, age_max=3)])[0].holds


def test_the_shape_is_compared_over_the_unbounded_run() -> None:
    simulate = module("simulate")
    samples = [
        sample(64, eta, "mask" if eta else "wait", rate) | {"sigma": sigma}
        for eta, rate in {0: 30, 1: 60, 2: 80, 4: 90, 8: 95, 16: 99, simulate.ANY: 100}.items()
        for sigma in (0.5, 1.0)
    ]
    samples.append(sample(64, 1, "wait", 10, learner_idle=0.9))  # other modes are no part of the curve
    rows = simulate.shape(samples)
    assert [row["ours"] for row in rows if row["σ"] == 1] == [0.3, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0]
    assert rows[2]["AReaL"] == 0.899  # 356.6 / 396.8
    assert rows[2]["gain, ours"] == round(50 / 70, 3)
    found = simulate.shape_checks(rows, 2.0)[:4]
    assert [(c.value, c.holds) for c in found] == [(-0.01, True), (0.099, True), (0.714, True), (0.857, True)]
    rows[3]["ours"] = 0.7
    fall, gap, *_ = simulate.shape_checks(rows, 2.0)
    assert (fall.holds, gap.holds) == (False, False)
    assert "the learner waits 10% of the time" in gap.reason
    rows[3]["ours"] = 1.0
    assert "the oldest token is 4" in simulate.shape_checks(rows, 2.0)[1].reason


def test_the_grid_has_every_combination_once() -> None:
    simulate = module("simulate")
    asked = simulate.argparse.Namespace(fill=2.0, balance=1.0, split=0.75, measured_learner=False)
    cases = simulate.grid(simulate.SIZES, module("simulate_model").MEASURED, asked)
    assert len(set(cases)) == len(cases) == (3 + 2 + 1 + 1) * 2 * (1 + 4 * 3)
    assert {c.engines for c in cases} == {4, 64, 512, 4096}
    assert all(c.groups * c.group_size == 2 * c.engines * c.slots for c in cases)


def test_the_measured_learner_runs_on_the_devices_that_do_not_generate() -> None:
    simulate, calibration = module("simulate"), module("simulate_model").MEASURED
    asked = simulate.argparse.Namespace(fill=2.0, balance=1.0, split=0.75, measured_learner=True)
    found = simulate.case_of(simulate.SIZES[0], calibration, asked, sigma=1.0, eta=1, on_exceed="wait", seed=0)
    # one learner device for three engines of 489 tokens/s at 32 sequences
    assert found.balance == pytest.approx(212 / 3 / 489)
    assert found.groups == 2 * 4 * 32 / 16


def test_the_script_takes_quick_json_and_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--help"])
    with pytest.raises(SystemExit) as ended:
        module("simulate").main()
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    assert all(option in usage for option in ("--quick", "--json FILE", "--trace FILE"))
