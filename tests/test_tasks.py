"""Tasks as authors write them by mistake: one sentence, with the class or the task."""

from __future__ import annotations

import decimal
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_agents import registry
from areal_agents.env import AgentEnv, LazyTasks
from areal_agents.errors import EnvError, RegistryError
from areal_agents.evaluation.held_out import held_out
from areal_agents.settings.config import EvalConfig
from areal_agents.types import Task, content_hash
from tests.letters_env import Letters


def make(i: int, split: str = "train", **payload: Any) -> Task:
    return Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": "a", **payload})


class NoDifficulty(Letters):
    @classmethod
    def tasks(cls, split: str) -> Sequence[Task]:  # type: ignore[override]
        return [make(0)]


class OfAnInstance(Letters):
    def tasks(self, split: str, *, difficulty: float | None = None) -> Sequence[Task]:  # type: ignore[override]
        return [make(0)]


class Generates(Letters):
    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Iterator[Task]:  # type: ignore[override]
        yield make(0)


class Awaited(Letters):
    @classmethod
    async def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:  # type: ignore[override]
        return [make(0)]


def returning(value: Any) -> type[AgentEnv]:
    class Returns(Letters):
        @classmethod
        def tasks(cls, split: str, *, difficulty: float | None = None) -> Any:
            return value() if callable(value) else value

    return Returns


def leave() -> None:
    raise SystemExit("need key")


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (NoDifficulty, r"NoDifficulty\.tasks\('train'\) cannot be asked: .*'difficulty'; write `def tasks\("),
        (OfAnInstance, r"OfAnInstance\.tasks\('train'\) cannot be asked: .* under @classmethod"),
        (Generates, r"Generates\.tasks\('train'\) returned a generator: return a list of Task, or LazyTasks"),
        (Awaited, "returned a coroutine: return a list"),
        (returning(None), r"Returns\.tasks\('train'\) returned a NoneType: return a list of Task"),
        (returning({"a": make(0)}), "returned a dict"),
        (returning({make}), "returned a set"),
        (returning("train"), "returned a str"),
        (returning([make(0), {"question": "2 + 2"}]), "holds {'question': '2 \\+ 2'}, which is no Task: use Task.make"),
        (returning([None]), "holds None, which is no Task"),
        (
            returning([make(0), make(1), make(0)]),
            "two tasks with the id 'train-0': give each task an id of its own",
        ),
        (returning(lambda: 1 / 0), r"Returns\.tasks\('train'\) raised ZeroDivisionError: division by zero"),
        (
            returning(lambda: [make(0, x={1, 2})]),
            r"raised TypeError: task 'train-0' is not JSON: payload\['x'\] is a set",
        ),
        (returning(lambda: leave()), r"raised RuntimeError: it called sys.exit\('need key'\)"),
    ],
)
def test_tasks_that_cannot_be_used_are_named_with_the_class(cls: type[AgentEnv], said: str) -> None:
    with pytest.raises(RegistryError, match=said) as caught:
        registry.tasks_of(cls, "acme/X-v0", "train", None)
    assert str(caught.value).startswith("acme/X-v0: ")
    assert "\n" not in str(caught.value)


def test_what_an_environment_refuses_itself_is_passed_on() -> None:
    def refuse() -> None:
        raise EnvError("the data are not downloaded")

    with pytest.raises(EnvError, match="the data are not downloaded"):
        registry.tasks_of(returning(refuse), "acme/X-v0", "train", None)


@pytest.mark.parametrize("found", [[], (make(0),), [make(0), make(1)], LazyTasks(3, make), np.array([make(0)], object)])
def test_sequences_are_taken(found: Any) -> None:
    assert registry.tasks_of(returning(found), "acme/X-v0", "train", None) is found


def test_the_tasks_of_a_lazy_sequence_are_looked_at_where_they_are_used() -> None:
    def broken(i: int) -> Any:
        return {0: make(0), 1: "task 1", 2: make(0)}[i]

    tasks = LazyTasks(4, broken)
    assert tasks[0] == make(0)
    with pytest.raises(EnvError, match="task 1 of 4 is 'task 1', which is no Task"):
        tasks[1]
    with pytest.raises(EnvError, match="task 3 of 4 could not be made: KeyError: 3"):
        tasks[3]
    spec = registry.EnvSpec("acme/X-v0", "tests.test_tasks:Twice")
    with pytest.raises(RegistryError, match="acme/X-v0:test has two tasks with the id 'test-1'"):
        held_out(spec, EvalConfig(n=2), difficulty=None, tell=print)


class Twice(Letters):
    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return LazyTasks(4, lambda i: make(i // 2, split))


# --- the payload ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array(7), 7),
        (np.str_("a"), "a"),
        ([np.int64(1), {"x": np.int32(2)}], [1, {"x": 2}]),
        ({"x": (np.int64(1), 2)}, {"x": (1, 2)}),
        (True, True),
        (None, None),
    ],
)
def test_numpy_numbers_become_pythons_own(value: Any, plain: Any) -> None:
    task = Task.make("t", split="train", seed=np.int64(4), payload={"v": value})  # type: ignore[arg-type]
    assert task.payload["v"] == plain
    assert type(task.payload["v"]) is type(plain)
    assert type(task.seed) is int
    assert task.content_hash == content_hash({"v": plain})
    json.dumps(task.payload)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.arange(3), r"payload\['v'\] is a ndarray: use .tolist\(\)"),
        ({1, 2}, r"payload\['v'\] is a set: use sorted"),
        (b"raw", r"payload\['v'\] is a bytes: decode it"),
        (Path("/tmp"), r"payload\['v'\] is a PosixPath"),
        (decimal.Decimal("0.1"), r"payload\['v'\] is a Decimal"),
        (1j, r"payload\['v'\] is a complex"),
        (math.nan, r"payload\['v'\] is nan"),
        (np.float32("inf"), r"payload\['v'\] is inf"),
        ([1, {"x": [object()]}], r"payload\['v'\]\[1\]\['x'\]\[0\] is a object"),
        ({np.int64(1): "x"}, "keys must be str"),
    ],
)
def test_what_json_lacks_is_named_with_task_and_place(value: Any, said: str) -> None:
    with pytest.raises(TypeError, match=f"task 'shop-3' is not JSON: {said}"):
        Task.make("shop-3", split="train", seed=0, payload={"v": value})


@pytest.mark.parametrize(
    ("make_one", "said"),
    [
        (lambda: Task.make(3, split="train", seed=0, payload={}), "task 3 of split 'train': id and split are texts"),  # type: ignore[arg-type]
        (lambda: Task.make("t", split="train", seed=0, payload=[1]), "the payload of task 't' is a list"),  # type: ignore[arg-type]
        (lambda: Task.make("t", split="train", seed="x", payload={}), "task 't' is not JSON: 'str' object"),  # type: ignore[arg-type]
    ],
)
def test_other_fields_of_the_wrong_type(make_one: Callable[[], Task], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make_one()
