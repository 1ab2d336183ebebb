"""Groups: retries, degraded groups, the failure budget, tasks queued again, and no stall."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from areal_agents.errors import ConfigError, EnvError, FailureBudgetError, InfraError, TaskError
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.curriculum import Attempts, Curriculum
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.producer import Rollouts
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.shares import Shares
from areal_agents.rollout.sources import EnvTasks, Source
from areal_agents.rollout.tasks import TaskStream
from areal_agents.types import Completion, Group, Prompt, Task
from tests.scripted import FMT, LIMITS, Script, ScriptedEnv, ScriptedPolicy, broken_sandbox, task

SAY = FMT.encode_turn("hello")
TASKS = [task(i) for i in range(5)]


class Events:
    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **fields: Any) -> None:
        self.rows.append((kind, fields))

    def count(self, kind: str) -> int:
        return sum(k == kind for k, _ in self.rows)


def batches(
    script: Script,
    *,
    n: int = 1,
    group_size: int = 4,
    window: int = 64,
    share: float = 0.25,
    events: Events | None = None,
    policy: Callable[[Task], ScriptedPolicy] = lambda task: ScriptedPolicy(SAY),
    inspect: Callable[[Rollouts], None] = lambda rollouts: None,
    tasks: Source | None = None,
    **buffer: Any,
) -> list[list[Group]]:
    """Run ``n`` batches to their end, acknowledging each at once."""

    async def main() -> list[list[Group]]:
        log = events or Events()
        player = LocalPlayer(lambda: ScriptedEnv(script), policy, LIMITS, event=log)
        runner = EpisodeRunner(player, FailureBudget(window=window, share=share), max_retries=2, event=log)
        settings: dict[str, Any] = {"groups": 2, "max_staleness": 1, "concurrency": 16, "total_batches": n} | buffer
        rollouts = Rollouts(
            Buffer(group_size=group_size, **settings), tasks or TaskStream(TASKS, seed=0), runner, seed=0, event=log
        )
        try:
            rollouts.start()
            out = []
            for version in range(1, n + 1):
                out.append(await asyncio.wait_for(rollouts.next_batch(), 60))
                rollouts.acknowledge(version)
            inspect(rollouts)
            return out
        finally:
            await rollouts.close()

    return asyncio.run(main())


def test_groups_share_task_and_seed_and_batches_are_exact() -> None:
    script = Script()
    out = batches(script, n=3)
    assert [len(b) for b in out] == [2, 2, 2]
    for group in (g for b in out for g in b):
        assert len(group.trajectories) == 4
        assert {t.task.id for t in group.trajectories} == {group.task.id}
    assert script.made == script.closed == 3 * 2 * 4  # nothing is started beyond the last batch
    assert set(Counter(script.seeds).values()) == {4}


def test_idle_means_that_nothing_runs_though_a_batch_may_wait() -> None:
    async def main() -> None:
        player = LocalPlayer(lambda: ScriptedEnv(Script()), lambda task: ScriptedPolicy(SAY), LIMITS)
        runner = EpisodeRunner(player, FailureBudget(window=8, share=0.5), max_retries=0)
        buffer = Buffer(groups=2, group_size=2, max_staleness=1, concurrency=8)
        rollouts = Rollouts(buffer, TaskStream(TASKS, seed=0), runner, seed=0)
        rollouts.start()
        assert buffer.running == 4  # (1 + 0 + 1) · 2
        await asyncio.wait_for(rollouts.idle(), 30)
        assert (buffer.running, buffer.buffered) == (0, 4)
        await rollouts.close()

    asyncio.run(main())


def test_an_infrastructure_failure_is_retried_and_costs_nothing() -> None:
    failures = iter([True, True])

    def flaky(k: int) -> None:
        if next(failures, False):
            raise InfraError("a hiccup")

    events = Events()
    (batch,) = batches(Script(on_step=flaky), events=events)
    assert [len(g.trajectories) for g in batch] == [4, 4]
    assert events.count("episode_failed") == 2
    assert [(f["turns"], f["tokens"], f["tool"]) for k, f in events.rows if k == "episode_failed"] == [(0, 0, "")] * 2
    assert all(t.reward == 1.0 for g in batch for t in g.trajectories)


def test_a_group_goes_on_with_fewer_episodes_then_is_discarded_and_its_task_queued_once() -> None:
    attempts: Counter[str] = Counter()

    class Unlucky(ScriptedPolicy):
        async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
            group, _, i = episode.id.partition("/")
            attempts[group] += 1
            dead = {"g0": "123", "g1": "3"}.get(group, "")  # three of four fail, one of four fails
            if i[0] in dead:
                raise EnvError("gone")
            return await super().sample(prompt, max_tokens, episode)

    events = Events()
    lost: list[str] = []
    (batch,) = batches(
        Script(),
        events=events,
        policy=lambda t: Unlucky(SAY),
        share=1.0,
        inspect=lambda r: lost.extend(r.tasks_lost),
    )
    assert sorted(len(g.trajectories) for g in batch) == [3, 4]  # g1 with three; g0 replaced by another group
    assert events.count("group_discarded") == 1
    ((_, discarded),) = [e for e in events.rows if e[0] == "group_discarded"]
    assert discarded["requeued"] is True
    assert discarded["task"] in {g.task.id for g in batch}  # the second chance was taken
    assert lost == []


def test_a_broken_reward_is_not_retried_and_stops_the_run() -> None:
    events = Events()
    with pytest.raises(TaskError, match=r"none of the split's 5 tasks can be played or scored:\n.*the reward nan"):
        batches(Script(reward=float("nan")), events=events, window=16)
    assert not any(fields.get("retried") for _, fields in events.rows)


def test_the_budget_stops_a_run_whose_sandbox_is_dead() -> None:
    with pytest.raises(FailureBudgetError, match=r"5 of the last \d+ episode attempts failed, the budget is 4 "):
        batches(Script(on_step=broken_sandbox), window=16)


def test_the_budget_counts_a_window_not_the_run() -> None:
    budget = FailureBudget(window=4, share=0.5)
    for _ in range(10):  # one failure in four, for ever
        budget.failure(InfraError("x"))
        budget.success()
        budget.success()
        budget.success()
    budget.failure(InfraError("y"))
    budget.failure(InfraError("y"))
    with pytest.raises(FailureBudgetError, match="3 of the last 4"):
        budget.failure(InfraError("z"))


def test_a_host_blocked_by_one_environment_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from tests import scripted

    monkeypatch.setattr("areal_agents.rollout.env_host._HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr("tests.rollout.test_producer.LIMITS", replace(LIMITS, step_timeout=0.3))
    once = iter([True])
    events = Events()

    def block(k: int) -> None:
        if next(once, False):
            scripted.block_the_loop(2.0)

    (batch,) = batches(Script(on_step=block), events=events)
    assert [len(g.trajectories) for g in batch] == [4, 4]
    assert events.count("host_replaced") == 1
    assert events.count("episode_failed") == 1  # the culprit alone; the others were only moved


def test_over_age_groups_are_dropped_and_replaced_without_a_stall() -> None:
    calls = 0

    def aged(task: Any) -> ScriptedPolicy:
        nonlocal calls
        calls += 1
        return ScriptedPolicy(SAY, version=0 if calls <= 24 else 1)  # the first six groups' tokens are of version 0

    dropped: list[int] = []
    out = batches(
        Script(), n=2, policy=aged, max_staleness=0, on_exceed="drop",
        inspect=lambda r: dropped.append(len(r.buffer.dropped)),
    )  # fmt: skip
    assert [len(b) for b in out] == [2, 2]
    assert dropped == [4]
    assert all(t.min_version == 1 for g in out[1] for t in g.trajectories)


class Notes(Curriculum):
    """It keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Attempts] = []

    def note(self, batch: Sequence[Attempts]) -> None:
        self.told += batch

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.told = []


