"""What environments.py makes of its samples, by hand, and its sides with a few short episodes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_agents.env import Expert
from areal_agents.types import Task
from tests.letters_env import Letters
from tests.simulated import benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]


def ours(share: float, *, think: float = 0.0, episodes: int = 1000, whole: int | None = None) -> dict[str, Any]:
    return {
        "side": "ours", "episodes": episodes, "turns": 20, "think_seconds": think, "share_of_ideal": share,
        "turns_per_second": 5000.0, "whole": episodes if whole is None else whole, "different_episodes": episodes,
        "episodes_per_second": 250.0, "seconds": 4.0, "players_lag_ms_p99": 3.0, "environments_lag_ms_p99": 4.0,
        "peak_pss_mib": 300.0,
    }  # fmt: skip


def theirs(side: str, per_second: float) -> dict[str, Any]:
    return {
        "side": side, "episodes": 64, "turns": 20, "share_of_ideal": 0.9, "episodes_per_second": per_second,
        "seconds": 1.0, "peak_pss_mib": 900.0,
    }  # fmt: skip


BOX = [{"env": "areal/Hanoi-v0", "at_once": 1, "episodes": 10, "solved": 10, "episodes_per_second": 9.0}]


def test_goals_are_of_medians_and_say_why_they_are_missed() -> None:
    environments = module("environments")
    rows = [ours(0.2), ours(0.9, think=0.45), ours(0.3), ours(1.0, think=0.45), ours(0.25), ours(0.8, think=0.45)]
    rows += [theirs("sync", 1.0), theirs("async", 50.0), ours(0.95, episodes=125)]
    found = {check.name: check for check in environments.checks(rows, BOX, timing=True)}
    missed = found["share of the ideal, 1000 episodes (ours)"]
    assert (missed.value, missed.holds) == (0.25, False)
    assert missed.reason == (
        "at 5000 turns a second the processor is the limit: the ideal asks for 20000, 50 µs of one core a turn"
    )
    held = found["share of the ideal, 1000 episodes (ours, 450 ms a thought)"]
    assert (held.value, held.holds, held.reason) == (0.9, True, "")
    (slow,) = (
        check for check in environments.checks([*rows[:1], *[ours(0.5, think=0.45)] * 3, theirs("async", 50.0)], BOX,
                                               timing=True) if "thought" in check.name
    )  # fmt: skip
    assert slow.reason.endswith("the ideal asks for 2000, 500 µs of one core a turn")
    faster = found["episodes a second over the faster vector environment's"]
    assert (faster.value, faster.holds) == (5.0, True)
    assert len(found) == 5


def test_lost_mixed_and_unsolved_episodes_are_counted() -> None:
    environments = module("environments")
    rows = [ours(1.0, whole=998), ours(1.0) | {"different_episodes": 999}, theirs("async", 1.0)]
    found = environments.checks(rows, [*BOX, BOX[0] | {"solved": 7}], timing=False)
    assert [(check.value, check.holds) for check in found] == [(3, False), (3, False)]


def test_the_sides_play_what_they_are_asked_for() -> None:
    sides, vector = module("environments_sides"), module("environments_vector")
    asked = {"side": "ours", "episodes": 20, "turns": 3, "tool_seconds": 0.001, "think_seconds": 0.0}
    found = asyncio.run(sides.thousand(asked))
    assert (found["whole"], found["different_episodes"]) == (20, 20)
    assert found["share_of_ideal"] == pytest.approx(0.003 / found["seconds"])
    asked = {"side": "box", "env": "areal/Hanoi-v0", "at_once": 4, "seconds": 0.05, "sandbox": "bubblewrap"}
    found = asyncio.run(sides.scripted(asked))
    assert found["solved"] == found["episodes"] >= 4
    assert found["tasks_without_answer"] == []
    found = vector.played({"side": "sync", "episodes": 2, "turns": 3, "tool_seconds": 0.001})
    assert (found["episodes"], found["turns"]) == (2, 3)
    assert found["seconds"] >= 6 * 0.001


def test_a_task_that_nobody_can_answer_is_named_and_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = module("environments_sides")

    def letters() -> Expert:
        yield "abc"
        yield "de"

    def expert(cls: type[Letters], task: Task) -> Expert | None:
        return None if task.seed % 2 else letters()

    monkeypatch.setattr(Letters, "expert", classmethod(expert))
    asked = {"side": "box", "env": "tests.letters_env:Letters", "at_once": 2, "seconds": 0.0, "sandbox": "unsafe_local"}
    found = asyncio.run(sides.scripted(asked))
    assert found["solved"] == found["episodes"] >= 1
    assert found["tasks_without_answer"]
    assert {int(id.rpartition("-")[2]) % 2 for id in found["tasks_without_answer"]} == {1}
