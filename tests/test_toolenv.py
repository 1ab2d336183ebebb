from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import Expert
from areal_agents.errors import EnvError, RewardError
from areal_agents.reward import Episode, Gate, RewardLike, Verdict, boxed_number, task_checks
from areal_agents.rewards import code
from areal_agents.rewards.shaping.wrappers import Clip
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.sandbox import Sandbox
from areal_agents.tool import ToolResult, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Message, Observation, Task, Text, system, user, without_reasoning
from tests.fake_sandbox import ScriptedBackend

TASK = Task.make("t", split="train", seed=0, payload={"answer": "4"})
CALL = '<tool_call>{"name": "run", "arguments": {"code": "a"}}</tool_call>'


@tool()
async def run(code: str, *, sandbox: Sandbox) -> str:
    return (await sandbox.exec(("run",), stdin=code.encode(), timeout=5)).stdout.decode()


class Sums(ToolEnv):
    system_prompt = "Be exact."
    tools = (run,)
    rubric = boxed_number()
    max_turns = 3

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [TASK]

    def prompt(self, task: Task) -> str:
        return "2+2?"


def play(env: ToolEnv, *texts: str) -> list[tuple[Any, ...]]:
    async def main() -> list[tuple[Any, ...]]:
        try:
            steps: list[tuple[Any, ...]] = [await env.areset(seed=0, options={"task": TASK})]
            return steps + [await env.astep(parse_text(text)) for text in texts]
        finally:
            await env.aclose()

    return asyncio.run(main())


def with_rubric(rubric: RewardLike, **attributes: Any) -> type[ToolEnv]:
    return type("Other", (Sums,), {"rubric": rubric, **attributes})


def test_an_episode_with_a_call_and_an_answer() -> None:
    backend = ScriptedBackend()
    first, called, answered = play(Sums(sandbox=backend), CALL, r"so \boxed{4}")
    assert first == ((system("Be exact."), user("2+2?")), {})
    assert called == (
        (Message("tool", (Text("A"),), tool_call_id="call_0", name="run"),),
        0.0,
        False,
        False,
        {"tool_results": [{"name": "run", "status": "ok", "truncated": False}]},
    )
    assert answered == ((), 1.0, True, False, {"stop_reason": "answer", "components": {"correct": 1.0}})
    assert (backend.opened, backend.closed) == (1, 1)


def test_wrong_and_missing_answers_score_zero() -> None:
    for text in (r"\boxed{5}", "4", "", r"\boxed{4} \boxed{5}"):
        assert play(Sums(sandbox=None), text)[-1][1:4] == (0.0, True, False)


def test_a_malformed_call_is_no_answer() -> None:
    _, broken, _ = play(Sums(sandbox=None), r'<tool_call>{"name": \boxed{4}', r"\boxed{4}")
    assert broken[1:4] == (0.0, False, False)
    assert "no closing </tool_call>" in broken[0][0].text
    assert broken[4]["tool_results"][0]["status"] == "malformed"


def test_the_turn_limit_truncates_and_scores_what_exists() -> None:
    seen: list[Episode] = []

    def score(episode: Episode) -> float:
        seen.append(episode)
        return len(episode.tool_results) / 10

    steps = play(with_rubric(score)(sandbox=ScriptedBackend()), CALL, CALL, CALL)
    assert [s[1:4] for s in steps[1:]] == [(0.0, False, False), (0.0, False, False), (0.3, False, True)]
    assert steps[-1][0][0].text == "A"  # the last result is still shown
    assert steps[-1][4]["stop_reason"] == "max_turns"
    assert steps[-1][4]["components"] == {"score": 0.3}
    [episode] = seen
    assert (episode.answer, episode.turns, episode.stop_reason) == (None, 3, "max_turns")
    assert episode.tool_results == (ToolResult("A"),) * 3
    assert [m.text for m in episode.messages[:2]] == ["Be exact.", "2+2?"]


def test_a_stated_limit_terminates_and_the_constructor_sets_it() -> None:
    env = with_rubric(lambda _: 0.5, turn_limit_stated=True)(sandbox=ScriptedBackend(), max_turns=1)
    assert play(env, CALL)[-1][1:4] == (0.5, True, False)
    with pytest.raises(EnvError, match="max_turns 0 must be at least 1"):
        Sums(max_turns=0)


