"""Groups without signal are replaced within a bound, and groups that compare with a greedy episode have one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from areal_agents.rollout.buffer import Buffer, BufferState, Ticket
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.producer import GREEDY, OpenGroup, Rollouts, RolloutState
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.tasks import TaskStream
from areal_agents.tracking.trajectories import read_shard
from areal_agents.trainer.rollout_state import rollouts_from_json, write_rollouts
from areal_agents.types import Group
from tests.rollout.test_producer import Events
from tests.scripted import FMT, LIMITS, Script, ScriptedEnv, ScriptedPolicy, broken_sandbox, task

SAY, SAY_GREEDY = FMT.encode_turn("hello"), FMT.encode_turn("best")
TASKS = [task(i) for i in range(6)]


class World:
    """Rollouts of scripted episodes, G = 2 and B = 2, and what was told of them."""

    def __init__(self, *, greedy: Script | None = None, n: int = 2, **buffer: Any) -> None:
        self.log, self.said, self.script = Events(), list[str](), Script()
        player = LocalPlayer(lambda: ScriptedEnv(self.script), lambda task: ScriptedPolicy(SAY), LIMITS)
        other = None
        if greedy is not None:
            other = LocalPlayer(lambda: ScriptedEnv(greedy), lambda task: ScriptedPolicy(SAY_GREEDY), LIMITS)
        budget = FailureBudget(window=64, share=0.9)
        self.runner = EpisodeRunner(player, budget, max_retries=1, event=self.log, greedy=other)
        size = 2 + self.runner.has_greedy
        settings = {"groups": 2, "max_staleness": 1, "concurrency": 4 * size, "total_batches": n} | buffer
        self.buffer = Buffer(group_size=size, **settings)
        self.n = n

    def play(
        self, has_signal: Callable[[Group], bool] | None = None, state: RolloutState | None = None
    ) -> list[list[Group]]:
        async def main() -> list[list[Group]]:
            rollouts = Rollouts(
                self.buffer, TaskStream(TASKS, seed=0), self.runner, seed=0, event=self.log, has_signal=has_signal,
                say=self.said.append,
            )  # fmt: skip
            self.rollouts = rollouts
            try:
                if state is not None:
                    rollouts.restore(state)
                rollouts.start()
                out = []
                for version in range(self.buffer.version + 1, self.n + 1):
                    out.append(await asyncio.wait_for(rollouts.next_batch(), 60))
                    rollouts.acknowledge(version)
                return out
            finally:
                await rollouts.close()

        return asyncio.run(main())


def even(group: Group) -> bool:
    return int(group.task.payload["i"]) % 2 == 0


def test_groups_without_signal_are_replaced() -> None:
    world = World(max_refills=50)
    out = world.play(even)
    assert [[even(g) for g in batch] for batch in out] == [[True, True], [True, True]]
    buffer, told = world.buffer, [fields for kind, fields in world.log.rows if kind == "group_refilled"]
    assert buffer.refilled == len(told) > 0
    assert all(fields["rewards"] == [1.0, 1.0] for fields in told)
    assert buffer.admitted == 4 + buffer.refilled  # nothing else was played
    assert (buffer.discarded, world.said) == (0, [])
    assert world.script.made == 2 * buffer.admitted


def test_refills_that_are_spent_are_told_and_the_batch_goes_on() -> None:
    world = World(max_refills=3)
    out = world.play(lambda group: False)
    assert [len(batch) for batch in out] == [2, 2]
    assert 3 <= world.buffer.refilled <= 6
    assert world.log.count("refills_spent") == 4  # every group that was kept
    assert len(world.said) == 1
    assert "3 refills (rollout.max_refills)" in world.said[0]


def test_without_dynamic_sampling_every_group_is_kept() -> None:
    world = World(max_refills=0)
    world.play()
    assert (world.buffer.refilled, world.buffer.admitted) == (0, 4)
    assert world.log.rows == []


def test_what_judges_the_signal_and_fails_ends_the_run() -> None:
    def broken(group: Group) -> bool:
        raise ValueError("no such estimator")

    with pytest.raises(ValueError, match="no such estimator"):
        World(max_refills=3).play(broken)


def test_a_group_has_one_greedy_episode_of_its_task_and_seed() -> None:
    greedy = Script(reward=0.5)
    world = World(greedy=greedy)
    groups = [g for batch in world.play() for g in batch]
    assert [len(g.trajectories) for g in groups] == [2] * 4
    for g in groups:
        assert g.greedy is not None
        assert (g.greedy.id, g.greedy.task, g.greedy.group) == (f"{g.id}/greedy", g.task, g.id)
        assert (g.greedy.reward, g.greedy.turns[0].completion.ids) == (0.5, SAY_GREEDY)
        assert all(t.turns[0].completion.ids == SAY for t in g.trajectories)
    assert sorted(greedy.seeds * 2) == sorted(world.script.seeds)  # type: ignore[type-var]
    assert (greedy.made, greedy.closed, world.script.made) == (4, 4, 8)


def test_a_group_that_loses_its_greedy_episode_is_discarded_and_its_task_comes_again() -> None:
    left = iter([True, True])  # the first one's attempts, retry included

    def fails(k: int) -> None:
        if next(left, False):
            broken_sandbox(k)

    # one group at a time, so that both failures are the first group's
    world = World(greedy=Script(on_step=fails), n=1, groups=1, max_staleness=0, concurrency=3)
    ((group,),) = world.play()
    assert group.greedy is not None
    (told,) = [fields for kind, fields in world.log.rows if kind == "group_discarded"]
    assert (told["finished"], told["of"], told["requeued"]) == (2, 2, True)
    assert (world.buffer.discarded, world.buffer.admitted) == (1, 2)


def test_a_greedy_episode_needs_its_player() -> None:
    async def main() -> None:
        runner = World().runner
        with pytest.raises(ValueError, match="no greedy player"):
            await runner.run(TASKS[0], id="g0/greedy", group="g0", seed=0, greedy=True)
        await runner.close()

    asyncio.run(main())


def test_a_checkpoint_keeps_greedy_episodes_and_refills(tmp_path: Path) -> None:
    first = World(greedy=Script(reward=0.5), n=2, max_refills=9)
    first.play(lambda group: group.order != 1)
    state = first.rollouts.state()
    assert state.buffer.refilled == 1

    async def finished() -> list[Group]:  # three groups that wait: one for its batch, two for what is left to play
        world = World(greedy=Script(reward=0.5), n=3, groups=3)
        rollouts = Rollouts(world.buffer, TaskStream(TASKS, seed=0), world.runner, seed=0)
        rollouts.start()
        batch = await asyncio.wait_for(rollouts.next_batch(), 60)
        await rollouts.close()
        return batch

    a, b, c = asyncio.run(finished())
    opened = (
        OpenGroup(Ticket(b.order, 0), b.task, {GREEDY: b.greedy, 1: b.trajectories[1]}),
        OpenGroup(Ticket(c.order, 0), c.task, {GREEDY: None, 0: c.trajectories[0]}),
    )
    buffer = BufferState(0, 3, 0, (), tuple(g.ticket for g in opened), (a,), refilled=4, refilled_now=2)
    state = RolloutState(buffer, opened, state.tasks, ())
    write_rollouts(tmp_path, state)
    row = json.loads((tmp_path / "rollouts.json").read_text())
    assert rollouts_from_json(row, read_shard(tmp_path / "groups.parquet")) == state

    resumed = World(greedy=Script(reward=0.5), n=1, groups=2, max_refills=9)
    ((one, two),) = resumed.play(None, state)
    # The first is complete; of the second its episode 0 alone is played. The third has lost its greedy episode.
    assert (one.id, two.id) == (a.id, b.id)
    assert one == a
    assert two.greedy == b.greedy
    assert resumed.buffer.refilled == 4
