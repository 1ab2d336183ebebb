"""Episodes in real Ray actors: the same as here, retried when a worker is killed or stopped, cancelled, closed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.chat.format import ChatFormat
from areal_agents.cluster.remote_errors import RemoteCause
from areal_agents.engine import Sampling
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.engines.spec import EngineSpec
from areal_agents.errors import (
    EnvError,
    FailureBudgetError,
    RewardError,
    SandboxError,
    SandboxUnavailable,
    TaskError,
    WorkerLost,
)
from areal_agents.rollout.episode import Limits
from areal_agents.rollout.player import PlayerSpec
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.types import Task, Trajectory
from tests.chat_server import chat_server, completion
from tests.conftest import require
from tests.processes import alive, descendants, wait_gone
from tests.rewards.judges.scripted import gives, slot
from tests.tiny_models import tiny_chat_model

pytest.importorskip("ray")
from areal_agents.cluster.engine_actors import Resources
from areal_agents.cluster.pool_actor import PoolSettings, RemotePool
from areal_agents.cluster.rollout_workers import RolloutWorkers, episode_seconds
from tests.cluster.conftest import RaySession

pytestmark = pytest.mark.ray

LIMITS = Limits(
    max_context=256, max_turn_tokens=16, max_episode_tokens=64, max_turns=8, step_timeout=300.0, request_timeout=300.0
)
ENV = "tests.cluster.worker_envs:Reported"


class Fleet:
    """Two workers, an engine pool of one actor, and the loop that they belong to."""

    def __init__(self, session: RaySession, model: Path) -> None:
        self.model, self.run = model, session.run
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.unrecorded: set[str] = set()
        """Kinds of events that cannot be recorded."""
        options: dict[str, Any] = {"precision": "fp32", "max_batch": 8, "kv_tokens": 4096, "max_context": 256}
        options["shape"] = Shape.read(model, 256)  # else the actor would import transformers to read it
        engines = PoolSettings(EngineSpec("transformers", str(model), options), 1, resources=Resources(0))
        self.engine = self.run(RemotePool.start(engines, event=self.event))
        self.workers = RolloutWorkers(
            self.engine, registry.spec(ENV), workers=2, episodes_per_worker=4, event=self.event, num_cpus=0,
            hang_seconds=10.0, health_interval=0.2, max_restarts=3,
        )  # fmt: skip
        self.run(self.workers.__aenter__())

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append((kind, fields))
        if kind in self.unrecorded:
            raise OSError("No space left on device")

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():  # noqa: ASYNC110  what other processes do
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self.run(self.workers.close())
        self.run(self.engine.close())


@pytest.fixture(scope="module")
def fleet(session: RaySession, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(session, tiny_chat_model(tmp_path_factory.mktemp("model") / "m"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_events_yet(fleet: Fleet) -> None:
    fleet.events.clear()


def spec(fleet: Fleet, env: str = ENV, **changes: Any) -> PlayerSpec:
    sampling = Sampling(16, temperature=0.0, stop_ids=ChatFormat.load(fleet.model).stop_ids)
    return replace(PlayerSpec(registry.spec(env), fleet.model, LIMITS, sampling), **changes)


def tasks() -> list[Task]:
    return list(registry.spec(ENV).tasks("train"))


def log(folder: Path) -> list[list[str]]:
    path = folder / "log"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def count(folder: Path, what: str) -> int:
    return sum(line[0] == what for line in log(folder))


def said(trajectory: Trajectory) -> tuple[Any, ...]:
    """Everything that must not depend on where it was played."""
    turns = [
        (t.prompt_suffix, t.completion.ids, t.completion.versions, t.reward, t.observation, t.message)
        for t in trajectory.turns
    ]
    return trajectory.id, trajectory.task, turns, trajectory.terminated, trajectory.stop_reason


def test_episodes_are_those_of_a_local_player(fleet: Fleet, tmp_path: Path) -> None:
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def both() -> tuple[list[Trajectory], list[Trajectory]]:
        out = []
        for player in (recipe.build(fleet.engine), fleet.workers.player(recipe)):
            plays = [player.play(task, id=f"e{i}", group="g", seed=i) for i, task in enumerate(tasks())]
            out.append(await asyncio.gather(*plays))
            await player.close()
        return out[0], out[1]

    here, there = fleet.run(both())
    assert [said(t) for t in there] == [said(t) for t in here]
    assert all(len(t.turns) == 2 and t.sampled_tokens > 2 for t in there)
    for a, b in zip(here, there, strict=True):
        assert [t.completion.logprobs for t in a.turns] == [
            pytest.approx(t.completion.logprobs, abs=1e-4) for t in b.turns
        ]
    places = Counter(int(pid) for what, pid, _ in log(tmp_path) if what == "start")
    assert places == {os.getpid(): 8, **dict.fromkeys(fleet.workers.pids.values(), 4)}  # the least-loaded first
    assert count(tmp_path, "close") == 16


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


def test_a_cancelled_play_ends_on_its_worker(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)})

    async def cancel() -> None:
        player = fleet.workers.player(recipe)
        running = [asyncio.create_task(player.play(t, id=t.id, group="g", seed=0)) for t in tasks()]
        waiting = [asyncio.create_task(player.play(t, id=f"{t.id}-late", group="g", seed=0)) for t in tasks()]
        await fleet.until(lambda: count(tmp_path, "step") == 8)
        for task in [*waiting, *running]:
            task.cancel()
        ends = await asyncio.gather(*running, *waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [asyncio.CancelledError] * 16
        assert Counter(what for what, _, _ in log(tmp_path)) == {"start": 8, "step": 8, "close": 8}
        (tmp_path / "gate").unlink()
        after = await asyncio.gather(*(player.play(t, id=f"{t.id}-after", group="g", seed=0) for t in tasks()))
        assert len(after) == 8  # every place is free again
        await player.close()

    fleet.run(cancel())
    assert fleet.named("worker_lost") == []


def test_a_cancelled_play_aborts_its_request(fleet: Fleet, tmp_path: Path) -> None:
    """Sampling of 200 tokens is cancelled on the way: the engine has nothing left to do."""
    long = replace(LIMITS, max_turn_tokens=200, max_episode_tokens=400)
    sampling = Sampling(200, temperature=1.0, seed=3)  # no stop id: it samples all of them
    recipe = spec(fleet, kwargs={"folder": str(tmp_path)}, limits=long, sampling=sampling)

    async def cancel() -> None:
        player = fleet.workers.player(recipe)
        before = (await fleet.engine.health()).sampled_tokens
        running = asyncio.create_task(player.play(tasks()[0], id="long", group="g", seed=0))
        while not (await fleet.engine.health()).running:  # noqa: ASYNC110
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})
        while (health := await fleet.engine.health()).running or health.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert 0 <= health.sampled_tokens - before < 200
        assert count(tmp_path, "close") == 1
        await player.close()

    fleet.run(cancel())


def test_a_judge_that_the_settings_name_is_asked_from_the_workers(fleet: Fleet) -> None:
    with chat_server(lambda body: completion(gives(4)(body["messages"][0]["content"]))) as server:
        judges = {"judge": f"openai:m@{server.url}"}
        recipe = spec(fleet, "tests.cluster.worker_envs:Judged", kwargs={"models": judges, "sandbox": None})

        async def play() -> list[Trajectory]:
            player = fleet.workers.player(recipe)
            plays = [player.play(task, id=task.id, group="g", seed=0) for task in tasks()[:4]]
            played = await asyncio.gather(*plays)
            await player.close()
            return played

        played = fleet.run(play())
    assert [t.reward for t in played] == [0.75] * 4
    assert [t.turns[-1].components["judge.judge"] for t in played] == [0.75] * 4
    prompts = [body["messages"][0]["content"] for body in server.requests]
    asked = {int(slot(prompt, "QUESTION").removeprefix("in process ")) for prompt in prompts}
    assert asked == set(fleet.workers.pids.values())


def test_errors_arrive_as_they_were_raised(fleet: Fleet) -> None:
    recipe = spec(fleet, "tests.cluster.worker_envs:Fails")

    async def play() -> list[BaseException]:
        player = fleet.workers.player(recipe)
        plays = [player.play(task, id=task.id, group="g", seed=0) for task in tasks()[:5]]
        ends = await asyncio.gather(*plays, return_exceptions=True)
        await player.close()
        return [end for end in ends if isinstance(end, BaseException)]

    raised, reward, sandbox, outside, bad = fleet.run(play())
    assert type(raised) is EnvError
    assert "astep (task train-0, turn 1) raised ZeroDivisionError: the author's own" in str(raised)
    assert (raised.turns, raised.tool) == (1, "")
    assert 0 < raised.tokens <= 16
    assert isinstance(raised.__cause__, RemoteCause)
    assert "worker_envs.py" in str(raised.__cause__)  # the author's line, from another process
    assert type(reward) is RewardError
    assert "astep (task train-1, turn 1) returned the reward nan" in str(reward)
    assert type(sandbox) is SandboxError
    assert (sandbox.tool, sandbox.turns, str(sandbox)) == ("python", 1, "the sandbox is gone")
    assert "OSError: no space left" in str(sandbox.__cause__)
    assert isinstance(outside, EnvError)
    assert (raised.blame, outside.blame) == ("environment", "outside")
    assert type(bad) is TaskError
    assert str(bad) == "areset (task train-4, turn 0): its picture is damaged"


def test_a_bad_tasks_group_on_workers_costs_no_budget(fleet: Fleet) -> None:
    recipe = spec(fleet, "tests.cluster.worker_envs:Fails")

    async def play(task: Task) -> EpisodeRunner:
        budget = FailureBudget(window=8, share=0.0)  # not one failed attempt may be charged
        runner = EpisodeRunner(fleet.workers.player(recipe), budget, max_retries=2, event=fleet.event)
        plays = (runner.run(task, id=f"{task.id}/{i}", group="g", seed=0) for i in range(8))
        ends = await asyncio.gather(*plays, return_exceptions=True)
        assert all(end is None or isinstance(end, TaskError) for end in ends)
        assert runner.settle(task, group="g") is not None
        await runner.close()
        return runner

    for i, why in ((4, "its picture is damaged"), (5, "raised KeyError: 'question'")):
        runner = fleet.run(play(tasks()[i]))
        assert list(runner.left_out) == [f"train-{i}"]
        assert why in runner.left_out[f"train-{i}"]
        assert runner.budget.kinds.total() == 0


def test_the_expert_plays_in_the_workers_own_sandbox(fleet: Fleet) -> None:
    require("bwrap")
    limits = replace(LIMITS, max_context=2000, max_turn_tokens=400, max_episode_tokens=800)
    recipe = spec(fleet, "areal/Arithmetic-v0", policy="expert", limits=limits)
    task = recipe.env.tasks("train")[0]

    async def play() -> Trajectory:
        player = fleet.workers.player(recipe)
        try:
            return await player.play(task, id="expert", group="g", seed=0)
        finally:
            await player.close()

    played = fleet.run(play())
    assert (played.reward, len(played.turns)) == (1.0, 2)
    assert played.turns[1].observation[-1].text.strip() == task.payload["answer"]


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


def test_a_worker_proves_its_sandbox_first(fleet: Fleet) -> None:
    async def start() -> None:
        env = registry.spec("areal/Arithmetic-v0")
        async with RolloutWorkers(fleet.engine, env, sandbox="tests.cluster.worker_envs:Refuses", num_cpus=0):
            pass

    with pytest.raises(SandboxUnavailable, match=r"process \d+ has a network. unplug it") as refused:
        fleet.run(start())
    assert refused.value.remedy == "unplug it"
    assert refused.value.probe != f"process {os.getpid()} has a network"  # it was another process that looked


def test_an_episode_has_a_bound() -> None:
    # 8 turns + reset, finish and close, each a step and a request of 300 s; 60 s more; all of it twice
    assert episode_seconds(LIMITS) == 2 * (11 * 600 + 60)
