"""Held-out tasks that a training has, word for word or nearly, are found and listed; others are left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.env import LazyTasks
from areal_agents.errors import ConfigError
from areal_agents.evaluation.overlap import Overlap, find_overlap, near_key, normalised
from areal_agents.rollout.tasks import TaskStream
from areal_agents.settings.config import EnvConfig, EvalConfig, ModelConfig, TrainConfig
from areal_agents.trainer.preflight import look_at_tasks
from areal_agents.types import Task
from tests.chat_envs import Sums
from tests.chat_server import chat_server
from tests.letters_env import Letters
from tests.tiny_models import tiny_chat_model
from tests.unfinished import answers


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 12 + 3?", "what is 12+3"),
        ("Eva has 1,000 well-known nails.", "eva has 1000 well known nails"),
        ("Ｗｈａｔ  is\n５ − ３?", "What is 5 - 3"),
        ("It's “his” and/or 'hers'!", "its his and or hers"),
    ],
)
def test_the_same_text(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 12 + 3?", "What is 1 + 23?"),
        ("What is 12 + 3?", "What is 12 - 3?"),
        ("What is 12 + 3?", "What is 123?"),
        ("List 1 23 in words", "List 12 3 in words"),
        ("Round the number 3.5 up", "Round the number 35 up"),
        ("Round the number 5 up", "Round the number -5 up"),
        ("Simplify the sum x+y", "Simplify the sum x-y"),
        ("What is 1,5 plus one", "What is 15 plus one"),
        ("#  @ $", "# @  $"),
        ("Straße eins", "Strand eins"),
    ],
)
def test_other_texts(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


def task(split: str, n: int, **payload: Any) -> Task:
    return Task.make(f"{split}-{n}", split=split, seed=n, payload=payload)


def look(train: Sequence[Task], held: Sequence[Task], **more: Any) -> Overlap:
    return find_overlap(train, held, names=("e:train", "e:test"), seed=0, **more)


def test_what_is_found() -> None:
    held = [task("test", i, question=f"What is {i} + 1?", answer=str(i + 1), id=i) for i in range(4)]
    train = [
        task("train", 0, question="What is 0 + 1?", answer="1", id=0),  # the very same
        task("train", 1, question="what is 1+1", answer="2.0", id=77),  # another spelling, answer and place
        task("train", 2, question="What is 9 + 1?", answer="10", id=2),
    ]
    found = look(train, held)
    assert found.pairs == (("train-0", "test-0", True), ("train-1", "test-1", False))
    assert str(found) == (
        "2 of the 4 tasks of e:test are not held out: e:train has them (all 3 looked at)\n"
        "  train-0 is test-0\n  train-1 is test-1, but for case, spaces or punctuation"
    )
    with pytest.raises(ConfigError, match=r"they may be there with a = 'b'$"):
        found.require_none("a = 'b'")
    clean = look(train[2:], held)
    clean.require_none("")
    assert str(clean) == "none of the 4 tasks of e:test is among those of e:train (all 1 looked at)"


def test_without_a_question_every_field_counts() -> None:
    one, other = task("a", 0, prompt="Guess it", answer="funny"), task("b", 0, prompt="guess it!", answer="solid")
    assert near_key(one) != near_key(other)
    assert near_key(one) == near_key(task("b", 0, prompt="guess it!", answer="Funny."))
    databases = [task("a", i, question="How many?", database=f"shop-{i}", answer="5") for i in range(2)]
    assert near_key(databases[0]) != near_key(databases[1])
    maps = [task("a", 0, map=["#  @", " $ ."]), task("a", 1, map=["# @ ", " $ ."])]
    assert near_key(maps[0]) != near_key(maps[1])


def test_a_lazy_split_costs_a_bounded_number_and_the_first_drawn_are_looked_at() -> None:
    made: list[int] = []

    def make(i: int) -> Task:
        made.append(i)
        return task("train", i, word=f"word {i}")

    lazy = LazyTasks(1_000_000, make)
    stream = TaskStream(lazy, seed=0)
    drawn = [stream.next() for _ in range(5)]
    made.clear()
    held = [task("test", 0, word=drawn[4].payload["word"].upper())]
    found = look(lazy, held, most=5)
    assert sorted(made) == sorted(int(t.id.split("-")[1]) for t in drawn)
    assert found.pairs == ((drawn[4].id, "test-0", False),)
    assert "(5 of 1000000 looked at)" in str(found)
    assert look(lazy, held, most=4).pairs == ()
    assert look([task("train", i, word=f"w {i}") for i in range(9)], held, most=4).seen == 9  # a list is there already
    assert look(lazy, held, seconds=-1.0).seen == 0


class Leaky(Letters):
    """Its third test task is its sixth training task, in capitals."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        words: Mapping[tuple[str, int], str] = {("test", 2): "SAME word", ("train", 5): "same word"}
        return [task(split, i, word=words.get((split, i), f"{split} {i}")) for i in range(8)]


def trained(tmp_path: Path, **evaluation: Any) -> TrainConfig:
    return TrainConfig(
        out=tmp_path / "run", model=ModelConfig(path="tiny"), env=EnvConfig(id=f"{__name__}:Leaky"),
        eval=EvalConfig(**{"n": 8, **evaluation}),
    )  # fmt: skip


def test_a_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train-5 is test-2, but for case[^\n]*\n[^\n]*eval\.overlap = 'tell'$"):
        asyncio.run(look_at_tasks(trained(tmp_path)))
    (told,) = asyncio.run(look_at_tasks(trained(tmp_path, overlap="tell"))).overlaps
    assert told is not None
    assert told.pairs == (("train-5", "test-2", False),)
    asyncio.run(look_at_tasks(trained(tmp_path, n=1)))  # test-2 is not among the evaluated
    looks = asyncio.run(look_at_tasks(trained(tmp_path, split="train")))
    assert (looks.overlaps, looks.not_held_out) == ((), ("",))


def test_the_command_refuses_it_before_a_folder_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tiny_chat_model(tmp_path / "tiny")
    argv = ["train", "--model.path", str(tiny), "--env.id", f"{__name__}:Leaky", "--eval.n=8"]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 1
    assert "1 of the 8 tasks of tests.evaluation.test_overlap:Leaky:test are not held out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_suite_is_refused_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Sums.tasks("train")[0].content_hash == Sums.tasks("test")[0].content_hash
    file = tmp_path / "s.toml"
    file.write_text('name = "s"\nversion = 1\n[[entries]]\nenv = "tests.chat_envs:Sums"\nn = 4\n')
    with chat_server(answers) as server:
        argv = ["eval", str(file), "--model", "openai:m", "--url", server.url, "--out", str(tmp_path / "out")]
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert "4 of the 4 tasks of Sums (tests.chat_envs:Sums:test) are not held out" in said
        assert said.endswith("or let the entry say overlap = 'tell'\n")
        assert not (tmp_path / "out").exists()
        file.write_text(file.read_text() + 'overlap = "tell"\n')
        assert main(argv) == 0
    assert "4 of the 4 tasks of Sums" in capsys.readouterr().out
