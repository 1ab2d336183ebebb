from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.errors import ArealError
from areal_agents.trajectories import Record, decode, encode, read_records, read_trajectories
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Image,
    Message,
    Task,
    Text,
    ToolCall,
    Trajectory,
    Turn,
    user,
)


def example(reward: float = 1.0) -> Trajectory:
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
        "e0", task, "g0", turns, True, False, "answer", (Message("tool", (Image("a.png"),), "c0", "python"),)
    )


def test_the_line_is_plain_json_with_every_token() -> None:
    row = json.loads(encode(example(), step=3, kind="train"))
    assert (row["schema_version"], row["kind"], row["step"], row["reward"], row["stop_reason"]) == (
        1,
        "train",
        3,
        1.0,
        "answer",
    )
    assert row["turns"][0]["ids"] == [4, 5]
    assert row["turns"][0]["logprobs"] == [-0.1, -1e-300]
    assert row["turns"][0]["versions"] == [0, 1]
    assert row["turns"][0]["observation"][0]["parts"] == [{"text": "What is 1 + 1?"}]
    assert row["turns"][1]["parent"] == 0
    assert row["task"]["payload"]["gold"] == "2"


def test_round_trip() -> None:
    assert decode(encode(example(), step=3, kind="eval")) == Record("eval", 3, example())


def test_what_json_lacks_comes_back() -> None:
    trajectory = example(math.inf)
    call = ToolCall("c", "f", {"x": math.nan, "s": "\ud800", "deep": {"y": [-math.inf]}}, "\ud800")
    turn = Turn((), Completion((1,), (-math.inf,), (0,), "stop"), AssistantMessage((Text("\x00\u2028"),), (call,)))
    odd = Trajectory(
        "e", trajectory.task, "g", (*trajectory.turns, turn), False, True, "error", (), {"s": math.nan}, "x"
    )
    line = encode(odd, step=0, kind="train")
    json.loads(line, parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity
    assert line.encode()
    assert "\n" not in line
    back = decode(line).trajectory
    assert math.isnan(back.metrics["s"])
    assert math.isnan(back.turns[2].message.tool_calls[0].arguments["x"])
    assert back.turns[2].message.tool_calls[0].arguments["deep"] == {"y": [-math.inf]}
    assert back.turns[2].message.tool_calls[0].raw == "\ud800"
    assert back.turns[2].completion.logprobs == (-math.inf,)
    assert back.turns[1].reward == math.inf


def test_files_are_read_in_order_and_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [encode(example(r), step=s, kind="train") for s, r in ((1, 0.0), (2, 1.0), (3, 0.5))]
    path.write_text("\n".join(lines)[:-20], encoding="utf-8")
    assert [(r.step, r.trajectory.reward) for r in read_records(path)] == [(1, 0.0), (2, 1.0)]
    assert list(read_trajectories(path)) == [example(0.0), example(1.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema_version": 2}', "trajectory schema_version 2 cannot be read: this package reads 1"),
        ("{}", "not a trajectory: KeyError: 'schema_version'"),
        ("[1", "not a trajectory: JSONDecodeError"),
        ("3", "not a trajectory: TypeError"),
    ],
)
def test_bad_lines_name_their_place(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(encode(example(), step=0, kind="train") + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ArealError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:2: {message}")


TEXT = st.text(max_size=10)
FLOAT = st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOAT | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PARTS = st.lists(st.builds(Text, TEXT) | st.builds(Image, TEXT), max_size=2).map(tuple)
CALLS = st.lists(
    st.builds(
        ToolCall, TEXT, TEXT, st.dictionaries(TEXT, JSON, max_size=2), TEXT, st.sampled_from(["ok", "unclosed"]),
        st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    ),
    max_size=2,
).map(tuple)  # fmt: skip


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    n = draw(st.integers(0, 4))
    ids, versions = (tuple(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))) for _ in range(2))
    return Completion(ids, tuple(draw(st.lists(FLOAT, min_size=n, max_size=n))), versions, "stop")


@settings(max_examples=40, deadline=None)
@given(
    completion=completions(), parts=PARTS, calls=CALLS, payload=st.dictionaries(TEXT, JSON, max_size=3), reward=FLOAT,
    components=st.dictionaries(TEXT, FLOAT, max_size=2), key=st.none() | TEXT,
)  # fmt: skip
def test_any_trajectory_round_trips(
    completion: Completion, parts: Any, calls: Any, payload: Any, reward: float, components: Any, key: str | None
) -> None:
    observation = (Message("user", parts, key, key),)
    turn = Turn((1,), completion, AssistantMessage(parts, calls), reward, components, None, observation, key)
    task = Task("t", "train", 0, payload, "hash")
    trajectory = Trajectory("e", task, "g", (turn, turn), True, False, "answer", observation, components, key)
    assert decode(encode(trajectory, step=1, kind="train")).trajectory == trajectory
