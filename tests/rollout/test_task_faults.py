"""A task that cannot be played or scored is left out, named and counted; infrastructure is charged as before."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.env import LazyTasks
from areal_agents.errors import EnvError, FailureBudgetError, RewardError, SandboxError, TaskError, TemplateError
from areal_agents.evaluation.attempts import run_attempts
from areal_agents.evaluation.report import Lost, summarize
from areal_agents.reward import Episode, RewardLike, boxed_number
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.episode import Limits
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.producer import Rollouts, RolloutState
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.task_faults import TaskAttempts
from areal_agents.rollout.tasks import TaskStream, tasks_at
from areal_agents.toolenv import ToolEnv
from areal_agents.tracking.trajectories import read_shard
from areal_agents.trainer.rollout_state import rollouts_from_json, write_rollouts
from areal_agents.types import Info, Observation, Task
from tests.scripted import FMT, LIMITS, ScriptedPolicy, block_the_loop

SAY = FMT.encode_turn(r"\boxed{7}")
BAD = 7  # of twenty tasks


def tasks(n: int = 20, bad: Callable[[int], bool] = lambda i: i % 20 == BAD, **wrong: Any) -> list[Task]:
    """Return ``n`` tasks whose answer is 7, in which the bad ones have ``wrong`` in their payload."""
    return [
        Task.make(f"t-{i}", split="train", seed=i, payload={"answer": "7", "i": i} | (wrong if bad(i) else {}))
        for i in range(n)
    ]


@dataclass
class World:
    """What one test's environments do, and what happened."""

    rubric: RewardLike = field(default_factory=boxed_number)
    prompt: Callable[[Task], Any] = lambda task: "What is 3 + 4?"
    reset: Callable[[Task], Any] = lambda task: None
    """Called at each reset; may raise, and an awaitable is awaited."""
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    resets: Counter[str] = field(default_factory=Counter)

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    def env(self) -> ToolEnv:
        world = self

        class Sums(ToolEnv):
            def prompt(self, task: Task) -> str:
                text: str = world.prompt(task)
                return text

            async def areset(
                self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
            ) -> tuple[Observation, Info]:
                task = (options or {})["task"]
                world.resets[task.id] += 1
                done = world.reset(task)
                if asyncio.iscoroutine(done):
                    await done
                return await super().areset(seed=seed, options=options)

        Sums.rubric = world.rubric
        return Sums(sandbox=None)

    def runner(
        self, *, share: float = 0.25, window: int = 64, retries: int = 2, limits: Limits = LIMITS
    ) -> EpisodeRunner:
        player = LocalPlayer(self.env, lambda task: ScriptedPolicy(SAY, limits=limits), limits, event=self.event)
        budget = FailureBudget(window=64, share=share)
        return EpisodeRunner(player, budget, max_retries=2, event=self.event, say=self.lines.append)


def train(
    world: World,
    pool: Sequence[Task],
    *,
    steps: int = 12,
    max_bad: float = 0.2,
    state: RolloutState | None = None,
    saved: list[RolloutState] | None = None,
    runner: EpisodeRunner | None = None,
    concurrency: int = 16,
    limits: Limits = LIMITS,
    fewest: int = 8,
) -> tuple[list[str], EpisodeRunner]:
    """Play groups of 8, two a batch, and return their tasks' ids and the runner."""

    async def main() -> tuple[list[str], EpisodeRunner]:
        mine = runner or world.runner(limits=limits)
        buffer = Buffer(groups=2, group_size=8, max_staleness=1, concurrency=concurrency)
        stream = TaskStream(pool, seed=0, max_bad=max_bad)
        rollouts = Rollouts(buffer, stream, mine, seed=0, event=world.event)
        seen: list[str] = []
        try:
            if state is not None:
                rollouts.restore(state)
            rollouts.start()
            for _ in range(steps):
                batch = await asyncio.wait_for(rollouts.next_batch(), 120)
                seen += [g.task.id for g in batch]
                assert all(len(g.trajectories) >= fewest for g in batch)
                rollouts.acknowledge(buffer.version)
            if saved is not None:
                saved.append(rollouts.state())
            return seen, mine
        finally:
            await rollouts.close()

    return asyncio.run(main())


def never(message: str) -> Callable[[Task], Any]:
    def check(task: Task) -> str:
        if "wrong" in task.payload:
            raise KeyError(message)
        return "What is 3 + 4?"

    return check


def rubric_that_reads(key: str) -> Callable[[Episode], float]:
    return lambda episode: float(int(episode.task.payload[key]) == 7)


async def for_ever() -> None:
    await asyncio.Event().wait()


