"""One episode: tokens line up, limits hold, failures are told apart, nothing is left open."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from areal_agents.algorithms.batch import rows_of
from areal_agents.errors import EnvError, InfraError, RewardError, TaskError
from areal_agents.rollout.env_host import EnvHost, HostLost
from areal_agents.rollout.env_results import read
from areal_agents.rollout.episode import EpisodeDriver, Limits, Policy
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.types import AssistantMessage, CallStatus, Info, StopReason, ToolCall, Trajectory
from tests.scripted import FMT, LIMITS, Script, ScriptedEnv, ScriptedPolicy, block_the_loop, task

SAY = FMT.encode_turn("hello")


def play(script: Script, policy: Policy | None = None, limits: Limits = LIMITS) -> Trajectory:
    async def main() -> Trajectory:
        host = EnvHost()
        try:
            return await run(host, script, policy or ScriptedPolicy(SAY, limits=limits))
        finally:
            await host.close()

    return asyncio.run(main())


async def run(host: EnvHost, script: Script, policy: Policy, limits: Limits = LIMITS) -> Trajectory:
    limits = policy.limits if isinstance(policy, ScriptedPolicy) else limits
    episode = EpisodeDriver(
        lambda: ScriptedEnv(script), task(), policy, host, "e", 7, limits.step_timeout, limits.max_turns
    )
    await episode.play()
    return episode.trajectory("g")


def changed(**values: Any) -> Limits:
    from dataclasses import replace

    return replace(LIMITS, **values)


def test_tokens_of_the_rows_are_the_prompts_that_were_sampled_from() -> None:
    policy = ScriptedPolicy(SAY, version=3)
    t = play(Script(turns=3), policy)
    assert (t.terminated, t.truncated, t.stop_reason, t.reward) == (True, False, "answer", 1.0)
    assert [turn.parent for turn in t.turns] == [None, 0, 1]
    (row,) = rows_of(t, [0.5, 0.25, -1.0], episode=0)
    # the last prompt is everything before the last turn's tokens (T1), and each prompt is a prefix of the next
    assert tuple(row.ids[: len(row) - len(SAY)]) == policy.prompts[-1]
    assert all(b[: len(a)] == a for a, b in zip(policy.prompts, policy.prompts[1:], strict=False))
    assert row.mask.sum() == 3 * len(SAY)
    assert set(row.versions[row.mask]) == {3}
    assert row.advantages[row.mask].tolist() == [0.5] * len(SAY) + [0.25] * len(SAY) + [-1.0] * len(SAY)


def test_what_the_environment_says_arrives_in_the_turns() -> None:
    t = play(Script(turns=2, reward=0.75))
    assert [turn.reward for turn in t.turns] == [0.0, 0.75]
    assert [turn.state_key for turn in t.turns] == [
        "k0",
        "k1",
    ]  # as they were shown, reset's first
    assert t.turns[1].components == {"correct": 1.0}
    assert [m.text for m in t.turns[0].observation] == ["play", "task 0"]
    assert [m.text for m in t.turns[1].observation] == ["next"]
    assert set(t.metrics) == {"env_seconds"}  # no engine was waited for


def test_rewards_assigned_at_the_end_replace_those_given_before() -> None:
    assert [t.reward for t in play(Script(turns=3, turn_rewards=[0.1, 0.2, 0.7])).turns] == [0.1, 0.2, 0.7]
    with pytest.raises(RewardError, match="turn_rewards has 1 entries for 3 turns"):
        play(Script(turns=3, turn_rewards=[1.0]))


def test_the_runners_end_may_replace_rewards_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def finish(self: ScriptedEnv, reason: StopReason) -> tuple[float, Info]:
        return 0.25, {"stop_reason": reason, "turn_rewards": [0.5, -1.0]}

    monkeypatch.setattr(ScriptedEnv, "afinish", finish)
    t = play(Script(turns=99), limits=changed(max_turns=2))
    assert ([turn.reward for turn in t.turns], t.stop_reason) == ([0.5, -1.0], "max_turns")


@pytest.mark.parametrize(
    ("limits", "reason", "turns"),
    [
        (changed(max_turns=2), "max_turns", 2),
        (changed(max_episode_tokens=3 * len(SAY)), "tokens", 3),
    ],
)
def test_the_runner_ends_an_episode_and_the_environment_scores_it(limits: Limits, reason: str, turns: int) -> None:
    script = Script(turns=99)
    t = play(script, limits=limits)
    assert (t.terminated, t.truncated, t.stop_reason, len(t.turns)) == (False, True, reason, turns)
    assert t.turns[-1].reward == 0.25  # afinish
    assert script.finished == [reason]
    assert script.closed == 1


def test_a_full_context_cuts_the_turn_and_ends_the_episode() -> None:
    first = ScriptedPolicy(SAY)
    play(Script(turns=1), first)
    room = 4
    assert room < len(SAY)
    t = play(Script(turns=99), limits=changed(max_context=len(first.prompts[0]) + room))
    assert len(t.turns) == 1
    assert len(t.turns[0].completion.ids) == room
    assert t.turns[0].completion.finish == "length"
    assert t.stop_reason == "context"


def test_a_prompt_that_never_fits_names_both_numbers() -> None:
    with pytest.raises(TaskError, match=r"the first prompt has \d+ tokens, model.max_context is 10"):
        play(Script(), limits=changed(max_context=10))


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), "ten", None, [1.0]])
def test_a_reward_that_is_no_finite_number_is_an_error_not_a_zero(reward: object) -> None:
    script = Script(turns=1, reward=reward)
    with pytest.raises(RewardError, match="the reward"):
        play(script)
    assert script.closed == 1


def test_an_environment_that_raises_is_closed_and_named() -> None:
    def explode(k: int) -> None:
        raise KeyError("missing table")

    script, policy = Script(on_step=explode), ScriptedPolicy(SAY)
    with pytest.raises(EnvError, match=r"astep \(task task-0, turn 0\) raised KeyError: 'missing table'") as caught:
        play(script, policy)
    assert isinstance(caught.value.__cause__, KeyError)
    assert script.closed == 1
    assert policy.released == ["e"]


def test_an_environment_that_exits_ends_its_own_episode_alone() -> None:
    script = Script(on_step=lambda k: sys.exit(3))
    with pytest.raises(EnvError, match=r"astep \(task task-0, turn 0\) raised RuntimeError: it called sys.exit\(3\)"):
        play(script)
    assert script.closed == 1  # on the same host, whose loop runs on


class Unheard(BaseException):
    """No Exception, and nothing that Python knows."""


def throws(error: BaseException) -> Callable[[int], None]:
    def now(step: int) -> None:
        raise error

    return now


@pytest.mark.parametrize("error", [GeneratorExit("x"), Unheard("x"), KeyboardInterrupt("x"), BaseException("x")])
def test_whatever_an_environment_raises_is_an_error_of_its_episode(error: BaseException) -> None:
    script = Script(on_step=throws(error))
    named = rf"astep \(task task-0, turn 0\) raised RuntimeError: it raised {type(error).__name__}: x"
    with pytest.raises(EnvError, match=named) as caught:
        play(script)
    assert caught.value.blame == "environment"
    assert script.closed == 1


async def leaves() -> None:
    sys.exit(7)


async def interrupts() -> None:
    raise KeyboardInterrupt


async def in_the_middle(code: Callable[[], Any]) -> None:
    await asyncio.gather(code(), asyncio.sleep(0))


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (lambda k: in_the_middle(leaves), r"it called sys\.exit\(7\)"),
        (lambda k: asyncio.wait_for(leaves(), 60), r"it called sys\.exit\(7\)"),
        (lambda k: asyncio.to_thread(sys.exit, 7), r"it called sys\.exit\(7\)"),
        (lambda k: in_the_middle(interrupts), "it raised KeyboardInterrupt"),
        (lambda k: interrupts(), "it raised KeyboardInterrupt"),
    ],
)
def test_a_task_that_ends_the_process_ends_its_own_episode_alone(ends: Callable[[int], Any], said: str) -> None:
    async def main() -> None:
        host, stepping = EnvHost(), asyncio.Event()
        loop, go_on = asyncio.get_running_loop(), threading.Event()

        async def step() -> None:
            loop.call_soon_threadsafe(stepping.set)
            await asyncio.to_thread(go_on.wait)

        innocent = asyncio.create_task(run(host, Script(turns=1, on_step=lambda k: step()), ScriptedPolicy(SAY)))
        await stepping.wait()
        with pytest.raises(EnvError, match=rf"astep \(task task-0, turn 0\) raised RuntimeError: {said}"):
            await run(host, Script(on_step=ends), ScriptedPolicy(SAY))
        go_on.set()
        assert (await innocent).reward == 1.0
        await host.close()

    asyncio.run(main())


def test_a_callback_that_ends_the_process_is_told_and_the_host_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def later() -> None:
        asyncio.get_running_loop().call_soon(sys.exit, 7)
        await asyncio.sleep(0)

    assert play(Script(on_step=lambda k: later())).reward == 1.0
    assert "an environment's callback tried to end the process" in caplog.text


class Unreadable(Exception):
    def __str__(self) -> str:
        raise KeyError("no text")


def test_texts_of_exceptions_are_cut_and_never_raise() -> None:
    def explode(error: Exception) -> Callable[[int], Any]:
        def step(k: int) -> None:
            raise error

        return step

    with pytest.raises(EnvError) as caught:
        play(Script(on_step=explode(ValueError("x" * 10_000_000))))
    assert len(str(caught.value)) < 2_200
    with pytest.raises(EnvError, match=r"raised Unreadable: \(its text cannot be read\)"):
        play(Script(on_step=explode(Unreadable())))


class Says(Policy):
    """Says one thing, whatever it is."""

    def __init__(self, said: Any) -> None:
        self.said = said

    async def say(self, episode: EpisodeDriver) -> Any:
        return self.said


def test_a_policy_that_stops_before_its_first_turn_is_an_error_with_a_sentence() -> None:
    script = Script()
    with pytest.raises(InfraError, match=r"task task-0: the policy stopped before its first turn \(tokens\)"):
        play(script, Says("tokens"))
    assert (script.finished, script.closed) == ([], 1)


@pytest.mark.parametrize("said", [None, "won", 3])
def test_a_policy_that_says_nothing_is_no_fault_of_the_environment(said: Any) -> None:
    with pytest.raises(TypeError, match=r"Says\.say returned .*: no Said, no stop reason"):
        play(Script(), Says(said))


def test_a_policy_that_cannot_be_closed_does_not_hide_why_the_episode_ended() -> None:
    class Sticks(ScriptedPolicy):
        async def close(self, episode: EpisodeDriver) -> None:
            raise ConnectionError("not released")

    def explode(k: int) -> None:
        raise KeyError("table")

    script = Script(on_step=explode)
    with pytest.raises(EnvError, match="raised KeyError: 'table'") as caught:
        play(script, Sticks(SAY))
    assert caught.value.__notes__ == ["and closing it raised ConnectionError: not released"]
    assert script.closed == 1
    with pytest.raises(ConnectionError):
        play(Script(), Sticks(SAY))


def expert(*said: Any, error: BaseException | None = None) -> ScriptPolicy:
    def speak() -> Any:
        for text in said:  # noqa: UP028  it would send to the tuple
            yield text
        if error is not None:
            raise error

    return ScriptPolicy(lambda shown: speak(), task())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (expert("hello", error=KeyError("gold")), "raised KeyError: 'gold'"),
        (expert("hello", error=SystemExit(0)), r"raised RuntimeError: it called sys\.exit\(0\)"),
        (expert("hello"), "stopped before the episode ended"),
        (expert("hello", None), "yielded None, which is not a text"),
    ],
)
def test_an_experts_error_is_the_environments_and_final(policy: ScriptPolicy, message: str) -> None:
    with pytest.raises(EnvError, match=f"the expert of task task-0 {message}") as caught:
        play(Script(turns=3), policy)
    assert (caught.value.final, caught.value.turns) == (True, 1)


def test_an_expert_that_cannot_be_closed_is_named() -> None:
    def speak() -> Any:
        try:
            while True:
                yield "hello"
        finally:
            raise KeyError("finally")

    with pytest.raises(EnvError, match=r"the expert of task task-0 raised KeyError: 'finally' when it was closed"):
        play(Script(), ScriptPolicy(lambda shown: speak(), task()))


def test_tools_are_read_on_the_host_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def tools(self: ScriptedEnv) -> tuple[()]:
        threads.append(threading.current_thread().name)
        return ()

    monkeypatch.setattr(ScriptedEnv, "tools", property(tools))
    play(Script(turns=3))
    assert threads == ["areal-env-host"]


def test_tools_that_raise_are_the_environments_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def tools(self: ScriptedEnv) -> tuple[()]:
        raise KeyError("catalogue")

    monkeypatch.setattr(ScriptedEnv, "tools", property(tools))
    script = Script()
    with pytest.raises(EnvError, match=r"areset \(task task-0, turn 0\): reading tools raised KeyError: 'catalogue'"):
        play(script)
    assert script.closed == 1


def test_an_environment_that_awaits_for_ever_is_cancelled() -> None:
    async def hang() -> None:
        await asyncio.get_running_loop().create_future()

    script = Script(on_step=lambda k: hang())
    with pytest.raises(EnvError, match=r"did not return within 0\.2 s"):
        play(script, limits=changed(step_timeout=0.2))
    assert script.closed == 1


def test_an_environment_that_blocks_its_loop_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.rollout.env_host._HEARTBEAT_SECONDS", 0.2)

    async def main() -> None:
        host = EnvHost()
        culprit = Script(on_step=lambda k: block_the_loop(3.0))
        waiting = asyncio.Event()

        async def hang() -> None:
            loop.call_soon_threadsafe(waiting.set)
            await asyncio.get_running_loop().create_future()

        loop = asyncio.get_running_loop()
        innocent = Script(on_step=lambda k: hang())

        second = asyncio.create_task(run(host, innocent, ScriptedPolicy(SAY, limits=changed(step_timeout=60.0))))
        await waiting.wait()
        with pytest.raises(EnvError, match=r"blocked its event loop for more than 0\.3 s"):
            await run(host, culprit, ScriptedPolicy(SAY, limits=changed(step_timeout=0.3)))
        assert host.wedged
        with pytest.raises(HostLost):
            await second
        with pytest.raises(HostLost):
            await run(host, Script(), ScriptedPolicy(SAY))

    asyncio.run(main())


def test_cancelling_an_episode_closes_its_environment_and_session() -> None:
    async def main() -> None:
        host, stepping = EnvHost(), asyncio.Event()
        loop = asyncio.get_running_loop()

        async def hang() -> None:
            loop.call_soon_threadsafe(stepping.set)
            await asyncio.get_running_loop().create_future()

        script, policy = Script(on_step=lambda k: hang()), ScriptedPolicy(SAY)
        episode = asyncio.create_task(run(host, script, policy))
        await stepping.wait()
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode
        assert script.closed == 1
        assert policy.released == ["e"]
        await host.close()

    asyncio.run(main())


def test_what_the_environment_found_out_about_a_call_reaches_the_trajectory() -> None:
    parsed: tuple[CallStatus, ...] = ("ok", "invalid_json", "ok", "ok")
    calls = tuple(ToolCall(str(i), "t", {}, "", s) for i, s in enumerate(parsed))
    results = [{"status": s} for s in ("unknown_tool", "malformed", "ok", "timeout")]
    stepped = ((), 0.0, True, False, {"tool_results": results})
    found = read("astep", stepped, "here", 1).marked(AssistantMessage((), calls))
    assert [c.status for c in found.tool_calls] == ["unknown_tool", "invalid_json", "ok", "ok"]
