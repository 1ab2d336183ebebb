"""A training's own evaluations: what was scored before a kill or a stop is not played again."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from areal_agents.errors import Interrupted, TaskError
from areal_agents.evaluation.compare import load
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer import evaluation as room
from areal_agents.trainer.loop import train
from areal_agents.types import Info, Observation, Task
from areal_agents.utils.signals import Stop
from tests.letters_env import Letters
from tests.tiny_models import tiny_chat_model

N = 6


class Watched(Letters):
    """``at`` is called with the number of held-out episodes that were begun before, and may end the run there."""

    begun: ClassVar[list[str]] = []
    at: ClassVar[Callable[[int], None]]
    bad: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"{split} {i}"}) for i in range(24)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        task = (options or {})["task"]
        if task.split == "test":
            Watched.at(len(Watched.begun))
            Watched.begun.append(task.id)
            if task.id in Watched.bad:
                raise TaskError("no word today")
        return await super().areset(seed=seed, options=options)


def ends(stop: list[Stop], after: int) -> None:
    def at(begun: int) -> None:
        if begun == after:
            stop[-1].request(signal.SIGINT)

    Watched.begun, Watched.at = [], at


def config(tmp_path: Path, **sections: Any) -> TrainConfig:
    if not (tmp_path / "model").exists():
        tiny_chat_model(tmp_path / "model")
    tree: dict[str, Any] = {
        "steps": 2,
        "out": tmp_path / "run",
        "model": {"path": str(tmp_path / "model"), "max_context": 128},
        "env": {"id": "tests.trainer.test_evaluation:Watched"},
        "engine": {"precision": "fp32", "max_batch": 1},
        "rollout": {"groups": 1, "group_size": 2, "concurrency": 2, "max_turn_tokens": 4},
        "learner": {"precision": "fp32", "lr": 1e-3},
        "eval": {"n": N, "task_seed": None, "temperature": 1.0, "baseline": True, "every": 1},
        "checkpoint": {"every": 2},
        "track": {"tensorboard": False},
    }
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, Mapping) else value
    return TrainConfig.model_validate(tree)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> list[Stop]:
    """The stop of the run that runs."""
    made: list[Stop] = []
    begin = Stop.__init__

    def init(self: Stop) -> None:
        begin(self)
        made.append(self)

    monkeypatch.setattr(Stop, "__init__", init)
    return made


def run(c: TrainConfig, *, resume: bool = False) -> dict[str, Any]:
    result = asyncio.run(train(c, resume=resume, console=False))
    return {label: report.to_json() for label, report in result.reports.items()}


def events(c: TrainConfig, kind: str) -> list[dict[str, Any]]:
    path = c.out / "events.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["kind"] == kind]


@pytest.mark.slow
def test_every_evaluation_goes_on_where_it_was_stopped(tmp_path: Path, stops: list[Stop]) -> None:
    """The baseline, the one after step 1 and the last one, each stopped in its fourth episode (``max_batch`` is 1)."""
    c = config(tmp_path)
    for i, label in enumerate(("before", "step_1", "after_rl")):
        # What was played already is not begun again: only the rest of the evaluation before, and this one.
        ends(stops, 3 if i == 0 else (N - 3) + 3)
        with pytest.raises(Interrupted, match="stopped by SIGINT"):
            run(c, resume=i > 0)
        kept = list(read_records(c.out, kind=f"eval-{label}"))
        assert [r.trajectory.task.id for r in kept] == [f"test-{j}" for j in range(3)]
        assert load(f"{c.out}:{label}").partial is not None
    Watched.begun, Watched.at = [], lambda begun: None
    reports = run(c, resume=True)
    assert Watched.begun == [f"test-{j}" for j in range(3, N)]
    assert list(reports) == ["before", "step_1", "after_rl"]
    assert [(r["n"], r["attempts"], r["unplayed"], r["infra_rate"]) for r in reports.values()] == [(N, N, 0, 0.0)] * 3
    assert [(e["label"], e["episodes"], e["of"]) for e in events(c, "evaluation_resumed")] == [
        (label, 3, N) for label in reports
    ]
    for label in reports:
        ids = [r.trajectory.id for r in read_records(c.out, kind=f"eval-{label}")]
        assert ids == [f"eval-{label}/{j}/0" for j in range(N)]
        assert load(f"{c.out}:{label}").partial is None
    assert not list((c.out / "trajectories").rglob("*.jsonl"))


@pytest.mark.slow
def test_what_other_weights_or_settings_played_is_not_counted(tmp_path: Path, stops: list[Stop]) -> None:
    """A kill after step 1, which no checkpoint has, and a fix of eval.n that no evaluation has used."""
    c = config(tmp_path, eval={"baseline": False})

    async def killed() -> None:
        """Play until the fourth held-out episode, with nothing saved at the end."""
        training = asyncio.create_task(train(c, console=False))
        loop = asyncio.get_running_loop()

        def at(begun: int) -> None:
            if begun == 3:
                loop.call_soon_threadsafe(training.cancel)

        Watched.begun, Watched.at = [], at
        await training

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(killed())
    assert len(list(read_records(c.out, kind="eval-step_1"))) == 3
    Watched.begun, Watched.at = [], lambda begun: None
    ends(stops, 3)
    with pytest.raises(Interrupted):  # step 1 is trained once more, to other weights
        run(c, resume=True)
    assert Counter(Watched.begun)["test-0"] == 1
    assert not events(c, "evaluation_resumed")
    Watched.begun, Watched.at = [], lambda begun: None
    run(config(tmp_path, eval={"baseline": False, "n": 4}), resume=True)
    assert Watched.begun == [f"test-{j}" for j in range(4)] * 2  # step_1 anew, with other settings, and after_rl
    assert not events(c, "evaluation_resumed")


@pytest.mark.slow
def test_past_a_share_of_bad_held_out_tasks_a_training_stops_and_goes_on(tmp_path: Path) -> None:
    Watched.begun, Watched.at = [], lambda begun: None
    Watched.bad = frozenset(f"test-{i}" for i in range(1, 20, 2))
    try:
        c = config(tmp_path, steps=1, eval={"n": 20, "baseline": True, "every": 0})
        with pytest.raises(TaskError, match=r"8 of the 16 tasks tried so far .*rollout.max_bad_tasks = 0.2") as caught:
            run(c)
        assert "test-15: " in str(caught.value)
        assert len(list(read_records(c.out, kind="eval-before"))) == 8
        Watched.begun = []
        reports = run(config(tmp_path, steps=1, eval={"n": 20, "baseline": True, "every": 0},
                             rollout={"max_bad_tasks": 0.6}), resume=True)  # fmt: skip
        assert not set(Watched.begun[:10]) & {"test-0", "test-2", "test-14"}  # they are scored already
        assert {label: (r["n"], len(r["left_out"])) for label, r in reports.items()} == {
            "before": (10, 10), "after_rl": (10, 10),
        }  # fmt: skip
    finally:
        Watched.bad = frozenset()


@pytest.mark.parametrize(("word", "kept"), [("one", 1), ("two", 0)])
def test_attempts_at_a_task_whose_content_changed_are_played_again(
    word: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, now = (Task.make("test-0", split="test", seed=0, payload={"word": w}) for w in ("one", word))
    told: list[str] = []
    monkeypatch.setattr(room, "read_episodes", lambda *where: ({(0, 0): SimpleNamespace(task=before)}, 3.0, None))
    tracker = SimpleNamespace(event=lambda kind, **row: told.append(f"{kind} {row['episodes']}"), message=told.append)
    run: Any = SimpleNamespace(config=SimpleNamespace(out=Path(), eval=SimpleNamespace(k=1)), tracker=tracker)
    journal: Any = SimpleNamespace(empty=lambda: told.append("emptied"))
    found, seconds = room._earlier(run, journal, [now], label="before", step=0)
    assert (len(found), seconds) == (kept, 3.0 * kept)
    assert told[0] == f"evaluation_resumed {kept}"
    assert ("emptied" in told) is (kept == 0)
