"""``areal/Facts-v0``: questions over several documents of a corpus that is searched, made up or a user's own."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, Final

from areal_agents.env import Expert
from areal_agents.envs.generated_files import generated_folder
from areal_agents.envs.procedural import drawn_tasks
from areal_agents.envs.search_questions import search_tasks
from areal_agents.errors import ConfigError, EnvError
from areal_agents.rewards.boxed_text import boxed_text
from areal_agents.tool import ToolSpec, call_text
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.read_output import read_output
from areal_agents.tools.search import search_tools
from areal_agents.tools.search_index import open_index, summary
from areal_agents.types import Task
from areal_agents.utils.short_text import short

DEFAULT_DIFFICULTY = 0.5
SIZES: Final = {"train": 2048, "test": 256}
_COUNTS: Final = {"person": 600, "company": 200, "town": 120, "province": 24}
_SYLLABLES: Final = (
    "bar", "cor", "dal", "fen", "gil", "hol", "jor", "kem", "lor", "mar", "nim", "or", "pel", "ru", "sel", "tas", "ul",
    "ven", "wil", "zar",
)  # fmt: skip
RELATIONS: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = MappingProxyType({
    "person": {
        "birthplace": ("town", "{} was born in the town of {}."),
        "employer": ("company", "{} works for the company {}."),
        "teacher": ("person", "{} was taught by {}."),
    },
    "company": {
        "founder": ("person", "The company {} was founded by {}."),
        "seat": ("town", "The company {} has its seat in the town of {}."),
    },
    "town": {
        "province": ("province", "The town of {} lies in the province of {}."),
        "mayor": ("person", "The mayor of the town of {} is {}."),
    },
    "province": {
        "capital": ("town", "The capital of the province of {} is the town of {}."),
        "governor": ("person", "The governor of the province of {} is {}."),
    },
})  # fmt: skip
"""Kind of thing → relation → the kind that it leads to, and the sentence that says so."""
World = Mapping[str, Mapping[str, str]]
"""Name of a thing → relation → name of another one."""


def _names(rng: Random, count: int, parts: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        words = ["".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize() for _ in range(parts)]
        found[" ".join(words)] = None
    return list(found)


@functools.cache
def world() -> tuple[World, Mapping[str, str]]:
    """Draw the facts: what each thing is related to, and what kind of thing it is."""
    rng = Random("areal/Facts-v0")
    single = _names(rng, _COUNTS["town"] + _COUNTS["province"], 1)
    things = {
        "person": _names(rng, _COUNTS["person"], 2),
        "company": [f"{name} Works" for name in _names(rng, _COUNTS["company"], 1)],
        "town": single[: _COUNTS["town"]],
        "province": single[_COUNTS["town"] :],
    }
    facts = {
        name: {relation: rng.choice(things[to]) for relation, (to, _) in RELATIONS[kind].items()}
        for kind, names in things.items()
        for name in names
    }
    return facts, {name: kind for kind, names in things.items() for name in names}


def corpus() -> Path:
    """Return the folder with the corpus, a JSONL file with a document for each thing.

    Its ids say nothing, so a document is found by a search alone.
    """
    return generated_folder("facts-2", _write)


def _write(folder: Path) -> None:
    facts, kinds = world()
    lines = []
    for number, (name, related) in enumerate(facts.items(), 1):
        sentences = [RELATIONS[kinds[name]][relation][1].format(name, other) for relation, other in related.items()]
        lines.append(json.dumps({"id": f"d{number}", "title": name, "text": " ".join(sentences)}))
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")


class Facts(ToolEnv):
    r"""Answer a question whose answer takes several documents, in ``\boxed{}``.

    An agent must learn to take a question apart from the inside, to search for one thing after the other, and to say no
    more than it read. Without ``path`` the corpus is made up, so nothing of it is known from elsewhere. ``difficulty``:
    one document at 0, two at 0.5 (the default), four at 1. Of a file all questions are asked by default.
    """

    system_prompt = r"Find out with search and read_document, one fact after the other. Then answer \boxed{name}."
    tools: Sequence[ToolSpec] = search_tools(corpus() / "corpus.jsonl", progress=False)
    rubric = boxed_text()
    max_turns = 12

    def __init__(self, *, path: str = "", corpus: str = "", test_path: str = "", **more: Any) -> None:
        """Make an environment on a file and its documents, or on facts that are made up.

        Args:
            path: of the JSONL file of questions (``search_questions.py``). Empty makes questions up.
            corpus: of the documents: a JSONL file, a folder of texts, or an index.
            test_path: of the file of the test split. Empty takes it from ``path``.
            more: of ``ToolEnv``.
        """
        self._source: dict[str, Any] = {"path": path, "corpus": corpus, "test_path": test_path}
        _require_both(**self._source)
        if path:  # in place of the two on the made-up corpus; a subclass's own stay
            found = _tools_on(open_index(corpus))
            named = {tool.name for tool in (*found, *Facts.tools)}
            self.tools = (*found, *(tool for tool in self.tools if tool.name not in named))
        super().__init__(**more)

    @classmethod
    def tasks(
        cls, split: str, *, difficulty: float | None = None, path: str = "", corpus: str = "", test_path: str = ""
    ) -> Sequence[Task]:
        _require_both(path, corpus, test_path)
        if path:
            return search_tasks(split, path, corpus, test_path, difficulty=difficulty)
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        hops = round(4**level)
        return drawn_tasks("areal/Facts-v0", split, level, lambda rng: _asked(rng, hops), SIZES)

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", **self._source)

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    @classmethod
    def gold(cls, task: Task) -> str:
        answer = task.payload["answer"]
        return rf"\boxed{{{answer if isinstance(answer, str) else answer[0]}}}"

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        """Read one document after the other, or return None where a file does not say which, or more than fit."""
        passages = [(name, name, rf"\[(d\d+)\] {re.escape(name)}$") for name in task.payload.get("path", ())[:-1]]
        passages += [(id, title, rf"^\d+\. \[({re.escape(id)})\]") for id, title in task.payload.get("passages", ())]
        return _looked_up(task, passages, cls.gold(task)) if 0 < 2 * len(passages) < cls.max_turns else None


def _require_both(path: str, corpus: str, test_path: str) -> None:
    if bool(path) != bool(corpus) or (test_path and not path):
        raise ConfigError(
            f"env.kwargs: path = {path!r}, corpus = {corpus!r}, test_path = {test_path!r}: questions of your own go "
            "with documents of your own. Give path and corpus, or neither"
        )


@functools.lru_cache(maxsize=8)
def _tools_on(index: Path) -> tuple[ToolSpec, ...]:
    """Return the tools on an index, which all environments of a process share.

    Where a document is longer than ``read_document`` shows of one, ``read_output`` is among them.
    """
    search, read_document = search_tools(index)
    cut = summary(index)[1] + len("\n\n") > read_document.max_output_chars
    return (search, read_document, read_output) if cut else (search, read_document)


def _looked_up(task: Task, passages: Sequence[tuple[str, str, str]], gold: str) -> Expert:
    """Search for each document by its title, with the question's words where others come first, and read it."""
    for name, title, pattern in passages:
        for query in (title, f"{title} {task.payload['question']}"):
            observation = yield call_text("search", query=query, top=10)
            if shown := re.search(pattern, observation[-1].text, re.MULTILINE):
                break
        else:
            raise EnvError(f"two searches for {short(title)} do not show the document {short(name)}")
        yield call_text("read_document", id=shown[1])
    yield gold


def _asked(rng: Random, hops: int) -> dict[str, Any]:
    """Draw a chain of facts that comes to no thing twice, and ask for its end."""
    facts, kinds = world()
    names = list(facts)
    while True:
        path = [rng.choice(names)]
        asked = path[0]
        for _ in range(hops):
            relation = rng.choice([*RELATIONS[kinds[path[-1]]]])
            asked = f"the {relation} of {asked}"
            path.append(facts[path[-1]][relation])
        if len(set(path)) == len(path):
            wanted = "Who" if kinds[path[-1]] == "person" else "What"
            return {"question": f"{wanted} is {asked}?", "answer": path[-1], "path": path}
