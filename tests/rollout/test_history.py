"""Histories that are rewritten in the middle of an episode: which prompts follow, what trains, and what is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents import registry
from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.context import EMPTY, HEAD, Fold, RuleSummary, applied, folded, note, summed_up
from areal_agents.errors import ConfigError, EnvError
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.rollout.history import COUNTED
from areal_agents.rollout.player import PlayerSpec, require_prompts
from areal_agents.tracking.trajectories import _turn, _turn_row
from areal_agents.types import Completion, Ids, Message, Prompt, Task, Trajectory, Turn, user
from tests import pages_env
from tests.pages_env import PAGES, Pages, call
from tests.pages_played import (
    FMT,
    KINDS,
    LIMITS,
    OPENING,
    TASK,
    TURN,
    Reader,
    again,
    messages_of,
    once,
    play,
    rule_of,
    small,
)
from tests.tiny_tokenizer import CHATML, NO_SYSTEM, NO_TOOL_ROLE, SWITCH, THINKING, WITH_TOOLS, tiny

# --- what an episode gains -------------------------------------------------------------------------------------------


def test_without_a_rule_an_episode_ends_where_its_context_is_full() -> None:
    limits = small()
    t = play(Reader(limits=limits), None)
    assert (t.stop_reason, t.truncated, t.turns[-1].components["right"]) == ("context", True, 0.0)
    assert not set(t.metrics) & set(COUNTED)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, THINKING, WITH_TOOLS])
def test_with_one_it_goes_on_and_every_prompt_fits(kind: str, template: str) -> None:
    fmt = ChatFormat(tiny(template))
    limits = small(fmt)
    policy = Reader(fmt, limits)
    t = play(policy, rule_of(kind))
    assert (t.stop_reason, t.terminated, t.turns[-1].components["right"]) == ("answer", True, 1.0)
    assert max(map(len, policy.prompts)) + TURN <= limits.max_context
    assert len(t.steps) == PAGES + 1
    rewritten = [turn for turn in t.turns if turn.rewritten is not None]
    assert rewritten
    counted = {name: t.metrics[name] for name in COUNTED}
    assert counted.pop("context_tokens_removed") > 0
    name = "context_folds" if kind == "fold" else "context_summaries"
    assert counted == dict.fromkeys(counted, 0.0) | {name: float(len(rewritten))}
    assert policy.summaries == (len(rewritten) if kind == "summary" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, THINKING])
def test_each_sampled_token_trains_once_in_the_context_that_it_was_sampled_in(kind: str, template: str) -> None:
    fmt = ChatFormat(tiny(template))
    policy = Reader(fmt, small(fmt))
    t = play(policy, rule_of(kind))
    once(t, policy.prompts)
    roots = sum(turn.parent is None for turn in t.turns)
    assert roots == (len(t.turns) if template == THINKING else 1 + sum(turn.rewritten is not None for turn in t.turns))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHATML, WITH_TOOLS, NO_TOOL_ROLE, NO_SYSTEM, SWITCH, THINKING])
def test_a_prompt_after_it_is_the_templates_rendering_of_the_messages(kind: str, template: str) -> None:
    fmt = ChatFormat(tiny(template), merge_system=True)
    policy = Reader(fmt, small(fmt))
    t = play(policy, rule_of(kind))
    roots = [k for k, turn in enumerate(t.turns) if turn.parent is None]
    assert len(roots) > 1
    for k in roots:
        assert t.turns[k].prompt_suffix == policy.prompts[k]
        assert policy.prompts[k] == fmt.first_prompt(messages_of(t)[k], Pages.tools)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma", "mistral_tools", "deepseekv3"])
def test_the_same_with_templates_of_model_families(name: str, smollm2: Path, shared_data: Path) -> None:
    from tests.chat_families import family_tokenizer

    fmt = ChatFormat(family_tokenizer(smollm2, shared_data / "chat_templates", name), merge_system=True)
    for kind in KINDS:
        policy = Reader(fmt, small(fmt, max_turn_tokens=120))
        t = play(policy, rule_of(kind, at=0.95) if kind != "summary" else rule_of(kind))
        assert t.turns[t.last_step].components["right"] == 1.0
        once(t, policy.prompts)
        for k, turn in enumerate(t.turns):
            if turn.parent is None:
                assert turn.prompt_suffix == fmt.first_prompt(messages_of(t)[k], Pages.tools)


# --- when ------------------------------------------------------------------------------------------------------------


def test_it_happens_where_the_next_prompt_and_a_longest_turn_exceed_the_share() -> None:
    on = Reader()
    play(on, None)
    fourth = len(on.prompts[3]) + TURN
    for at in (1.0, 0.5):
        for more, expected in ((0, False), (-1, True)):
            limits = replace(LIMITS, max_context=round(fourth / at) + round(more / at))
            t = play(Reader(limits=limits), Fold(keep=1, at=at))
            assert (t.turns[3].rewritten is not None) == expected
            assert [k for k, turn in enumerate(t.turns[:3]) if turn.rewritten] == []


def test_what_is_folded_by_hand() -> None:
    on = Reader()
    play(on, None)
    limits = replace(LIMITS, max_context=len(on.prompts[3]) + TURN - 1)
    t = play(Reader(limits=limits), Fold(keep=2, at=1.0))
    # system, task, call 0, page 0, call 1, page 1, call 2, page 2
    length = len(f"page 0: {pages_env.FILLER}")
    result = t.turns[1].observation[0]
    assert t.turns[3].rewritten == (0, 1, 2, replace(result, parts=user(note(length)).parts), 4, 5, 6, 7)
    assert t.turns[3].observation == (replace(t.turns[3].observation[0]),)


def test_where_even_the_folded_history_does_not_fit_the_episode_ends_as_before() -> None:
    limits = small(pages=1.5)
    for kind in ("fold", "rule"):
        policy = Reader(limits=limits)
        t = play(policy, rule_of(kind, keep=2))
        assert (t.stop_reason, t.truncated) == ("context", True)
        assert max(map(len, policy.prompts)) < limits.max_context


def test_a_rewritten_history_that_is_no_shorter_is_left() -> None:
    policy = Reader(limits=small())
    t = play(policy, RuleSummary(write=lambda messages: pages_env.FILLER * 20, at=0.9))
    assert (t.stop_reason, t.metrics["context_summaries"]) == ("context", 0.0)
    assert t.metrics["context_not_shorter"] > 0
    assert [turn.rewritten for turn in t.turns] == [None] * len(t.turns)
    once(t, policy.prompts)


# --- summaries of the policy -----------------------------------------------------------------------------------------


def test_a_summary_is_a_turn_that_only_the_policy_sees() -> None:
    policy = Reader(limits=small())
    t = play(policy, rule_of("summary"))
    kinds = [turn.kind for turn in t.turns]
    s = kinds.index("summary")
    asked, after = t.turns[s], t.turns[s + 1]
    assert (asked.parent, asked.observation, asked.reward, asked.state_key) == (s - 1, (user("sum up"),), 0.0, None)
    assert asked.prompt_suffix == FMT.suffix((user("sum up"),), t.turns[s - 1].completion)
    assert asked.message.text == f"page {s} read"
    assert (after.parent, after.rewritten) == (None, (0, 1, user(f"{HEAD}page {s} read"), 2 * s, 2 * s + 1))
    assert after.observation[0].text.startswith(f"page {s - 1}:"), "what its last call led to comes after the summary"
    assert kinds.count("summary") >= 2
    second = next(k for k in range(s + 1, len(kinds)) if kinds[k] == "summary")
    texts = [e.text for e in t.turns[second + 1].rewritten or () if isinstance(e, Message)]
    assert texts == [f"{HEAD}{t.turns[second].message.text}"], "the last summary went into this one"


def test_the_environment_pays_and_counts_its_own_steps() -> None:
    t = play(Reader(limits=small()), rule_of("summary"))
    assert "summary" in {turn.kind for turn in t.turns}
    rewards = [turn.reward for turn in t.turns if turn.kind == "step"]
    assert rewards == pytest.approx([*(0.1 * (k + 1) for k in range(PAGES)), 1.0])
    assert {turn.reward for turn in t.turns if turn.kind == "summary"} == {0.0}
    limits = small(max_turns=PAGES)
    t = play(Reader(limits=limits), rule_of("summary"))
    assert (t.stop_reason, len(t.steps)) == ("max_turns", PAGES)
    assert len(t.turns) > PAGES


def test_a_summary_that_was_cut_or_calls_a_tool_or_says_nothing_is_one_all_the_same() -> None:
    for said, shown, calls in (
        ("the quick brown fox " * 40, "the quick brown fox the quick", 0),
        (call(3), "<tool_call>", 0),
        ("<think>\nnever ends", EMPTY, 0),
    ):
        policy = Reader(limits=small(), summary=said.replace("{", "{{").replace("}", "}}"))
        t = play(policy, rule_of("summary"))
        s = next(k for k, turn in enumerate(t.turns) if turn.kind == "summary")
        assert len(t.turns[s].message.tool_calls) == calls
        assert any(isinstance(e, Message) and e.text.startswith(HEAD + shown) for e in t.turns[s + 1].rewritten or ())
        once(t, policy.prompts)


def test_a_summary_without_room_or_use_is_not_asked_for() -> None:
    limits = small(max_episode_tokens=130)  # three calls and a bit: none is left for a summary of 40
    policy = Reader(limits=limits)
    t = play(policy, rule_of("summary", max_tokens=60))
    assert (policy.summaries, t.stop_reason) == (0, "tokens")
    assert t.metrics["context_summaries_missing"] > 0
    policy = Reader(limits=small(pages=1.2))
    t = play(policy, rule_of("summary", keep=2, prompt="s"))
    assert (policy.summaries, t.stop_reason) == (0, "context")


class Garbled(Reader):
    """Sums up in bytes that are no text. Each is shown as a character of three bytes, so they are more tokens then."""

    async def sample_summary(self, prompt: Prompt, max_tokens: int, asked: Any, episode: EpisodeDriver) -> Completion:
        self.prompts.append(prompt.ids)
        broken = next(i for i in range(400) if self.fmt.text_of(i) == "\ufffd")
        return Completion((broken,) * max_tokens, (-1.0,) * max_tokens, (0,) * max_tokens, "length")


def test_an_episode_that_ends_right_after_a_summary_is_paid_at_its_last_step() -> None:
    on = Reader()
    play(on, None)
    page = len(on.prompts[1]) - len(on.prompts[0])
    limits = replace(LIMITS, max_context=len(on.prompts[0]) + page + TURN + 50)
    policy = Garbled(limits=limits)
    t = play(policy, rule_of("summary"))
    assert ([turn.kind for turn in t.turns], t.stop_reason) == (["step", "step", "summary"], "context")
    assert t.last_step == 1
    assert [turn.reward for turn in t.turns] == [0.1, 0.0, 0.0]
    assert [bool(turn.components) for turn in t.turns] == [False, True, False]
    once(t, policy.prompts)
    assert again(t, rule_of("summary")).identical


# --- any sequence of rewritings --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_folds_and_summaries_trains_each_token_once(data: st.DataObject) -> None:
    template = data.draw(st.sampled_from([CHATML, THINKING, NO_SYSTEM]))
    fmt = ChatFormat(tiny(template), merge_system=True)
    talk = Conversation(fmt, OPENING)
    turns: list[Turn] = []
    prompts: list[Ids] = []
    histories: list[Any] = []

    def grow(where: Conversation, **more: Any) -> None:
        suffix, parent = where.suffix, where.parent
        ids = (*data.draw(st.lists(st.integers(0, 200), max_size=4)), fmt.turn_end)
        done = Completion(ids, (-1.0 - len(turns),) * len(ids), (len(turns),) * len(ids), "stop")
        prompts.append(where.prompt.ids)
        histories.append(where.messages)
        turns.append(Turn(suffix, done, where.add_completion(done), parent=parent, **more))

    for _ in range(data.draw(st.integers(1, 7))):
        what = data.draw(st.sampled_from(["go on", "fold", "sum up", "ask"])) if turns else "go on"
        rewritten = None
        if what == "ask":
            branch = talk.fork(talk.last)
            branch.add_observation((user("sum up"),))
            grow(branch, kind="summary")
        if turns:
            talk.add_observation((user(data.draw(st.sampled_from(["ok", pages_env.FILLER]))),))
        keep = data.draw(st.integers(1, 2))
        if what == "fold":
            rewritten = folded(Fold(keep=keep, roles=("tool", "user")), talk.messages, 2)
        elif what in ("sum up", "ask"):
            text = turns[-1].message.spoken if what == "ask" else "so far"
            rewritten = summed_up(talk.messages, 2, keep, text)
        if rewritten is not None:
            talk = talk.restart(applied(rewritten, talk.messages))
        grow(talk, rewritten=rewritten)
    t = Trajectory("e", TASK, "g", tuple(turns), True, False, "answer")
    once(t, prompts)
    for turn, history in zip(turns, histories, strict=True):
        if turn.parent is None:
            assert turn.prompt_suffix == fmt.first_prompt(history)
    assert _turns_again(t) == t


def _turns_again(t: Trajectory) -> Trajectory:
    """What a file keeps of the turns."""
    return replace(t, turns=tuple(_turn(_turn_row(turn)) for turn in t.turns))


# --- rules that fail or cannot be kept -------------------------------------------------------------------------------


class Wrong(Pages):
    context = 3  # type: ignore[assignment]


class Often(Pages):
    context = Fold(at=0.5)


def test_what_is_no_rule_is_the_environments_error() -> None:
    with pytest.raises(EnvError, match=r"areset .*: context is 3: it says what happens to long histories, so it must"):
        play(Reader(), None, lambda: Wrong(sandbox=None))


def failing(messages: Any) -> str:
    raise KeyError("lost")


async def slow(messages: Sequence[Any]) -> str:
    await asyncio.sleep(0)
    return "slowly"


def test_a_function_that_fails_is_the_environments_error_and_may_be_async() -> None:
    with pytest.raises(EnvError, match=r"RuleSummary.write \(task train-0, turn \d\) raised KeyError: 'lost'"):
        play(Reader(limits=small()), RuleSummary(write=failing, at=0.9))
    with pytest.raises(EnvError, match=r"RuleSummary.write .* returned 3, which is not a text"):
        play(Reader(limits=small()), RuleSummary(write=lambda messages: 3, at=0.9))  # type: ignore[arg-type,return-value]
    t = play(Reader(limits=small()), RuleSummary(write=slow, at=0.9))
    assert t.metrics["context_summaries"] > 0


def test_limits_that_a_rule_cannot_keep_are_refused_before_anything_starts() -> None:
    spec = registry.spec("tests.rollout.test_history:Often")
    limits = replace(LIMITS, max_context=2 * TURN)
    with pytest.raises(ConfigError, match=r"at=0.5\) of model.max_context = 120 is less than the longest turn"):
        require_prompts(spec, FMT, limits)
    with pytest.raises(ConfigError, match=r"at=0.5\) of model.max_context = 120"):
        play(Reader(limits=limits), None, lambda: Often(sandbox=None))
    require_prompts(spec, FMT, replace(limits, max_context=2 * TURN + 2))
    require_prompts(spec.with_kwargs({"context": {"kind": "none"}}), FMT, limits)
    given = spec.with_kwargs({"context": {"kind": "summary", "at": 0.9}})
    with pytest.raises(ConfigError, match=r"Summary\(at=0.9\) leaves 100 of model.max_context = 1000 tokens"):
        require_prompts(given, FMT, replace(LIMITS, max_context=1000))
    with pytest.raises(ConfigError, match=r"context\.kind is 'folds'"):
        require_prompts(spec.with_kwargs({"context": {"kind": "folds"}}), FMT, LIMITS)


# --- demonstrations --------------------------------------------------------------------------------------------------


class Facts:
    """Played by the environment's own script, with the prompts of a tokenizer."""

    id: ClassVar[str] = "areal/Facts-v0"

    @classmethod
    def play(cls, folder: Path, limits: Limits, context: Any) -> Trajectory:
        spec = registry.spec(cls.id)
        task = spec.tasks("train", difficulty=1.0)[0]
        return demonstrated(spec, folder, limits, task, context)


