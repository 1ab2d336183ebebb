"""A simulated run by hand, its clock, and the real ``Rollouts`` in virtual time."""

from __future__ import annotations

import math
from typing import Any

import pytest

from areal_agents.rollout.buffer import Buffer
from tests.simulated import benchmarks_on_path, case, constant, fix_lengths, module

__all__ = ["benchmarks_on_path"]


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
