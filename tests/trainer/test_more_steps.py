"""A finished run that gets more steps: what was its end stays, under the name of any other step."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from areal_agents import settings
from areal_agents.errors import ConfigError
from areal_agents.evaluation.compare import compare
from areal_agents.evaluation.report import EvalReport, summarize
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.rewind import cut_back
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import Record, read_records, shard_path, write_shard
from areal_agents.trainer.loop import train
from areal_agents.trainer.resume import begin
from areal_agents.trainer.run_folder import Commit, RunFolder
from areal_agents.types import AssistantMessage, Completion, Task, Text, Trajectory, Turn
from tests.trainer.test_resume import check_lineage, config


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_may_get_more_steps(tmp_path: Path) -> None:
    c = config(tmp_path, steps=4, env={"difficulty": 0.012}, checkpoint={"every": 1, "keep": 1, "keep_every": 3})
    first = asyncio.run(train(c, resume=True, console=False))  # nothing there yet: it starts
    before = {f: f.stat().st_mtime_ns for f in c.out.rglob("*") if f.is_file() and f.name != "lock"}
    again = asyncio.run(train(c, resume=True, console=False))
    assert again.reports == first.reports
    assert {f: f.stat().st_mtime_ns for f in c.out.rglob("*") if f.is_file() and f.name != "lock"} == before
    with pytest.raises(ConfigError, match="holds another run: go on with it by --resume"):
        asyncio.run(train(c, console=False))
    longer = c.model_copy(update={"steps": 6})
    played = [r.trajectory for r in read_records(c.out, kind="eval-after_rl")]
    result = asyncio.run(train(longer, resume=True, console=False))
    assert result.reports["before"] == first.reports["before"]
    assert result.reports["after_rl"].version == 6
    check_lineage(longer)
    check_kept_end(longer, first.reports["after_rl"], played)
    assert sorted(f.name for f in (c.out / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    with pytest.raises(ConfigError, match="has 6 steps behind it, but steps = 4"):
        asyncio.run(train(c, resume=True, console=False))
    other = longer.model_copy(update={"seed": 5, "learner": c.learner.model_copy(update={"lr": 5e-4})})
    with pytest.raises(ConfigError, match="seed was 0 and is 5 now") as caught:
        asyncio.run(train(other, resume=True, console=False))
    assert "learner.lr" not in str(caught.value)  # that one may change


def check_kept_end(c: TrainConfig, report: EvalReport, played: list[Trajectory]) -> None:
    """The evaluation after step 4, which was the last one, is there under the name of any other step."""
    kept = [r.trajectory for r in read_records(c.out, kind="eval-step_4")]
    assert [replace(t, id="", group="") for t in kept] == [replace(t, id="", group="") for t in played]
    assert [t.id for t in kept] == [t.id.replace("after_rl", "step_4") for t in played]
    (row,) = read_metrics(c.out, kind="eval/step_4")
    assert (row["step"], row["pass_at_1"], row["version"]) == (4, report.pass_at_1, 4)
    (row,) = read_metrics(c.out, kind="eval/after_rl")
    assert row["step"] == 6
    committed = RunFolder(c.out).read_commit()
    assert committed is not None
    assert list(committed.reports) == ["before", "step_4", "after_rl"]
    assert committed.reports["step_4"] == report
    assert compare(f"{c.out}:step_4", f"{c.out}:after_rl").n == report.n
    said = [json.loads(line) for line in (c.out / "events.jsonl").read_text().splitlines()]
    assert [(e["label"], e["step"]) for e in said if e["kind"] == "evaluation_kept"] == [("step_4", 4)]


def test_what_failed_before_its_first_episode_is_no_run(tmp_path: Path) -> None:
    """Its folder takes the corrected settings; a file that somebody wrote there by hand is not written over."""
    c = config(tmp_path, steps=4)
    with pytest.raises(ConfigError, match="a demonstration"), RunFolder(c.out) as folder:  # noqa: PT012
        folder.write_settings(settings.dump(c))
        raise ConfigError("a demonstration earned nothing")
    with RunFolder(c.out) as folder:
        assert begin(folder, c, resume=False) == (None, {})
        write_shard(shard_path(c.out, "eval-before", 0), [])
        with pytest.raises(ConfigError, match="holds another run"):
            begin(folder, c, resume=False)
    by_hand = c.model_copy(update={"out": tmp_path / "mine"})
    by_hand.out.mkdir()
    (by_hand.out / "config.toml").write_text("# mine")
    with RunFolder(by_hand.out) as folder, pytest.raises(ConfigError, match="holds another run"):
        begin(folder, by_hand, resume=False)


def test_a_kill_while_the_end_gets_its_new_name_costs_nothing(tmp_path: Path) -> None:
    """The process dies after the episodes are written and before the commit: the next one does the same again."""
    c = config(tmp_path, steps=4)
    task = Task.make("t", split="test", seed=0, payload={})
    turn = Turn((1,), Completion((2,), (-1.0,), (0,), "stop"), AssistantMessage((Text("x"),)), 1.0)
    episode = Trajectory("eval-after_rl/0/0", task, "eval-after_rl/0", (turn,), True, False, "answer")
    report = summarize(
        [(task, [episode])], env="e", split="test", model="m", version=4, temperature=0.0, seed=0, seconds=1.0
    )
    end = Commit(4, "step-000004", mark={"metrics_bytes": 0, "shards": {}}, reports={"after_rl": report}, complete=True)
    with RunFolder(c.out) as folder:
        write_shard(shard_path(c.out, "eval-after_rl", 4), [Record("eval-after_rl", 4, episode)])
        folder.write_settings(settings.dump(c))
        for _ in range(2):
            folder.commit(end)
            commit, _ = begin(folder, c.model_copy(update={"steps": 6}), resume=True)
            assert commit is not None
            assert commit.mark["shards"] == {"eval-step_4": [[4, 4]]}
            assert folder.read_commit() == commit
            assert [r.trajectory.id for r in read_records(c.out, kind="eval-step_4")] == ["eval-step_4/0/0"]
        cut_back(c.out, {"metrics_bytes": 0, "shards": {"eval-step_4": [[4, 4]]}})
    assert [r.trajectory.id for r in read_records(c.out)] == ["eval-step_4/0/0"]
