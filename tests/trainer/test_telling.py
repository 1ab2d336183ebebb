"""What whoever watches a run is told of its parts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from areal_agents.tracking.tracker import Tracker
from areal_agents.trainer.telling import Telling, line_of


@pytest.mark.parametrize(
    ("kind", "fields", "line"),
    [
        ("starting", {"part": "2 vllm engines"}, "starting 2 vllm engines"),
        (
            "engine_lost",
            {"reason": "killed by\nsignal 9"},
            "the engine is lost (killed by signal 9): it is started again",
        ),
        ("engine_lost", {"reason": "it hung", "replica": 1}, "engine 1 is lost (it hung): it is started again"),
        ("engine_restarted", {"seconds": 12.34, "replica": 0}, "engine 0 is back after 12 s"),
        (
            "replica_lost",
            {"reason": "too often", "replica": 2, "left": 1},
            "engine 2 is lost for good (too often): 1 left",
        ),
        (
            "worker_lost",
            {"worker": 3, "reason": "\x1b[2Jdied"},
            "rollout worker 3 is lost (\\x1b[2Jdied): it is started again",
        ),
        ("worker_restarted", {"worker": 3, "seconds": 2.6}, "rollout worker 3 is back after 3 s"),
        ("worker_dropped", {"worker": 3, "reason": "again"}, "rollout worker 3 is lost for good (again)"),
        (
            "pool_lost",
            {"reason": "its actor died"},
            "the engine pool is lost (its actor died): the run ends, and goes on with --resume",
        ),
        ("learner_lost", {"reason": "died"}, "the learner is lost (died)"),
        ("checkpoint", {"step": 3}, None),
    ],
)
def test_a_loss_and_a_return_are_one_line_each(kind: str, fields: dict[str, object], line: str | None) -> None:
    assert line_of(kind, fields) == line


def test_a_start_is_told_of_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        with Tracker(tmp_path, tensorboard=False) as tracker:
            told, seen = Telling(tracker), asyncio.Event()
            usual = tracker.message
            tracker.message = lambda text: (usual(text), text.startswith("still") and seen.set())  # type: ignore
            async with told.start(every=0.01):
                told.event("starting", part="the learner")
                await asyncio.wait_for(seen.wait(), 30)

    asyncio.run(main())
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["starting the learner", "still starting the learner: 0 s so far"]
    assert '"kind": "starting"' in (tmp_path / "events.jsonl").read_text()
