"""Trajectory shards: every value back exactly, whole files or none, clear errors."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_agents.errors import ArealError
from areal_agents.tracking import exact_json, trajectories
from areal_agents.tracking.one_episode import Earned, read_earned
from areal_agents.tracking.trajectories import Record, read_records, read_shard, shard_path, shards, write_shard
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Finish,
    Image,
    Message,
    Task,
    Text,
    ToolCall,
    Trajectory,
    Turn,
    user,
)


def example(reward: float = 1.0, id: str = "e0") -> Trajectory:
    call = ToolCall("c0", "python", {"code": "print(1)"}, '<tool_call>{"name": …', "ok", (0, 2))
    turns = (
        Turn(
            prompt_suffix=(1, 2, 3),
            completion=Completion((4, 5), (-0.1, -1e-300), (0, 1), "stop"),
            message=AssistantMessage((Text("a\n"),), (call,)),
            observation=(user("What is 1 + 1?"),),
            state_key="start",
        ),
        Turn(
            (6,),
            Completion((7,), (-2.0,), (1,), "length"),
            AssistantMessage((), finish="length"),
            reward,
            {"ok": 1.0},
            0,
        ),
    )
    task = Task.make("t0", split="train", seed=7, payload={"question": "1 + 1", "gold": "2", "numbers": [1, 1]})
    return Trajectory(
        id, task, "g0", turns, True, False, "answer", (Message("tool", (Image("a.png"),), "c0", "python"),)
    )


def test_round_trip(tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 3)
    assert path == tmp_path / "trajectories" / "train" / "step-000003.parquet"
    records = [Record("train", 3, example(r, f"e{i}")) for i, r in enumerate((0.0, 1.0, 0.5))]
    write_shard(path, records)
    assert read_shard(path) == records
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_calls_format_and_problem_come_back_and_older_shards_have_none(tmp_path: Path) -> None:
    call = ToolCall("c0", "f", {}, "<tool_call>f", "invalid_arguments", None, "glm", "'x' is given \ud800 twice")
    whole = example()
    turns = (replace(whole.turns[0], message=AssistantMessage((Text("a"),), (call,))),)
    write_shard(tmp_path / "x.parquet", [Record("train", 0, replace(whole, turns=turns))])
    (read,) = read_shard(tmp_path / "x.parquet")
    assert read.trajectory.turns[0].message.tool_calls == (call,)
    row = trajectories._call_row(ToolCall("c0", "f", {"x": 1}, "raw"))
    older = {key: value for key, value in row.items() if key not in ("format", "problem")}
    assert trajectories._call(older) == trajectories._call(row)


def test_an_empty_shard_is_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.parquet", [])
    assert read_shard(tmp_path / "x.parquet") == []


def test_the_columns_are_typed(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.parquet", [Record("train", 3, example())])
    table = pq.read_table(tmp_path / "x.parquet")
    row = table.to_pylist()[0]
    plain = {k: v for k, v in row.items() if k not in ("turns", "final_observation", "content_hash")}
    assert plain == {
        "schema_version": 3, "kind": "train", "step": 3, "id": "e0", "group": "g0", "task_id": "t0",
        "task_split": "train", "task_seed": 7, "task_payload": '{"question":"1 + 1","gold":"2","numbers":[1,1]}',
        "reward": 1.0, "terminated": True, "truncated": False, "stop_reason": "answer", "error": None, "n_turns": 2,
        "n_tool_calls": 1, "n_valid_tool_calls": 1, "sampled_tokens": 3, "min_version": 0, "max_version": 1,
        "metrics": "{}", "tail": None, "outcome": None,
    }  # fmt: skip
    assert row["turns"][0]["text"] == "a\n"
    assert row["turns"][0]["observation"][0]["text"] == "What is 1 + 1?"
    assert row["turns"][0]["tool_calls"][0]["arguments"] == '{"code":"print(1)"}'
    turn = table.schema.field("turns").type.value_type
    assert turn.field("logprobs").type == pa.list_(pa.float64())
    assert turn.field("ids").type == turn.field("versions").type == pa.list_(pa.int32())
    assert pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    assert table.schema.metadata[b"areal_agents.schema_version"] == b"3"


def test_a_file_of_version_2_is_read_and_its_state_keys_are_those_that_were_shown(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    first, last = example().turns
    keyed = replace(example(), turns=(replace(first, state_key="after 0"), replace(last, state_key="after 1")))
    write_shard(path, [Record("train", 3, keyed)])
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["schema_version"] = 2
        for turn in row["turns"]:
            del turn["in_thought"]
    old = pa.Table.from_pylist(rows)
    pq.write_table(old.replace_schema_metadata({b"areal_agents.schema_version": b"2"}), path)
    (back,) = read_shard(path)
    assert [turn.state_key for turn in back.trajectory.turns] == [None, "after 0"]
    shown = replace(keyed, turns=(replace(first, state_key=None), replace(last, state_key="after 0")))
    assert back.trajectory == shown
    assert read_earned(path) == [Earned.of(shown)]


def test_what_utf8_and_json_lack_comes_back(tmp_path: Path) -> None:
    pair, mark = "\ud83d\ude00", "\ufdd0d800"  # two lone surrogates are no emoji; a mark in the text is no mark
    arguments = {"x": math.nan, "s": "\ud800", "deep": {"y": (-math.inf, ()), "$float": 1}, "m": mark, "e": {}}
    call = ToolCall(pair, "", arguments, "\ud800\x00\u2028", "ok", (0, 0))
    turn = Turn(
        (), Completion((1,), (-math.inf,), (0,), "stop"),
        AssistantMessage((Text(mark), Text(pair), Image("")), (call,)),
        math.nan, {}, None, (Message("user", ()), Message("user", (Text(""),), "", "")), "",
    )  # fmt: skip
    task = Task(pair, "train", -(2**63), {"$float": "nan", "t": ((1, [2]), []), "i": {1: {(2,): None}}}, "")
    trajectory = Trajectory("e", task, mark, (turn,), False, True, "error", (), {"s": -math.inf, "z": -0.0}, "")
    write_shard(tmp_path / "x.parquet", [Record("train", 0, trajectory)])
    (back,) = read_shard(tmp_path / "x.parquet")
    assert repr(back.trajectory) == repr(trajectory)  # NaN is not equal to itself, but has one repr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": [1, 2.5, None, True, "é"]}, '{"a":[1,2.5,null,true,"é"]}'),
        (math.nan, '{"$float":"nan"}'),
        ((1, ()), '{"$tuple":[1,{"$tuple":[]}]}'),
        ({"$tuple": [1]}, '{"$dict":[["$tuple",[1]]]}'),
        ({1: "x"}, '{"$dict":[[1,"x"]]}'),
        ("\ud800", '"\ufdd0d800"'),
        (10**30, "1" + "0" * 30),
    ],
)
def test_exact_json_by_hand(value: Any, text: str) -> None:
    assert exact_json.dumps(value) == text
    assert repr(exact_json.loads(text)) == repr(value)


def test_shards_are_sorted_by_kind_and_step_and_temporary_files_are_left_out(tmp_path: Path) -> None:
    for kind, step in (("train", 10), ("train", 9), ("eval-before", 0), ("train", 1_000_000)):
        write_shard(shard_path(tmp_path, kind, step), [Record(kind, step, example(step / 10))])
    (tmp_path / "trajectories" / "train" / ".step-000011.parquet.1.tmp").write_bytes(b"PAR1")
    expected = [
        "eval-before/step-000000.parquet", "train/step-000009.parquet", "train/step-000010.parquet",
        "train/step-1000000.parquet",
    ]  # fmt: skip
    for out in (tmp_path, tmp_path / "trajectories"):
        assert [p.relative_to(tmp_path / "trajectories").as_posix() for p in shards(out)] == expected
        assert [(r.kind, r.step) for r in read_records(out)][:2] == [("eval-before", 0), ("train", 9)]
    assert [r.step for r in read_records(tmp_path, kind="train")] == [9, 10, 1_000_000]
    with pytest.raises(ArealError, match="no folder: name a run's folder"):
        shards(tmp_path / "none")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(ArealError, match=r"x\.parquet is no readable trajectory shard: FileNotFoundError"):
        read_shard(path)
    write_shard(path, [Record("train", 0, example())])
    whole = path.read_bytes()
    table = pq.read_table(path)
    for cut in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArealError, match=r"x\.parquet is no readable trajectory shard"):
            read_shard(path)
    pq.write_table(table.replace_schema_metadata({b"areal_agents.schema_version": b"7"}), path)
    with pytest.raises(ArealError, match="schema_version 7, but this package reads 2 and 3"):
        read_shard(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(ArealError, match="schema_version is missing"):
        read_shard(path)
    pq.write_table(table.drop_columns(["turns"]), path)
    with pytest.raises(ArealError, match="KeyError: 'turns'"):
        read_shard(path)


@pytest.mark.parametrize("kind", ["", "../x", "a/b", ".hidden", "a b"])
def test_a_kind_is_a_plain_name(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ArealError, match="a kind is letters"):
        shard_path(tmp_path, kind, 0)


def test_a_value_that_cannot_be_stored_names_itself_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_shard(path, [Record("train", 0, example())])
    for payload, seed, message in (({"x": {1, 2}}, 0, "set is no JSON value"), ({}, 2**63, "too large|too big|bounds")):
        odd = Trajectory("e", Task("t", "train", seed, payload, ""), "g", (), True, False, "answer")
        with pytest.raises(ArealError, match=message):
            write_shard(path, [Record("train", 0, odd)])
    assert read_shard(path) == [Record("train", 0, example())]
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    write_shard(path, [Record("train", 0, example(0.0))])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArealError, match=r"x\.parquet cannot be written \(No space left on device\): free"):
        write_shard(path, [Record("train", 0, example(1.0))])
    assert read_shard(path) == [Record("train", 0, example(0.0))]
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from("\ud83d\ude00\ufdd0d8"), max_size=8)
FLOAT = st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOAT | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT | st.sampled_from(["$float", "$tuple", "$dict"]) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
PARTS = st.lists(st.builds(Text, TEXT) | st.builds(Image, TEXT), max_size=2).map(tuple)
INT32 = st.integers(-(2**31), 2**31 - 1)
FINISHES: list[Finish] = ["stop", "length", "content_filter", "empty"]
FINISH = st.sampled_from(FINISHES)
CALLS = st.lists(
    st.builds(
        ToolCall, TEXT, TEXT, OBJECTS, TEXT,
        st.sampled_from(["ok", "invalid_json", "unclosed", "missing_name", "unknown_tool", "invalid_arguments"]),
        st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    ),
    max_size=2,
).map(tuple)  # fmt: skip
MESSAGES = st.lists(
    st.builds(
        Message, st.sampled_from(["system", "user", "assistant", "tool"]), PARTS, st.none() | TEXT, st.none() | TEXT
    ),
    max_size=2,
).map(tuple)
METRICS = st.dictionaries(TEXT, FLOAT, max_size=2)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    n = draw(st.integers(0, 4))
    ids, versions = (tuple(draw(st.lists(INT32, min_size=n, max_size=n))) for _ in range(2))
    return Completion(ids, tuple(draw(st.lists(FLOAT, min_size=n, max_size=n))), versions, draw(FINISH))


TURNS = st.builds(
    Turn,
    st.lists(INT32, max_size=3).map(tuple),
    completions(),
    st.builds(AssistantMessage, PARTS, CALLS, FINISH, in_thought=st.booleans()),
    FLOAT,
    METRICS,
    st.none() | st.integers(0, 9),
    MESSAGES,
    st.none() | TEXT,
)
TRAJECTORIES = st.builds(
    Trajectory,
    TEXT,
    st.builds(Task, TEXT, TEXT, st.integers(-(2**63), 2**63 - 1), OBJECTS, TEXT),
    TEXT,
    st.lists(TURNS, max_size=3).map(tuple),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["answer", "max_turns", "context", "tokens", "time_budget", "error"]),
    MESSAGES,
    METRICS,
    st.none() | TEXT,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(trajectories=st.lists(TRAJECTORIES, max_size=2), kind=TEXT, step=st.integers(0, 2**62))
def test_any_trajectories_round_trip(tmp_path: Path, trajectories: list[Trajectory], kind: str, step: int) -> None:
    records = [Record(kind, step, t) for t in trajectories]
    write_shard(tmp_path / "x.parquet", records)
    assert repr(read_shard(tmp_path / "x.parquet")) == repr(records)  # repr: NaN is itself, -0.0 is not 0.0
