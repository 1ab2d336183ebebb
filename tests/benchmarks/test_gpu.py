"""The GPU's benchmark: all of it on a CPU, its counts by hand-worked numbers, and parts that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from areal_agents.learner.packing import Pack, Segment, pack_rows
from tests.processes import MARKER, marked
from tests.simulated import BENCHMARKS, benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny", "--quick", "--json", path]
    done = subprocess.run(
        [*map(str, command), "--commit", "abc", "--seconds", "1200"], capture_output=True, text=True, timeout=1300
    )
    assert path.is_file(), done.stdout + done.stderr
    record = json.loads(path.read_text())
    for part in record["parts"]:
        assert part["status"] == "done", part["reason"]
    assert record["commit"] == "abc"
    assert (record["card"]["name"], record["card"]["torch"]) == ("cpu", torch.__version__)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record["samples"]:
        found.setdefault(row["part"], []).append(row)
    assert {row["what"] for row in found["attention"]} == {"kernel", "gradient", "pack"}
    assert {(row["tokens"], row["rows"]) for row in found["attention"] if row["what"] == "pack"} == {(320, 1), (320, 8)}
    steps = [row for row in found["step"] if row["what"] == "step"]
    assert {(row["gradient_checkpointing"], row["chunk"], row["pack"]) for row in steps} == {
        (kept, chunk, pack) for kept in (False, True) for chunk, pack in ((16, 320), (64, 320), (16, 640))
    }
    assert all(row["packs"] == 2 and row["scored"] == 2 * row["pack"] * 7 // 8 for row in steps)
    assert [row["turn"] for row in found["weights"] if row["what"] == "handed to another process"] == [0, 1, 2]
    outcomes = {(row["case"], row.get("rank")): row["outcome"] for row in found["groups"]}
    assert outcomes["missing", 0] == "raised"
    assert outcomes["killed", 1] == "ended with signal SIGKILL"
    assert outcomes["pair", 0] == outcomes["pair", 1] == outcomes["round", None] == "ended well"
    assert [row["version"] for row in found["probe"] if row["what"] == "version"] == list(range(6))
    held = {check["name"]: check["holds"] for check in record["checks"]}
    assert len(held) == 17
    held.pop("seconds of a missing member over the deadline")  # a clock
    assert all(held.values()), held
    assert "attention alone, relative errors" in done.stdout


def operations_config() -> Any:
    return module("gpu_models").model_config(
        "tiny", hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=5,
    )  # fmt: skip


def test_operations_hand_worked() -> None:
    nothing = np.zeros(0, np.int64)
    segments = (Segment(0, 2, ()), Segment(2, 3, (0,)))
    pack = Pack((0,), (1, 3), np.zeros(3, np.int64), nothing, (nothing,), segments)
    # A layer's products have 4·4 (Q) + 4·2 (K) + 4·2 (V) + 4·4 (O) + 3·4·3 = 84 weights; pairs that look at each other:
    # 1 + 2 in the first segment, 3 in the second, each 2 · 2 · 4 operations. The head: 2 · 5 · 4 for each of 2.
    assert module("gpu_models").operations(operations_config(), [pack], 2) == 3 * (2 * 84 * 3 + 16 * 6 + 80)


def test_random_rows_make_one_pack_of_that_size() -> None:
    models = module("gpu_models")
    for tokens, grouped, prompt, segments in ((320, True, 40, 9), (320, False, 40, 1)):
        rows = models.random_rows(tokens, 512, grouped=grouped, prompt=prompt)
        (pack,) = pack_rows([row.ids for row in rows], token_budget=tokens)
        assert (pack.tokens, len(pack.segments)) == (tokens, segments)
        assert [int(row.mask.sum()) for row in rows] == [280 // len(rows)] * len(rows)


PART = """
import os, signal, subprocess, sys
sys.path.insert(0, {path!r})
from gpu_parts import main
def rows(settings):
    yield {{"device": settings.device, "tiny": settings.tiny}}
    print("a stray line")
    {then}
