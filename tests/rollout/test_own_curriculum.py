"""Somebody's own curriculum: found by name, run as the page shows it, and whatever it does wrongly said."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_agents.errors import ConfigError
from areal_agents.rollout.curriculum import Attempts, Curriculum, curriculum_of, levels_of
from areal_agents.rollout.shares import Shares
from areal_agents.rollout.sources import EnvTasks, Source
from areal_agents.rollout.tasks import TaskStream
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.types import Task
from tests import doc_blocks

HERE = __name__
TASKS = [Task.make(f"t{i}", split="train", seed=i, payload={"i": i}) for i in range(6)]


class Counts(Curriculum):
    """It counts batches, and plays the task at that place."""

    def __init__(self, seed: str = "", difficulty: float | None = None) -> None:
        self.seed, self.difficulty, self.batches = seed, difficulty, 0
        self.places: list[tuple[str, int]] = []

    def task_again(self, order: int) -> int | None:
        return self.batches or None

    def drawn(self, task: Task, place: int) -> None:
        self.places.append((task.id, place))

    def note(self, batch: Sequence[Attempts]) -> None:
        self.batches += 1

    def state(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.batches = state["batches"]

    def metrics(self) -> dict[str, float]:
        return {"batches": self.batches}


class Climbs(Counts):
    """A level more a batch."""

    levels: Sequence[float] = (0.0, 0.5, 1)

    def level(self, order: int) -> float | None:
        return self.levels[min(self.batches, 2)]

    def task_again(self, order: int) -> int | None:
        return None


def counts(seed: str, difficulty: float | None) -> Counts:
    return Counts(seed, difficulty)


def climbs(seed: str) -> Climbs:
    return Climbs()


def sown(seed: str) -> Climbs:
    """Its levels follow from the seed of the run and the environment."""
    found = Climbs()
    found.levels = (0.25,) if seed == "4/x" else (0.75,)
    return found


def settings(name: str) -> CurriculumConfig:
    return CurriculumConfig(kind=f"{HERE}:{name}", passes=0.5)


def source(name: str) -> Source:
    own = curriculum_of(settings(name), difficulty=0.3, seed=4, label="x")
    return Source([EnvTasks(lambda level: TaskStream(TASKS, seed=0), curriculum=own)], Shares([1.0], seed=0))


def test_it_chooses_tasks_and_goes_on_from_its_state() -> None:
    first, second = source("counts"), source("counts")
    stream = TaskStream(TASKS, seed=0)
    assert first.draw(0).task == stream.next()
    first.consume([])
    assert [first.draw(order).task.id for order in (1, 2)] == ["t1", "t1"]
    assert first.metrics() == {"": {"batches": 1.0}}
    second.restore(first.state())
    assert second.draw(3).task.id == "t1"
    for _ in range(5):
        second.consume([])
    said = f"curriculum.kind = '{HERE}:counts' chose the task at place 6 of a split with 6 tasks"
    with pytest.raises(ConfigError, match=said):
        second.draw(9)


def test_it_is_told_of_the_run_and_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Counts] = []

    def keeps(seed: str, difficulty: float | None) -> Counts:
        seen.append(Counts(seed, difficulty))
        return seen[-1]

    monkeypatch.setattr(sys.modules[HERE], "keeps", keeps, raising=False)
    found = source("keeps")
    assert [(c.seed, c.difficulty) for c in seen] == [("4/x", 0.3)]
    first = found.draw(0).task
    found.consume([])
    assert found.draw(1).task.id == "t1"
    assert seen[0].places == [(first.id, first.payload["i"]), ("t1", 1)]  # of tasks that it chose itself too


def test_its_levels_are_known_before_the_run() -> None:
    assert levels_of(settings("climbs"), 0.3, seed=4, label="x") == [0.0, 0.5, 1.0]
    assert levels_of(settings("counts"), 0.3, seed=4, label="x") == [0.3]
    assert levels_of(settings("sown"), 0.3, seed=4, label="x") == [0.25]
    found = source("climbs")
    levels = [found.draw(0).level]
    for order in (1, 2):
        found.consume([])
        levels.append(found.draw(order).level)
    assert levels == [0.0, 0.5, 1.0]


def broken(**methods: Callable[..., Any] | object) -> Any:
    """A function that makes a curriculum with other methods."""
    made = type("Broken", (Counts,), methods)
    return lambda seed: made()


def exits(self: object, *given: object) -> None:
    sys.exit(3)


async def awaits(self: object, *given: object) -> None:
    """Somebody wrote `async def`."""


def yields(self: object, *given: object) -> Iterator[int]:
    yield 1


class Unreadable:
    """What cannot be looked into."""

    def __iter__(self) -> Iterator[Any]:
        raise LookupError("closed")

    def keys(self) -> Iterator[Any]:
        sys.exit(4)

    def __repr__(self) -> str:
        return "Unreadable"


WRONG: Mapping[str, tuple[Any, str]] = {
    "nothing": (lambda seed: None, "returned None, which has no method level, task_again"),
    "raises": (broken(note=exits), r"note\(\) raised RuntimeError: it called sys.exit\(3\)"),
    "state": (broken(state=lambda self: {"x": {1}}), r"state\(\) is not JSON, as a checkpoint is: TypeError"),
    "nan": (broken(state=lambda self: {"batches": float("nan")}), r"state\(\) is not JSON"),
    "list": (broken(state=lambda self: [1]), r"state\(\) returned \[1\]: expected a dictionary"),
    "restore": (broken(restore=lambda self, state: state["y"]), r"restore\(\) raised KeyError: 'y'"),
    "place": (
        broken(task_again=lambda self, order: 1.5),
        r"task_again\(1\) returned 1.5: expected a place in the split",
    ),
    "true": (broken(task_again=lambda self, order: True), r"task_again\(1\) returned True"),
    "before": (broken(task_again=lambda self, order: -1), r"task_again\(1\) returned -1"),
    "level": (broken(level=lambda self, order: 0.5), r"level\(1\) returned 0.5: expected one of its levels, None"),
    "other": (broken(levels=[0, 1], level=lambda self, order: 0.5), r"expected one of its levels, \[0.0, 1.0\]"),
    "none": (broken(levels=[0, 1]), r"level\(1\) returned None: expected one of its levels"),
    "above": (broken(levels=[0, 2]), r"levels is \[0, 2\]: expected numbers from 0 to 1, or None"),
    "word": (broken(levels="high"), r"levels is 'high'"),
    "metrics": (broken(metrics=lambda self: {"x": "y"}), r"metrics\(\) returned {'x': 'y'}: not a number"),
    "odd metrics": (
        broken(metrics=lambda self: Unreadable()),
        r"metrics\(\) returned Unreadable: it called sys.exit\(4\)",
    ),
    "ours": (
        broken(metrics=lambda self: {"pass_rate": 0.5}),
        r"metrics\(\) has 'pass_rate', which is the batch's: call it otherwise",
    ),
    "odd levels": (broken(levels=Unreadable()), "levels is Unreadable: expected numbers from 0 to 1, or None"),
    "number": (
        broken(state=lambda self: {"passes": [{7: 1}]}),
        r"state\(\) has the key 7, which comes back from JSON as a text: use texts as keys",
    ),
    "async": (broken(note=awaits), r"note\(\) is a coroutine, which nobody runs: write `def` without `async`"),
    "generator": (broken(drawn=yields), r"drawn\(\) is a generator, which nobody runs"),
    "truth": (broken(task_again=lambda self, order: np.bool_(True)), r"task_again\(1\) returned .*True.*: expected"),
}


def test_what_restore_forgets_is_said_where_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch was consumed, and after ``restore`` it knows of none: it would play other tasks than it did."""
    made = broken(restore=lambda self, state: None)

    def forgets(seed: str) -> Any:
        return made(seed)

    monkeypatch.setattr(sys.modules[HERE], "forgets", forgets, raising=False)
    first, second = source("forgets"), source("forgets")
    first.draw(0)
    first.consume([])
    first.draw(1)
    said = r"after restore\(\), state\(\) has 'batches' = 0: expected 1, as it was saved"
    with pytest.raises(ConfigError, match=said):
        second.restore(first.state())


