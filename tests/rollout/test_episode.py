"""One episode: tokens line up, limits hold, failures are told apart, nothing is left open."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from areal_agents.algorithms.batch import rows_of
from areal_agents.errors import EnvError, RewardError
from areal_agents.rollout.env_host import EnvHost, HostLost
from areal_agents.rollout.env_results import read
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.types import AssistantMessage, CallStatus, Info, StopReason, ToolCall, Trajectory
from tests.scripted import FMT, LIMITS, Script, ScriptedEnv, ScriptedPolicy, block_the_loop, task

SAY = FMT.encode_turn("hello")


def play(script: Script, policy: ScriptedPolicy | None = None, limits: Limits = LIMITS) -> Trajectory:
    async def main() -> Trajectory:
        host = EnvHost()
        try:
            return await run(host, script, policy or ScriptedPolicy(SAY, limits=limits))
        finally:
            await host.close()

    return asyncio.run(main())


async def run(host: EnvHost, script: Script, policy: ScriptedPolicy) -> Trajectory:
    limits = policy.limits
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
    assert [turn.state_key for turn in t.turns] == ["k1", None]
    assert t.turns[1].components == {"correct": 1.0}
    assert [m.text for m in t.turns[0].observation] == ["play", "task 0"]
    assert [m.text for m in t.turns[1].observation] == ["next"]


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
    with pytest.raises(EnvError, match=r"the first prompt has \d+ tokens, model.max_context is 10"):
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
