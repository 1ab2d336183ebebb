"""``areal-agents verify math``, as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from areal_agents.cli.main import main


def verified(rows: list[object], tmp_path: Path, *options: str) -> list[dict[str, object]]:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    assert main(["verify", "math", "--jsonl", str(given), "--out", str(out), *options]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_come_out_in_order_each_with_its_verdict(tmp_path: Path) -> None:
    rows: list[object] = [
        {"gold": "1/2", "pred": "0.5", "id": 7},
        {"gold": ["5", "6"], "pred": r"so \boxed{6}", "slot": "boxed"},
        {"gold": "1/3", "pred": "0.33", "options": {"precision": 2}},
        {"gold": "1/3", "pred": "0.33"},
        {"gold": "5"},
        {"gold": "5", "pred": 5},
        {"gold": "5", "pred": "5", "slot": "here"},
        {"gold": "5", "pred": "5", "options": {"precison": 1}},
        "{broken",
        [1],
        {"gold": r"\frac{1}{", "pred": "5"},
    ]
    found = verified(rows, tmp_path, "--workers", "1")
    assert [row["status"] for row in found] == [
        "ok", "ok", "ok", "wrong", "parse_error", "parse_error", "parse_error", "parse_error", "parse_error",
        "parse_error", "gold_error",
    ]  # fmt: skip
    assert [row["score"] for row in found] == [1, 1, 1] + [0] * 8
    assert found[0]["id"] == 7
    assert found[4]["detail"] == "'pred' is missing"
    assert "unknown slot 'here'" in str(found[6]["detail"])
    assert "unknown option 'precison'" in str(found[7]["detail"])
    assert "no JSON" in str(found[8]["detail"])
    assert all(isinstance(row["elapsed_ms"], float) for row in found)


def test_nothing_is_overwritten_and_wrong_usage_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("")
    out.write_text("kept")
    command = ["verify", "math", "--jsonl", str(given), "--out", str(out)]
    assert main(command) == 2
    assert out.read_text() == "kept"
    assert "exists: name another file" in capsys.readouterr().err
    out.unlink()
    assert main([*command, "--workers", "-1"]) == 2
    given.unlink()
    assert main(command) == 1
    assert "cannot read" in capsys.readouterr().err


def test_a_row_that_no_file_can_hold_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    given, out = tmp_path / "rows.jsonl", tmp_path / "verdicts.jsonl"
    half = r'{"gold": "5", "pred": "\ud800"}'  # JSON that holds half a character
    given.write_text("\n".join([half, "[" * 200_000, '{"gold": "5", "pred": "5"}']))
    assert main(["verify", "math", "--jsonl", str(given), "--out", str(out), "--workers", "1"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["status"] for row in rows] == ["parse_error", "parse_error", "ok"]
    assert rows[0]["pred"] == "\ud800"


def test_no_row_is_lost_between_two_batches(tmp_path: Path) -> None:
    rows: list[object] = [{"gold": str(i), "pred": f"{i + i % 2}.0", "id": i} for i in range(300)]
    found = verified(rows, tmp_path, "--workers", "1")
    assert [row["id"] for row in found] == list(range(300))
    assert [row["score"] for row in found] == [1, 0] * 150


def test_broken_rows_have_verdicts_of_their_own_and_valid_json(tmp_path: Path) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        b'\xef\xbb\xbf{"gold": "1", "pred": "1"}', b"", b'{"gold": "\xff", "pred": "1"}', b"null",
        b'{"gold": "1", "pred": "1", "id": NaN}', b'{"gold": "1", "pred": "1", "options": [1]}',
        b'{"gold": "1", "pred": "1", "options": []}', b'{"gold": "1", "pred": "1", "slot": null}', b"[" * 5000,
        b'{"line": 1, "status": "parse_error"}', b'{"gold": "\\ud800", "pred": "1"}', b'{"gold": "2", "pred": "2"}',
    ]  # fmt: skip
    given.write_bytes(b"\n".join(lines))
    assert main(["verify", "math", "--jsonl", str(given), "--out", str(out)]) == 0

    def refuse(name: str) -> float:
        raise AssertionError(name)

    found = [json.loads(line, parse_constant=refuse) for line in out.read_text().splitlines()]
    broken = ["parse_error"] * 8
    assert [row["status"] for row in found] == ["ok", *broken, "gold_error", "ok"]
    assert [row.get("line") for row in found] == [None, 3, None, 5, None, None, None, 9, 1, None, None]
    assert found[4]["detail"] == "options are no table, but [1]"
    assert found[8]["detail"] == "'gold' is missing"


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out, partial = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.partial"))
    rows = [json.dumps({"gold": f"x+{i}", "pred": f"{i}+x", "id": i}) for i in range(20_000)]
    given.write_text("".join(f"{row}\n" for row in rows))
    command = ["verify", "math", "--jsonl", str(given), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "areal_agents", *command], stderr=subprocess.PIPE, text=True)
    while not (partial.exists() and partial.stat().st_size):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert f"{partial} keeps what is verified; go on with --resume" in process.communicate(timeout=120)[1]
    assert process.returncode == 130
    kept = partial.read_text().splitlines()
    assert 64 <= len(kept) < 20_000
    assert main(command) == 2
    assert "is of an interrupted call: go on with --resume" in capsys.readouterr().err

    enough = len(kept) + 70
    given.write_text("".join(f"{row}\n" for row in rows[:enough]))
    with partial.open("a") as file:
        file.write('{"gold": "torn')
    assert main([*command, "--resume"]) == 0
    found = out.read_text().splitlines()
    assert found[: len(kept)] == kept
    assert [json.loads(line)["id"] for line in found] == list(range(enough))
    assert f"{enough} ok" in capsys.readouterr().err
    assert not partial.exists()

    out.rename(partial)
    given.write_text("".join(f"{row}\n" for row in reversed(rows[:enough])))
    assert main([*command, "--resume"]) == 1
    assert f"has verdicts on other rows than {given}" in capsys.readouterr().err
    given.write_text(f"{rows[0]}\n")
    assert main([*command, "--resume"]) == 1  # fewer rows than verdicts
    assert len(partial.read_text().splitlines()) == enough  # nothing was taken away


def test_what_cannot_be_written_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text('{"gold": "1", "pred": "1"}\n')
    for out in (tmp_path / "none" / "out.jsonl", Path("/proc/out.jsonl")):
        assert main(["verify", "math", "--jsonl", str(given), "--out", str(out)]) == 1
        assert f"cannot write {out}.partial: No such file" in capsys.readouterr().err
    assert main(["verify", "math", "--jsonl", str(tmp_path), "--out", str(tmp_path / "out.jsonl")]) == 1
    assert f"cannot read {tmp_path}: Is a directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [given]


def test_rows_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    rows = "".join(json.dumps({"gold": str(i), "pred": str(i)}) + "\n" for i in range(100))
    writer = threading.Thread(target=pipe.write_text, args=(rows,))
    writer.start()
    assert main(["verify", "math", "--jsonl", str(pipe), "--out", str(out), "--workers", "1"]) == 0
    writer.join()
    assert len(out.read_text().splitlines()) == 100
