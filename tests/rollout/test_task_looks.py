"""The look at a split's tasks before the first episode."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from areal_agents.env import LazyTasks
from areal_agents.errors import InfraError, TaskError
from areal_agents.reward import Episode, Gate, WeightedSum, boxed_number, task_checks
from areal_agents.rewards import boxed_math, code
from areal_agents.rewards.shaping.wrappers import Clip
from areal_agents.rollout.task_looks import Look, look_at
from areal_agents.types import Task


def task(i: int, **payload: Any) -> Task:
    return Task.make(f"t{i}", split="train", seed=i, payload={"i": i, **payload})


def look(tasks: Any, reward: Any, **limits: Any) -> Look:
    return asyncio.run(look_at(tasks, task_checks(reward), where="own/Env-v0:train", seed=0, **limits))


def brief(episode: Episode) -> float:
    return 0.0


@pytest.mark.parametrize("reward", [boxed_number(), boxed_math()])
def test_bad_golds_are_found_through_rubrics(reward: Any) -> None:
    tasks = [task(i, answer=str(i)) for i in range(6)]
    tasks[2], tasks[4] = task(2, answer=r"\frac{1}{"), task(4)
    wrapped = functools.wraps(brief)(lambda episode: reward(episode))
    wrapped.__wrapped__ = reward
    for rubric in (reward, WeightedSum({"a": (reward, 0.5), "b": brief}), Gate({"on": reward}, on="on"), wrapped,
                   Clip(WeightedSum({"a": reward}), low=0, high=1),
                   WeightedSum({"deep": Gate({"on": brief, "x": reward}, on="on")})):  # fmt: skip
        found = look(tasks, rubric)
        assert (found.total, found.seen, list(found.bad)) == (6, 6, ["t2", "t4"])
        assert "task 't2'" in found.bad["t2"]
    assert task_checks(WeightedSum({"b": brief})) == ()
    assert look(tasks, brief) == Look(6)


def test_several_golds_and_options_are_read_as_the_reward_reads_them() -> None:
    tasks = [task(0, answer=["(", "5"]), task(1, answer=["(", "["]), task(2, answer=3), task(3, answer=True)]
    assert list(look(tasks, boxed_math()).bad) == ["t1", "t3"]


def test_programs_without_tests_are_found() -> None:
    good = {"tests": [{"input": "1", "output": "1"}]}
    tasks = [task(0, **good), task(1), task(2, tests=[]), task(3, **good, language="cobol")]
    assert list(look(tasks, code()).bad) == ["t1", "t2", "t3"]


def test_of_many_tasks_a_seeded_sample_is_looked_at() -> None:
    tasks = LazyTasks(1000, lambda i: task(i, answer="x" if i % 2 else "1"))
    first, again = look(tasks, boxed_number(), most=100), look(tasks, boxed_number(), most=100)
    assert (first.seen, str(first)) == (100, "100 of 1000")
    assert first == again
    assert 30 < len(first.bad) < 70


def test_a_task_that_cannot_be_made_and_a_check_that_breaks_are_found() -> None:
    def make(i: int) -> Task:
        if i == 1:
            raise KeyError("no row")
        return task(i)

    class Broken:
        async def require_scorable(self, task: Task) -> None:
            if task.seed == 2:
                raise LookupError("nothing")

    found = look(LazyTasks(4, make), Broken())
    assert "no row" in found.bad["task 1 of the split"]
    assert "require_scorable raised LookupError: nothing" in found.bad["t2"]
    assert len(found.bad) == 2


async def leaves_later(task: Task) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    asyncio.get_running_loop().create_task(leave()).add_done_callback(lambda done: done.exception())
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (TaskError(), "require_scorable raised TaskError without a reason"),
        (asyncio.CancelledError(), "require_scorable raised CancelledError"),
        (SystemExit(3), r"it called sys.exit\(3\)"),
        (TimeoutError("mine"), "raised TimeoutError: mine"),
    ],
)
def test_whatever_a_check_raises_is_its_tasks_and_ends_no_look(raised: BaseException, reason: str) -> None:
    class Picky:
        def require_scorable(self, task: Task) -> None:
            if task.seed % 2:
                raise raised

    found = look([task(i) for i in range(100)], Picky())  # more bad ones than are looked at at once
    assert (found.seen, len(found.bad)) == (100, 50)
    assert all(re.search(reason, why) for why in found.bad.values())


def test_a_check_that_cancels_the_task_it_runs_in_ends_no_look() -> None:
    class Cancels:
        async def require_scorable(self, task: Task) -> None:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
            await asyncio.sleep(0)

    found = look([task(i) for i in range(40)], Cancels())
    assert (found.seen, len(found.bad)) == (40, 40)


def test_a_task_of_asyncio_that_a_check_leaves_behind_ends_no_look() -> None:
    class Leaves:
        require_scorable = staticmethod(leaves_later)

    assert look([task(i) for i in range(40)], Leaves()) == Look(40, 40, {})


def test_bad_tasks_of_one_id_are_each_counted() -> None:
    class Bad:
        def require_scorable(self, task: Task) -> None:
            raise TaskError("no gold")

    same = [Task.make("same", split="train", seed=i, payload={"i": i}) for i in range(10)]
    found = look(same, Bad())
    assert (found.seen, dict(found.bad), found.namesakes) == (10, {"same": "no gold"}, 9)
    with pytest.raises(TaskError, match="10 of the 10 tasks of e:train"):
        found.require_enough("e:train", max_bad=0.5)


def test_time_bounds_the_look_and_a_lost_verifier_is_told() -> None:
    class Hangs:
        async def require_scorable(self, task: Task) -> None:
            if task.seed == 3:
                await asyncio.Event().wait()

    found = look([task(i) for i in range(5)], Hangs(), seconds=1.0)
    assert (found.seen, str(found), found.bad) == (4, "4 of 5", {})

    class Blocks:
        def require_scorable(self, task: Task) -> None:
            threading.Event().wait(0.02)

    assert 1 <= look([task(i) for i in range(1000)], Blocks(), seconds=0.2).seen < 1000

    class Lost:
        def require_scorable(self, task: Task) -> None:
            raise InfraError("no process")

    with pytest.raises(InfraError, match="no process"):
        look([task(0)], Lost())


FREE = threading.Event()
"""Ends the threads that a test has left blocked."""


@pytest.fixture
def freed() -> Iterator[None]:
    FREE.clear()
    yield
    FREE.set()


class BlocksAtOnce:
    def require_scorable(self, task: Task) -> None:
        if task.seed == 1:
            FREE.wait()


class BlocksTheLoop:
    async def require_scorable(self, task: Task) -> None:
        if task.seed == 1:
            await asyncio.sleep(0)
            FREE.wait()


class KeepsOn:
    async def require_scorable(self, task: Task) -> None:
        while task.seed == 1 and not FREE.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("reward", [BlocksAtOnce(), BlocksTheLoop(), KeepsOn()], ids=lambda r: type(r).__name__)
def test_a_check_that_never_returns_is_named_with_its_task(reward: Any, freed: None) -> None:
    match = rf"own/Env-v0:train: {type(reward).__name__}.require_scorable, the check of task 't1', has not returned"
    with pytest.raises(TaskError, match=match):
        look([task(i) for i in range(3)], reward, seconds=0.5)


def test_a_task_that_is_never_made_is_named(freed: None) -> None:
    def make(i: int) -> Task:
        if i == 2:
            FREE.wait()
        return task(i, answer="1")

    with pytest.raises(TaskError, match="own/Env-v0:train: the making of task 2 of the split has not returned"):
        look(LazyTasks(3, make), boxed_number(), seconds=0.5)


def test_a_long_look_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.rollout.task_looks._QUIET_SECONDS", 0.0)
    told: list[str] = []

    class Slow:
        async def require_scorable(self, task: Task) -> None:
            if task.seed == 0:
                raise TaskError("bad")
            while not told:  # noqa: ASYNC110  of another thread
                await asyncio.sleep(0.01)

    assert look([task(i) for i in range(4)], Slow(), seconds=60.0, tell=told.append).seen == 4
    assert told == ["looking at the tasks of own/Env-v0:train: 1 of 4, 1 cannot be scored"]


def test_a_cancelled_look_ends_its_checks() -> None:
    ended = threading.Event()
    begun = threading.Event()

    class Waits:
        async def require_scorable(self, task: Task) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    async def work() -> None:
        looking = asyncio.create_task(look_at([task(0)], task_checks(cast(Any, Waits())), where="e:train", seed=0))
        await asyncio.to_thread(begun.wait, 60)
        looking.cancel()
        await asyncio.wait((looking,))
        assert looking.cancelled()
        assert await asyncio.to_thread(ended.wait, 60)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("seen", "bad", "share", "refused"),
    [(100, 7, 0.0, False), (100, 8, 0.07, True), (100, 8, 0.08, False), (3, 3, 1.0, True), (3, 2, 0.2, False),
     (0, 0, 0.0, False)],
)  # fmt: skip
def test_too_many_bad_tasks_refuse_the_run(seen: int, bad: int, share: float, refused: bool) -> None:
    found = Look(1000, seen, {f"t{i}": "bad" for i in range(bad)})
    require: Callable[[], None] = lambda: found.require_enough("e:train", max_bad=share)  # noqa: E731
    if not refused:
        return require()
    with pytest.raises(TaskError, match=rf"{bad} of the {seen} tasks of e:train that were looked at.*\n  t0: bad"):
        require()
    return None
