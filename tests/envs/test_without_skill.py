"""How much the environments pay without the skill, and how many different tasks they have: what the docs say of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from areal_agents import registry
from areal_agents.env import AgentEnv
from areal_agents.envs.blackjack import Blackjack
from areal_agents.envs.booking import WISHES, Booking
from areal_agents.envs.doors import KEYS, Doors
from areal_agents.envs.hanoi import PEGS, Hanoi
from areal_agents.envs.hidden_number import HiddenNumber
from areal_agents.envs.nim import Nim
from areal_agents.envs.sokoban import Sokoban
from areal_agents.envs.words import Words
from areal_agents.tool import call_text
from areal_agents.types import Task

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"
_CELLS = r"\| `(areal/\w+-v0)` \| ([^|]*) of (\d+) \| ([^|]*) \| [^|]+ \|"
SAID = {found[1]: (found[2], int(found[3]), found[4]) for found in re.finditer(_CELLS, PAGE.read_text("utf-8"))}
Policy = Callable[[AgentEnv, Task, Random], Iterator[str]]


def spaced(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    """Guess at equal distances, all in one message: no answer is read."""
    p = task.payload
    step = (p["high"] - p["low"] + 1) / p["guesses"]
    yield "\n".join(call_text("guess", number=int(p["low"] + i * step)) for i in range(p["guesses"]))


def frequent(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    while True:
        yield call_text("guess", word=task.payload["word"][0] + "".join(rng.choice("aeioulrnst") for _ in range(4)))


def wander(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    while True:
        yield call_text("walk", steps="".join(rng.choice("UDLR") for _ in range(12)))


def legal(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    while True:
        tops = {peg: env.state.top(peg) for peg in PEGS}
        start, end = rng.choice([
            (a, b) for a in PEGS for b in PEGS if tops[a] is not None and (tops[b] is None or tops[a] < tops[b])
        ])  # fmt: skip
        yield call_text("move", start=start, end=end)


def stand(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    yield call_text("stand")


def largest(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    while True:
        heaps = env.state.heaps
        yield call_text("take", heap=heaps.index(max(heaps)) + 1, count=max(heaps))


def any_key(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    while True:
        yield call_text("open", key=rng.choice(KEYS))


def unasked(env: AgentEnv, task: Task, rng: Random) -> Iterator[str]:
    """Book what was said at the start, the rest at random: a restaurant that fits what was said."""
    p = task.payload
    said = {wish: p["wishes"][wish] for wish in p["opening"]}
    fitting = [r["name"] for r in p["restaurants"] if all(said.get(w, r[w]) == r[w] for w in ("food", "area"))]
    day, people = (said.get(wish, rng.choice(WISHES[wish])) for wish in ("day", "people"))
    yield call_text("book", restaurant=rng.choice(fitting), day=day, people=int(people))


POLICIES: dict[type[AgentEnv], Policy] = {
    HiddenNumber: spaced, Words: frequent, Sokoban: wander, Hanoi: legal, Blackjack: stand, Nim: largest,
    Doors: any_key, Booking: unasked,
}  # fmt: skip


def earned(cls: type[AgentEnv], task: Task, rng: Random) -> float:
    env = cls(sandbox=None)  # type: ignore[call-arg]
    env.reset(seed=0, options={"task": task})
    reward, over = 0.0, False
    for text in POLICIES[cls](env, task, rng):
        _, paid, terminated, truncated, _ = env.step(text)
        reward, over = reward + float(paid), terminated or truncated
        if over:
            break
    env.close()
    assert over
    return reward


@pytest.mark.parametrize("cls", POLICIES, ids=lambda cls: cls.__name__)
def test_what_comes_without_the_skill_is_what_the_docs_say(cls: type[AgentEnv]) -> None:
    _, _, cell = SAID[f"areal/{cls.__name__}-v0"]
    rng = Random(1)
    for difficulty, said in zip((0.0, 0.5), map(float, cell.split(", ")), strict=False):
        mean = fmean(earned(cls, task, rng) for task in cls.tasks("test", difficulty=difficulty)[:100])
        assert mean == pytest.approx(said, abs=0.13)  # 100 tasks of 0 or 1: two standard errors are 0.1


def test_what_comes_without_the_skill_is_declared_as_chance() -> None:
    """So that the audit knows it. Where it is a constant answer's few hundredths, the audit's slack has room for it."""
    for id, (_, _, cell) in SAID.items():
        said = [max(0.0, float(number)) for number in cell.split(", ")]
        said = said * 3 if len(said) == 1 else said
        levels = (0.0, 0.5, 1.0)
        declared = [dataclasses.replace(registry.spec(id), difficulty=level).audit.chance for level in levels]
        if max(said) <= 0.02:
            assert declared == [0.0] * 3, id
        else:
            assert declared == said, id
            assert registry.spec(id).audit.chance == said[1], id


def test_the_docs_say_how_many_different_tasks_there_are() -> None:
    assert len(SAID) == 15
    for id, (cell, size, _) in SAID.items():
        different = [size] * 3 if cell == "all" else [int(n) for n in cell.split(", ")]
        pool = registry.spec(id).tasks("test", difficulty=0.0)
        assert len(pool) == size
        assert len({task.content_hash for task in pool}) == different[0], id
