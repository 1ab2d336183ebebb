"""Questions of a user's own over documents of a user's own, as ``areal/Facts-v0`` reads them (``env.kwargs.path``).

    {"question": "Where was the founder of X born?", "answers": ["Y"], "supporting": ["d7", "d2"], "split": "test"}

``supporting`` names the documents that the answer takes, in the order in which one leads to the next. ``hops`` is how
many steps it takes, where that is another number. Both, and ``split``, may be left out. A row is refused with its line.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import sqlite3
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from areal_agents.envs.questions import file_key, json_lines, split_of
from areal_agents.errors import ConfigError
from areal_agents.evaluation.overlap import normalised
from areal_agents.reward import sole_boxed
from areal_agents.rewards.boxed_text import MAX_CHARS, plain_words
from areal_agents.tools.search import terms_of
from areal_agents.tools.search_index import open_index, summary
from areal_agents.types import Task
from areal_agents.utils.short_text import short

SPLITS: Final = ("train", "test")
_OPTIONAL: Final = ("supporting", "hops", "split")
_NAMED: Final = 10
_QUERY_WORDS: Final = 12
"""Of a document without a title: the query that shows it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A question of a file."""

    path: str
    line: int
    split: str
    """What the row says, or ""."""
    payload: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.line}"

    @property
    def asked(self) -> str:
        """What near-duplicates share."""
        return normalised(str(self.payload["question"]))

    @property
    def answers(self) -> set[str]:
        return {plain_words(answer) for answer in self.payload["answer"]}


def search_tasks(
    split: str, path: str, corpus: str, test_path: str = "", *, difficulty: float | None = None
) -> list[Task]:
    """Return the tasks of a split.

    Args:
        split: ``train`` or ``test``.
        path: of the questions, a JSONL file.
        corpus: what ``search_tools`` takes.
        test_path: of the questions of the test split. Empty takes them from ``path``: the rows that say so, and where a
            row says nothing, every eighth or so by a hash of its question.
        difficulty: chooses questions by their hops: of the numbers that are there, the least at 0, the next in equal
            parts, the most at 1. None takes all.

    Raises:
        ConfigError: a row cannot be read, rows contradict each other, or a question is in both splits.
    """
    if split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}: there are {', '.join(SPLITS)}")
    index = file_key(str(open_index(corpus)))
    rows = [(row, _own_split(row, "train" if test_path else "")) for row in _rows(file_key(path), index)]
    if test_path:
        rows += [(row, _own_split(row, "test")) for row in _rows(file_key(test_path), index)]
    _require_apart(rows)
    if difficulty is not None:
        rows = _of_level(rows, difficulty, path)
    return [
        Task.make(f"{split}-{row.line}", split=split, seed=row.line, payload=dict(row.payload))
        for row, own in rows
        if own == split
    ]


def _own_split(row: Row, of_file: str) -> str:
    if of_file and row.split not in ("", of_file):
        raise ConfigError(
            f"{row.where}: its split is {row.split!r}, and env.kwargs.test_path makes it {of_file!r}: leave one out"
        )
    return of_file or row.split or split_of(row.asked)


def _require_apart(rows: Sequence[tuple[Row, str]]) -> None:
    """Raise ConfigError where a question is in both splits, but for case, spaces and punctuation perhaps."""
    trained = {row.asked: row for row, split in rows if split == "train"}
    shared = [(trained[row.asked], row) for row, split in rows if split == "test" and row.asked in trained]
    if shared:
        raise ConfigError(
            f"{len(shared)} questions are not held out: they are in both splits, but for case, spaces or punctuation "
            "perhaps. Take one of each two out, or give both the same split:"
            + "".join(f"\n  {a.where} and {b.where}: {b.payload['question']!r:.80}" for a, b in shared[:_NAMED])
            + (f"\n  and {len(shared) - _NAMED} more" if len(shared) > _NAMED else "")
        )


def _of_level(rows: Sequence[tuple[Row, str]], difficulty: float, path: str) -> list[tuple[Row, str]]:
    """Return the rows of the number of hops that a difficulty stands for, all where no row says its number."""
    hops = sorted({row.payload["hops"] for row, _ in rows if "hops" in row.payload})
    if not hops:
        return list(rows)
    if without := [row for row, _ in rows if "hops" not in row.payload]:
        warnings.warn(
            f"{path}: {len(without)} rows have neither hops nor supporting (first: {without[0].where}), so they are of "
            "no difficulty: they are asked where env.difficulty is left out",
            stacklevel=2,
        )
    wanted = hops[min(int(difficulty * len(hops)), len(hops) - 1)]
    return [(row, split) for row, split in rows if row.payload.get("hops") == wanted]


@functools.lru_cache(maxsize=8)
def _rows(file: tuple[str, int, int], index: tuple[str, int, int]) -> tuple[Row, ...]:
    """Read every row of a file, once."""
    path, rows = file[0], list[Row]()
    digest = summary(Path(index[0]))[0][:16]  # with other documents a task is another one
    with contextlib.closing(sqlite3.connect(f"{Path(index[0]).as_uri()}?immutable=1", uri=True)) as connection:
        for number, row in json_lines(Path(path)):
            try:
                payload = {**_payload(row, connection), "corpus": digest}
                Task.make(path, split="", seed=0, payload=payload)  # raises where it cannot be
                rows.append(Row(path, number, _split(row), payload))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise ConfigError(f"{path}: it has no question")
    _look_for_repeats(path, rows)
    return tuple(rows)


def _payload(row: Mapping[str, Any], connection: sqlite3.Connection) -> dict[str, Any]:
    """Turn a row into a payload. Raises ValueError where it cannot be."""
    _refuse_misspelt(row)
    question = row.get("question")
    if not isinstance(question, str) or not normalised(question).strip():
        raise ValueError(f"'question' = {short(question)} is no text" if "question" in row else _lacks(row, "question"))
    named = [name for name in ("answers", "answer") if name in row]
    if len(named) != 1:
        raise ValueError("it has both 'answers' and 'answer'" if named else _lacks(row, "answers"))
    found = row[named[0]]
    answers = found if isinstance(found, list) else [found]
    for answer in answers or [None]:
        if not isinstance(answer, str) or not plain_words(answer):
            quoted = ": write a number in quotes" if isinstance(answer, int | float) else ""
            raise ValueError(f"{named[0]!r} = {short(found)} is no text with a word in it, nor a list of them{quoted}")
        if len(answer) > MAX_CHARS or plain_words(sole_boxed(rf"\boxed{{{answer}}}") or "") != plain_words(answer):
            raise ValueError(
                f"{named[0]!r}: {short(answer)} cannot stand in \\boxed{{}}: it is longer than {MAX_CHARS} characters, "
                "or has braces that are not closed"
            )
    payload: dict[str, Any] = {"question": question, "answer": list(dict.fromkeys(answers))}
    if "supporting" in row:
        payload["passages"] = _passages(row["supporting"], connection)
    hops = row.get("hops", len(payload.get("passages", ())))
    if type(hops) is not int or (hops < 1 and "hops" in row):
        raise ValueError(f"'hops' = {short(hops)} is no whole number of at least 1")
    return payload | ({"hops": hops} if hops else {})


def _split(row: Mapping[str, Any]) -> str:
    split = row.get("split", "")
    if "split" in row and split not in SPLITS:
        raise ValueError(f"'split' = {short(split)} is neither 'train' nor 'test'")
    return str(split)


def _refuse_misspelt(row: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that is nearly one that may be left out, or has answers: it would be left out."""
    if aliases := next((name for name in row if "alias" in name.lower()), None):
        raise ValueError(f"it has {aliases!r}: other right answers belong into the list 'answers'; or rename it")
    for name in row.keys() - set(_OPTIONAL):
        near = difflib.get_close_matches(name.lower(), _OPTIONAL, n=1, cutoff=0.75)
        if near and near[0] not in row:
            raise ValueError(f"it has {name!r}: write {near[0]!r} if that is meant, or rename it")


