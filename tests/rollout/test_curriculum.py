"""Curricula by hand: levels that follow a pass rate, and tasks and levels drawn by their learnability."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from areal_agents.rollout.curriculum import (
    Attempts,
    Curriculum,
    LevelCurriculum,
    LevelLearnability,
    TaskLearnability,
    curriculum_of,
    grid,
    learnability,
    levels_of,
    moved_level,
)
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.types import Group, Task
from tests.trainer.test_loop import episode

BAND = {"low": 0.3, "high": 0.7, "step": 0.1}


def seen(passed: int, n: int = 4, *, task: str = "t", level: float | None = None, order: int = 0) -> Attempts:
    return Attempts(order, "", task, level, n, passed)


def test_a_group_is_counted_by_the_reward_that_passes() -> None:
    task = Task.make("t", split="train", seed=0, payload={"x": 1})
    rewards = (1.0, 0.7 + 0.2 + 0.1, 0.5, 0.0)  # the second is 1 but for rounding
    group = Group("g7", task, tuple(episode(r) for r in rewards), 0, 7, None, "math", 0.3)
    assert Attempts.of(group, passes=1.0) == Attempts(7, "math", task.content_hash, 0.3, 4, 2)
    assert Attempts.of(group, passes=0.5).passed == 3


@pytest.mark.parametrize(
    ("level", "rate", "moved"),
    [
        (0.2, 0.7, 0.3), (0.2, 0.69, 0.2), (0.2, 0.31, 0.2), (0.2, 0.3, 0.1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0),
        (0.95, 1.0, 1.0),
    ],
)  # fmt: skip
def test_a_level_moves_at_the_ends_of_the_band(level: float, rate: float, moved: float) -> None:
    assert moved_level(level, rate, **BAND) == moved


def test_ten_steps_of_a_tenth_are_one() -> None:
    level, visited = 0.0, []
    for _ in range(10):
        level = moved_level(level, 1.0, **BAND)
        visited.append(level)
    assert visited == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def test_levels_follow_the_pass_rate_of_a_full_window_of_their_own_episodes() -> None:
    c = LevelCurriculum(CurriculumConfig(kind="level", window=8), start=0.5)
    assert c.level(0) == 0.5
    c.note([seen(4, level=0.5)])  # 4 of 8 are there: nothing is judged
    assert (c.level(1), c.metrics()) == (0.5, {"level": 0.5, "level_episodes": 4.0})
    c.note([seen(4, level=0.5), seen(0, level=0.5), seen(0, level=0.5)])  # 8 of 8: up; the rest were begun below
    assert c.metrics() == {"level": 0.6, "level_episodes": 0.0}
    c.note([seen(2, level=0.6), seen(2, level=0.6)])  # 4 of 8: in the band, and the window is emptied
    assert c.metrics() == {"level": 0.6, "level_episodes": 0.0}
    c.note([seen(4, level=0.6), seen(1, n=1, level=0.5)])
    c.note([seen(0, level=0.6)])  # 4 of 8
    assert c.level(9) == 0.6
    c.note([seen(1, level=0.6), seen(1, level=0.6)])  # 2 of 8: down
    assert c.level(9) == 0.5


def test_learnability_by_hand() -> None:
    assert learnability(1, 1) == pytest.approx(1 / 6)  # the mean of p(1 − p) where every p is as likely
    assert learnability(5, 5) == pytest.approx(25 / 110)
    assert learnability(1, 9) == learnability(9, 1) == pytest.approx(9 / 110)
    assert learnability(1000, 1000) == pytest.approx(0.25, abs=2e-4)


def known(c: TaskLearnability, *rows: tuple[str, int, int]) -> None:
    """Let tasks be drawn, whose places are 0, 1, …, and played: name, passed, of how many."""
    for place, (name, _, _) in enumerate(rows):
        c.drawn(replace(Task.make(name, split="train", seed=0, payload={}), content_hash=name), place)
    c.note([seen(passed, n, task=name) for name, passed, n in rows])


def test_tasks_are_played_again_by_their_learnability() -> None:
    settings = CurriculumConfig(kind="learnability", explore=0.25)
    c = TaskLearnability(settings, seed="0/")
    assert c.task_again(0) is None  # nothing is known
    known(c, ("never", 0, 8), ("half", 4, 8), ("always", 8, 8))
    drawn = Counter(c.task_again(order) for order in range(4000))
    weights = [9 / 110, 25 / 110, 9 / 110]
    assert drawn[None] / 4000 == pytest.approx(0.25, abs=0.02)
    for place, weight in enumerate(weights):
        assert drawn[place] / 4000 == pytest.approx(0.75 * weight / sum(weights), abs=0.02)
    assert c.metrics() == {"tasks_known": 3.0, "learnability": pytest.approx(sum(weights) / 3)}
    assert [c.task_again(order) for order in range(50)] == [c.task_again(order) for order in range(50)]
    other = TaskLearnability(settings, seed="1/")
    other.restore(c.state())
    assert [other.task_again(o) for o in range(50)] != [c.task_again(o) for o in range(50)]


def test_what_is_known_of_a_task_fades() -> None:
    c = TaskLearnability(CurriculumConfig(kind="learnability", half_life=2.0), seed="0/")
    known(c, ("solved", 8, 8))
    for _ in range(2):
        c.note([])
    assert c.metrics()["learnability"] == pytest.approx(learnability(1 + 4, 1))  # half of its 8 passes are left
    c.note([])
    c.note([seen(0, 4, task="solved")])  # a quarter is left, and four failures count whole
    assert c.metrics()["learnability"] == pytest.approx(learnability(1 + 2, 1 + 4))
    for _ in range(60):
        c.note([])
    assert c.metrics()["learnability"] == pytest.approx(1 / 6, abs=1e-6)  # as if it had never been tried


def test_a_task_that_plays_for_the_first_time_is_not_drawn_again_before_it_has_ended() -> None:
    c = TaskLearnability(CurriculumConfig(kind="learnability", explore=1e-9), seed="0/")
    c.drawn(Task.make("a", split="train", seed=0, payload={}), 3)
    assert [c.task_again(order) for order in range(20)] == [None] * 20
    c.note([seen(1, task="never drawn here")])  # of another life, say: there is no place to find it at
    assert c.metrics() == {"tasks_known": 0.0, "learnability": 0.0}


def test_levels_are_drawn_by_their_learnability() -> None:
    c = LevelLearnability(CurriculumConfig(kind="learnability", by="level", level_step=0.5, explore=0.0), seed="0/")
    c.note([seen(8, 8, level=0.0), seen(4, 8, level=0.5), seen(0, 8, level=1.0)])
    drawn = Counter(c.level(order) for order in range(4000))
    weights = {0.0: 9 / 110, 0.5: 25 / 110, 1.0: 9 / 110}
    for level, weight in weights.items():
        assert drawn[level] / 4000 == pytest.approx(weight / sum(weights.values()), abs=0.03)
    assert c.metrics() == {
        "level_0/pass_rate": pytest.approx(0.9), "level_0.5/pass_rate": 0.5, "level_1/pass_rate": pytest.approx(0.1),
    }  # fmt: skip
    even = LevelLearnability(CurriculumConfig(kind="learnability", by="level", level_step=0.5, explore=1.0), seed="0/")
    even.restore(c.state())
    assert min(Counter(even.level(order) for order in range(3000)).values()) > 900


def test_the_levels_that_a_run_may_play() -> None:
    def levels(settings: CurriculumConfig, difficulty: float | None) -> list[float | None]:
        return levels_of(settings, difficulty, seed=0, label="")

    assert grid(0.3) == [0.0, 0.3, 0.6, 0.9, 1.0]
    assert levels(CurriculumConfig(), 0.4) == [0.4]
    assert levels(CurriculumConfig(), None) == [None]
    assert levels(CurriculumConfig(kind="learnability"), None) == [None]
    assert levels(CurriculumConfig(kind="learnability", by="level", level_step=0.5), 0.3) == [0.0, 0.5, 1.0]
    assert levels(CurriculumConfig(kind="level", level_step=0.5), 0.5) == [0.0, 0.5, 1.0]
    # From 0.2 in halves: 0.2, 0.7, and at 1 the way back is by halves too.
    assert levels(CurriculumConfig(kind="level", level_step=0.5, start=0.2), None) == [0.0, 0.2, 0.5, 0.7, 1.0]


@pytest.mark.parametrize("settings", [
    CurriculumConfig(kind="level", window=4),
    CurriculumConfig(kind="learnability"),
    CurriculumConfig(kind="learnability", by="level", level_step=0.25),
], ids=["level", "task", "by level"])  # fmt: skip
def test_a_state_goes_through_json_and_goes_on_as_if_nothing_had_happened(settings: CurriculumConfig) -> None:
    def fresh() -> Curriculum:
        found = curriculum_of(settings, difficulty=0.5, seed=4, label="x")
        assert found is not None
        return found

    def live(c: Curriculum, batches: Sequence[int]) -> list[object]:
        chosen: list[object] = []
        for batch in batches:
            notes = []
            for order in range(4 * batch, 4 * batch + 4):
                level, place = c.level(order), c.task_again(order)
                if place is None:
                    place = order
                    c.drawn(replace(Task.make("t", split="s", seed=0, payload={}), content_hash=f"h{order}"), order)
                chosen.append((level, place))
                notes.append(seen(order % 5, task=f"h{place}", level=level, order=order))
            c.note(notes)
        return chosen

    whole = fresh()
    all_of_it = live(whole, range(12))
    first = fresh()
    begun = live(first, range(5))
    second = fresh()
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + live(second, range(5, 12)) == all_of_it
    assert second.state() == whole.state()
    assert second.metrics() == whole.metrics()
    assert len(set(map(str, all_of_it))) > 3


def test_no_curriculum() -> None:
    assert curriculum_of(CurriculumConfig(), difficulty=0.5, seed=0, label="") is None


def test_a_level_begins_where_the_settings_say() -> None:
    for settings, difficulty, start in (
        (CurriculumConfig(kind="level"), None, 0.0),
        (CurriculumConfig(kind="level"), 0.4, 0.4),
        (CurriculumConfig(kind="level", start=0.0), 0.4, 0.0),
    ):
        c = curriculum_of(settings, difficulty=difficulty, seed=0, label="")
        assert c is not None
        assert c.level(0) == start