main(rows)
"""


def outcome(folder: Path, then: str, *, seconds: float = 60.0) -> Any:
    parts = module("gpu_parts")
    script = folder / "part.py"
    script.write_text(PART.format(path=str(BENCHMARKS), then=then))
    return parts.run(parts.Part("x", str(script), 1.0), parts.Settings("cpu", True, False), seconds=seconds)


def test_a_part_that_fails_leaves_its_reason_and_its_rows(tmp_path: Path) -> None:
    row = {"device": "cpu", "tiny": True}
    for then, status, reason in (
        ("yield {'n': 2}", "done", ""),
        ("raise ValueError('too large')", "failed", "ValueError: too large"),
        ("os.kill(os.getpid(), signal.SIGABRT)", "failed", "it ended with signal SIGABRT"),
        ("os._exit(3)", "failed", "it ended with code 3"),
        ("os._exit(0)", "failed", "it ended with code 0"),
    ):
        found = outcome(tmp_path, then)
        assert (found.status, found.reason.splitlines()[:1]) == (status, [reason] if reason else [])
        assert found.rows == [row, {"n": 2}] if status == "done" else [row]
    assert "a stray line" in outcome(tmp_path, "sys.exit(1)").reason


def test_a_part_that_is_late_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARKER, str(tmp_path))
    then = "subprocess.Popen(['sleep', '600'], start_new_session=True).wait()"
    found = outcome(tmp_path, then, seconds=3.0)
    assert (found.status, found.reason) == ("timed out", "it did not end within 3 s")
    end = time.monotonic() + 30
    while marked(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not marked(str(tmp_path))


def test_parts_that_no_time_is_left_for_are_recorded() -> None:
    gpu, parts = module("gpu"), module("gpu_parts")
    found = gpu.run_parts(gpu.PARTS, parts.Settings("cuda", False, False), seconds=0.0)
    assert [o.name for o in found] == [part.name for part in gpu.PARTS]
    assert {(o.status, o.reason) for o in found} == {("timed out", "no time was left of 0 s")}
    held = module("gpu_summary").checks(found, on_gpu=True)
    assert not any(check.holds for check in held), "what was not shown does not hold"
    assert sum(part.seconds for part in gpu.PARTS) == gpu.SECONDS < 600


def test_goals_and_shares_of_the_peak() -> None:
    summary, parts = module("gpu_summary"), module("gpu_parts")
    kernel = {"what": "kernel", "format": "bfloat16", "output_error": 0.01, "gradient_errors": [0.01, 0.3, 0.01]}
    pack = {
        "what": "pack", "fits": True, "tree_chosen": True, "tflops": 400.0, "seconds": 1.0, "kernel_seconds": 0.9,
        "kernels": [["flash_fwd_kernel", 28, 1.0]],
    }  # fmt: skip
    math = pack | {"kernels": [["softmax_warp_forward", 28, 1.0]]}
    found = [
        parts.Outcome("card", "done", "", 1.0, [{"what": "card", "peak_tflops": 800.0}]),
        parts.Outcome("attention", "failed", "it ended\nwith more", 1.0, [kernel, pack, math]),
        parts.Outcome("groups", "done", "", 1.0, [
            {"case": "missing", "outcome": "raised", "after": 11.0, "deadline": 10.0},
            {"case": "missing", "outcome": "hung", "deadline": 10.0},
        ]),
    ]  # fmt: skip
    held = {check.name: check for check in summary.checks(found, on_gpu=True)}
    assert (held["part attention"].holds, held["part attention"].reason) == (False, "it ended")
    assert (held["error of attention, bfloat16"].value, held["error of attention, bfloat16"].holds) == (0.3, False)
    assert held["error of attention, float32"].reason == "no row says it"
    assert held["packs whose attention is not flash attention's"].value == 1
    assert held["packs without the tree layout"].holds
    assert held["seconds of a missing member over the deadline"].value is None
    assert "part step" not in held, "a part that was not asked for has no goals"
    assert "packs whose attention is not flash attention's" not in {
        check.name for check in summary.checks(found, on_gpu=False)
    }
    line = next(line for line in summary.summarize(found).splitlines() if "flash_fwd_kernel" in line)
    assert "50.0" in line, "400 of 800 TFLOP/s"
    assert "90" in line, "the kernels' share of the time"


def test_a_copy_without_git_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = module("record")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit().startswith("unknown: ")
