"""Rollout workers that are killed, stopped, added and removed while they play: what that costs their episodes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.errors import (
    FailureBudgetError,
    WorkerLost,
)
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.types import Trajectory
from tests.conftest import require
from tests.processes import alive, descendants, wait_gone

pytest.importorskip("ray")
from areal_agents.cluster.rollout_workers import RolloutWorkers
from tests.cluster.fleet import LIMITS, Fleet, count, log, spec, tasks

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_costs_an_attempt_of_its_episodes(fleet: Fleet, tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "gate").touch()
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})
    budget = FailureBudget(window=8, share=0.0)  # not one failed attempt may be charged

    async def play() -> tuple[list[Trajectory | None], int]:
        runner = EpisodeRunner(fleet.workers.player(recipe), budget, max_retries=1, event=fleet.event)
        running = [
            asyncio.create_task(runner.run(task, id=f"e{i}", group="g", seed=i)) for i, task in enumerate(tasks())
        ]
        await fleet.until(lambda: count(tmp_path, "step") == 8)
        pid = fleet.workers.pids[min(fleet.workers.pids)]
        os.kill(pid, number)
        await fleet.until(lambda: bool(fleet.named("worker_lost")))
        (tmp_path / "gate").unlink()
        done = await asyncio.gather(*running)
        await fleet.until(lambda: len(fleet.workers.pids) == 2)
        await runner.close()
        return done, pid

    done, pid = fleet.run(play())
    assert [t.task.id for t in done if t is not None] == [t.id for t in tasks()]
    assert sorted(t.id.partition("~")[2] for t in done if t is not None) == [""] * 4 + ["1"] * 4
    (lost,) = fleet.named("worker_lost")
    (restarted,) = fleet.named("worker_restarted")
    assert (lost["episodes"], lost["worker"]) == (4, restarted["worker"])
    assert ("died" if number is signal.SIGKILL else "no sign of health for 10 s") in lost["reason"]
    failed = fleet.named("episode_failed")
    assert [(f["error"], f["retried"], f["attempt"]) for f in failed] == [("WorkerLost", True, 1)] * 4
    assert budget.kinds == {"WorkerLost": 4}
    # Four were begun again and nobody else: what the lost worker had begun was never finished, nor read.
    begun = Counter(int(p) for what, p, _ in log(tmp_path) if what == "start")
    assert (begun.total(), begun[pid]) == (12, 4)
    assert all(int(p) != pid for what, p, _ in log(tmp_path) if what == "close")
    assert wait_gone([pid], 60) == []


def test_a_loss_that_cannot_be_recorded_is_made_good_all_the_same(fleet: Fleet, tmp_path: Path) -> None:
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def lose() -> None:
        fleet.unrecorded = {"worker_lost"}
        pid = fleet.workers.pids[min(fleet.workers.pids)]
        os.kill(pid, signal.SIGKILL)
        await fleet.until(lambda: bool(fleet.named("worker_restarted")))
        player = fleet.workers.player(recipe)
        assert await asyncio.gather(*(player.play(t, id=t.id, group="g", seed=0) for t in tasks()))
        await player.close()
        assert len(fleet.workers.pids) == 2
        assert pid not in fleet.workers.pids.values()

    try:
        fleet.run(lose())
    finally:
        fleet.unrecorded = set()


def test_workers_come_and_go_while_episodes_play(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def resize() -> None:
        player = fleet.workers.player(recipe)
        await fleet.workers.resize(3)
        pids = dict(fleet.workers.pids)
        assert len(pids) == 3
        running = [asyncio.create_task(player.play(t, id=t.id, group="g", seed=0)) for t in tasks()]
        await fleet.until(lambda: count(tmp_path, "step") == 8)
        begun = Counter(int(pid) for what, pid, _ in log(tmp_path) if what == "start")
        assert sorted(begun.values()) == [2, 3, 3]
        await fleet.workers.resize(2)
        newest = pids[max(pids)]
        assert newest not in fleet.workers.pids.values()
        assert alive(newest)  # its episodes go on
        (tmp_path / "gate").unlink()
        assert len(await asyncio.gather(*running)) == 8
        await fleet.until(lambda: not alive(newest))
        assert sum(int(pid) == newest for what, pid, _ in log(tmp_path) if what == "close") == begun[newest]
        await player.close()

    fleet.run(resize())
    assert [len(fleet.named(kind)) for kind in ("worker_added", "worker_removed", "worker_lost")] == [1, 1, 0]


def test_episodes_that_outstay_a_removed_worker_start_again_and_are_nobodys_failure(
    fleet: Fleet, tmp_path: Path
) -> None:
    (tmp_path / "gate").touch()
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def remove() -> None:
        workers = RolloutWorkers(
            fleet.engine, recipe.env, workers=2, episodes_per_worker=4, event=fleet.event, num_cpus=0,
            drain_seconds=0.1,
        )  # fmt: skip
        async with workers:
            budget = FailureBudget(window=4, share=0.25)  # the second failure would end the run
            runner = EpisodeRunner(workers.player(recipe), budget, max_retries=2)
            plays = [asyncio.create_task(runner.run(t, id=t.id, group="g", seed=0)) for t in tasks()[:4]]
            await fleet.until(lambda: count(tmp_path, "step") == 4)
            await workers.resize(1)
            await fleet.until(lambda: count(tmp_path, "start") == 6)  # two of four were on the removed one
            (tmp_path / "gate").unlink()
            assert all(isinstance(end, Trajectory) for end in await asyncio.gather(*plays))
            assert budget.kinds == {"WorkerLost": 2}

    fleet.run(remove())


def test_the_last_worker_lost_too_often_ends_the_run_and_its_programs(fleet: Fleet) -> None:
    """Killed while a program of its sandbox sleeps, with a child that does too."""
    require("bwrap")
    limits = replace(LIMITS, max_context=4000, max_turn_tokens=400, max_episode_tokens=800)
    recipe = spec(fleet, "tests.drill_envs:Sleeps", policy="expert", limits=limits)
    names = recipe.env.tasks("train")

    async def lose() -> list[int]:
        workers = RolloutWorkers(
            fleet.engine, recipe.env, workers=1, episodes_per_worker=1, event=fleet.event, num_cpus=0, max_restarts=0
        )
        async with workers:
            (pid,) = workers.pids.values()
            runner = EpisodeRunner(workers.player(recipe), FailureBudget(window=8, share=0.5), max_retries=3)
            plays = [asyncio.create_task(runner.run(t, id=t.id, group="g", seed=0)) for t in names[:2]]
            await fleet.until(lambda: sum(map(is_program, descendants(pid))) == 2)
            everything = [pid, *descendants(pid)]
            os.kill(pid, signal.SIGKILL)
            ends = await asyncio.gather(*plays, return_exceptions=True)
        assert [type(end) for end in ends] == [FailureBudgetError] * 2
        assert "lost once more after 0 restarts" in str(ends[0])
        return everything

    assert wait_gone(fleet.run(lose()), 60) == []
    assert [len(fleet.named(kind)) for kind in ("worker_lost", "worker_dropped", "worker_restarted")] == [1, 1, 0]


def test_a_worker_that_cannot_come_back_is_the_first_to_go(fleet: Fleet, tmp_path: Path) -> None:
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def shrink() -> None:
        workers = RolloutWorkers(fleet.engine, recipe.env, workers=2, event=fleet.event, num_cpus=0)
        async with workers:
            pids = dict(workers.pids)
            workers._options["resources"] = {"a_node_that_is_gone": 1}
            os.kill(pids[0], signal.SIGKILL)
            await fleet.until(lambda: len(workers.pids) == 1)
            await workers.resize(1)
            assert workers.pids == {1: pids[1]}
            played = await workers.player(recipe).play(tasks()[0], id="a", group="g", seed=0)
            assert played.turns

    fleet.run(shrink())
    assert [fields["worker"] for fields in fleet.named("worker_removed")] == [0]


def test_the_last_worker_may_be_lost_while_another_one_is_added(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def grow(workers: RolloutWorkers) -> None:
        going, launch = asyncio.Event(), workers._launch

        async def held(index: int) -> Any:
            await going.wait()
            return await launch(index)

        async with workers:
            monkeypatch.setattr(workers, "_launch", held)
            growth = asyncio.create_task(workers.resize(2))
            await asyncio.sleep(0)
            os.kill(workers.pids[0], signal.SIGKILL)
            playing = asyncio.create_task(workers.player(recipe).play(tasks()[0], id="a", group="g", seed=0))
            await fleet.until(lambda: bool(fleet.named("worker_dropped")))
            going.set()
            await growth
            with contextlib.suppress(WorkerLost):  # it may have been on the lost one
                assert (await playing).turns
            assert (await workers.player(recipe).play(tasks()[0], id="b", group="g", seed=0)).turns

    async def begin() -> None:
        await grow(RolloutWorkers(fleet.engine, recipe.env, workers=1, event=fleet.event, num_cpus=0, max_restarts=0))

    fleet.run(begin())


def is_program(pid: int) -> bool:
    """Whether it is what the ``python`` tool runs inside the sandbox."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b"python3\0-I\0-u\0-X\0utf8\0-\0"
    return False