def demonstrated(spec: Any, folder: Path, limits: Limits, task: Task, context: Any) -> Trajectory:
    from areal_agents.engine import Sampling

    made = PlayerSpec(spec, folder, limits, Sampling(TURN), kwargs={"context": context}, policy="expert")

    async def main() -> Trajectory:
        player = made.build(None)  # type: ignore[arg-type]  # an expert needs no engine
        try:
            return await player.play(task, id="e", group="g", seed=0)
        finally:
            await player.close()

    return asyncio.run(main())


def test_an_environment_of_the_box_is_given_one_by_its_arguments(tmp_path: Path) -> None:
    tiny(CHATML).save_pretrained(tmp_path)
    limits = replace(LIMITS, max_context=1_000_000, max_turn_tokens=100)
    whole = Facts.play(tmp_path, limits, None)
    assert whole.reward == 1.0
    used = sum(len(t.prompt_suffix) + len(t.completion.ids) for t in whole.turns)
    tight = replace(limits, max_context=round(0.8 * used))
    assert Facts.play(tmp_path, tight, None).stop_reason == "context"
    t = Facts.play(tmp_path, tight, {"kind": "fold", "keep": 1, "at": 0.9})
    assert (t.stop_reason, t.reward) == ("answer", 1.0)
    assert t.metrics["context_folds"] > 0


def scripted(messages: Sequence[Any]) -> str:
    return f"{len(messages)} messages"


def test_a_demonstration_needs_a_function_for_its_summaries(tmp_path: Path) -> None:
    tiny(CHATML).save_pretrained(tmp_path)
    spec, limits = registry.spec("tests.pages_env:Pages"), small()
    rule = {"kind": "summary", "prompt": "sum up", "at": 0.8, "max_tokens": 40}
    with pytest.raises(ConfigError, match=r"its summary is the policy's to write: give .* a `scripted` function"):
        demonstrated(spec, tmp_path, limits, TASK, rule)
    t = demonstrated(spec, tmp_path, limits, TASK, rule | {"scripted": "tests.rollout.test_history:scripted"})
    s = next(k for k, turn in enumerate(t.turns) if turn.kind == "summary")
    assert t.turns[s].message.text == f"{2 * s + 1} messages"
    assert t.turns[t.last_step].components["right"] == 1.0
