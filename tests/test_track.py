from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest

from areal_agents.errors import ArealError
from areal_agents.plot import HeldOut, plot
from areal_agents.track import Tracker, clock, plain_line, read_metrics, read_trajectories
from tests.test_trajectories import example


def test_metrics_are_one_object_a_line(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False, console=False) as tracker:
        tracker.log(1, {"reward": 0.25, "loss": math.nan, "ratio": math.inf, "count": 3})
        tracker.log(1, {"pass@1": 0.5}, kind="eval")
        tracker.flush()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2  # there while the run goes on
    rows = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    for row in rows:
        assert row.pop("time") > 1.7e9
    assert rows == [
        {"kind": "train", "step": 1, "reward": 0.25, "loss": None, "ratio": None, "count": 3.0},
        {"kind": "eval", "step": 1, "pass@1": 0.5},
    ]


def test_read_metrics_by_kind_and_without_a_cut_line(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False, console=False) as tracker:
        for step in (1, 2):
            tracker.log(step, {"reward": step / 4})
            tracker.log(step, {"x": 1.0}, kind="eval")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [(r["step"], r["reward"]) for r in read_metrics(tmp_path, kind="train")] == [(1, 0.25), (2, 0.5)]
    assert len(read_metrics(tmp_path)) == 4


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False, console=False) as tracker, pytest.raises(ValueError, match=r"\['step'\]"):
        tracker.log(1, {"step": 3.0})


def test_events_and_appending_to_an_earlier_run(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with Tracker(tmp_path, tensorboard=False, console=False) as tracker:
            tracker.event("retry", attempt=attempt, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["attempt"], r["folder"]) for r in rows] == [
        ("retry", 1, str(tmp_path)),
        ("retry", 2, str(tmp_path)),
    ]


def test_trajectories_by_kind(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False, console=False) as tracker:
        tracker.trajectories.write([example(0.0), example(1.0)], step=1)
        tracker.trajectories.write([example(0.5)], step=1, kind="eval")
        tracker.flush()
        assert list(read_trajectories(tmp_path / "trajectories" / "train.jsonl")) == [example(0.0), example(1.0)]
    assert list(read_trajectories(tmp_path / "trajectories" / "eval.jsonl")) == [example(0.5)]


def test_callers_never_wait_for_the_disk_and_order_is_kept(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, tensorboard=False, console=False)
    gate = threading.Event()
    tracker._lines.submit(lambda: [gate.wait(30)].clear())  # a disk that hangs
    for step in range(100):
        tracker.log(step, {"reward": 0.0})
    assert not (tmp_path / "metrics.jsonl").exists()  # all hundred calls came back all the same
    gate.set()
    tracker.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(100))


def test_a_failed_write_is_raised_by_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    tracker = Tracker(tmp_path, tensorboard=False, console=False)
    tracker.log(1, {"reward": 0.0})
    with pytest.raises(ArealError, match=r"the run's files cannot be written: .*Is a directory"):
        tracker.flush()
    tracker.close()
    tracker.close()


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, console=False) as tracker:
        tracker.log(1, {"reward": 0.25, "loss": math.nan})
        tracker.log(2, {"reward": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert events.Tags()["tensors"] == ["train/reward"]
    points = [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors("train/reward")]
    assert points == [(1, 0.25), (2, 0.5)]


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, steps=10, tensorboard=False) as tracker:
        tracker.log(0, {"pass@1": 0.5}, kind="eval")
        tracker.message("warm start: 64 demonstrations")
    assert capsys.readouterr().out == "eval at step 0  pass@1 0.5\nwarm start: 64 demonstrations\n"
    values = {"reward": 0.4375, "age": 0.5, "queue": 3.0, "tokens_per_second": 812.4, "unshown": 1.0}
    line = plain_line(4, 10, values, "train", 20.0)
    assert line == "step 4/10  reward 0.438  age 0.50  queue 3  812 tok/s  ETA 2:00"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05"), (-3, "0:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_the_terminal_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Tracker(tmp_path, steps=4, tensorboard=False) as tracker:
        tracker.log(3, {"reward": 0.4375})
        tracker.log(3, {"pass@1": 0.5}, kind="eval")
    out = capsys.readouterr().out
    assert "3/4" in out
    assert "reward 0.438" in out
    assert "eval at step 3  pass@1 0.5" in out


def test_plot_is_a_picture(tmp_path: Path) -> None:
    with Tracker(tmp_path, tensorboard=False, console=False) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"reward": step / 5})
        tracker.log(6, {"reward": math.nan})
    held_out = [
        HeldOut("before", 0, 0.0, 0.0, 0.03),
        HeldOut("warm start", 0, 0.42, 0.34, 0.5),
        HeldOut("after RL", 5, 0.9, 0.85, 0.95),
    ]
    path = plot(tmp_path, held_out, title="areal/Arithmetic-v0")
    assert path == tmp_path / "learning_curve.png"
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1125, 630)
    assert len(data) > 10_000
