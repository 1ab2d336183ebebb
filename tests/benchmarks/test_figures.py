"""The pictures of docs/: what is drawn is what the records hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.simulated import benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_every_seed_of_the_record_of_credit_is_a_point() -> None:
    record = json.loads((RESULTS / "credit.json").read_text())
    figure = module("figures").credit(record)
    worlds = dict.fromkeys(row["world"] for row in record["rows"])
    for axes, world in zip(figure.axes, worlds, strict=True):
        rows = [row for row in record["rows"] if row["world"] == world]
        # a row of points that got there, one of those that did not, and the mean's stroke
        drawn = [points.get_offsets() for points in axes.collections]
        assert len(drawn) == 3 * len(rows)
        for height, row in enumerate(rows):
            there, not_there, mean = drawn[3 * height : 3 * height + 3]
            assert (len(there), len(there) + len(not_there)) == (row["reached"], row["seeds"])
            assert {y for _, y in (*there, *not_there)} == {height}
            assert mean.tolist() == [[row["episodes"], height]]
            assert min(x for x, _ in there) == row["least"] if row["reached"] else True


def test_an_interval_of_staleness_is_that_of_the_deficit_turned_round() -> None:
    rows = [
        {"method": "decoupled", "eta": 0, "score": 90.0, "deficit": 0.0, "low": 0.0, "high": 0.0},
        {"method": "decoupled", "eta": 8, "score": 80.0, "deficit": 10.0, "low": 7.0, "high": 15.0},
    ]
    shape = [
        {"method": "decoupled", "eta": 0, "of fresh": 1.0, "AReaL of fresh": 1.0},
        {"method": "decoupled", "eta": 8, "of fresh": 0.889, "AReaL of fresh": None},
    ]
    scores, shares = module("figures").staleness({"rows": rows, "in_shape": shape}).axes
    (bars,) = scores.containers
    (low, high) = (tuple(bars.lines[1][end].get_ydata()) for end in (0, 1))
    # 10 points lost, at least 7 and at most 15: of the 90 with fresh data 75 to 83 are left
    assert (low, high) == ((90.0, 75.0), (90.0, 83.0))
    assert [label.get_text() for label in scores.get_xticklabels()] == ["0", "8"]
    ours, theirs = shares.lines
    assert (list(ours.get_ydata()), list(theirs.get_ydata())) == ([1.0, 0.889], [1.0])


@pytest.mark.parametrize("name", ["credit", "staleness"])
def test_it_draws_from_the_committed_record(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["figures.py", "--only", name, "--out", str(tmp_path)])
    assert module("figures").main() == 0
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
