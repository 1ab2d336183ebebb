"""The tools people have read the shards: every block of docs/trajectories.md is run, on a run's real files."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from areal_agents.tracking.trajectories import Record, shard_path, write_shard
from areal_agents.types import AssistantMessage, Completion, Text, ToolCall, Trajectory, Turn
from tests.tracking.test_trajectories import example

PAGE = Path(__file__).parents[2] / "docs" / "trajectories.md"


def failing(id: str) -> Trajectory:
    call = ToolCall("c0", "python", {}, "{oops", "invalid_json")
    turn = Turn((1,), Completion((8,), (-0.5,), (2,), "stop"), AssistantMessage((Text("try {oops"),), (call,)))
    return Trajectory(id, example().task, "g1", (turn,), True, False, "answer")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``runs/demo`` in it, which is the working directory."""
    out = tmp_path / "runs" / "demo"
    for kind, step, episodes in (
        ("train", 1, [example(0.0, "a"), example(1.0, "b")]),
        ("train", 2, [example(1.0, "c"), failing("d")]),
        ("eval-after_rl", 2, [example(1.0, "e")]),
        ("eval-step_1", 1, []),
    ):
        write_shard(shard_path(out, kind, step), [Record(kind, step, t) for t in episodes])
    (out / "trajectories" / "train" / ".step-000003.parquet.tmp").write_bytes(b"PAR1")  # a killed process's
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def blocks(language: str, word: str) -> str:
    """The one block of the page in ``language`` that holds ``word``."""
    found = [
        b for b in re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL) if word in b
    ]
    assert len(found) == 1, word
    return str(found[0])


def python(word: str) -> tuple[str, dict[str, Any]]:
    """What a Python block prints, and its names."""
    names: dict[str, Any] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(blocks("python", word), str(PAGE), "exec"), names)
    return out.getvalue(), names


def test_the_page_has_no_block_that_is_not_run_here() -> None:
    assert len(re.findall(r"```(?:python|sql)\n", PAGE.read_text(encoding="utf-8"))) == 7


def test_one_episode(run: Path) -> None:
    printed, names = python("read_episode")
    assert (names["first"].id, printed) == ("a", example(0.0, "a").turns[0].message.text + "\n")


def test_this_package(run: Path) -> None:
    printed, _ = python("read_records")
    assert printed == "1 0.0 \n1 1.0 \n2 1.0 \n2 0.0 try {oops\n"


def test_pandas(run: Path) -> None:
    printed, names = python("pandas")
    episodes = names["episodes"]
    assert list(episodes["id"]) == ["a", "b", "c", "d"]
    assert [line.split() for line in printed.splitlines()][2:] == [
        ["1", "0.5", "2.0", "3.0"],
        ["2", "0.5", "1.5", "2.0"],
    ]
    assert episodes["reward"].dtype == "float64"
    assert episodes["step"].dtype == "int64"
    assert [list(turn["ids"]) for turn in episodes["turns"][0]] == [[4, 5], [7]]
    assert list(episodes["turns"][0][0]["logprobs"]) == [-0.1, -1e-300]


def test_duckdb(run: Path) -> None:
    import duckdb

    with duckdb.connect() as db:
        assert db.execute(blocks("sql", "GROUP BY kind")).fetchall() == [
            ("eval-after_rl", 2, 1, 1.0, 3.0),
            ("train", 1, 2, 0.5, 3.0),
            ("train", 2, 2, 0.5, 2.0),
        ]
        assert db.execute(blocks("sql", "call.status <>")).fetchall() == [("d", "try {oops", "invalid_json", "{oops")]
        tokens = db.execute(blocks("sql", "AS logprob") + " ORDER BY id, token").fetchall()
        assert tokens[:3] == [("a", 1, 4, -0.1, 0), ("a", 1, 5, -1e-300, 1), ("a", 1, 7, -2.0, 1)]
        assert tokens[-1] == ("d", 2, 8, -0.5, 2)
        gold = "SELECT DISTINCT json_extract_string(task_payload, '$.gold') FROM 'runs/demo/trajectories/*/*.parquet'"
        assert db.execute(gold).fetchall() == [("2",)]
        groups = "SELECT \"group\", count(*) FROM 'runs/demo/trajectories/train/*.parquet' GROUP BY ALL ORDER BY ALL"
        assert db.execute(groups).fetchall() == [("g0", 3), ("g1", 1)]


def test_datasets(run: Path) -> None:
    from datasets import load_dataset

    files = str(run / "runs/demo/trajectories/train/*.parquet")
    episodes = load_dataset("parquet", data_files=files, split="train", cache_dir=str(run / "cache"))
    assert episodes["id"] == ["a", "b", "c", "d"]
    assert episodes[0]["turns"][0]["logprobs"] == [-0.1, -1e-300]
    assert episodes[0]["turns"][0]["tool_calls"][0]["name"] == "python"
    code = blocks("python", "load_dataset").replace('split="train"', f'split="train", cache_dir={str(run / "cache")!r}')
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(PAGE), "exec"), {})
    assert out.getvalue() == "a\n\n"