CASES: dict[str, tuple[Callable[[], World], dict[str, Any], str]] = {
    "a prompt over max_context": (
        lambda: World(prompt=lambda task: "word " * (400 if "wrong" in task.payload else 1)),
        {"wrong": 1}, r"the first prompt has \d+ tokens, model.max_context is 400",
    ),
    "prompt() raises": (lambda: World(prompt=never("missing")), {"wrong": 1}, "KeyError: 'missing'"),
    "prompt() is None": (
        lambda: World(prompt=lambda task: None if "wrong" in task.payload else "hi"), {"wrong": 1},
        "prompt returned None, which is not a text",
    ),
    "a gold answer that is no number": (World, {"answer": "seven"}, r"payload\['answer'\] = 'seven' is no number"),
    "a gold answer that is None": (World, {"answer": None}, r"payload\['answer'\] = None is no number"),
    "a rubric that cannot read it": (
        lambda: World(rubric=rubric_that_reads("answer")), {"answer": "VII"}, "invalid literal for int",
    ),
    "a reward that is nan": (
        lambda: World(rubric=lambda e: float("nan") if "wrong" in e.task.payload else 1.0), {"wrong": 1},
        "returned nan on task",
    ),
    "a reward that is None": (
        lambda: World(rubric=lambda e: None if "wrong" in e.task.payload else 1.0),  # type: ignore[arg-type,return-value]
        {"wrong": 1}, "returned None on task",
    ),
    "the environment says so": (
        lambda: World(reset=lambda task: _say_so(task)), {"wrong": 1}, "the picture is damaged",
    ),
}  # fmt: skip


def _say_so(task: Task) -> None:
    if "wrong" in task.payload:
        raise TaskError("the picture is damaged")


@pytest.mark.parametrize("name", CASES)
def test_one_bad_task_in_twenty_is_left_out_named_and_costs_no_budget(name: str) -> None:
    make, wrong, why = CASES[name]
    world = make()
    seen, runner = train(world, tasks(**wrong), steps=21)  # two epochs and a bit: 42 groups
    assert f"t-{BAD}" not in seen
    assert len(seen) == 42
    assert {f"t-{i}" for i in range(20) if i != BAD} == set(seen)
    (left_out,) = world.of("task_left_out")  # once, though its group has eight members
    assert left_out["task"] == f"t-{BAD}"
    assert re.search(why, left_out["reason"]), left_out["reason"]
    assert world.lines == [f"task t-{BAD} is left out: {left_out['reason']}"]
    assert runner.left_out == {f"t-{BAD}": left_out["reason"]}
    assert runner.budget.kinds.total() == 0
    assert world.of("group_discarded") == []
    assert world.resets[f"t-{BAD}"] <= 8 + 5  # the eight, and at most five of them once more


@pytest.mark.parametrize("name", ["a prompt over max_context", "a gold answer that is no number"])
def test_what_is_certain_is_not_retried(name: str) -> None:
    make, wrong, _ = CASES[name]
    world = make()
    train(world, tasks(**wrong))
    assert world.of("episode_failed") == []
    assert world.resets[f"t-{BAD}"] <= 8


def test_a_reset_that_never_returns_for_one_task_is_that_tasks() -> None:
    world = World(reset=lambda task: for_ever() if "wrong" in task.payload else None)
    seen, runner = train(world, tasks(wrong=1), limits=replace(LIMITS, step_timeout=3.0), fewest=4)
    assert f"t-{BAD}" not in seen
    assert "did not return within 3 s" in runner.left_out[f"t-{BAD}"]
    assert not [e for e in world.of("episode_failed") if e["task"] == f"t-{BAD}" and e["attempt"] > 3]


def test_a_reset_that_blocks_its_thread_costs_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.rollout.env_host._HEARTBEAT_SECONDS", 1.0)
    world = World(reset=lambda task: block_the_loop(20.0) if "wrong" in task.payload else None)
    _, runner = train(world, tasks(wrong=1), limits=replace(LIMITS, step_timeout=2.0), fewest=4)
    assert "blocked its event loop" in runner.left_out[f"t-{BAD}"]
    assert 2 <= len(world.of("host_replaced")) < 8  # two, though the group has eight


