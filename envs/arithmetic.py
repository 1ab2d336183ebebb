"""``areal/Arithmetic-v0``: word problems whose numbers are too large to work out without the python tool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from areal_agents.env import Expert
from areal_agents.envs.procedural import drawn_tasks
from areal_agents.reward import boxed_number
from areal_agents.tool import call_text
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.python import python
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5

_NAMES = ("Ana", "Ben", "Eva", "Leo", "Mia", "Tom")
_ITEMS = ("apples", "beads", "cards", "coins", "nails", "pens", "shells", "stamps")


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The numbers of one problem, drawn at random.

    With difficulty, the bounds grow tenfold for factors and a hundredfold for sums.
    """

    rng: Random
    difficulty: float

    def small(self) -> int:
        """Draw a factor: 12 to 99 at difficulty 0, to 999 at 1."""
        return self.rng.randint(12, int(10 ** (2 + self.difficulty)) - 1)

    def big(self) -> int:
        """Draw a factor or summand: 101 to 999 at difficulty 0, to 99999 at 1."""
        return self.rng.randint(101, int(10 ** (3 + 2 * self.difficulty)) - 1)

    def below(self, limit: int) -> int:
        """Draw what can be taken away from ``limit``, at most a big number."""
        return self.rng.randint(11, max(12, min(limit - 1, int(10 ** (3 + 2 * self.difficulty)) - 1)))


@dataclass(frozen=True, slots=True)
class _Story:
    """One problem: its text, the Python expression that solves it, and the solution."""

    text: str
    expression: str
    answer: int


StoryShape = Callable[[_Numbers, str, str], _Story]


def _given_away(n: _Numbers, name: str, item: str) -> _Story:
    a, b = n.small(), n.big()
    c = n.below(a * b)
    text = f"{name} buys {a} boxes of {b} {item} and gives away {c}. How many {item} are left?"
    return _Story(text, f"{a}*{b}-{c}", a * b - c)


def _per_day(n: _Numbers, name: str, item: str) -> _Story:
    a, b, c = n.big(), n.small(), n.big()
    text = f"{name} collects {a} {item} a day for {b} days, then {c} more. How many {item} in all?"
    return _Story(text, f"{a}*{b}+{c}", a * b + c)


def _bags(n: _Numbers, name: str, item: str) -> _Story:
    a, b, c = n.big(), n.big(), n.small()
    text = f"A bag holds {a} red and {b} blue {item}. How many {item} are in {c} bags?"
    return _Story(text, f"({a}+{b})*{c}", (a + b) * c)


def _shared(n: _Numbers, name: str, item: str) -> _Story:
    each, children, c = n.big(), n.small(), n.big()
    total = each * children
    text = f"{total} {item} are shared by {children} children. {name} adds {c} to one share. How many {item} is that?"
    return _Story(text, f"{total}//{children}+{c}", each + c)


def _two_prices(n: _Numbers, name: str, item: str) -> _Story:
    a, b, c, d = n.big(), n.small(), n.big(), n.small()
    text = f"{name} sells {a} {item} at {b} dollars each and {c} books at {d} dollars each. How many dollars is that?"
    return _Story(text, f"{a}*{b}+{c}*{d}", a * b + c * d)


def _savings(n: _Numbers, name: str, item: str) -> _Story:
    a, b = n.big(), n.small()
    c = n.below(a * b)
    d = n.big()
    text = f"{name} earns {a} dollars a week for {b} weeks, spends {c} and then finds {d}. How many dollars is that?"
    return _Story(text, f"{a}*{b}-{c}+{d}", a * b - c + d)


def _collected(n: _Numbers, name: str, item: str) -> _Story:
    a, b, c = n.big(), n.small(), n.big()
    d = n.below(a * b + c)
    text = f"{name} collects {a} {item} a day for {b} days, finds {c} more and loses {d}. How many {item} are left?"
    return _Story(text, f"{a}*{b}+{c}-{d}", a * b + c - d)


def _hall(n: _Numbers, name: str, item: str) -> _Story:
    a, b = n.big(), n.small()
    c = n.below(a * b)
    d = n.big()
    text = f"A hall has {a} rows of {b} seats. {c} seats are empty and {d} people stand. How many people are there?"
    return _Story(text, f"{a}*{b}-{c}+{d}", a * b - c + d)


def _shop(n: _Numbers, name: str, item: str) -> _Story:
    a, b = n.big(), n.small()
    c = n.below(a * b // 2)
    d = n.below(a * b - c)
    text = f"{name} orders {a} boxes of {b} {item}, sells {c} and throws {d} away. How many {item} are left?"
    return _Story(text, f"{a}*{b}-{c}-{d}", a * b - c - d)


def _trucks(n: _Numbers, name: str, item: str) -> _Story:
    a, b, c = n.small(), n.small(), n.small()
    d = n.below(a * b * c)
    text = f"{a} trucks carry {b} crates each, with {c} {item} a crate. {d} {item} get lost. How many {item} arrive?"
    return _Story(text, f"{a}*{b}*{c}-{d}", a * b * c - d)


def _theatre(n: _Numbers, name: str, item: str) -> _Story:
    a, b, c, d = n.small(), n.big(), n.small(), n.big()
    e = n.below(a * b + c * d)
    text = f"A hall has {a} rows of {b} seats and {c} rows of {d} seats. {e} seats are empty. How many are taken?"
    return _Story(text, f"{a}*{b}+{c}*{d}-{e}", a * b + c * d - e)


_SHAPES: tuple[tuple[float, float, StoryShape], ...] = (
    (0.0, 0.4, _given_away),
    (0.0, 0.4, _per_day),
    (0.3, 1.0, _savings),
    (0.3, 1.0, _collected),
    (0.3, 1.0, _hall),
    (0.3, 1.0, _shop),
    (0.8, 1.0, _two_prices),
    (0.8, 1.0, _trucks),
    (0.8, 1.0, _bags),
    (0.8, 1.0, _shared),
    (0.8, 1.0, _theatre),
)
"""Each row is (lowest difficulty, highest difficulty, shape).

The first shapes have two operations, the next three. The last have other structures, with up to four."""


class Arithmetic(ToolEnv):
    r"""Work out a word problem with python; the answer is read from ``\boxed{}`` and compared exactly.

    ``difficulty`` scales the numbers' lengths and the structure: two operations at 0, three at 0.5 (the default), up
    to four with parentheses and division at 1.
    """

    system_prompt = r"Compute with python, then answer \boxed{number}."
    tools = (python,)
    rubric = boxed_number()
    max_turns = 4

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Arithmetic-v0", split, level, lambda rng: _problem(rng, level))

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    @classmethod
    def expert(cls, task: Task) -> Expert:
        observation = yield call_text("python", code=f"print({task.payload['expression']})")
        yield rf"\boxed{{{observation[-1].text.strip()}}}"

    @classmethod
    def gold(cls, task: Task) -> str:
        return rf"\boxed{{{task.payload['answer']}}}"


def _problem(rng: Random, difficulty: float) -> dict[str, str]:
    shapes = [shape for low, high, shape in _SHAPES if low <= difficulty <= high]
    story = rng.choice(shapes)(_Numbers(rng, difficulty), rng.choice(_NAMES), rng.choice(_ITEMS))
    return {"question": story.text, "expression": story.expression, "answer": str(story.answer)}
