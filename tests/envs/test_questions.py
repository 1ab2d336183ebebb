"""Questions from JSONL files: what is read, what is refused, and where each question belongs."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import areal_agents
from areal_agents.chat.toolcalls import parse_text
from areal_agents.envs.questions import SAMPLE, Questions, gold_of, split_of
from areal_agents.errors import ConfigError, RegistryError
from areal_agents.rollout.script import expert_of
from areal_agents.types import Task

ID = "areal/Questions-v0"


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def row(question: str, answer: Any = "1") -> dict[str, Any]:
    return {"question": question, "answer": answer}


def tasks(split: str, path: str, **kwargs: Any) -> list[Task]:
    return list(areal_agents.spec(ID).with_kwargs({"path": path, **kwargs}).tasks(split))


def scored(task: Task, said: str, **kwargs: Any) -> float:
    async def play() -> float:
        env = areal_agents.make(ID, **kwargs)
        await env.areset(seed=0, options={"task": task})
        _, reward, terminated, _, _ = await env.astep(parse_text(said))
        assert terminated
        return reward

    return asyncio.run(play())


def test_the_answer_behind_the_marks_is_the_gold_one(tmp_path: Path) -> None:
    solution = "Half of 48 is <<48/2=24>>24.\nSo 48 + 24.\n#### 1,072"
    path = written(
        tmp_path / "q.jsonl", row("a", solution), row("b", r"so \boxed{\frac12}"), row("c", 3), row("d", ["1", "2"])
    )
    found = {t.payload["question"]: t for split in ("train", "test") for t in tasks(split, path)}
    assert [found[q].payload["answer"] for q in "abcd"] == ["1,072", r"\frac12", "3", ["1", "2"]]
    assert found["a"].payload["solution"] == "Half of 48 is 24.\nSo 48 + 24."
    assert scored(found["a"], r"It is \boxed{1072}") == 1.0
    assert scored(found["a"], r"It is \boxed{1071}") == 0.0
    assert scored(found["b"], r"\boxed{0.5}") == 1.0
    assert scored(found["d"], r"\boxed{2}") == 1.0
    assert scored(found["c"], r"\boxed{3.2}", verify={"tolerance": 0.5}) == 1.0
    expert = expert_of(areal_agents.spec(ID), found["a"])
    assert expert is not None
    assert next(expert) == "Half of 48 is 24.\nSo 48 + 24.\n\\boxed{1,072}"


@pytest.mark.parametrize(
    ("text", "gold"),
    [("#### 5", "5"), ("a #### b #### 7 ", "7"), (r"\boxed{x}", "x"),
     (r"\boxed{1} or \boxed{2}", r"\boxed{1} or \boxed{2}"),
     (" 12 ", "12"), ("####", "")],
)  # fmt: skip
def test_gold_of(text: str, gold: str) -> None:
    assert gold_of(text) == gold


def test_a_question_stays_in_its_split(tmp_path: Path) -> None:
    names = [f"question {i}" for i in range(200)]
    one = written(tmp_path / "one.jsonl", *map(row, names))
    two = written(tmp_path / "two.jsonl", *map(row, reversed(names)), row("new"), row("question 3"))
    with pytest.warns(UserWarning, match="two.jsonl: 1 of its 202 rows ask what an earlier one asks"):
        tasks("train", two)
    for split in ("train", "test"):
        assert {t.payload["question"] for t in tasks(split, one)} <= {t.payload["question"] for t in tasks(split, two)}
        assert all(split_of(t.payload["question"]) == split for t in tasks(split, two))
    assert len(tasks("train", one)) + len(tasks("test", one)) == 200
    assert 10 < len(tasks("test", one)) < 45


def test_a_file_of_its_own_for_the_tests(tmp_path: Path) -> None:
    train, test = written(tmp_path / "a", row("1"), row("2")), written(tmp_path / "b", row("3"), "", row("4"))
    assert [t.id for t in tasks("train", train, test_path=test)] == ["train-1", "train-2"]
    assert [t.id for t in tasks("test", train, test_path=test)] == ["test-1", "test-3"]
    shared = written(tmp_path / "c", row("2"))
    with pytest.raises(ConfigError, match=r"'2' is a question of .*a too"):
        tasks("test", train, test_path=shared)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for names in (["one"], ["one", "two"]):
        written(path, *map(row, names))
        found = tasks("train", str(path)) + tasks("test", str(path))
        assert [t.payload["question"] for t in sorted(found, key=lambda t: t.seed)] == names


def test_other_names_of_fields(tmp_path: Path) -> None:
    path = written(tmp_path / "m.jsonl", {"problem": "p", "solution": r"\boxed{4}", "level": 5})
    names = {"question": "problem", "answer": "solution"}
    assert [t.payload["answer"] for s in ("train", "test") for t in tasks(s, path, **names)] == ["4"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: it is no JSON"), ([row("a"), "[]"], "line 2: it is no JSON object"),
        ([{"question": "a"}], "line 1: it has no 'answer', but 'question'"), ([row("a", None)], "neither a text"),
        ([row("a", True)], "neither a text"), ([row("a", [])], "neither a text"), ([row("a", "")], "is empty"),
        ([row("a", "so\n####")], "is empty"), ([row(" ")], "is no text"),
        ([{"question": 1, "answer": 1}], "is no text"),
        ([row("a", float("nan"))], "line 1: .* is no finite number"),
        ([row("b"), '{"question": "a", "answer": 1e999}'], "line 2: .* is no finite number"),
        (["[" * 200_000], "line 1: it is no JSON"), ([f'{{"question": "a", "answer": {"9" * 5000}}}'], "line 1: it is"),
        (['{"question": "a \\ud800", "answer": "1"}'], "line 1: .*surrogates"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_told_with_its_line(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks("train", written(tmp_path / "q.jsonl", *lines))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        tasks("train", str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="is a folder, and no file"):
        tasks("train", str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(ConfigError, match="is a pipe, a device or a socket, and no file"):
            tasks("train", path)
        with pytest.raises(ConfigError, match="is a pipe, a device or a socket, and no file"):
            tasks("test", SAMPLE, test_path=path)
    (tmp_path / "latin").write_bytes(b'{"question": "\xe9", "answer": 1}')
    with pytest.raises(ConfigError, match="not UTF-8"):
        tasks("train", str(tmp_path / "latin"))
    with pytest.raises(RegistryError, match="paht"):
        areal_agents.make(ID, paht="x")


def test_an_episode_without_a_task_draws_from_the_given_file(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", *(row(f"mine {i}") for i in range(20)))
    env = areal_agents.make(ID, path=path)
    observation, _ = env.reset(seed=3)
    assert observation[-1].text.startswith("mine ")
    env.close()
    assert Path(SAMPLE).is_file()


def test_a_path_that_is_none() -> None:
    with pytest.raises(ConfigError, match="is no path"):
        tasks("train", "a\0b")


def test_rows_that_contradict_each_other_are_refused_with_their_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path / "q.jsonl", row("2 + 2?", "4"), "", row("other", "1"), row("2 + 2?", "so\n#### 5"), row("p", "cat"),
        row(" 2  +\n2? ", 5), row("p", "dog"), row("other", "2/2"),
    )  # fmt: skip
    lines = ["lines 1 and 4: ['4'] and ['5']", "lines 1 and 6: ['4'] and ['5']", "lines 5 and 7: ['cat'] and ['dog']"]
    for split in ("train", "test"):
        with pytest.raises(ConfigError, match="of 3 questions there are two rows") as error:
            tasks(split, path)
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == lines
    many = written(tmp_path / "many.jsonl", *(row(f"q{i % 20}", str(i)) for i in range(40)))
    with pytest.raises(ConfigError, match=r"lines 10 and 30: \['9'\] and \['29'\]\n  and 10 more"):
        tasks("train", many)


def test_rows_that_repeat_another_are_counted_and_stay(tmp_path: Path) -> None:
    rows = [row("half", "1/2"), row("half", "0.5"), row("half ", ["2", r"\frac12"]), row("x", "(("), row("x", "))")]
    path = written(tmp_path / "q.jsonl", *rows, row("x", "(("))
    with pytest.warns(UserWarning, match="4 of its 6 rows ask what an earlier one asks, with the same answer"):
        found = tasks("train", path) + tasks("test", path)
    assert sorted(t.seed for t in found) == [1, 2, 3, 4, 5, 6]
    assert len({t.id.partition("-")[0] for t in found if t.payload["question"].startswith("half")}) == 1


def test_one_question_about_other_things_is_another_question(tmp_path: Path) -> None:
    rows = [row("Which?", "A") | {"choices": "1 2"}, row("Which?", "B") | {"choices": "2 1"}]
    path = written(tmp_path / "q.jsonl", *rows)

    class Chosen(Questions):
        @classmethod
        def payload(cls, row: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
            return super().payload(row, question, answer) | {"choices": row["choices"]}

    assert len([*Chosen.tasks("train", path=path), *Chosen.tasks("test", path=path)]) == 2
    with pytest.raises(ConfigError, match="two rows with different answers"):
        Questions.tasks("train", path=path)


def test_a_split_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(RegistryError, match="no split 'validation'; its splits are train, test"):
        tasks("validation", SAMPLE)
    with pytest.raises(ConfigError, match="no split 'validation': its splits are train, test"):
        Questions.tasks("validation", path=SAMPLE, test_path=SAMPLE)
