"""W&B: the real package, offline; what it stored is read back from its own files."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from areal_agents.errors import ConfigError
from areal_agents.tracking import wandb as wandb_log
from areal_agents.tracking.tracker import Tracker

pytest.importorskip("wandb", reason="needs the wandb extra")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


def tracker(out: Path, **arguments: Any) -> Tracker:
    return Tracker(out, **{"tensorboard": False, "console": False, "wandb": "gym", **arguments})


def records(path: Path) -> list[Any]:
    """The records of an offline run's ``.wandb`` file: LevelDB's log format after seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, chunk, out = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # the rest of a block that no header fits in
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            out.append(Record.FromString(chunk))
            chunk = b""
    return out


def stored(out: Path) -> list[dict[str, Any]]:
    """What W&B holds, a dictionary an offline run, in the order they were made."""
    runs = []
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        run: dict[str, Any] = {"rows": [], "axes": {}}
        for record in records(path):
            what = record.WhichOneof("record_type")
            if what == "history":
                items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                items.pop("_runtime", None)
                run["rows"].append(items)
            elif what == "run" and "id" not in run:
                r = record.run
                run |= {"id": r.run_id, "project": r.project, "name": r.display_name, "group": r.run_group}
                run["config"] = {u.key: json.loads(u.value_json) for u in r.config.update if u.key != "_wandb"}
            elif what == "metric":
                run["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        runs.append(run)
    return runs


def test_metrics_evals_and_config_arrive_and_nothing_stays_behind(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with tracker(tmp_path, config={"seed": 3, "learner": {"lr": 1e-5}}) as t:
        t.log(1, {"reward": 0.25, "loss": math.nan})
        t.log(1, {"pass_at_1": 0.5}, kind="eval/before")
        t.log(2, {"reward": 0.5})
    assert set(threading.enumerate()) <= threads
    assert [p.name() for p in psutil.Process().children(recursive=True) if "wandb" in p.name()] == []
    (run,) = stored(tmp_path)
    times = [json.loads(line)["time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert run["rows"] == [
        {"step": 1, "train/reward": 0.25, "_step": 0, "_timestamp": times[0]},
        {"step": 1, "eval/before/pass_at_1": 0.5, "_step": 1, "_timestamp": times[1]},
        {"step": 2, "train/reward": 0.5, "_step": 2, "_timestamp": times[2]},
    ]
    assert run["axes"]["*"] == "step"
    assert run["project"] == "gym"
    assert run["config"] == {"seed": 3, "learner": {"lr": 1e-5}}
    state = json.loads((tmp_path / "wandb.json").read_text())
    assert (state["id"], state["name"], state["group"]) == (run["id"], tmp_path.name, run["group"])
    assert not (tmp_path / "events.jsonl").exists()  # nothing went wrong


def test_a_resume_that_cuts_starts_a_run_with_what_remains_and_one_that_does_not_goes_on(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        for step in (1, 2):
            t.log(step, {"loss": step})
        mark = t.mark()
        t.log(3, {"loss": 3})
    with tracker(tmp_path, mark=mark) as t:  # step 3 is discarded
        t.log(3, {"loss": 30})
        mark = t.mark()
    with tracker(tmp_path, mark=mark) as t:  # nothing is
        t.log(4, {"loss": 4})
    first, second, third = stored(tmp_path)
    rows = [[(r["_step"], r["step"], r["train/loss"]) for r in run["rows"]] for run in (first, second, third)]
    assert rows == [[(0, 1, 1), (1, 2, 2), (2, 3, 3)], [(0, 1, 1), (1, 2, 2), (2, 3, 30)], [(3, 4, 4)]]
    assert first["id"] != second["id"] == third["id"]
    assert first["group"] == second["group"] == third["group"]
    assert (second["name"], third["name"]) == (f"{tmp_path.name}-resumed-at-2",) * 2


def test_disabled_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with tracker(tmp_path) as t:
        t.log(1, {"reward": 0.25})
    assert stored(tmp_path) == []
    assert not (tmp_path / "events.jsonl").exists()


def test_no_key_is_one_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with tracker(tmp_path, console=True) as t:
        for step in range(3):
            t.log(step, {"reward": 0.25}, show=False)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert event["kind"] == "wandb_failed"
    assert "no API key: run `wandb login`, or set WANDB_MODE=offline" in event["error"]
    assert capsys.readouterr().out.count("warning: W&B gets nothing more from this run") == 1


def test_a_failure_midway_is_one_warning_and_the_next_resume_sends_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    real = wandb.Run.log

    def log(run: wandb.Run, data: dict[str, Any], **arguments: Any) -> None:
        if data["step"] == 2:
            raise ConnectionError("the service went away")
        real(run, data, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(wandb.Run, "log", log)
        with tracker(tmp_path) as t:
            for step in (1, 2, 3):
                t.log(step, {"loss": step})
            mark = t.mark()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["kind"], e["error"]) for e in events] == [("wandb_failed", "ConnectionError: the service went away")]
    assert [r["step"] for r in stored(tmp_path)[0]["rows"]] == [1]
    with tracker(tmp_path, mark=mark):
        pass
    assert [r["step"] for r in stored(tmp_path)[1]["rows"]] == [1, 2, 3]


def test_the_package_is_needed_before_a_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'areal-agents\[wandb\]'"):
        tracker(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hanging_service_does_not_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    answer = threading.Event()
    monkeypatch.setattr(wandb_log, "PATIENCE", 1.0)
    monkeypatch.setattr(wandb.Run, "log", lambda run, data, **arguments: answer.wait(60))
    t = tracker(tmp_path)
    t.log(1, {"loss": 1.0})
    assert t._wandb is not None
    t.close()  # returns
    answer.set()
    t._wandb._thread.join()
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["kind"], event["error"]) == ("wandb_failed", "it did not finish within 3 s")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


KILLED = """
import sys, time, pathlib, psutil
from areal_agents.tracking.tracker import Tracker
t = Tracker(pathlib.Path(sys.argv[1]), tensorboard=False, console=True, wandb="gym")
t.log(1, {"loss": 1.0})
while not (found := [p.pid for p in psutil.Process().children() if p.name() == "wandb-core"]):
    time.sleep(0.05)
print("pids", *found, flush=True)
time.sleep(600)
"""


def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = next(text for text in child.stdout if text.startswith("pids"))
        left = [psutil.Process(int(pid)) for pid in line.split()[1:]]
    finally:
        child.kill()
        child.communicate()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []


def test_importing_the_tracker_imports_nothing_heavy() -> None:
    code = "import areal_agents.tracking.tracker, sys\n"
    code += "print({'wandb', 'pyarrow', 'tensorboard', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
