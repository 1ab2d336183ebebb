"""What a run shows: lines for logs and pipes, a bar on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_agents.tracking.console import clock, plain_line
from areal_agents.tracking.tracker import Tracker


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(tmp_path, steps=10, tensorboard=False) as tracker:
        tracker.log(0, {"pass@1": 0.5}, kind="eval")
        tracker.message("warm start: 64 demonstrations")
    assert capsys.readouterr().out == "eval at step 0  pass@1 0.5\nwarm start: 64 demonstrations\n"
    values = {"reward": 0.4375, "age": 0.5, "queue": 3.0, "tokens_per_second": 812.4, "unshown": 1.0}
    line = plain_line(4, 10, values, "train", 20.0)
    assert line == "step 4/10  reward 0.438  age 0.50  queue 3  812 tok/s  ETA 2:00"
    odd = {"reward": 0.5, "unverifiable": 2.0, "verdict_timeouts": 0.0, "sandbox_replays": 1.0, "withheld": 3.0}
    noted = plain_line(4, None, odd, "train", 1.0)
    assert noted == "step 4  reward 0.500  unverifiable 2  sandbox replays 1  cut answers unpaid 3"


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
