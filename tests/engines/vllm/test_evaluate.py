"""``areal-agents eval --engine.kind vllm``: greedy answers are the other engine's, and a kill costs what ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.tracking.trajectories import read_records, row_of
from tests.conftest import require
from tests.engines.vllm.test_server import served_model
from tests.unfinished import started, until_begun, until_saved

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def answers(model: Path, out: Path, kind: str) -> dict[str, list[tuple[int, ...]]]:
    """What each task's turns sampled."""
    argv = ["eval", "tests.letters_env:Letters", "--model", str(model), "--n", "4", "--out", str(out)]
    argv += ["--engine.kind", kind, "--engine.precision", "fp32", "--engine.max_batch", "4", "--engine.kv_tokens=2048"]
    assert main([*argv, "--max-turn-tokens", "6", "--max-context", "256"]) == 0
    assert json.loads((out / "report.json").read_text())["infra_rate"] == 0.0
    played = [record.trajectory for record in read_records(out, kind="eval")]
    return {t.task.id: [turn.completion.ids for turn in t.turns] for t in played}


def test_greedy_answers_are_those_of_the_other_engine(tmp_path: Path) -> None:
    require("module:vllm")
    served_model(tmp_path / "model")
    by_vllm = answers(tmp_path / "model", tmp_path / "vllm", "vllm")
    assert len(by_vllm) == 4
    assert by_vllm == answers(tmp_path / "model", tmp_path / "ours", "transformers")


SHORT = """
name = "short"
version = 1
[[entries]]
env = "areal/Doors-v0"
difficulty = 0.0
n = 4
k = 2
max_turns = 3
sampling = { temperature = 0.7, max_turn_tokens = 16 }
[[entries]]
name = "after it"
env = "areal/HiddenNumber-v0"
difficulty = 0.0
n = 2
max_turns = 2
sampling = { max_turn_tokens = 16 }
"""


def rows(cell: Path) -> dict[tuple[str, str], bytes]:
    """Each episode that is on the disk, as bytes, by its task and its number."""
    found = [(r.trajectory, json.dumps(row_of(r), default=str).encode()) for r in read_records(cell, kind="eval")]
    kept = {(t.task.id, t.id): row for t, row in found}
    assert len(kept) == len(found)
    return kept


def test_a_killed_suite_goes_on_and_leaves_finished_rows_as_they_are(
    tmp_path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, out = tmp_path / "short.toml", tmp_path / "out"
    suite.write_text(SHORT)
    command = ["eval", str(suite), "--model", str(smollm2), "--out", str(out), "--engine.kind", "vllm"]
    command += ["--engine.max_batch", "1", "--engine.kv_tokens", "4096"]
    with started(*command) as process:
        cell = until_begun(out / "cells", process)
        until_saved(cell, 3)
        process.kill()
        process.communicate()
    before = rows(cell)
    assert 3 <= len(before) < 8
    assert not (cell / "report.json").exists()
    assert main(command) == 0
    assert f"{len(before)} of 8 attempts are played already" in capsys.readouterr().out
    after = rows(cell)
    assert {id: after[id] for id in before} == before
    assert len(after) == 8
    assert sorted(len(rows(one)) for one in (out / "cells").iterdir()) == [2, 8]
    assert json.loads((out / "short-v1" / "leaderboard.json").read_text())["complete"]
