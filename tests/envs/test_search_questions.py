"""A user's own questions over own documents: what is read, what is refused, and what the expert does with them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

import areal_agents
from areal_agents.conformance.check import check
from areal_agents.envs.facts import Facts
from areal_agents.errors import ConfigError, EnvError
from areal_agents.evaluation.held_out import held_out
from areal_agents.evaluation.overlap import find_overlap
from areal_agents.rollout.script import expert_of
from areal_agents.settings.config import EvalConfig
from areal_agents.tool import call_text
from areal_agents.tools.calculator import calculator
from areal_agents.types import Task

ID = "areal/Facts-v0"
DOCUMENTS: list[dict[str, Any]] = [
    {"id": "mill", "title": "Mill of Arbo", "text": "The mill of Arbo was built by Ida Quent."},
    {"id": "ida", "title": "Ida Quent", "text": "Ida Quent was born in Selva, by the sea."},
    {"id": "selva", "title": "Selva", "text": "Selva lies in the province of Tor."},
    {"id": 7, "text": "The governor of Tor is Ana Bell, of the old family Bell."},
    {"id": "dots", "text": "…"},
]


@pytest.fixture(autouse=True)
def _cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_AGENTS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return written(tmp_path / "corpus.jsonl", *DOCUMENTS)


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def row(question: str, answers: Any = "x", **more: Any) -> dict[str, Any]:
    return {"question": question, "answers": answers, **more}


def tasks(split: str, path: str, corpus: str, difficulty: float | None = None, **kwargs: Any) -> list[Task]:
    given = areal_agents.spec(ID).with_kwargs({"path": path, "corpus": corpus, **kwargs})
    return list(given.tasks(split, difficulty=difficulty))


MINE = (
    row("Where was the builder of the mill of Arbo born?", ["Selva"], supporting=["mill", "ida"], split="train"),
    row("Who governs the province that Selva lies in?", ["Ana Bell", "Bell"], supporting=["selva", 7], split="test"),
    row("Who built the mill of Arbo?", "Ida Quent", supporting=["mill"], split="train"),
    row("Is Selva by the sea?", ["yes"], split="test", hops=1),
)


def test_a_file_and_its_documents_are_played_by_their_expert(tmp_path: Path, corpus: str) -> None:
    path = written(tmp_path / "q.jsonl", *MINE)
    train, test = tasks("train", path, corpus), tasks("test", path, corpus)
    assert [t.id for t in train + test] == ["train-1", "train-3", "test-2", "test-4"]
    assert (test[0].payload["answer"], test[0].payload["hops"]) == (["Ana Bell", "Bell"], 2)
    assert pickle.loads(pickle.dumps(test)) == test
    env = areal_agents.make(ID, path=path, corpus=corpus)
    for task in [*train, test[0]]:
        observation, _ = env.reset(seed=0, options={"task": task})
        assert observation[-1].text == task.payload["question"]
        speaker = expert_of(areal_agents.spec(ID), task)
        assert speaker is not None
        said, reward, over, calls = next(speaker), 0.0, False, 0
        while not over:
            observation, given, over, _, _ = env.step(said)
            reward = float(given)
            calls += 1
            said = said if over else speaker.send(observation)
        assert (reward, calls) == (1.0, 2 * len(task.payload["passages"]) + 1)
    env.close()
    assert expert_of(areal_agents.spec(ID), test[1]) is None  # it says no document
    many = {"answer": ["x"], "passages": [[str(i), str(i)] for i in range(6)]}
    assert Facts.expert(Task.make("t", split="test", seed=0, payload=many)) is None  # 13 turns of 12


@pytest.mark.parametrize(("said", "reward"), [("the BELL.", 1.0), ("Ana Bell", 1.0), ("Tor", 0.0)])
def test_any_of_the_answers_is_right(tmp_path: Path, corpus: str, said: str, reward: float) -> None:
    path = written(tmp_path / "q.jsonl", *MINE)
    env = areal_agents.make(ID, path=path, corpus=corpus)
    env.reset(seed=0, options={"task": tasks("test", path, corpus)[0]})
    assert env.step(rf"It is \boxed{{{said}}}")[1] == reward
    env.reset(seed=0)  # draws a training task of the file
    assert env.task.id in ("train-1", "train-3")
    env.close()


@pytest.mark.slow
def test_a_file_passes_the_check(tmp_path: Path, corpus: str) -> None:
    path = written(tmp_path / "q.jsonl", *MINE[:3])
    report = check(ID, tokenizer=None, kwargs={"path": path, "corpus": corpus})
    assert report.passed, str(report)
    assert {r.name for r in report.results if r.status != "passed"} == {"tokens"}


def test_without_a_split_a_question_stays_where_it_is_however_it_is_written(tmp_path: Path, corpus: str) -> None:
    names = [f"question number {i}" for i in range(200)]
    one = written(tmp_path / "one.jsonl", *map(row, names))
    two = written(tmp_path / "two.jsonl", *(row(f"  {n.upper()}?") for n in reversed(names)))
    assert 10 < len(tasks("test", one, corpus)) < 45
    for split in ("train", "test"):
        asked = {t.payload["question"] for t in tasks(split, one, corpus)}
        assert {t.payload["question"].strip(" ?").lower() for t in tasks(split, two, corpus)} == asked
    with pytest.warns(UserWarning, match=r"three.jsonl: 1 of its 2 rows ask what an earlier one asks"):
        assert len(tasks("train", written(tmp_path / "three.jsonl", row("a b?"), row("A b", ["x", "y"])), corpus)) == 2


def test_a_question_in_both_splits_is_refused(tmp_path: Path, corpus: str) -> None:
    both = written(tmp_path / "q.jsonl", row("Who is it?", split="train"), "", row("who is IT", split="test"))
    train, test = written(tmp_path / "a", row("Who is it?")), written(tmp_path / "b", row("who, is it?"))
    for split in ("train", "test"):
        with pytest.raises(ConfigError, match=r"1 questions are not held out(?s:.*)line 1 and .*line 3: 'who is IT'"):
            tasks(split, both, corpus)
        with pytest.raises(ConfigError, match=r"not held out(?s:.*)a, line 1 and .*b, line 1"):
            tasks(split, train, corpus, test_path=test)
    other = written(tmp_path / "c", row("Who is she?", split="train"))
    with pytest.raises(ConfigError, match=r"c, line 1: its split is 'train', and .*makes it 'test'"):
        tasks("train", train, corpus, test_path=other)
    apart = written(tmp_path / "d", row("Who is she?"))
    found = [tasks(split, train, corpus, test_path=apart) for split in ("train", "test")]
    assert [[t.id for t in split] for split in found] == [["train-1"], ["test-1"]]
    assert not find_overlap(*found, names=("train", "test"), seed=0).pairs


def test_difficulty_is_the_number_of_hops(tmp_path: Path, corpus: str) -> None:
    rows = [row(f"question {n} {i}", hops=n, split=split) for n, split in ((2, "train"), (3, "train"), (4, "test"))
            for i in range(n)]  # fmt: skip
    path = written(tmp_path / "q.jsonl", *rows)
    for difficulty, train, test in ((0.0, 2, 0), (0.3, 2, 0), (0.5, 3, 0), (0.7, 0, 4), (1.0, 0, 4), (None, 5, 4)):
        counts = [len(tasks(split, path, corpus, difficulty)) for split in ("train", "test")]
        assert counts == [train, test], difficulty
    some = written(tmp_path / "some", row("which one", hops=2, split="train"), row("which other", split="train"))
    assert len(tasks("train", some, corpus)) == 2
    with pytest.warns(UserWarning, match=r"some: 1 rows have neither hops .*some, line 2\), so they are of no diff"):
        assert [t.id for t in Facts.tasks("train", path=some, corpus=corpus, difficulty=1.0)] == ["train-1"]
    none = written(tmp_path / "none", row("which one", split="train"))
    assert [len(tasks("train", none, corpus, d)) for d in (0.0, 1.0)] == [1, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: it is no JSON"), (["", "[]"], "line 2: it is no JSON object"), ([], "it has no question"),
        ([{"answers": "x"}], "line 1: it has no 'question', but 'answers'"), ([row(" ")], "line 1: 'question' = ' '"),
        ([row("a"), {"question": "b"}], "line 2: it has no 'answers', but 'question'"),
        ([row("a", answer="x")], "line 1: it has both 'answers' and 'answer'"),
        ([row("a", [])], r"'answers' = \[\] is no text with a word"), ([row("a", ["x", 7])], "no text with a word"),
        ([row("a", "?!")], "no text with a word"), ([row("a", "x{")], "line 1: .*braces that are not closed"),
        ([row("a", "x" * 1001)], "longer than 1000 characters"),
        ([row("a", 1969)], "'answers' = 1969 is no text .*: write a number in quotes"),
        ([row("a", supporting=["dots"])], "line 1: 'supporting' names 'dots', a document whose beginning has no word"),
        ([row("a", split="dev")], "'split' = 'dev' is neither 'train' nor 'test'"),
        ([row("a", hops=0)], "'hops' = 0 is no whole number"), ([row("a", hops=True)], "'hops' = True"),
        ([row("a", supporting=[])], r"line 1: 'supporting' = \[\] is no list"),
        ([row("a", supporting=["mill", "mil"])], "line 1: 'supporting' names 'mil', and no document"),
        ([row("a", supporting=["7", 7])], "'supporting' has '7' twice"),
        ([row("a", suporting=["mill"])], "it has 'suporting': write 'supporting'"),
        ([row("a", supporting_facts=[["Mill", 0]])], "it has 'supporting_facts': write 'supporting'"),
        ([row("a", answer_aliases=["y"])], "line 1: it has 'answer_aliases': other right answers belong into the list"),
        ([row("a b"), row("A b?", "y")], r"(?s)without an answer in common.*line 1 and .*line 2: \['x'\] and \['y'\]"),
        (['{"question": "a \\ud800", "answers": "1"}'], "line 1: .*surrogates"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_told_with_its_line(tmp_path: Path, corpus: str, lines: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks("train", written(tmp_path / "q.jsonl", *lines), corpus)


def test_documents_and_questions_go_together(tmp_path: Path, corpus: str) -> None:
    path = written(tmp_path / "q.jsonl", *MINE)
    for given in ({"path": path}, {"corpus": corpus}, {"test_path": path}):
        with pytest.raises(ConfigError, match="Give path and corpus, or neither"):
            areal_agents.make(ID, **given)
        with pytest.raises(ConfigError, match="Give path and corpus, or neither"):
            areal_agents.spec(ID).with_kwargs(given).tasks("train")
    with pytest.raises(ConfigError, match=r"search corpus '.*none' is not there"):
        tasks("train", path, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        tasks("train", str(tmp_path / "none"), corpus)


def test_with_another_corpus_a_task_is_another_one(tmp_path: Path, corpus: str) -> None:
    path = written(tmp_path / "q.jsonl", *MINE)
    first = tasks("train", path, corpus)
    copy = written(tmp_path / "copy.jsonl", *DOCUMENTS)
    assert tasks("train", path, copy) == first
    changed = written(tmp_path / "new.jsonl", {**DOCUMENTS[0], "text": "It was built by Ida Quent."}, *DOCUMENTS[1:])
    assert [t.content_hash for t in tasks("train", path, changed)] != [t.content_hash for t in first]


@pytest.mark.parametrize(("length", "reads_on"), [(6000, False), (6001, True)])
def test_where_a_document_is_not_shown_whole_the_model_can_read_on(tmp_path: Path, length: int, reads_on: bool) -> None:
    text = "The builder of the bridge of Oss was born in " + "x " * 1472 + "Selva." + " y" * 3000
    long = {"id": "oss", "title": "Oss", "text": text[: length - len("Oss\n\n")]}
    corpus = written(tmp_path / "corpus.jsonl", *DOCUMENTS, long)
    env = areal_agents.make(ID, path=written(tmp_path / "q.jsonl", *MINE), corpus=corpus)
    assert [tool.name for tool in env.tools] == ["search", "read_document", *(["read_output"] if reads_on else [])]
    env.reset(seed=0)
    observation, *_ = env.step(call_text("read_document", id="oss"))
    assert ("Selva" in observation[-1].text) is not reads_on
    if reads_on:
        observation, *_ = env.step(call_text("read_output", output=1, start=2900))
        assert "Selva." in observation[-1].text
    env.close()


class Reckons(Facts):
    tools = (*Facts.tools, calculator)


def test_a_subclass_keeps_its_own_tools_beside_those_on_the_file(tmp_path: Path, corpus: str) -> None:
    env = Reckons(path=written(tmp_path / "q.jsonl", *MINE), corpus=corpus)
    assert [tool.name for tool in env.tools] == ["search", "read_document", "calculator"]
    assert env.tools[0] is not Facts.tools[0]
    env.reset(seed=0)
    observation, *_ = env.step(call_text("search", query="Selva") + call_text("calculator", expression="6*7"))
    assert "Selva" in observation[0].text
    assert "42" in observation[1].text
    assert [tool.name for tool in Reckons().tools] == ["search", "read_document", "calculator"]


def test_a_split_without_a_question_is_said_and_not_to_be_lowered(tmp_path: Path, corpus: str) -> None:
    spec = areal_agents.spec(ID).with_kwargs({"path": written(tmp_path / "q", MINE[0]), "corpus": corpus})
    with pytest.raises(ConfigError, match=r"areal/Facts-v0:test has no tasks: name another split \(eval.split\), or"):
        held_out(spec, EvalConfig(n=1), difficulty=None, tell=print)


def test_a_document_that_no_search_shows_is_said(tmp_path: Path) -> None:
    crowd = [{"id": str(i), "title": "Bell", "text": "Bell"} for i in range(30)]
    corpus = written(tmp_path / "corpus.jsonl", *crowd, {"id": "a", "title": "Bell", "text": "A Bell " + "is " * 50})
    (task,) = tasks("train", written(tmp_path / "q", row("What?", supporting=["a"], split="train")), corpus)
    env = areal_agents.make(ID, path=str(tmp_path / "q"), corpus=corpus)
    env.reset(seed=0, options={"task": task})
    speaker = Facts.expert(task)
    assert speaker is not None
    observation, *_ = env.step(next(speaker))
    observation, *_ = env.step(speaker.send(observation))
    with pytest.raises(EnvError, match="two searches for 'Bell' do not show the document 'a'"):
        speaker.send(observation)
    env.close()
