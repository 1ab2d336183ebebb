"""Episodes whose histories were rewritten: saved, judged, played again, shown and counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from areal_agents.context import HEAD, Context, Fold, RuleSummary, Summary
from areal_agents.evaluation.endings import context_means, count_oddities, noted
from areal_agents.evaluation.replay import replay
from areal_agents.evaluation.rescore import with_verdict
from areal_agents.evaluation.transcript import transcript, transcript_json
from areal_agents.group_reward import with_group_verdict
from areal_agents.reward import Verdict
from areal_agents.rollout.rebuilt import rebuilt
from areal_agents.tracking.trajectories import Record, _turn, _turn_row, read_shard, write_shard
from tests import pages_env
from tests.pages_env import PAGES, Pages
from tests.pages_played import (
    FMT,
    KINDS,
    Reader,
    again,
    play,
    rule_of,
    small,
)

# --- who else deals with such an episode -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_read_as_it_was(kind: str, tmp_path: Path) -> None:
    records = [Record("train", 1, play(Reader(limits=small()), rule_of(kind)))]
    write_shard(tmp_path / "step-000001.parquet", records)
    assert read_shard(tmp_path / "step-000001.parquet") == records
    old = _turn_row(records[0].trajectory.turns[0])
    del old["kind"], old["rewritten"]
    assert _turn(old) == records[0].trajectory.turns[0], "files of before"


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_sees_every_message_as_it_was_also_later(kind: str) -> None:
    t = play(Reader(limits=small()), rule_of(kind))
    seen = pages_env.SEEN[-1]
    assert seen.turns == PAGES + 1
    assert not any(HEAD in m.text or "folded away" in m.text or m.text == "sum up" for m in seen.messages)
    assert rebuilt(t, lambda it: it.turns[it.last_step].message.spoken) == seen


def test_new_verdicts_go_to_the_steps() -> None:
    t = play(Reader(limits=small()), rule_of("summary"))
    turns = tuple(float(k) for k in range(PAGES + 1))
    for new in (with_verdict(t, Verdict(sum(turns), turn_rewards=turns)),
                with_group_verdict(t, Verdict(sum(turns), turn_rewards=turns), adds=False)):  # fmt: skip
        assert tuple(new.turns[k].reward for k in new.steps) == turns
        assert {turn.reward for turn in new.turns if turn.kind == "summary"} == {0.0}
    last = with_verdict(t, Verdict(2.5, {"c": 1.0}))
    assert [turn.reward for turn in last.turns] == [*(0.0,) * (len(t.turns) - 1), 2.5]
    assert last.turns[last.last_step].components == {"c": 1.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limits", [{}, {"max_episode_tokens": 200}, {"max_turns": 6}])
def test_it_is_played_again_identically(kind: str, limits: dict[str, Any]) -> None:
    t = play(Reader(limits=small(**limits)), rule_of(kind))
    assert any(turn.rewritten for turn in t.turns) or limits
    for fmt in (FMT, None):
        report = asyncio.run(
            replay(Record("train", 1, t), lambda: Pages(sandbox=None, context=rule_of(kind)), seed=7, fmt=fmt,
                   max_turns=limits.get("max_turns", 30))
        )  # fmt: skip
        assert report.identical, report.text()


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("fold", Fold(keep=2)),
        ("fold", None),
        ("rule", RuleSummary(write=lambda messages: "other")),
        ("rule", None),
        ("summary", Summary(prompt="sum up, please")),
        ("summary", Summary(prompt="sum up", keep=2)),
        ("summary", None),
    ],
)
def test_another_rule_is_a_difference(kind: str, other: Context | None) -> None:
    t = play(Reader(limits=small()), rule_of(kind))
    report = again(t, other)
    first = next(k for k, turn in enumerate(t.turns) if turn.kind == "summary" or turn.rewritten)
    if not (isinstance(other, Summary) and other.keep == 2):  # its request is the same
        assert (report.differences[0].turn, report.differences[0].what) == (first, "context"), report.text()
    assert {d.what for d in report.differences} == {"context"}


def test_people_are_shown_where_the_history_was_rewritten() -> None:
    t = play(Reader(limits=small()), rule_of("summary"))
    s = next(k for k, turn in enumerate(t.turns) if turn.kind == "summary")
    lines = [text for _, text in transcript(Record("train", 1, t), [0.5] * len(t.turns))]
    at = next(i for i, text in enumerate(lines) if text.startswith(f"assistant, turn {s}, a summary  reward 0  "))
    assert lines[at + 1].strip() == f"page {s} read"
    became = lines.index(f"history rewritten  {2 * s + 2} messages became 5, 1 of them new")
    assert lines[became : became + 5] == [
        f"history rewritten  {2 * s + 2} messages became 5, 1 of them new", "", "user",
        f"    {HEAD.strip()}", "",
    ]  # fmt: skip
    row = transcript_json(Record("train", 1, t), None)["turns"]
    assert (row[s]["kind"], row[s]["rewritten"]) == ("summary", None)
    assert row[s + 1]["rewritten"] == [
        0, 1, {"role": "user", "content": f"{HEAD}page {s} read"}, 2 * s, 2 * s + 1,
    ]  # fmt: skip
    assert (row[s + 1]["kind"], row[s]["parent"], row[s + 1]["parent"]) == ("step", s - 1, None)


def test_the_metrics_count_episodes_and_their_rewritten_histories() -> None:
    plain, fold = play(Reader(), rule_of("fold")), play(Reader(limits=small()), rule_of("fold"))
    none = play(Reader(), None)
    n = sum(turn.rewritten is not None for turn in fold.turns)
    means = context_means([plain, fold, none])
    assert (means["context_folds"], means["context_summaries"]) == (n / 2, 0.0), "over the episodes that have a rule"
    assert means["context_tokens_removed"] == fold.metrics["context_tokens_removed"] / 2
    assert context_means([none]) == {}
    assert count_oddities([plain, fold, none])["rewritten"] == 1
    assert noted({"answer": 3}, {"stop": 9}, count_oddities([plain, fold, none])) == (
        "ended by answer 3; 1 histories rewritten"
    )


def test_a_critic_reads_the_prompt_that_follows_a_rewritten_history() -> None:
    limits = small(max_turns=6)
    policy = Reader(limits=limits)
    t = play(policy, rule_of("fold"))
    assert t.tail is not None
    assert t.tail.parent == len(t.turns) - 1
    turn = t.turns[-1]
    assert t.tail.ids == FMT.suffix(t.final_observation, turn.completion)