def test_numbers_of_numpy_are_places_and_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    methods: dict[str, Any] = {
        "levels": np.array([0.5, 1.0]),
        "level": lambda self, order: np.float64(0.5),
        "task_again": lambda self, order: np.int64(2),
        "drawn": lambda self, task, place: drawn.append(place),
    }
    made = type("OfNumpy", (Counts,), methods)

    def of_numpy(seed: str) -> Any:
        return made()

    monkeypatch.setattr(sys.modules[HERE], "of_numpy", of_numpy, raising=False)
    found = source("of_numpy").draw(0)
    assert (found.task.id, found.level) == ("t2", 0.5)
    assert [(place, type(place)) for place in drawn] == [(2, int)]


@pytest.mark.parametrize("name", WRONG)
def test_what_it_does_wrongly_names_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = WRONG[name]

    def function(seed: str) -> Any:
        return make(seed)

    monkeypatch.setattr(sys.modules[HERE], "function", function, raising=False)

    def live() -> None:
        found = source("function")
        found.consume([])
        found.draw(1)
        found.metrics()

    with pytest.raises(ConfigError, match=rf"curriculum.kind = '{HERE}:function':? .*{said}"):
        live()


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "easy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: easy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[areal_agents.curricula]\neasy_first = easy_first:easy_first\n")
    (block,) = (b for b in doc_blocks.blocks("docs/curriculum.md") if b.file == "easy_first.py")
    (tmp_path / "easy_first.py").write_text(block.text)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = curriculum_of(CurriculumConfig(kind="easy_first"), difficulty=None, seed=0, label="")
    assert own is not None
    assert own.task_again(7) == 0
    own.note([Attempts(0, "", "t", None, 4, 1), Attempts(1, "", "t", None, 4, 2)])
    assert (own.task_again(8), own.state()) == (1, {"place": 1})
    for kind, said in (
        ("levle", "curriculum.kind = 'levle': no such curriculum; did you mean 'level'?"),
        ("nowhere:f", r"curriculum.kind = 'nowhere:f': nowhere:f cannot be imported"),
        (f"{HERE}:Counts", "an algorithm is a Python function"),
    ):
        with pytest.raises(ValueError, match=said):
            CurriculumConfig(kind=kind)
    with pytest.raises(ValueError, match=r"curriculum.window is a setting of curriculum.kind = 'level'"):
        CurriculumConfig(kind="easy_first", window=3)
