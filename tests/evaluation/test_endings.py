"""How episodes ended is counted where people look: the report, its table, and the rows of a training."""

from __future__ import annotations

from dataclasses import replace

from areal_agents.evaluation.endings import count_endings, count_finishes, count_oddities, noted
from areal_agents.trainer.rollout_metrics import rollout_metrics
from areal_agents.types import AssistantMessage, Completion, Finish, Group, StopReason, Task, Trajectory, Turn

TASK = Task.make("t", split="test", seed=0, payload={})


def episode(reason: StopReason, *finishes: Finish, **metrics: float) -> Trajectory:
    turns = tuple(
        Turn((1,), Completion((2,), (-1.0,), (0,), "stop"), AssistantMessage((), finish=f), 1.0) for f in finishes
    )
    return Trajectory("e", TASK, "g", turns, reason == "answer", reason != "answer", reason, metrics=metrics)


EPISODES = [
    episode("answer", "stop", "length", "stop", unverifiable=1.0),
    episode("answer", "stop", sandbox_replays=2.0, verdict_timeout=1.0),
    episode("length", "length", reward_withheld=0.5),
    episode("content_filter", "content_filter", sandbox_replays=1.0),
    episode("empty", "empty"),
]


def test_counts_by_hand() -> None:
    assert count_endings(EPISODES) == {"answer": 2, "length": 1, "content_filter": 1, "empty": 1}
    assert count_finishes(EPISODES) == {"stop": 3, "length": 2, "content_filter": 1, "empty": 1}
    assert count_oddities(EPISODES) == {
        "cut_turns": 4, "unverifiable": 1, "verdict_timeouts": 1, "sandbox_replays": 3, "withheld": 1,
        "rewritten": 0,
    }  # fmt: skip


def test_the_note_says_what_is_odd_and_nothing_where_nothing_is() -> None:
    counts = [f(EPISODES) for f in (count_endings, count_finishes, count_oddities)]
    assert noted(*counts) == (
        "ended by answer 2, length 1, content_filter 1, empty 1; turns cut by length 2, content_filter 1, empty 1; "
        "1 unverifiable; 1 verdict timed out; 3 sandbox replays; 1 not paid for a cut message"
    )
    fine = [episode("answer", "stop", "stop")] * 3
    assert noted(*(f(fine) for f in (count_endings, count_finishes, count_oddities))) == ""
    limited = [*fine, episode("max_turns", "stop")]
    counts = [f(limited) for f in (count_endings, count_finishes, count_oddities)]
    assert noted(*counts) == "ended by answer 3, max_turns 1"


def test_the_rows_of_a_training_count_them_too() -> None:
    row = rollout_metrics([Group("g", TASK, tuple(replace(t, id=str(i)) for i, t in enumerate(EPISODES)), 0, 0)], 0)
    assert (row["unverifiable"], row["sandbox_replays"], row["cut_turns"], row["withheld"]) == (1.0, 3.0, 4.0, 1.0)
    assert row["truncation_rate"] == 3 / 5