def test_a_curriculum_learns_from_groups_that_were_dropped_for_their_age() -> None:
    """What is slow is often what fails: pass rates of the quick groups alone would be too high."""
    calls, notes = 0, Notes()

    def aged(task: Any) -> ScriptedPolicy:
        nonlocal calls
        calls += 1
        return ScriptedPolicy(SAY, version=0 if calls <= 24 else 1)

    tasks = Source(
        [EnvTasks(lambda level: TaskStream(TASKS, seed=0), curriculum=notes)], Shares([1.0], seed=0), groups=2
    )
    out = batches(Script(), n=2, policy=aged, max_staleness=0, on_exceed="drop", tasks=tasks)
    tasks.consume([])
    tasks.draw(10**6)  # which knows of all
    assert [g.order for batch in out for g in batch] == [0, 1, 6, 7]
    assert [(seen.order, seen.n, seen.passed) for seen in notes.told] == [(k, 4, 4) for k in (2, 3, 4, 5)]


def test_tasks_come_in_seeded_epochs() -> None:
    a, b, c = (TaskStream(TASKS, seed=s) for s in (1, 1, 2))
    first = [a.next().id for _ in range(10)]
    assert first == [b.next().id for _ in range(10)]
    assert first != [c.next().id for _ in range(10)]
    assert sorted(first[:5]) == sorted(first[5:]) == sorted(t.id for t in TASKS)
    with pytest.raises(ConfigError, match="no tasks"):
        TaskStream([], seed=0)
