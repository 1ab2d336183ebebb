"""``areal-agents eval --engine.kind vllm``: greedy answers are those of the other engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.tracking.trajectories import read_records
from tests.conftest import require
from tests.engines.vllm.test_server import served_model

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
