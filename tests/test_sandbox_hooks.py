"""``prepare`` and ``inspect``: what an environment does in its sandbox before the first call and after the last."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat.toolcalls import parse_text
from areal_agents.errors import EnvError, SandboxError
from areal_agents.evaluation.rescore import with_verdict
from areal_agents.reward import Episode, Verdict, judge
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.rebuilt import rebuilt
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.sandbox import Sandbox
from areal_agents.tool import call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.tracking.trajectories import Record, read_shard, write_shard
from areal_agents.types import Task, Trajectory
from tests.fake_sandbox import Script, ScriptedBackend

TASK = Task.make("t", split="train", seed=0, payload={"word": "seed"})


async def said(sandbox: Sandbox, code: str) -> str:
    return (await sandbox.exec(("run",), stdin=code.encode(), timeout=5)).stdout.decode()


@tool()
async def run(code: str, *, sandbox: Sandbox) -> str:
    """Run code."""
    return await said(sandbox, code)


def found(episode: Episode) -> Verdict:
    return Verdict(float(episode.outcome["looked"].startswith("LOOK")), {"seen": float(len(episode.outcome))})


class Seeded(ToolEnv):
    tools = (run,)
    rubric = found
    max_turns = 2

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [TASK]

    def prompt(self, task: Task) -> str:
        return "?"

    async def prepare(self, sandbox: Sandbox) -> None:
        await said(sandbox, self.task.payload["word"])

    async def inspect(self, sandbox: Sandbox) -> Any:
        return {"looked": await said(sandbox, "look"), 1: (2, 3)}


def backend(*failing: tuple[int, str]) -> ScriptedBackend:
    script: Script = lambda session, code: None if (session, code) in failing else f"{code.upper()}@{session}"  # noqa: E731
    return ScriptedBackend(script)


def driven(box: ScriptedBackend, texts: Sequence[str], cls: type[ToolEnv] = Seeded, max_turns: int = 9) -> Trajectory:
    async def main() -> Trajectory:
        host = EnvHost()
        policy = ScriptPolicy(lambda first: (text for text in texts), TASK)  # type: ignore[arg-type,return-value]
        episode = EpisodeDriver(lambda: cls(sandbox=box), TASK, policy, host, "e", 0, 60.0, max_turns=max_turns)
        try:
            await episode.play()
        finally:
            await host.close()
        return episode.trajectory("g")

    return asyncio.run(main())


def codes(box: ScriptedBackend, session: int) -> list[str]:
    return [code for number, code in box.ran if number == session]


RUN = call_text("run", code="a")


def test_a_session_is_prepared_before_its_first_call_and_looked_at_once_at_the_end(tmp_path: Path) -> None:
    box = backend()
    trajectory = driven(box, [RUN, "done"])
    assert box.ran == [(1, "seed"), (1, "a"), (1, "look")]
    assert (box.opened, box.closed) == (1, 1)
    assert trajectory.outcome == {"looked": "LOOK@1", "1": [2, 3]}  # as JSON has it
    assert (trajectory.reward, dict(trajectory.turns[-1].components)) == (1.0, {"seen": 2.0})
    # It is saved, so that another reward can look at it.
    write_shard(tmp_path / "x.parquet", [Record("train", 1, trajectory)])
    (back,) = read_shard(tmp_path / "x.parquet")
    assert back.trajectory == trajectory
    episode = rebuilt(back.trajectory, lambda t: "done")
    assert episode.outcome == trajectory.outcome
    assert pickle.loads(pickle.dumps(replace(episode, state=None))).outcome == trajectory.outcome
    verdict = asyncio.run(judge(lambda e: float(e.outcome["looked"] == "LOOK@1"), episode))
    assert with_verdict(back.trajectory, verdict).reward == 1.0


def test_the_session_is_opened_for_the_look_where_no_call_did() -> None:
    box = backend()
    assert driven(box, ["done"]).outcome["looked"] == "LOOK@1"
    assert box.ran == [(1, "seed"), (1, "look")]


@pytest.mark.parametrize("way", ["max_turns", "cut", "finish"])
def test_it_is_looked_at_however_the_episode_ends(way: str) -> None:
    box = backend()
    if way == "cut":

        async def main() -> dict[str, Any]:
            env = Seeded(sandbox=box)
            await env.areset(seed=0, options={"task": TASK})
            await env.astep(parse_text(RUN, tools=env.tools))
            *_, truncated, info = await env.astep(parse_text("do", finish="length"))
            assert truncated
            await env.aclose()
            return info

        assert asyncio.run(main())["outcome"]["looked"] == "LOOK@1"
    else:
        trajectory = driven(box, [RUN, RUN], max_turns=1 if way == "finish" else 9)
        assert (trajectory.truncated, trajectory.outcome["looked"]) == (True, "LOOK@1")
        assert len(trajectory.turns) == {"max_turns": 2, "finish": 1}[way]
    assert codes(box, 1)[-1] == "look"
    assert codes(box, 1).count("look") == 1


def test_a_fresh_session_is_prepared_before_earlier_calls_are_repeated() -> None:
    box = backend((1, "b"))
    trajectory = driven(box, [RUN, call_text("run", code="b")])
    assert codes(box, 2) == ["/bin/true", "seed", "a", "b", "look"]
    assert trajectory.metrics["sandbox_replays"] == 1.0


def test_a_session_that_is_lost_under_the_look_is_made_again() -> None:
    box = backend((1, "look"))
    trajectory = driven(box, [RUN, "done"])
    assert codes(box, 2) == ["/bin/true", "seed", "a", "look"]
    assert (trajectory.outcome["looked"], trajectory.metrics["sandbox_replays"]) == ("LOOK@2", 1.0)


@pytest.mark.parametrize(
    "failing", [[(1, "seed")], [(1, "look"), (2, "look")], [(1, "look"), (2, "/bin/true")], [(1, "a"), (2, "seed")]]
)
def test_a_sandbox_that_fails_the_hooks_is_infrastructure(failing: list[tuple[int, str]]) -> None:
    box = backend(*failing)
    with pytest.raises(SandboxError):
        driven(box, [RUN, "done"])
    assert box.opened == box.closed  # none is left open
    if failing == [(1, "seed")]:
        assert box.ran == [(1, "seed")]  # no call meets half of what it needs


async def wrong(self: Any, sandbox: Sandbox) -> Any:
    raise KeyError("oops")


async def slow(self: Any, sandbox: Sandbox) -> Any:
    await asyncio.Event().wait()


async def own_timeout(self: Any, sandbox: Sandbox) -> Any:
    raise TimeoutError("mine")


def plain(self: Any, sandbox: Sandbox) -> Any:
    return {}


@pytest.mark.parametrize("name", ["prepare", "inspect"])
@pytest.mark.parametrize(
    ("hook", "says", "blame"),
    [
        (wrong, r"raised KeyError: 'oops'", "environment"),
        (slow, r"did not end within 0\.01 s \(sandbox_seconds\)", "hang"),
        (own_timeout, r"raised TimeoutError: mine", "outside"),
        (plain, r"must be an `async def`", "environment"),
    ],
)
def test_what_the_hooks_do_wrong_is_the_environments(name: str, hook: Any, says: str, blame: str) -> None:
    cls = type("Bad", (Seeded,), {name: hook, "sandbox_seconds": 0.01 if hook is slow else 60.0})
    box = backend()
    with pytest.raises(EnvError, match=rf"Bad\.{name} {says}") as failed:
        driven(box, [RUN, "done"], cls)
    assert failed.value.blame == blame
    assert box.opened == box.closed == 1


def returned(value: Any) -> Any:
    async def hook(self: Any, sandbox: Sandbox) -> Any:
        return value

    return hook


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": {1, 2}}, "which is not JSON: TypeError: a set is in it"),
        (float("nan"), "which is not JSON: ValueError"),
        (b"x", "which is not JSON"),
        ("x" * (1 << 20), "which has 1048578 characters as JSON, more than 1048576"),
    ],
)
def test_an_outcome_is_json_of_a_bounded_size(value: Any, says: str) -> None:
    with pytest.raises(EnvError, match=says):
        driven(backend(), ["done"], type("Bad", (Seeded,), {"inspect": returned(value)}))


def test_none_is_an_outcome_as_is_that_of_an_environment_without_a_hook() -> None:
    rubric = lambda episode: float(episode.outcome is None)  # noqa: E731
    assert driven(backend(), ["x"], type("No", (Seeded,), {"inspect": returned(None), "rubric": rubric})).reward == 1.0
    box = backend()
    without = type("Without", (Seeded,), {"inspect": ToolEnv.inspect, "rubric": rubric})
    assert driven(box, ["x"], without).reward == 1.0
    assert box.opened == 0


def test_a_look_needs_a_sandbox_and_says_so_at_the_start() -> None:
    with pytest.raises(EnvError, match=r"Seeded\.inspect needs a sandbox"):
        asyncio.run(Seeded(sandbox=None).areset(seed=0, options={"task": TASK}))


def subclass(**body: Any) -> type[Seeded]:
    return type("Sub", (Seeded,), body)


def test_steps_have_the_time_that_the_hooks_may_take() -> None:
    assert Seeded.step_seconds == 120.0
    assert subclass(sandbox_seconds=90.0).step_seconds == 180.0
    assert subclass(sandbox_seconds=90.0, step_seconds=5.0).step_seconds == 5.0


def test_the_next_episode_has_a_session_of_its_own() -> None:
    box = backend()

    async def main() -> None:
        env = Seeded(sandbox=box)
        for _ in range(2):
            await env.areset(seed=0, options={"task": TASK})
            await env.astep(parse_text(RUN, tools=env.tools))
            await env.astep(parse_text("done"))
        await env.aclose()

    asyncio.run(main())
    assert box.ran == [(1, "seed"), (1, "a"), (1, "look"), (2, "seed"), (2, "a"), (2, "look")]