def test_afinish_scores_what_exists() -> None:
    async def main() -> tuple[float, dict[str, Any]]:
        env = with_rubric(lambda episode: 0.25 if episode.stop_reason == "context" else 0.0)(sandbox=None)
        await env.areset(options={"task": TASK})
        return await env.afinish("context")

    reward, info = asyncio.run(main())
    assert (reward, info["stop_reason"], list(info["components"].values())) == (0.25, "context", [0.25])


def test_turn_rewards_reach_info_and_the_last_turn() -> None:
    class Steps:
        async def __call__(self, episode: Episode) -> Verdict:
            return Verdict(3.0, {"steps": 3.0}, (1.0, 2.0), "timeout")

    step = play(with_rubric(Steps())(sandbox=ScriptedBackend()), CALL, "done")[-1]
    assert step[1] == 2.0
    assert step[4]["turn_rewards"] == [1.0, 2.0]
    assert step[4]["verdict_status"] == "timeout"


def test_a_reward_that_is_nan_raises() -> None:
    with pytest.raises(RewardError, match="returned nan on task 't'"):
        play(with_rubric(lambda _: float("nan"))(sandbox=None), "x")


def test_misuse_is_named() -> None:
    class Unfinished(ToolEnv):
        pass

    with pytest.raises(EnvError, match="Unfinished has no `rubric`"):
        Unfinished()
    for texts in (("a", "b"),):
        with pytest.raises(EnvError, match="no episode is running; call reset first"):
            play(Sums(sandbox=None), *texts)
    with pytest.raises(EnvError, match="no episode is running"):
        asyncio.run(Sums(sandbox=None).astep(parse_text("a")))


def test_a_new_reset_closes_the_old_session() -> None:
    async def main() -> None:
        backend = ScriptedBackend()
        env = Sums(sandbox=backend)
        for count in (1, 2):
            await env.areset(options={"task": TASK})
            await env.astep(parse_text(CALL))
            assert (backend.opened, backend.closed) == (count, count - 1)
        await env.aclose()
        assert backend.closed == 2

    asyncio.run(main())


def test_observations_are_new_objects() -> None:
    a, b, c = play(Sums(sandbox=ScriptedBackend()), CALL, CALL)
    assert a[0] is not b[0]
    assert b[4] is not c[4]
    assert b[4]["tool_results"] is not c[4]["tool_results"]


def test_the_end_of_an_episode_can_be_redefined() -> None:
    class Guess(with_rubric(lambda episode: episode.answer == "yes")):  # type: ignore[misc]
        def is_final(self, action: Any) -> bool:
            return "FINAL" in action.text

        def answer(self, action: Any) -> str:
            return str(action.text.removeprefix("FINAL "))

    steps = play(Guess(sandbox=None), "thinking", "FINAL yes")
    assert steps[1][:4] == ((), 0.0, False, False)
    assert steps[2][1:4] == (1.0, True, False)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("a", "a"),
        ("<think>b</think>a", "a"),
        (r"b \boxed{1}</think>a", "a"),
        ("<think>open", ""),
        ("a<think>open", "a"),
        ("<think>b</think>a<think>c</think>d", "d"),
    ],
)
def test_reasoning_is_no_part_of_the_answer(text: str, rest: str) -> None:
    assert without_reasoning(text) == rest


@tool(timeout=0.75)
async def sleepy(x: int) -> str:
    """Sleep."""
    await asyncio.Event().wait()
    return "never"


def eight_slow_calls() -> tuple[EpisodeDriver, EnvHost]:
    class Slow(ToolEnv):
        rubric = lambda episode: 0.5  # noqa: E731
        tools = (sleepy,)

        def prompt(self, task: Task) -> str:
            return "sleep"

    calls = "".join(f'<tool_call>{{"name": "sleepy", "arguments": {{"x": {i}}}}}</tool_call>' for i in range(8))

    def speak(shown: Observation) -> Expert:
        yield calls
        yield "done"

    task = Task.make("t", split="train", seed=0, payload={})
    host = EnvHost()
    script = ScriptPolicy(speak, task)
    return EpisodeDriver(lambda: Slow(sandbox=None), task, script, host, "e", 0, step_timeout=5.0), host