def test_a_reset_that_blocks_is_noted_though_an_innocent_replaces_the_host_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("areal_agents.rollout.env_host._HEARTBEAT_SECONDS", 0.2)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        waits, over = asyncio.Event(), threading.Event()

        async def hang() -> None:
            loop.call_soon_threadsafe(waits.set)
            await asyncio.Event().wait()

        def reset(task: Task) -> Any:
            if "wrong" in task.payload:
                over.wait()  # it holds the thread of its host
            return hang() if world.resets[task.id] == 1 else None

        limits = replace(LIMITS, step_timeout=1.0)
        world = World(reset=reset)
        player = LocalPlayer(world.env, lambda task: ScriptedPolicy(SAY, limits=limits), limits, event=world.event)
        (good, bad) = tasks(2, bad=lambda i: i == 1, wrong=1)
        try:
            # Its time is over first, so it finds out, and starts again at once: the culprit hears of it later.
            innocent = asyncio.create_task(player.play(good, id="good", group="g", seed=0))
            await waits.wait()
            for attempt in range(3):
                with pytest.raises(EnvError, match="blocked its event loop"):
                    await player.play(bad, id=f"bad-{attempt}", group="b", seed=0)
                await innocent  # which is played to its end before the next attempt
            assert [e["episode"] for e in world.of("host_lost")] == ["good"]
            assert world.resets == {good.id: 2, bad.id: 2}  # the third attempt is refused: it would cost a thread
        finally:
            over.set()
            await player.close()

    asyncio.run(main())


def test_a_flaky_backend_is_infrastructure() -> None:
    tries: Counter[str] = Counter()

    def flaky(task: Task) -> None:
        tries[task.id] += 1
        if tries[task.id] <= 3:  # the first three of the task's eight, in the same words
            raise RuntimeError("the database has no free connection")

    world = World(reset=flaky)
    seen, runner = train(world, tasks(), steps=3, runner=world.runner(share=1.0))
    assert len(seen) == 6
    assert runner.left_out == {}
    assert runner.budget.kinds["EnvError"] >= 3 * 6  # all charged, once their group was over


def test_two_reasons_for_one_task_are_infrastructure() -> None:
    attempts = TaskAttempts()
    one, two = EnvError("areset (task a, turn 0) raised X: p"), EnvError("areset (task a, turn 0) raised X: q")
    assert attempts.failed(one) == []
    assert attempts.failed(two) == [one, two]
    assert attempts.failed(one) == [one]
    assert attempts.verdict() is None


def test_the_turn_and_addresses_do_not_matter() -> None:
    attempts = TaskAttempts()
    for turn in range(3):
        text = f"astep (task a, turn {turn}) raised KeyError: <object at 0x7f{turn}>"
        assert attempts.failed(EnvError(text)) == []
    assert "the same in all 3 attempts" in str(attempts.verdict())


def test_one_attempt_shows_nothing_unless_the_reward_is_no_number() -> None:
    for error, shown in ((EnvError("areset raised"), False), (RewardError("nan"), True)):
        attempts = TaskAttempts()
        attempts.failed(error)
        assert (attempts.verdict() is not None) is shown
    sandbox = SandboxError("died")
    assert TaskAttempts().failed(sandbox) == [sandbox]


def test_a_refused_connection_is_never_the_tasks() -> None:
    def dead(task: Task) -> None:
        raise RuntimeError("cannot ask") from ConnectionRefusedError(111, "refused")

    world = World(reset=dead)
    with pytest.raises(FailureBudgetError, match=r"17 of the last 17 .* RuntimeError: cannot ask"):
        train(world, tasks())
    assert world.of("task_left_out") == []


def test_past_a_share_of_bad_tasks_the_run_stops_and_names_them() -> None:
    world = World()
    with pytest.raises(TaskError, match=r"8 of the \d+ tasks tried so far .* rollout.max_bad_tasks = 0.2") as caught:
        train(world, tasks(40, bad=lambda i: i % 2 == 0, answer="x"), steps=40)
    named = [f"t-{i}" for i in range(0, 40, 2) if f"t-{i}:" in str(caught.value)]
    assert len(named) == 8
    assert "payload['answer'] = 'x' is no number" in str(caught.value)


def test_tasks_that_were_bad_before_the_stream_began_do_not_count_against_its_share(tmp_path: Path) -> None:
    warm = {f"t-{i}": "found by the warm start, beside 200 that can be played" for i in range(9)}
    stream = TaskStream(tasks(1000, bad=lambda i: False), seed=0, max_bad=0.2, left_out=warm)
    for i in range(7):
        stream.leave_out(f"new-{i}", "bad")
    buffer = Buffer(groups=2, group_size=8, max_staleness=1, concurrency=16)
    write_rollouts(tmp_path, RolloutState(buffer.state(), (), stream.state(), ()))
    row = json.loads((tmp_path / "rollouts.json").read_text())
    again = TaskStream(tasks(1000, bad=lambda i: False), seed=0, max_bad=0.2)
    again.restore(rollouts_from_json(row, []).tasks)
    for one in (stream, again):
        assert set(warm) < set(one.left_out)
        with pytest.raises(TaskError, match=r"^8 of the 8 tasks tried so far") as caught:
            one.leave_out("new-7", "bad")
        assert "warm start" not in str(caught.value)


