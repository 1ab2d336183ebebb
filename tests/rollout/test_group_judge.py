"""Groups judged as a whole: before the buffer, retried and counted, cancelled, bounded in time, resumed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from areal_agents.chat.options import ChatOptions
from areal_agents.conformance import reward_audit
from areal_agents.conformance.contract import Subject
from areal_agents.errors import ConfigError, EnvError, FailureBudgetError, InfraError, TaskError
from areal_agents.group_reward import GroupRewardLike, declaration, group_reward
from areal_agents.registry import EnvSpec
from areal_agents.reward import Episode, Verdict
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.group_judge import GroupJudge, NamedGroupReward, group_reward_of, open_judge, require_attempts
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.producer import Rollouts, RolloutState
from areal_agents.rollout.rebuilt import spoken_answer
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.tasks import TaskStream
from areal_agents.served_model import ServedModel
from areal_agents.settings.config import TrainConfig
from areal_agents.types import AssistantMessage, Completion, Group, Text, Trajectory, Turn, user
from tests.rollout.test_producer import SAY, TASKS, Events
from tests.scripted import LIMITS, Script, ScriptedEnv, ScriptedPolicy, block_the_loop


def named(function: Callable[..., Any], **declared: Any) -> NamedGroupReward:
    reward: GroupRewardLike = group_reward(**({"reads_others": True} | declared))(function)
    return NamedGroupReward(reward, declaration(reward, "it"), "ranked")


class World:
    """A producer of groups of four, two a batch, whose groups ``function`` judges."""

    def __init__(
        self, function: Callable[..., Any], *, timeout: float = 60.0, share: float = 0.5, **declared: Any
    ) -> None:
        self.events, self.script = Events(), Script()
        self.judge = GroupJudge(named(function, **declared), spoken_answer, timeout=timeout, event=self.events)
        player = LocalPlayer(lambda: ScriptedEnv(self.script), lambda task: ScriptedPolicy(SAY), LIMITS)
        self.budget = FailureBudget(window=32, share=share)
        self.runner = EpisodeRunner(player, self.budget, max_retries=2, event=self.events, group_judge=self.judge)
        self.buffer = Buffer(groups=2, group_size=4, max_staleness=0, concurrency=8)
        self.rollouts = Rollouts(
            self.buffer, TaskStream(TASKS, seed=0, max_bad=1.0), self.runner, seed=0, event=self.events
        )

    async def batch(self, state: RolloutState | None = None) -> list[Group]:
        try:
            if state is not None:
                self.rollouts.restore(state)
            self.rollouts.start()
            return await asyncio.wait_for(self.rollouts.next_batch(), 120)
        finally:
            await self.rollouts.close()

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events.rows if k == kind]


def run(function: Callable[..., Any], **options: Any) -> tuple[list[Group], World]:
    async def main() -> tuple[list[Group], World]:
        world = World(function, **options)
        return await world.batch(), world

    return asyncio.run(main())


def test_a_group_is_judged_once_with_all_its_episodes_in_order() -> None:
    calls: list[tuple[Episode, ...]] = []

    def ranked(episodes: Sequence[Episode]) -> list[Verdict]:
        calls.append(tuple(episodes))
        return [Verdict(float(i), {"rank": float(i)}) for i in range(len(episodes))]

    batch, world = run(ranked)
    assert [len(c) for c in calls] == [4, 4]
    assert {e.answer for c in calls for e in c} == {"hello"}
    assert {e.turns for c in calls for e in c} == {2}
    for group in batch:
        assert [t.id for t in group.trajectories] == [f"{group.id}/{i}" for i in range(4)]
        assert [t.reward for t in group.trajectories] == [0.0, 1.0, 2.0, 3.0]
        assert [t.turns[-1].own for t in group.trajectories] == [(1.0, {"correct": 1.0})] * 4
        assert dict(group.trajectories[2].turns[-1].components) == {"correct": 1.0, "group.rank": 2.0}
    assert not world.told("group_failed")


def test_the_models_of_the_environments_reach_it() -> None:
    seen: list[dict[str, Any]] = []

    def asked(episodes: Sequence[Episode]) -> list[float]:
        seen.extend(dict(e.models) for e in episodes)
        return [0.0] * len(episodes)

    async def main() -> None:
        spec = EnvSpec(
            "named", "tests.scripted:ScriptedEnv", kwargs={"models": {"judge": "openai:m@http://127.0.0.1:1/v1"}}
        )
        judge = open_judge(named(asked), spec, TrainConfig(), Events())
        assert judge is not None
        try:
            await judge.judge(TASKS[0], [trajectory()], [0])
        finally:
            await judge.close()

    asyncio.run(main())
    assert [list(m) for m in seen] == [["judge"]]
    assert isinstance(seen[0]["judge"], ServedModel)


def trajectory() -> Trajectory:
    completion = Completion((1,), (-1.0,), (0,), "stop")
    turn = Turn((0,), completion, AssistantMessage((Text("hello"),)), 1.0, observation=(user("?"),))
    return Trajectory("g/0", TASKS[0], "g", (turn,), terminated=True, truncated=False, stop_reason="answer")


def test_rewards_are_added_and_doubtful_verdicts_counted() -> None:
    async def doubtful(episodes: Sequence[Episode]) -> list[Verdict]:
        return [Verdict(0.25, status="unverifiable"), *[Verdict(0.75, turn_rewards=(0.5, 0.25))] * 3]

    batch, _ = run(doubtful, adds=True)
    for group in batch:
        assert [t.reward for t in group.trajectories] == [1.25, 1.75, 1.75, 1.75]
        assert [t.metrics.get("unverifiable") for t in group.trajectories] == [1.0, None, None, None]


def test_until_it_is_judged_a_group_runs_and_is_not_in_the_buffer() -> None:
    async def main() -> None:
        began, go = asyncio.Semaphore(0), threading.Event()
        loop = asyncio.get_running_loop()

        async def held(episodes: Sequence[Episode]) -> list[float]:
            loop.call_soon_threadsafe(began.release)
            await asyncio.to_thread(go.wait, 120)
            return [7.0] * len(episodes)

        world = World(held)
        world.rollouts.start()
        for _ in range(2):
            await asyncio.wait_for(began.acquire(), 60)
        assert (world.buffer.playing, world.buffer.running, world.buffer.buffered) == (0, 2, 0)
        assert not world.buffer.can_admit()
        saved = world.rollouts.state()
        assert [len(g.finished) for g in saved.open] == [4, 4]
        go.set()
        assert [t.reward for g in await asyncio.wait_for(world.rollouts.next_batch(), 60) for t in g.trajectories] == [
            7.0
        ] * 8
        await world.rollouts.close()

        asked: list[int] = []

        def again(episodes: Sequence[Episode]) -> list[float]:
            asked.append(len(episodes))
            return [5.0] * len(episodes)

        resumed = World(again)
        batch = await resumed.batch(saved)  # finished and not judged: judged once, not played again
        assert (asked, resumed.script.made) == ([4, 4], 0)
        assert {t.reward for g in batch for t in g.trajectories} == {5.0}

    asyncio.run(main())


def test_groups_in_the_buffer_of_a_checkpoint_keep_their_verdicts() -> None:
    async def main() -> None:
        def seven(episodes: Sequence[Episode]) -> list[float]:
            return [7.0] * len(episodes)

        world = World(seven)
        world.rollouts.start()
        await asyncio.wait_for(world.rollouts.idle(), 60)
        saved = world.rollouts.state()
        await world.rollouts.close()
        assert len(saved.buffer.buffered) == 2

        def never(episodes: Sequence[Episode]) -> list[float]:
            raise AssertionError("asked again")

        batch = await World(never).batch(saved)
        assert {t.reward for g in batch for t in g.trajectories} == {7.0}

    asyncio.run(main())


def test_an_infrastructure_failure_is_retried_and_counted() -> None:
    failures = iter([InfraError("the judge is away")] * 2)

    def flaky(episodes: Sequence[Episode]) -> list[float]:
        if (error := next(failures, None)) is not None:
            raise error
        return [1.0] * len(episodes)

    batch, world = run(flaky)
    assert len(batch) == 2
    assert world.budget.kinds == {"InfraError": 2}
    assert [(f["error"], f["retried"]) for f in world.told("group_failed")] == [("InfraError", True)] * 2
    assert not world.told("group_discarded")


def test_a_group_that_cannot_be_judged_is_discarded_and_its_task_played_once_more() -> None:
    lost: list[str] = []

    def away(episodes: Sequence[Episode]) -> list[float]:
        task = episodes[0].task.id
        if not lost or (lost[0] == task and len(lost) < 3):
            lost.append(task)
            raise InfraError("the judge is away")
        return [1.0] * len(episodes)

    batch, world = run(away, share=1.0)
    assert len(batch) == 2
    assert len(lost) == 3  # two retries
    (discarded,) = world.told("group_discarded")
    assert (discarded["task"], discarded["finished"], discarded["of"], discarded["requeued"]) == (lost[0], 4, 4, True)
    assert world.buffer.discarded == 1
    assert not world.runner.left_out


def test_a_judge_that_stays_away_ends_the_run_by_its_budget() -> None:
    def away(episodes: Sequence[Episode]) -> list[float]:
        raise InfraError("the judge is away")

    with pytest.raises(FailureBudgetError, match="First failure: the judge is away"):
        run(away, share=0.2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TaskError("no gold"), "group reward ranked (task {task}): no gold"),
        (KeyError("gold"), "group reward ranked (task {task}) raised KeyError: 'gold' (the same in all 3 attempts)"),
        (None, "group reward 'ranked' returned 1 verdicts for 4 episodes on task '{task}': return one an episode"),
    ],
)
def test_a_task_that_cannot_be_judged_is_left_out(error: Exception | None, reason: str) -> None:
    bad: list[str] = []

    def picky(episodes: Sequence[Episode]) -> list[float]:
        task = episodes[0].task.id
        if not bad:
            bad.append(task)
        if task != bad[0]:
            return [1.0] * len(episodes)
        if error is None:
            return [1.0]
        raise error

    batch, world = run(picky)
    assert {g.task.id for g in batch}.isdisjoint(bad)
    assert world.runner.left_out[bad[0]].startswith(reason.format(task=bad[0]))
    assert not world.budget.kinds  # a property of the task
    assert world.buffer.discarded == 1


def test_a_wrong_setting_ends_the_run() -> None:
    def keyless(episodes: Sequence[Episode]) -> list[float]:
        raise ConfigError("no key for the judge")

    with pytest.raises(ConfigError, match="no key for the judge"):
        run(keyless)


def test_an_exit_costs_no_more_than_another_exception() -> None:
    def leaves(episodes: Sequence[Episode]) -> list[float]:
        raise SystemExit(3)

    async def main() -> None:
        world = World(leaves)
        judge = world.judge
        with pytest.raises(EnvError, match=r"group reward ranked .* raised RuntimeError: it called sys.exit\(3\)"):
            await judge.judge(TASKS[0], [], [])
        await world.rollouts.close()

    asyncio.run(main())


def test_a_call_that_hangs_is_cancelled_at_its_deadline_and_one_that_blocks_is_left_behind() -> None:
    async def hangs(episodes: Sequence[Episode]) -> list[float]:
        await asyncio.Event().wait()
        return []

    def blocks(episodes: Sequence[Episode]) -> list[float]:
        block_the_loop(15.0)
        return []

    async def main() -> None:
        world = World(hangs, timeout=0.05)
        with pytest.raises(EnvError, match=r"group reward ranked .* did not return within 0\.05 s") as error:
            await world.judge.judge(TASKS[0], [], [])
        assert error.value.blame == "hang"
        await world.rollouts.close()
        blocked = World(blocks, timeout=0.05, seconds=0.05)
        with pytest.raises(EnvError, match=r"blocked its event loop for more than 0\.1 s"):
            await blocked.judge.judge(TASKS[0], [], [])
        await blocked.rollouts.close()

    start = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - start < 60  # nobody waits for the one that blocks


def test_closing_cancels_a_call() -> None:
    async def main() -> None:
        began, cancelled = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        async def held(episodes: Sequence[Episode]) -> list[float]:
            loop.call_soon_threadsafe(began.set)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                loop.call_soon_threadsafe(cancelled.set)
                raise
            return []

        world = World(held)
        world.rollouts.start()
        await asyncio.wait_for(began.wait(), 60)
        await world.rollouts.close()
        await asyncio.wait_for(cancelled.wait(), 60)

    asyncio.run(main())


# --- which reward ----------------------------------------------------------------------------------------------------


@group_reward(reads_others=True)
def flat(episodes: Sequence[Episode]) -> list[float]:
    return [0.0] * len(episodes)


class Judged(ScriptedEnv):
    group_rubric = staticmethod(flat)


def undeclared(episodes: Sequence[Episode]) -> list[float]:
    return []


class Undeclared(ScriptedEnv):
    group_rubric = staticmethod(undeclared)


def spec(name: str) -> EnvSpec:
    return EnvSpec(name, f"tests.rollout.test_group_judge:{name}")


def test_the_environments_reward_or_that_of_the_settings() -> None:
    plain = EnvSpec("plain", "tests.scripted:ScriptedEnv")
    assert group_reward_of(plain) is None
    own = group_reward_of(spec("Judged"))
    assert own is not None
    assert (own.reward, own.name) == (flat, "flat")
    given = group_reward_of(plain, "tests.rollout.test_group_judge:flat")
    assert given == own
    for setting, message in (
        ("flat", "rollout.group_reward = 'flat': write \"package.module:name\""),
        ("tests.rollout.test_group_judge:flatt", r"has no 'flatt' \(did you mean 'flat'\?\)"),
        ("tests.no_such:flat", "importing 'tests.no_such' failed"),
        ("tests.rollout.test_group_judge:undeclared", "does not declare `adds` and `reads_others`"),
        ("tests.rollout.test_group_judge:TASKS", "does not declare"),
    ):
        with pytest.raises(ConfigError, match=message):
            group_reward_of(plain, setting)


def test_a_reward_that_compares_attempts_needs_two() -> None:
    own = group_reward_of(spec("Judged"))
    with pytest.raises(ConfigError, match=r"eval.k = 1: .*'flat' compares a task's attempts"):
        require_attempts(own, 1)
    require_attempts(own, 2)
    require_attempts(None, 1)


def test_check_looks_at_the_declaration() -> None:
    subject = Subject(spec("Undeclared"), 60.0, None, ChatOptions())
    with pytest.raises(ConfigError, match=r"Undeclared: Undeclared\.group_rubric is .* does not declare `adds`"):
        asyncio.run(reward_audit.reward(subject))