def test_eight_calls_that_meet_their_own_limit_cost_reward_and_no_infrastructure() -> None:
    """8 × 0.75 s is more than the 5 s that a step may take beside its calls."""

    async def main() -> EpisodeDriver:
        episode, host = eight_slow_calls()
        try:
            await episode.play()
        finally:
            await host.close()
        return episode

    episode = asyncio.run(main())
    assert [r.status for r in episode.turns[0].tool_results] == ["timeout"] * 8
    assert episode.turns[1].reward == 0.5
    assert episode.stop_reason == "answer"


class Recorder:
    """A host without limits, which notes what it was told."""

    def __init__(self) -> None:
        self.limits: list[tuple[str, float]] = []

    async def call(self, make: Callable[[], Awaitable[Any]], *, timeout: float, what: str) -> Any:
        self.limits.append((what.partition(" ")[0], timeout))
        return await make()


def test_a_steps_limit_is_its_environments_and_its_calls() -> None:
    class Compiles(Sums):
        step_seconds = 100.0
        tools = (run,)

    def speak(shown: Observation) -> Expert:
        yield CALL + CALL  # ``run`` has 5 s a call
        yield "4"

    host = Recorder()
    script = ScriptPolicy(speak, TASK)
    episode = EpisodeDriver(lambda: Compiles(sandbox=ScriptedBackend()), TASK, script, host, "e", 0, step_timeout=60.0)
    asyncio.run(episode.play())
    assert host.limits == [("areset", 60.0), ("astep", 170.0), ("astep", 160.0), ("aclose", 60.0)]


@pytest.mark.parametrize(
    ("hook", "value", "says"),
    [
        ("prompt", None, "prompt returned None, which is not a text"),
        ("prompt", ["hi"], r"prompt returned \['hi'\], which is not a text"),
        ("answer", None, "answer returned None, which is not a text"),
        ("answer", 7, "answer returned 7, which is not a text"),
        ("is_final", None, "is_final returned None, which is not a bool"),
        ("system_prompt", ["be", "kind"], r"\['be', 'kind'\] in it is not a text"),
        ("step_seconds", -1, "step_seconds is -1, which is no number of seconds"),
        ("tools", [len], r"raised AttributeError|not a sequence of tools"),
    ],
)
def test_a_hook_that_returns_something_else_is_named_with_task_and_turn(hook: str, value: Any, says: str) -> None:
    class Wrong(ToolEnv):
        rubric = lambda episode: 1.0  # noqa: E731

        def prompt(self, task: Task) -> str:
            return "hi"

    setattr(Wrong, hook, value if hook in ("system_prompt", "step_seconds", "tools") else lambda self, given: value)

    async def main() -> None:
        task = Task.make("t9", split="train", seed=0, payload={})
        host = EnvHost()

        def speak(shown: Observation) -> Expert:
            yield "done"

        try:
            await EpisodeDriver(
                lambda: Wrong(sandbox=None), task, ScriptPolicy(speak, task), host, "e", 0, step_timeout=60
            ).play()
        finally:
            await host.close()

    with pytest.raises(EnvError, match=says) as caught:
        asyncio.run(main())
    assert re.search(r"\(task t9, turn 0\)", str(caught.value)), str(caught.value)


def test_a_rubric_that_judges_long_has_the_time_for_it() -> None:
    """Also inside of others, and where the class says nothing itself. Its tasks are looked at, too."""
    judged = Clip(Gate({"correct": code(), "brief": lambda episode: 1.0}), low=0.0, high=1.0)

    class Judged(ToolEnv):
        rubric = judged

    class Inherits(Judged):
        step_seconds = 5.0

    class Quick(ToolEnv):
        rubric = boxed_number()

    assert Judged.step_seconds == code.step_seconds == 1800.0
    assert (Inherits.step_seconds, Quick.step_seconds, ToolEnv.step_seconds) == (5.0, 0.0, 0.0)
    assert len(task_checks(judged)) == 1
