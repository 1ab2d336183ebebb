"""The prompt after the last turn of an episode that a limit cut, where a critic says what was left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.algorithms.batch import rows_of, tail_row
from areal_agents.chat.format import ChatFormat
from areal_agents.env import AgentEnv
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver, Limits, Policy
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.tracking import trajectories
from areal_agents.tracking.trajectories import Record, read_shard, write_shard
from areal_agents.types import AssistantMessage, Info, Observation, Tail, Trajectory, system, user
from tests.scripted import FMT, LIMITS, Script, ScriptedEnv, ScriptedPolicy, task
from tests.tiny_tokenizer import CHATML, DROPS_SYSTEM, tiny

SAY = FMT.encode_turn("hello")
FOREVER = Script(turns=99)


def play(
    policy: Policy, limits: Limits = LIMITS, make: Callable[[], AgentEnv] = lambda: ScriptedEnv(FOREVER)
) -> Trajectory:
    async def main() -> Trajectory:
        host = EnvHost()
        try:
            episode = EpisodeDriver(make, task(), policy, host, "e", 7, limits.step_timeout, limits.max_turns)
            await episode.play()
            return episode.trajectory("g")
        finally:
            await host.close()

    return asyncio.run(main())


def scripted(limits: Limits = LIMITS, *, fmt: ChatFormat = FMT, ids: tuple[int, ...] = SAY) -> ScriptedPolicy:
    policy = ScriptedPolicy(ids, limits=limits)
    policy.fmt = fmt
    return policy


def whole(t: Trajectory) -> tuple[int, ...]:
    """The prompt that the next turn would have had, by the rows that train."""
    assert t.tail is not None
    if t.tail.parent is None:
        return t.tail.ids
    assert t.tail.parent == len(t.turns) - 1
    return (*rows_of(t, [1.0] * len(t.turns), episode=0)[-1].ids.tolist(), *t.tail.ids)


@pytest.mark.parametrize("history", ["append", "template"])
@pytest.mark.parametrize("limit", [{"max_turns": 2}, {"max_episode_tokens": 2 * len(SAY)}])
def test_it_is_the_next_turns_prompt(limit: dict[str, int], history: Any) -> None:
    fmt = ChatFormat(tiny(CHATML), history=history)
    on = scripted(fmt=fmt)
    play(on)
    limits = replace(LIMITS, **limit)
    cut = scripted(limits, fmt=fmt)
    t = play(cut, limits)
    assert (len(t.turns), t.truncated, t.terminated) == (2, True, False)
    assert t.tail is not None
    assert (t.tail.parent is None) == (history == "template")
    assert whole(t) == on.prompts[2]
    assert cut.prompts == on.prompts[:2]


def test_a_task_that_ended_has_none() -> None:
    assert play(scripted(), make=lambda: ScriptedEnv(Script(turns=2))).tail is None


def test_without_room_for_another_turn_there_is_none() -> None:
    on = scripted()
    play(on)
    for room, turns in ((0, 1), (1, 2)):  # the second prompt fits, or it does not
        limits = replace(LIMITS, max_context=len(on.prompts[1]) + room, max_turns=turns)
        t = play(scripted(limits), limits)
        assert (t.truncated, t.tail) == (True, None), "context, or a last turn behind which nothing fits"
    limits = replace(LIMITS, max_context=len(on.prompts[1]) + 1, max_turns=1)
    assert play(scripted(limits), limits).tail is not None


class EndsWhenCut(ScriptedEnv):
    """Ends, and shows nothing, where a message is cut."""

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        if action.finish == "length":
            return (), 0.5, False, True, {"stop_reason": "length"}
        return await super().astep(action)


def test_after_a_turn_that_was_cut_it_closes_the_turn_and_opens_another() -> None:
    limits = replace(LIMITS, max_turn_tokens=len(SAY) - 2)
    t = play(scripted(limits), limits, lambda: EndsWhenCut(FOREVER))
    assert (t.stop_reason, t.final_observation) == ("length", ())
    assert t.tail == Tail(FMT.suffix((), t.turns[-1].completion), 0)
    assert t.tail.ids[0] == FMT.turn_end, "which the model did not say"
    assert t.tail.ids[-1] == play(scripted()).turns[1].prompt_suffix[-1], "the generation prompt"


class LimitsItself(ScriptedEnv):
    """Has a limit of its own, which its prompt does not state."""

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        return (user("time is up"),), 0.0, False, True, {}


def test_an_environments_own_limit_has_one_with_what_it_showed() -> None:
    t = play(scripted(), make=lambda: LimitsItself(FOREVER))
    assert t.tail == Tail(FMT.suffix((user("time is up"),), t.turns[-1].completion), 0)


def test_a_policy_without_tokens_has_none() -> None:
    def says(shown: Any) -> Any:
        while True:
            yield "hello"

    t = play(ScriptPolicy(says, task()), replace(LIMITS, max_turns=2))
    assert (t.truncated, t.tail) == (True, None)


class EndsWithASystemMessage(ScriptedEnv):
    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        return (user("play"),), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        return (system("over"),), 0.0, False, True, {}


def test_what_the_template_cannot_show_is_counted() -> None:
    fmt = ChatFormat(tiny(DROPS_SYSTEM))
    t = play(scripted(fmt=fmt), make=lambda: EndsWithASystemMessage(FOREVER))
    assert (t.truncated, t.tail, t.metrics["tails_missing"]) == (True, None, 1.0)


# --- saved, and as a row --------------------------------------------------------------------------------------------


def test_it_is_saved_and_files_without_it_are_read(tmp_path: Path) -> None:
    limits = replace(LIMITS, max_turns=2)
    cut = play(scripted(limits), limits)
    root = replace(cut, tail=Tail((1, 2), None))
    records = [Record("train", 1, t) for t in (cut, root, replace(cut, tail=None))]
    write_shard(tmp_path / "x.parquet", records)
    assert read_shard(tmp_path / "x.parquet") == records
    row = trajectories.row_of(records[0])
    del row["tail"]
    assert trajectories._record(row) == records[2]


def test_its_row_is_the_prompt_and_one_token_that_was_never_sampled() -> None:
    limits = replace(LIMITS, max_turns=2)
    for history in ("append", "template"):
        t = play(scripted(limits, fmt=ChatFormat(tiny(CHATML), history=history)), limits)
        row = tail_row(t, episode=5)
        assert row is not None
        assert tuple(row.ids[:-1]) == whole(t)
        assert row.mask.tolist() == [False] * len(whole(t)) + [True]
        assert (row.turns[-1], row.episode) == (2, 5)
        assert tail_row(replace(t, terminated=True), episode=0) is None  # scored although it was cut: it is over
        assert tail_row(replace(t, tail=None), episode=0) is None
