"""``areal-agents verify math``, as a user calls it."""

from __future__ import annotations

import json
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
