"""Group rewards of episodes that are played in Ray actors: asked here, once a whole group, after a loss too."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from areal_agents.errors import InfraError
from areal_agents.group_reward import declaration, group_reward
from areal_agents.reward import Episode, Verdict
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.group_judge import GroupJudge, NamedGroupReward
from areal_agents.rollout.producer import Rollouts
from areal_agents.rollout.rebuilt import spoken_answer
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.tasks import TaskStream
from areal_agents.types import Group

pytest.importorskip("ray")
from tests.cluster.fleet import Fleet, count, spec, tasks

pytestmark = pytest.mark.ray


def test_a_group_of_remote_episodes_is_judged_here_and_whole_although_a_worker_is_lost(
    fleet: Fleet, tmp_path: Path
) -> None:
    asked: list[tuple[int, list[str], list[int]]] = []

    @group_reward(reads_others=True)
    def ranked(episodes: Sequence[Episode]) -> list[Verdict]:
        asked.append((os.getpid(), [e.task.id for e in episodes], [e.turns for e in episodes]))
        if len(asked) == 1:
            raise InfraError("the ranking server is down")
        return [Verdict(i / 3, {"rank": i / 3}) for i in range(len(episodes))]

    (tmp_path / "gate").touch()
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def play() -> list[Group]:
        judge = GroupJudge(NamedGroupReward(ranked, declaration(ranked, "it"), "ranked"), spoken_answer, timeout=60.0)
        player, budget = fleet.workers.player(recipe), FailureBudget(window=32, share=0.5)
        runner = EpisodeRunner(player, budget, max_retries=2, event=fleet.event, group_judge=judge)
        buffer = Buffer(groups=2, group_size=4, max_staleness=0, concurrency=8)
        rollouts = Rollouts(buffer, TaskStream(tasks(), seed=0), runner, seed=0, event=fleet.event)
        rollouts.start()
        try:
            await fleet.until(lambda: count(tmp_path, "step") == 8)
            os.kill(fleet.workers.pids[min(fleet.workers.pids)], signal.SIGKILL)
            await fleet.until(lambda: bool(fleet.named("worker_lost")))
            (tmp_path / "gate").unlink()
            return await rollouts.next_batch()
        finally:
            await rollouts.close()

    batch = fleet.run(play())
    assert [len(group.trajectories) for group in batch] == [4, 4]
    for group in batch:
        assert [t.reward for t in group.trajectories] == [0.0, 1 / 3, 2 / 3, 1.0]
        assert [t.turns[-1].components["group.rank"] for t in group.trajectories] == [0.0, 1 / 3, 2 / 3, 1.0]
        assert {t.task.id for t in group.trajectories} == {group.task.id}
    assert len(asked) == 3  # two groups, and one was asked for again
    assert {pid for pid, _, _ in asked} == {os.getpid()}
    assert all(len(set(names)) == 1 and turns == [2] * 4 for _, names, turns in asked)
    assert [(f["error"], f["retried"]) for f in fleet.named("group_failed")] == [("InfraError", True)]
    assert {f["error"] for f in fleet.named("episode_failed")} == {"WorkerLost"}


def test_groups_that_are_judged_while_others_play_do_not_wait_for_them(fleet: Fleet, tmp_path: Path) -> None:
    """An async reward that waits holds up neither the workers nor another group's verdict."""
    second = asyncio.Event()
    order: list[str] = []

    @group_reward(reads_others=False, adds=True)
    async def bonus(episodes: Sequence[Episode]) -> list[float]:
        order.append(episodes[0].task.id)
        if len(order) == 1:
            await second.wait()
        second.set()
        return [0.5] * len(episodes)

    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def play() -> tuple[list[Group], list[float]]:
        judge = GroupJudge(NamedGroupReward(bonus, declaration(bonus, "it"), "bonus"), spoken_answer, timeout=300.0)
        player, budget = fleet.workers.player(recipe), FailureBudget(window=32, share=0.5)
        runner = EpisodeRunner(player, budget, max_retries=0, event=fleet.event, group_judge=judge)
        buffer = Buffer(groups=2, group_size=2, max_staleness=0, concurrency=8)
        rollouts = Rollouts(buffer, TaskStream(tasks(), seed=0), runner, seed=0, event=fleet.event)
        rollouts.start()
        try:
            batch = await rollouts.next_batch()
            return batch, [t.turns[-1].own[0] for g in batch for t in g.trajectories if t.turns[-1].own]
        finally:
            await rollouts.close()

    batch, own = fleet.run(play())
    paid = [t.turns[-1].reward for g in batch for t in g.trajectories]
    assert len(paid) == len(own) == 4
    assert paid == [pytest.approx(x + 0.5) for x in own]
    assert len(set(order)) == 2
