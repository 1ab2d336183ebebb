"""Episodes in real Ray actors: the same as here, cancelled, with their errors, and closed."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from areal_agents import registry
from areal_agents.cluster.remote_errors import RemoteCause
from areal_agents.engine import Sampling
from areal_agents.errors import (
    EnvError,
    RewardError,
    SandboxError,
    SandboxUnavailable,
    TaskError,
)
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.types import Task, Trajectory
from tests.chat_server import chat_server, completion
from tests.conftest import require
from tests.rewards.judges.scripted import gives, slot

pytest.importorskip("ray")
from areal_agents.cluster.rollout_workers import RolloutWorkers, episode_seconds
from tests.cluster.fleet import ENV, LIMITS, Fleet, count, log, said, spec, tasks

pytestmark = pytest.mark.ray


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


@pytest.mark.parametrize("mixture", [False, True], ids=["one environment", "the second of a mixture"])
def test_a_worker_proves_its_sandboxes_first(fleet: Fleet, mixture: bool) -> None:
    async def start() -> None:
        env, refuses = registry.spec("areal/Arithmetic-v0"), "tests.cluster.worker_envs:Refuses"
        first, sandbox = (registry.spec(ENV), "bubblewrap") if mixture else (env, refuses)
        more = [(env, refuses)] if mixture else []
        async with RolloutWorkers(fleet.engine, first, sandbox=sandbox, more=more, num_cpus=0):
            pass

    with pytest.raises(SandboxUnavailable, match=r"process \d+ has a network. unplug it") as refused:
        fleet.run(start())
    assert refused.value.remedy == "unplug it"
    assert refused.value.probe != f"process {os.getpid()} has a network"  # it was another process that looked


def test_an_episode_has_a_bound() -> None:
    # 8 turns + reset, finish and close, each a step and a request of 300 s; 60 s more; all of it twice
    assert episode_seconds(LIMITS) == 2 * (11 * 600 + 60)