def _lacks(row: Mapping[str, Any], name: str) -> str:
    return f"it has no {name!r}, but {', '.join(map(repr, row)) or 'nothing'}"


def _passages(named: object, connection: sqlite3.Connection) -> list[list[str]]:
    """Return the id of each supporting document, and a query that should show it."""
    if not isinstance(named, list) or not named or not all(type(name) in (str, int) for name in named):
        raise ValueError(f"'supporting' = {short(named)} is no list of ids of documents")
    names = list(map(str, named))
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise ValueError(f"'supporting' has {short(twice)} twice")
    return [[name, _query(name, connection)] for name in names]


def _query(name: str, connection: sqlite3.Connection) -> str:
    clean = name.encode(errors="replace").decode()
    row = connection.execute("SELECT title, substr(text, 1, 400) FROM documents WHERE id = ?", (clean,)).fetchone()
    if row is None:
        raise ValueError(f"'supporting' names {short(name)}, and no document of the corpus has this id")
    title, text = (" ".join(part.split()) for part in row)
    query = title or " ".join(text.split()[:_QUERY_WORDS])
    if not terms_of(query):
        raise ValueError(f"'supporting' names {short(name)}, a document whose beginning has no word to search for")
    return query


def _look_for_repeats(path: str, rows: Sequence[Row]) -> None:
    """Raise ConfigError where rows contradict each other, and warn of those that repeat another."""
    first, differ, repeats = dict[str, Row](), list[tuple[Row, Row]](), 0
    for row in rows:
        earlier = first.setdefault(row.asked, row)
        if earlier is not row:
            repeats += earlier.split == row.split  # else they are in both splits, which is refused
            differ += [] if earlier.answers & row.answers else [(earlier, row)]
    if differ:
        raise ConfigError(
            f"{path}: of {len(differ)} questions there are two rows without an answer in common, of which one is wrong:"
            + "".join(f"\n  {a.where} and {b.where}: {_told(a)} and {_told(b)}" for a, b in differ[:_NAMED])
            + (f"\n  and {len(differ) - _NAMED} more" if len(differ) > _NAMED else "")
        )
    if repeats:
        warnings.warn(
            f"{path}: {repeats} of its {len(rows)} rows ask what an earlier one asks, with the same answer, and are "
            "trained on as often as they are there",
            stacklevel=2,
        )


def _told(row: Row) -> str:
    return short(row.payload["answer"])
