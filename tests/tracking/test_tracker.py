"""What a run leaves behind: metrics, events, episodes and TensorBoard files; marks; failing disks; odd clocks."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from areal_agents.errors import ArealError
from areal_agents.tracking.plot import HeldOut, plot
from areal_agents.tracking.rewind import spans
from areal_agents.tracking.tensorboard import Board
from areal_agents.tracking.tracker import Tracker, read_metrics
from areal_agents.tracking.trajectories import read_records, read_shard, shard_path, shards
from tests.small_disk import fill, small_disk
from tests.tracking.test_trajectories import example


def quiet(out: Path, **arguments: Any) -> Tracker:
    return Tracker(out, **{"tensorboard": False, "console": False, **arguments})


def reader(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def board(out: Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, value and wall time of every point that TensorBoard reads, by tag."""
    events = reader(out)
    return {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_metrics_are_one_object_a_line(tmp_path: Path) -> None:
    with quiet(tmp_path) as tracker:
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
    with quiet(tmp_path) as tracker:
        for step in (1, 2):
            tracker.log(step, {"reward": step / 4})
            tracker.log(step, {"x": 1.0}, kind="eval")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert [(r["step"], r["reward"]) for r in read_metrics(tmp_path, kind="train")] == [(1, 0.25), (2, 0.5)]
    assert len(read_metrics(tmp_path)) == 4


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    with quiet(tmp_path) as tracker, pytest.raises(ValueError, match=r"\['step'\]"):
        tracker.log(1, {"step": 3.0})


def test_events_are_appended_and_hold_what_utf8_lacks(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with quiet(tmp_path) as tracker:
            tracker.event("retry", attempt=attempt, folder=tmp_path, text="é\ud800\n")
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["attempt"], r["folder"], r["text"]) for r in rows] == [
        ("retry", 1, str(tmp_path), "é\ud800\n"),
        ("retry", 2, str(tmp_path), "é\ud800\n"),
    ]


def test_one_call_is_one_whole_shard(tmp_path: Path) -> None:
    with quiet(tmp_path) as tracker:
        tracker.trajectories.write([example(0.0), example(1.0)], step=1)
        tracker.trajectories.write([example(0.5)], step=1, kind="eval")
        tracker.flush()
        assert [r.trajectory for r in read_records(tmp_path, kind="train")] == [example(0.0), example(1.0)]
        with pytest.raises(ArealError, match=r"train/step-000001\.parquet is written already: one call holds all"):
            tracker.trajectories.write([example(1.0)], step=1)
        with pytest.raises(ArealError, match="a kind is letters"):
            tracker.trajectories.write([], step=1, kind="../train")
    assert [(r.kind, r.step, r.trajectory) for r in read_records(tmp_path)] == [
        ("eval", 1, example(0.5)),
        ("train", 1, example(0.0)),
        ("train", 1, example(1.0)),
    ]
    with quiet(tmp_path) as tracker, pytest.raises(ArealError, match="written already"):  # by an earlier process
        tracker.trajectories.write([], step=1)


def test_callers_never_wait_for_the_disk_and_order_is_kept(tmp_path: Path) -> None:
    tracker = quiet(tmp_path)
    gate = threading.Event()
    tracker._writer.submit(lambda: [gate.wait(30)].clear())  # a disk that hangs
    for step in range(100):
        tracker.log(step, {"reward": 0.0})
    assert not (tmp_path / "metrics.jsonl").exists()  # all hundred calls came back all the same
    gate.set()
    tracker.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(100))


