"""``areal-agents plot``: the numbers that are drawn, worked by hand, and real pictures."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.evaluation.curves import first_panel, panel, read_numbers
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.plot import Point
from areal_agents.tracking.tracker import Tracker
from tests.saved_runs import record, save

HELD = {"pass_at_1": 0.5, "ci95_low": 0.4, "ci95_high": 0.6, "reward": 0.7}


def run(out: Path) -> Path:
    """Two steps of three groups of two; only the first step's episodes differ."""
    with Tracker(out, console=False, tensorboard=False) as tracker:
        tracker.log(0, HELD, kind="eval/before")
        tracker.log(1, {"reward": 0.5, "loss": math.nan, "off_policy/ess": 1.0})
        tracker.log(2, {"reward": 1.0, "loss": 2.0, "off_policy/ess": 0.5})
        tracker.log(3, {"reward": 0.25, "loss": 3.0, "off_policy/ess": 0.5})
    rewards = ((0.0, 0.0), (0.5, 0.5), (0.0, 2.0))  # means of the groups: 0, 0.5, 1
    first = [record(g, i, r, task=g, step=1) for g, pair in enumerate(rewards) for i, r in enumerate(pair)]
    second = [record(10 + g, i, 1.0, task=g, step=2) for g in range(3) for i in range(2)]
    save(out, TrainConfig(out=out), [*first, *second, record(20, 0, 0.25, step=3)])
    return out


def evaluation(out: Path, **report: Any) -> Path:
    out.mkdir(parents=True)
    (out / "report.json").write_text(json.dumps({"env": "e", "pass_at_1": 0.25, "ci95": [0.125, 0.5]} | report))
    return out


def test_what_is_drawn(tmp_path: Path) -> None:
    a, b = first_panel(read_numbers([run(tmp_path / "a"), evaluation(tmp_path / "b")])).curves
    # Means 0, 0.5, 1: standard deviation 0.5, Student's t of 2 degrees of freedom 4.302653.
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert [(p.step, p.value) for p in a.training] == [(1, 0.5), (2, 1.0), (3, 0.25)]
    assert (a.training[0].low, a.training[0].high) == pytest.approx((0.5 - half, 0.5 + half))
    assert (a.training[1].low, a.training[1].high) == (1.0, 1.0)
    assert math.isnan(a.training[2].low)  # one group says nothing about others
    assert a.held_out == (Point(0, 0.5, 0.4, 0.6),)
    assert (a.name, a.level, b.name, b.level) == ("a", None, "b", Point(0, 0.25, 0.125, 0.5))


def test_a_metric_of_training_alone_of_held_out_tasks_alone_and_of_both(tmp_path: Path) -> None:
    runs = read_numbers([run(tmp_path / "a"), evaluation(tmp_path / "b")])
    loss, lacking = panel(runs, "loss")
    assert (loss.training, loss.held_out, lacking) == ("loss", "", ["b"])
    assert math.isnan(loss.curves[0].training[0].value)  # a gap, not a zero
    assert [p.value for p in loss.curves[0].training[1:]] == [2.0, 3.0]
    passed, lacking = panel(runs, "pass_at_1")
    assert (passed.training, passed.held_out, lacking) == ("", "pass_at_1", [])
    reward, lacking = panel(runs, "reward")
    assert (reward.training, reward.held_out, lacking) == ("reward", "reward", ["b"])
    assert [p.value for p in reward.curves[0].held_out] == [0.7]
    assert math.isnan(reward.curves[0].held_out[0].low)  # its interval is pass@1's alone


def test_runs_of_one_name_are_told_apart_and_one_run_is_drawn_once(tmp_path: Path) -> None:
    a, b = run(tmp_path / "x" / "run"), run(tmp_path / "y" / "run")
    assert [r.name for r in read_numbers([a, b, a / "."])] == [str(a), str(b)]


@pytest.mark.parametrize("name", ["p.png", "deep/er/p.SVG"])
def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    odd = run(tmp_path / "_$a$")  # neither a formula nor a label that legends leave out
    argv = ["plot", str(odd), str(evaluation(tmp_path / "b")), "--out", str(tmp_path / name)]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{tmp_path / name}\n"
    data = (tmp_path / name).read_bytes()
    if name.endswith(".png"):
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(data) > 10_000
    else:
        assert ElementTree.fromstring(data).tag.endswith("svg")
        for label in ("training reward (95 % band), _$a$", "held-out pass@1 (95 % CI), _$a$", "pass@1 (95 % CI), b"):
            assert label.encode() in data  # matplotlib names its glyphs' text in a comment
    assert main([*argv, "--metric", "loss", "off_policy/ess"]) == 0
    assert "note: b has no loss: not in that panel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["run", "--metric", "los"], 1, "--metric los: no run has it; did you mean loss?"),
        (["run", "--metric", "zzzz"], 1, "there are ci95_high, ci95_low, loss, off_policy/ess, pass_at_1, reward"),
        (["nowhere"], 1, "nowhere has neither metrics.jsonl nor report.json"),
        (["empty"], 1, "empty has no step and no held-out evaluation yet"),
        (["broken"], 1, "broken: its numbers cannot be read"),
        (["run", "--out", "x.gif"], 2, "--out is x.gif: the name of a picture ends with .png or .svg"),
        ([], 2, "name the folder of a run"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run(Path("run"))
    Path("empty").mkdir()
    Path("empty/metrics.jsonl").touch()
    Path("broken").mkdir()
    Path("broken/metrics.jsonl").write_text("no JSON\n")
    assert main(["plot", *argv]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
