"""Lines of a file: what becomes an example or a pair, and what is left out with which reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.errors import ConfigError
from areal_agents.finetune.examples import Limits, fingerprint, last_turn, split_holdout
from areal_agents.finetune.files import file_examples, file_pairs
from areal_agents.finetune.messages import read_messages
from areal_agents.finetune.render import render
from tests.finetune.world import chat, dpo, fmt, jsonl, sft, targets
from tests.tiny_tokenizer import THINKING, tiny

LIMITS = Limits(256, 1000)
END = "<|im_end|>"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def examples(tmp_path: Path, *rows: Any, **changes: Any) -> tuple[list[Any], Any]:
    path = jsonl(tmp_path / "d.jsonl", *rows)
    return file_examples(path, sft(path, Path("m"), Path("o"), **changes), fmt(), LIMITS)


@pytest.mark.parametrize(
    ("row", "learned"),
    [
        (chat("a", "b"), ["b"]),
        ({"prompt": "a", "completion": "b"}, ["b"]),
        ({"prompt": [user("a"), says("x"), user("c")], "completion": [says("b")]}, ["b"]),
        ({"prompt": [user("a")], "completion": says("b")}, ["b"]),
        ({"messages": [user("a"), says("b"), user("c"), says("d")]}, ["b", "d"]),
    ],
)
def test_forms_of_a_line(row: Any, learned: list[str], tmp_path: Path) -> None:
    ((example,), tally) = examples(tmp_path, row)
    assert "".join(targets(example.said)) == "".join(text + END for text in learned)
    assert (tally.found, tally.taken, tally.left_out.total()) == (1, 1, 0)


def test_the_last_turn_alone(tmp_path: Path) -> None:
    row = {"messages": [user("a"), says("b"), user("c"), says("d")]}
    ((example,), _) = examples(tmp_path, row, turns="last")
    assert targets(example.said) == ["d" + END]


def test_the_last_turn_of_several_rows_is_in_the_last_of_them() -> None:
    thinks = {"role": "assistant", "content": "b", "reasoning": "hm"}
    rows = render(ChatFormat(tiny(THINKING)), read_messages([user("a"), thinks, user("c"), says("d")]))
    assert len(rows) == 2
    (row,) = last_turn(rows)
    assert fmt().tokenizer.decode(row.ids[row.mask]) == f"d{END}"


def test_a_row_of_just_max_context_is_taken(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", chat("a", "b"))
    config = sft(path, Path("m"), Path("o"))
    ((example,), _) = file_examples(path, config, fmt(), LIMITS)
    tokens = len(example.said.rows[0])
    assert len(file_examples(path, config, fmt(), Limits(tokens, 1000))[0]) == 1
    assert len(file_examples(path, config, fmt(), Limits(tokens - 1, 1000))[0]) == 0


def test_the_fingerprint_sees_tokens_masks_and_order(tmp_path: Path) -> None:
    talk = {"messages": [user("a"), says("b"), user("c"), says("d")]}
    shown = {"messages": [user("a"), says("b") | {"weight": 0}, user("c"), says("d")]}
    found = [fingerprint(examples(tmp_path, *rows)[0]) for rows in ((talk, shown), (shown, talk), (talk,), (shown,))]
    assert len(set(found)) == 4
    again = examples(tmp_path, talk, shown)[0]
    assert fingerprint(again) == found[0]
    assert fingerprint([replace(again[0], task="other"), again[1]]) != found[0], "other examples would be held out"


def test_one_question_of_two_files_is_held_out_whole(tmp_path: Path) -> None:
    found = []
    for name in ("x", "y"):
        path = jsonl(tmp_path / f"{name}.jsonl", *(chat(q, name) for q in "abcd"))
        found += file_examples(path, sft(path, Path("m"), Path("o")), fmt(), LIMITS)[0]
    train, held = split_holdout(found, 0.5, seed=0)
    assert (len(train), len(held)) == (4, 4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "neither messages nor completion, but ['text']"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "areal-agents dpo"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ShareGPT"),
        ({"messages": [user("a")], "completion": "b"}, "both messages and completion"),
        ({"completion": "b"}, "begins with a message of the assistant"),
        ({"prompt": 3, "completion": "b"}, "N is neither text nor a list of messages"),
        (chat("a", "b", chat_template_kwargs={"enable_thinking": False}), "--template-variables"),
        (chat("a", "b " * 400), "more than --max-context N"),
    ],
)
def test_lines_that_are_left_out(row: Any, said: str, tmp_path: Path) -> None:
    found, tally = examples(tmp_path, chat("a", "b"), row)
    assert (len(found), tally.left_out.total()) == (1, 1)
    assert said in next(iter(tally.left_out))
    assert f"{tmp_path}/d.jsonl:2: " in next(iter(tally.first.values()))


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    row = chat("a", "b", id=3, source="x")
    row["messages"][0]["mood"] = "good"
    _, tally = examples(tmp_path, row)
    assert tally.lines("examples")[-1] == "  not used: id, messages.mood, source"


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bom.jsonl").write_text('\n{"prompt": "a", "completion": "b"}\n', encoding="utf-8-sig")
    for name, said in (("list", "line 1, is"), ("bytes", "JSONL file in UTF-8")):
        path = tmp_path / f"{name}.jsonl"
        with pytest.raises(ConfigError, match=said):
            file_examples(path, sft(path, Path("m"), Path("o")), fmt(), LIMITS)
    path = tmp_path / "bom.jsonl"
    assert len(file_examples(path, sft(path, Path("m"), Path("o")), fmt(), LIMITS)[0]) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [user("a")], "chosen": [says("b")], "rejected": [says("c")]},
        {"prompt": [user("a")], "chosen": says("b"), "rejected": says("c")},
        {"chosen": [user("a"), says("b")], "rejected": [user("a"), says("c")]},
        {"prompt": "a", "chosen": [user("a"), says("b")], "rejected": [user("a"), says("c")]},
        {"prompt": [], "chosen": [user("a"), says("b")], "rejected": [user("a"), says("c")]},
    ],
)
def test_forms_of_a_pair(row: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", row)
    ((pair,), _) = file_pairs(path, dpo(path, Path("m"), Path("o")), fmt(), LIMITS)
    assert (targets(pair.chosen), targets(pair.rejected)) == (["b" + END], ["c" + END])
    before = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert fmt().tokenizer.decode(pair.chosen.rows[0].ids) == f"{before}b{END}"


def test_what_both_begin_with_is_not_learned(tmp_path: Path) -> None:
    begun = [user("a"), says("same"), user("x")]
    path = jsonl(
        tmp_path / "d.jsonl", {"chosen": [*begun, says("b")], "rejected": [*begun, says("c"), user("y"), says("d")]}
    )
    ((pair,), _) = file_pairs(path, dpo(path, Path("m"), Path("o")), fmt(), LIMITS)
    assert targets(pair.chosen) == ["b" + END]
    assert targets(pair.rejected) == [f"c{END}d{END}"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [user("a"), says("b")], "rejected": [user("z"), says("c")]}, "an answer to the same prompt"),
        ({"chosen": [user("a"), says("b")], "rejected": [user("a"), says("b")]}, "nothing tells them apart"),
        (
            {"chosen": [user("a"), says("b")], "rejected": [user("a"), says("b"), user("x"), says("c")]},
            "tells them apart",
        ),
        ({"prompt": "a", "chosen": [user("a"), says("b")], "rejected": "c"}, "an answer to the same prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "the same tokens"),
        ({"prompt": "a", "chosen": "b"}, "it has no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "says nothing"),
        ({"chosen": "b", "rejected": "c"}, "begins with a message of the assistant"),
        (chat("a", "b"), "areal-agents sft"),
        ({"prompt": "a", "chosen": "b", "rejected": "c " * 400}, "more than --max-context"),
    ],
)
def test_pairs_that_are_left_out(row: Any, said: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", row)
    found, tally = file_pairs(path, dpo(path, Path("m"), Path("o")), fmt(), LIMITS)
    assert (found, tally.left_out.total()) == ([], 1)
    assert said in next(iter(tally.left_out))


def test_one_question_is_held_out_whole(tmp_path: Path) -> None:
    found, _ = examples(tmp_path, *(chat(q, a) for q in "abcd" for a in "xyz"))
    train, held = split_holdout(found, 0.5, seed=0)
    assert (len(train), len(held)) == (6, 6)
    assert not {e.task for e in train} & {e.task for e in held}
    assert split_holdout(found, 0.0, seed=0) == (found, [])
    assert len(split_holdout(found, 0.01, seed=0)[1]) == 3  # one question at least