def test_a_failed_write_is_raised_by_the_next_call(tmp_path: Path) -> None:
    tracker = quiet(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    tracker.log(1, {"reward": 0.0})
    with pytest.raises(ArealError, match=r"metrics\.jsonl cannot be written \(Is a directory\): make it writable"):
        tracker.flush()
    tracker.close()
    tracker.close()
    with pytest.raises(ArealError, match="the tracker is closed"):
        tracker.flush()


def test_no_mark_is_taken_over_a_write_that_failed_whoever_was_told(tmp_path: Path) -> None:
    tracker = quiet(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    tracker.log(1, {"reward": 0.0})
    with pytest.raises(ArealError, match=r"metrics\.jsonl cannot be written"):
        tracker.flush()  # somebody else's call
    (tmp_path / "metrics.jsonl").rmdir()
    tracker.log(2, {"reward": 0.0})
    with pytest.raises(ArealError, match=r"metrics\.jsonl cannot be written"):
        tracker.mark()
    tracker.close()


def test_what_ended_the_run_stays_the_error(tmp_path: Path) -> None:
    def run() -> None:
        with quiet(tmp_path) as tracker:
            (tmp_path / "metrics.jsonl").mkdir()
            tracker.log(1, {"reward": 0.0})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run()
    assert "metrics.jsonl cannot be written" in caught.value.__notes__[0]


# --- marks -------------------------------------------------------------------------------------------------------


def run_of(out: Path, steps: range, **arguments: Any) -> dict[int, Any]:
    """Log ``steps`` (the loss is the step) and return the mark after each."""
    marks: dict[int, Any] = {}
    with quiet(out, **arguments) as tracker:
        for step in steps:
            tracker.log(step, {"loss": step, "odd": math.nan})
            tracker.log(step, {"pass_at_1": step / 8}, kind="eval/held")
            tracker.trajectories.write([example(step)], step=step)
            tracker.event("step", step=step)
            marks[step] = json.loads(json.dumps(tracker.mark()))
    return marks


def test_a_mark_cuts_back_exactly(tmp_path: Path) -> None:
    mark = run_of(tmp_path, range(1, 6))[3]
    assert mark["shards"] == {"train": [[1, 3]]}
    kept = (tmp_path / "metrics.jsonl").read_bytes()[: mark["metrics_bytes"]]
    events = (tmp_path / "events.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("ab") as file, (tmp_path / "events.jsonl").open("ab") as log:
        file.write(b'{"kind": "train", "st')
        log.write(b'{"kind')
    (tmp_path / "trajectories" / "train" / ".step-000006.parquet.77.tmp").write_bytes(b"PAR1")
    late = shard_path(tmp_path, "eval-step_5", 5)
    late.parent.mkdir()
    late.write_bytes(b"never read")
    with quiet(tmp_path, mark=mark) as tracker:
        assert tracker.cut is not None
        assert tracker.cut.to_json() == {"rows": 4, "shards": 3, "missing": ()}
        assert (tmp_path / "metrics.jsonl").read_bytes() == kept
        assert [p.name for p in shards(tmp_path)] == [f"step-00000{i}.parquet" for i in (1, 2, 3)]
        assert sorted(p.name for p in (tmp_path / "trajectories").rglob("*") if p.is_dir()) == ["train"]
        assert not list(tmp_path.rglob("*.tmp"))
        assert tracker.mark() == mark
        tracker.log(4, {"loss": 40})
        tracker.trajectories.write([example(40)], step=4)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path, kind="train")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [r.trajectory.reward for r in read_records(tmp_path)] == [1, 2, 3, 40]
    assert (tmp_path / "events.jsonl").read_bytes().startswith(events)
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in rows] == ["step"] * 5 + ["cut_back"]
    assert (rows[-1]["rows"], rows[-1]["shards"]) == (4, 3)


def test_an_empty_mark_cuts_everything(tmp_path: Path) -> None:
    run_of(tmp_path, range(1, 3))
    with quiet(tmp_path, mark={}) as tracker:
        assert tracker.mark() == {"metrics_bytes": 0, "shards": {}}
    assert read_metrics(tmp_path) == []
    assert shards(tmp_path) == []
    with quiet(tmp_path / "new", mark={}) as tracker:  # killed before there was anything
        assert tracker.mark() == {"metrics_bytes": 0, "shards": {}}


def test_no_mark_cuts_a_torn_line_only(tmp_path: Path) -> None:
    run_of(tmp_path, range(1, 3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind')
    run_of(tmp_path, range(3, 4))
    assert [r["step"] for r in read_metrics(tmp_path, kind="train")] == [1, 2, 3]


def test_a_mark_that_does_not_fit_removes_nothing(tmp_path: Path) -> None:
    mark = run_of(tmp_path, range(1, 4))[2]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for bad, message in (
        ({**mark, "metrics_bytes": 10**6}, "does not fit the checkpoint"),
        ({**mark, "metrics_bytes": mark["metrics_bytes"] - 1}, "does not fit the checkpoint"),
        ({"metrics_bytes": 0}, "is no mark of a run's files"),
        ({"metrics_bytes": 0, "shards": {"train": [1]}}, "is no mark of a run's files"),
    ):
        with pytest.raises(ArealError, match=message):
            quiet(tmp_path, mark=bad)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(ArealError, match=r"metrics\.jsonl is gone, but the checkpoint needs it"):
        quiet(tmp_path, mark=mark)


def test_deleted_shards_are_reported_and_do_not_stop_a_resume(tmp_path: Path) -> None:
    mark = run_of(tmp_path, range(1, 4))[3]
    shard_path(tmp_path, "train", 2).unlink()
    with quiet(tmp_path, mark=mark) as tracker:
        assert tracker.cut is not None
        assert tracker.cut.missing == ("train/2",)
        assert tracker.mark()["shards"] == {"train": [[1, 1], [3, 3]]}


def test_spans() -> None:
    names = [("b", 0), ("a", 3), ("a", 10), ("a", 2), ("a", 11), ("a", 5)]
    expected = {"a": [[2, 3], [5, 5], [10, 11]], "b": [[0, 0]]}
    assert spans(shard_path(Path("x"), kind, step) for kind, step in names) == expected


# --- TensorBoard -------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    with quiet(tmp_path, tensorboard=True) as tracker:
        tracker.log(1, {"reward": 0.25, "loss": math.nan})
        tracker.log(2, {"reward": 0.5})
        tracker.flush()
        assert [p[:2] for p in board(tmp_path)["train/reward"]] == [(1, 0.25), (2, 0.5)]  # while the run goes on
    points = board(tmp_path)
    times = [r["time"] for r in read_metrics(tmp_path)]
    assert points == {"train/reward": [(1, 0.25, times[0]), (2, 0.5, times[1])]}


def test_tensorboards_reader_finds_scalars_as_users_call_it(tmp_path: Path) -> None:
    """With no arguments of its own, for the folder and for the file, and among the scalars alone."""
    with quiet(tmp_path, tensorboard=True) as tracker:
        tracker.log(0, {"pass_at_1": 0.25}, kind="eval/before")
        tracker.log(1, {"reward": 0.5, "off_policy/age_share/0": 1.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    for path in (tmp_path / "tensorboard", file):
        events = EventAccumulator(str(path)).Reload()
        tags = {kind: found for kind, found in events.Tags().items() if found}
        assert tags == {"scalars": ["eval/before/pass_at_1", "train/reward", "train/off_policy/age_share/0"]}
        assert [(e.step, e.value) for e in events.Scalars("train/reward")] == [(1, 0.5)]


def test_tensorboard_is_rebuilt_after_a_cut(tmp_path: Path) -> None:
    mark = run_of(tmp_path, range(1, 6), tensorboard=True)[3]
    watching = reader(tmp_path)
    assert [e.step for e in watching.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    with quiet(tmp_path, tensorboard=True, mark=mark) as tracker:
        tracker.log(4, {"loss": 40})
    times = {r["step"]: r["time"] for r in read_metrics(tmp_path, kind="train")}
    expected = [(1, 1.0, times[1]), (2, 2.0, times[2]), (3, 3.0, times[3]), (4, 40.0, times[4])]
    assert board(tmp_path)["train/loss"] == expected
    assert [p[0] for p in board(tmp_path)["eval/held/pass_at_1"]] == [1, 2, 3]
    # A viewer that was open all the time.
    assert [(e.step, e.value) for e in watching.Reload().Scalars("train/loss")] == [p[:2] for p in expected]
    with quiet(tmp_path, tensorboard=False, mark={}):  # switched off since: what it shows is cut all the same
        assert board(tmp_path) == {}


def test_tensorboard_keeps_kinds_whose_steps_lie_beyond_the_cut(tmp_path: Path) -> None:
    """The warm start counts demonstrations: cutting back to training's step 1 leaves them all."""
    with quiet(tmp_path, tensorboard=True) as tracker:
        for done in (8, 16):
            tracker.log(done, {"loss": 1 / done}, kind="warm_start")
        tracker.log(1, {"loss": 1.0})
        mark = tracker.mark()
        tracker.log(2, {"loss": 2.0})
    with quiet(tmp_path, tensorboard=True, mark=mark):
        points = board(tmp_path)
    assert [p[:2] for p in points["warm_start/loss"]] == [(8, 0.125), (16, 0.0625)]
    assert [p[:2] for p in points["train/loss"]] == [(1, 1.0)]


def test_an_open_tensorboard_goes_on_where_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = run_of(tmp_path, range(1, 4), tensorboard=True)[2]
    watching = reader(tmp_path)
    assert [e.step for e in watching.Scalars("train/loss")] == [1, 2, 3]
    monkeypatch.setattr(time, "time", lambda: 1e9)  # 2001
    for value in (30.0, 31.0):  # twice: the second one resumes while the clock stands still
        with quiet(tmp_path, tensorboard=True, mark=mark) as tracker:
            tracker.log(3, {"loss": value})
        seen = [(e.step, e.value) for e in watching.Reload().Scalars("train/loss")]
        assert seen == [(1, 1.0), (2, 2.0), (3, value)]
        assert [p[:2] for p in board(tmp_path)["train/loss"]] == seen  # and one that is opened now


# --- full disks and odd clocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk(tmp_path: Path, tensorboard: bool) -> None:
    with small_disk(tmp_path / "disk") as disk:
        with quiet(disk, tensorboard=tensorboard) as tracker:
            tracker.log(1, {"loss": 1.0})
            tracker.trajectories.write([example(1.0)], step=1)
            mark = tracker.mark()
            ballast = fill(disk)
            tracker.trajectories.write([example(2.0)], step=2)
            with pytest.raises(ArealError, match=r"step-000002\.parquet cannot be written \(No space left") as caught:
                tracker.flush()
            assert "free some space on that disk, then go on with --resume" in str(caught.value)
            for step in range(2, 40):  # into the last page of the file, and beyond it
                with contextlib.suppress(ArealError):
                    tracker.log(step, {f"a{i}": 1.0 for i in range(50)})
            with contextlib.suppress(ArealError):
                tracker.flush()
            tracker.trajectories.write([example(2.0)], step=3)
            with pytest.raises(ArealError, match=r"cannot be written \(No space left on device\)"):
                tracker.mark()
        assert (disk / "metrics.jsonl").read_bytes().endswith(b"}\n")  # no half line
        assert read_shard(shard_path(disk, "train", 1))[0].trajectory == example(1.0)
        assert not list(disk.rglob("*.tmp"))
        ballast.unlink()
        with quiet(disk, tensorboard=tensorboard, mark=mark) as tracker:
            tracker.log(2, {"loss": 2.0})
            tracker.trajectories.write([example(2.0)], step=2)
        assert [r["loss"] for r in read_metrics(disk)] == [1.0, 2.0]
        assert [r.step for r in read_records(disk)] == [1, 2]
        if tensorboard:
            assert [p[:2] for p in board(disk)["train/loss"]] == [(1, 1.0), (2, 2.0)]


def test_tensorboard_on_a_full_disk_raises_at_every_row_and_hangs_at_none(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        folder = disk / "tensorboard"
        rows = [("train", step, 1.7e9 + step, {"loss": float(step)}) for step in range(1, 400)]  # 20 kB, 5 pages
        full = Board(folder)
        full.add(rows[0])
        ballast = fill(disk)
        written = [rows[0]]

        def add_all() -> None:
            for row in rows[1:]:
                full.add(row)
                written.append(row)

        with pytest.raises(OSError, match="No space left"):
            add_all()
        with pytest.raises(OSError, match="No space left"):
            full.add(rows[-1])
        full.close()
        expected = [(step, values["loss"], wall) for _, step, wall, values in written]
        assert board(disk)["train/loss"] == expected
        with pytest.raises(OSError, match="No space left"):
            Board(folder, rows)
        assert board(disk)["train/loss"][: len(expected)] == expected  # what the failed one was to replace
        ballast.unlink()
        Board(folder, rows).close()
        assert [p[0] for p in board(disk)["train/loss"]] == list(range(1, 400))


def test_a_clock_that_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wall = iter(range(2_000_000_000, 0, -100_000))  # a day back at every look
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: float(next(wall)))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Tracker(tmp_path, steps=10) as tracker:
        tracker.start_clock()
        for step in (1, 2, 3):
            now[0] += 20.0
            tracker.log(step, {"reward": step / 4})
            tracker.event("step", step=step)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert [r["time"] for r in rows] == sorted((r["time"] for r in rows), reverse=True)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events] == [1, 2, 3]
    assert [p[:2] for p in board(tmp_path)["train/reward"]] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("ETA ")[1] for line in lines] == ["3:00", "2:40", "2:20"]


# --- picture -----------------------------------------------------------------------------------------------------


def test_plot_is_a_picture(tmp_path: Path) -> None:
    with quiet(tmp_path) as tracker:
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