def test_a_split_without_one_good_task_stops_whatever_the_share() -> None:
    world = World()
    with pytest.raises(TaskError, match="none of the split's 3 tasks can be played or scored"):
        train(world, tasks(3, bad=lambda i: True, answer="x"), max_bad=1.0)


def test_a_resumed_run_remembers_and_does_not_play_it_again(tmp_path: Path) -> None:
    pool, first = tasks(answer="seven"), World()
    saved: list[RolloutState] = []
    train(first, pool, steps=11, saved=saved)  # the whole first epoch
    (state,) = saved
    write_rollouts(tmp_path, state)
    row = json.loads((tmp_path / "rollouts.json").read_text())
    again = rollouts_from_json(row, read_shard(tmp_path / "groups.parquet"))
    assert again.tasks == state.tasks
    assert [id for id, _ in again.tasks.left_out] == [f"t-{BAD}"]
    second = World()
    seen, _ = train(second, pool, steps=12, state=again)
    assert f"t-{BAD}" not in seen
    assert second.resets[f"t-{BAD}"] == 0
    assert second.of("task_left_out") == []


def test_an_evaluation_names_counts_and_goes_on() -> None:
    world = World()
    pool = tasks(40, answer="seven")  # 7 and 27 cannot be scored

    async def main() -> tuple[EpisodeRunner, list[Any]]:
        runner = world.runner(share=0.0)
        try:
            return runner, await run_attempts(runner, pool, k=2, concurrency=8, seed=0, label="test")
        finally:
            await runner.close()

    runner, results = asyncio.run(main())
    assert sorted(runner.left_out) == ["t-27", "t-7"]
    report = summarize(
        results, env="e", split="test", model="m", version=0, temperature=0.0, seed=0, seconds=1.0,
        lost=Lost(left_out=runner.left_out),
    )  # fmt: skip
    assert (report.n, report.attempts, report.k) == (38, 76, 2)
    assert (report.pass_at_1, report.infra_rate) == (1.0, 0.0)  # out of every denominator: no zero, no failure
    assert report.to_json()["left_out"] == runner.left_out
    assert "2 tasks left out" in report.table()
    assert "t-7: " in report.table()
    assert "n = 38 (left out: 2)" in report.line("before")
    assert len(world.of("task_left_out")) == 2


def lazy(n: int, broken: Callable[[int], bool]) -> LazyTasks:
    def make(i: int) -> Task:
        if broken(i):
            raise ValueError(f"row {i} has no answer")
        return tasks(n)[i]

    return LazyTasks(n, make)


def test_a_task_that_cannot_even_be_made_is_left_out(tmp_path: Path) -> None:
    pool, world, saved = lazy(20, lambda i: i == BAD), World(), list[RolloutState]()
    runner, reason = world.runner(), "task 7 of 20 could not be made: ValueError: row 7 has no answer"

    async def main() -> None:
        stream = TaskStream(pool, seed=0, tell=runner.leave_out)
        for _ in range(2):  # epochs
            assert sorted(stream.next().id for _ in range(19)) == sorted(f"t-{i}" for i in range(20) if i != BAD)
        again = TaskStream(pool, seed=0)
        again.restore(stream.state())
        assert [again.next().id for _ in range(5)] == [stream.next().id for _ in range(5)]
        assert again.left_out == {"task 7 of the split": reason}
        await runner.close()

    asyncio.run(main())
    assert world.of("task_left_out") == [{"task": "task 7 of the split", "reason": reason}]
    assert len(train(World(), pool, saved=saved)[0]) == 24
    assert [name for name, _ in saved[0].tasks.left_out] == ["task 7 of the split"]
    told: dict[str, str] = {}
    assert len(tasks_at(pool, range(10), told.__setitem__)) == 9
    assert list(told) == ["task 7 of the split"]


def test_a_first_prompt_that_the_template_cannot_render_is_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(prompt=lambda task: "unrenderable" if "wrong" in task.payload else "fine")
    usual = FMT.first_prompt

    def strict(messages: Any, tools: Any = ()) -> Any:
        if any(m.text == "unrenderable" for m in messages):
            raise TemplateError("the chat template cannot render the roles [user user]")
        return usual(messages, tools)

    monkeypatch.setattr(FMT, "first_prompt", strict)
    seen, runner = train(world, tasks(wrong=1))
    assert f"t-{BAD}" not in seen
    assert "the first prompt cannot be rendered: the chat template" in runner.left_out[f"t-{BAD}"]
