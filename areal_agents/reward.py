"""The reward contract: a finished episode goes in, a checked verdict comes out.

Rubrics compose rewards:

    def correct(episode: Episode) -> bool: ...
    rubric = Gate({"correct": correct, "brief": (brief, 0.1)}, on="correct")

A reward is an async callable that returns a Verdict, or any function, sync or async, that returns a number. Every
number is checked: NaN, an infinity or a non-number raises RewardError and is never taken for zero. Answers are read
only from a declared slot (``boxed``) and by a strict grammar (``number``). Nothing of a model's text is evaluated.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from areal_agents.errors import RewardError, TaskError
from areal_agents.types import AssistantMessage, Message, StopReason, Task
from areal_agents.utils.blocking import timed
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import cut, short
from areal_agents.utils.tolerance import rounding_of

if TYPE_CHECKING:
    import sympy  # type: ignore[import-untyped]

    from areal_agents.engine import ChatModel
    from areal_agents.tool import ToolResult

VerdictStatus = Literal["ok", "unverifiable", "timeout"]
_WORST_FIRST: tuple[VerdictStatus, ...] = ("timeout", "unverifiable", "ok")
MAX_NUMBER_CHARS = 256
PAID = "turn_reward"
"""The component of a turn that says what its tools paid (``ToolEnv.reward_turn``)."""


@dataclass(frozen=True, slots=True)
class Episode:
    """The part of an episode that a reward may look at."""

    task: Task
    messages: tuple[Message | AssistantMessage, ...]
    answer: str | None
    """Text of the final answer without its reasoning; None when the episode ended without one."""
    tool_results: tuple[ToolResult, ...]
    stop_reason: StopReason
    models: Mapping[str, ChatModel] = field(default_factory=dict, repr=False, compare=False)
    """Judges and simulated users that the environment was made with, by name. They stay in their process."""
    state: Any = field(default=None, repr=False, compare=False)
    """The environment's ``state`` at the end. It is not saved: looking at that of a saved episode is a RewardError."""
    outcome: Any = field(default=None, repr=False)
    """What ``ToolEnv.inspect`` found in the sandbox at the end, as JSON has it. It is saved with the episode."""

    def __reduce__(self) -> tuple[Any, ...]:
        kept = (self.task, self.messages, self.answer, self.tool_results, self.stop_reason)
        return Episode, (*kept, {}, self.state, self.outcome)

    @property
    def turns(self) -> int:
        """Turns of the policy so far."""
        return sum(isinstance(m, AssistantMessage) for m in self.messages)

    @property
    def tokens(self) -> int | None:
        """Tokens that the policy sampled, over all turns. None where nobody counted those of every turn."""
        counts = [m.tokens for m in self.messages if isinstance(m, AssistantMessage)]
        known = [n for n in counts if n is not None]
        return sum(known) if len(known) == len(counts) else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a reward.

    ``score`` is the episode's reward. ``components`` explain it and are logged, not trained on.
    """

    score: float
    components: Mapping[str, float] = field(default_factory=dict)
    turn_rewards: tuple[float, ...] | None = None
    """One number a turn, in place of ``score`` on the last turn. ``score`` is their sum."""
    status: VerdictStatus = "ok"


class Reward(Protocol):
    async def __call__(self, episode: Episode) -> Verdict: ...


Score: TypeAlias = "Verdict | float | bool"
RewardLike: TypeAlias = "Reward | Callable[[Episode], Score | Awaitable[Score]]"
TaskCheck: TypeAlias = Callable[[Task], Awaitable[None] | None]
"""Raises TaskError for a task that cannot be scored, whatever is answered. Sync or async."""


async def judge(reward: RewardLike, episode: Episode, *, name: str = "") -> Verdict:
    """Call any kind of reward, and check every number of its verdict.

    Raises RewardError.
    """
    label = name or name_of(reward)
    value: Any = timed(label, reward, episode)
    if inspect.isawaitable(value):
        value = await value
    return checked(value, episode, label)


def name_of(reward: object) -> str:
    """Return what messages and components call a reward: its own name, or its class's."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def checked(value: object, episode: Episode, label: str) -> Verdict:
    """Return what the reward called ``label`` returned for ``episode`` as a Verdict, every number checked.

    Raises RewardError.
    """
    if not isinstance(value, Verdict):
        score = _finite(value, label, episode)
        return Verdict(score, {label: score})
    if value.status not in _WORST_FIRST:
        raise RewardError(
            f"reward {label!r} returned the status {short(value.status)} on task {episode.task.id!r}: use "
            f"{', '.join(_WORST_FIRST)}"
        )
    turns = value.turn_rewards
    if turns is not None and len(turns) != episode.turns:
        raise RewardError(
            f"reward {label!r} returned {len(turns)} turn rewards for {episode.turns} turns on task "
            f"{episode.task.id!r}: return one number a turn, or None"
        )
    score = _finite(value.score, label, episode)
    checked = None if turns is None else tuple(_finite(x, f"{label}.turn_rewards", episode) for x in turns)
    if checked and abs(math.fsum(checked) - score) > rounding_of(score, *checked):
        raise RewardError(
            f"reward {label!r} returned the score {score:g} on task {episode.task.id!r}, but its turn rewards add up "
            f"to {math.fsum(checked):g}: the score is their sum, so return Verdict(sum(turns), turn_rewards=turns)"
        )
    components = {key: _finite(x, f"{label}.{key}", episode) for key, x in value.components.items()}
    return Verdict(score, components, checked, value.status)


def task_checks(reward: object) -> tuple[TaskCheck, ...]:
    """Return the ``require_scorable`` of a reward, or of those that it is made of (``inner_rewards``, ``__wrapped__``).

    A run looks at its tasks with them before the first episode. Empty where a reward has none.
    """
    own: TaskCheck | None = getattr(reward, "require_scorable", None)
    if own is not None:
        return (own,)
    inner: Iterable[object] = getattr(reward, "inner_rewards", ())
    wrapped: object = getattr(reward, "__wrapped__", None)
    parts = [*inner, *(() if wrapped is None else (wrapped,))]
    return tuple(check for part in parts for check in task_checks(part))


def judging_seconds(reward: RewardLike) -> float:
    """Return the seconds that a reward, or those that it is made of, may take by their nature (``step_seconds``)."""
    own: float | None = getattr(reward, "step_seconds", None)
    if own is not None:
        return own
    inner: Iterable[RewardLike] = getattr(reward, "inner_rewards", ())
    wrapped: RewardLike | None = getattr(reward, "__wrapped__", None)
    return sum(judging_seconds(part) for part in [*inner, *(() if wrapped is None else (wrapped,))])


class WeightedSum:
    """A rubric that adds named rewards up, each times its weight.

    A value is a reward (weight 1) or ``(reward, weight)``.
    """

    def __init__(self, rewards: Mapping[str, RewardLike | tuple[RewardLike, float]]) -> None:
        if not rewards:
            raise ValueError("a rubric needs at least one reward")
        self._parts: dict[str, tuple[RewardLike, float]] = {}
        for name, entry in rewards.items():
            reward, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be finite, got {weight}")
            self._parts[name] = (reward, float(weight))

    @property
    def inner_rewards(self) -> tuple[RewardLike, ...]:
        return tuple(reward for reward, _ in self._parts.values())

    @property
    def parts(self) -> dict[str, RewardLike]:
        """The rewards by name, without their weights."""
        return {name: reward for name, (reward, _) in self._parts.items()}

    async def __call__(self, episode: Episode) -> Verdict:
        verdicts = {name: await judge(reward, episode, name=name) for name, (reward, _) in self._parts.items()}
        return self._combine(verdicts, frozenset(verdicts), episode)

    def _combine(self, verdicts: Mapping[str, Verdict], counted: frozenset[str], episode: Episode) -> Verdict:
        """Add up the ``counted`` parts.

        Components always show what every part scored.
        """
        weighted = {name: (self._parts[name][1], v) for name, v in verdicts.items() if name in counted}
        score = sum(weight * v.score for weight, v in weighted.values())
        turn_rewards: list[float] | None = None
        if episode.turns and any(v.turn_rewards is not None for _, v in weighted.values()):
            turn_rewards = [0.0] * episode.turns
            for weight, v in weighted.values():
                if v.turn_rewards is None:  # an outcome belongs to the turn that produced it
                    turn_rewards[-1] += weight * v.score
                else:
                    turn_rewards = [total + weight * x for total, x in zip(turn_rewards, v.turn_rewards, strict=True)]
        components: dict[str, float] = {}
        for name, v in verdicts.items():
            components |= {key if key == name else f"{name}.{key}": x for key, x in v.components.items()}
            components[name] = v.score
        status = next(s for s in _WORST_FIRST if s == "ok" or any(v.status == s for v in verdicts.values()))
        return Verdict(float(score), components, None if turn_rewards is None else tuple(turn_rewards), status)


class Gate(WeightedSum):
    """A WeightedSum whose other rewards count only where ``on`` scored at least ``threshold``.

    This is the rubric for format and style rewards. Without the gate a policy can collect them while every answer is
    wrong.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardLike | tuple[RewardLike, float]],
        *,
        on: str = "correct",
        threshold: float = 1.0,
    ) -> None:
        super().__init__(rewards)
        if on not in self._parts:
            raise ValueError(f"Gate(on={on!r}): no such reward; there are {', '.join(map(repr, self._parts))}")
        self._on = on
        self._threshold = threshold

    @property
    def on(self) -> str:
        """The reward that opens the gate."""
        return self._on

    async def __call__(self, episode: Episode) -> Verdict:
        verdicts = {name: await judge(reward, episode, name=name) for name, (reward, _) in self._parts.items()}
        opened = verdicts[self._on].score >= self._threshold
        return self._combine(verdicts, frozenset(verdicts) if opened else frozenset({self._on}), episode)


Rubric: TypeAlias = WeightedSum | Gate


def correct_part(reward: object) -> str | None:
    """Return the component of a reward that says whether an answer is right, or None where nothing tells.

    It is what a Gate is on, else a part called ``correct``, here or in a reward inside.
    """
    if isinstance(reward, Gate):
        return reward.on
    if isinstance(reward, WeightedSum):
        if "correct" in reward.parts:
            return "correct"
        inside = {name: correct_part(part) for name, part in reward.parts.items()}
        return next((f"{name}.{found}" for name, found in inside.items() if found is not None), None)
    own = getattr(reward, "__dict__", {})  # of Clip, Normalize and reward_function
    wrapped = own.get("reward", own.get("function"))
    return None if wrapped is None else correct_part(wrapped)


def _finite(value: object, name: str, episode: Episode) -> float:
    try:
        return finite(value)
    except ValueError as wrong:
        if isinstance(value, list | tuple) or getattr(value, "ndim", None):
            raise RewardError(
                f"reward {name!r} returned {short(value)} on task {episode.task.id!r}: a reward is a finite number, "
                f"this is {wrong}; one number a turn is Verdict(sum(turns), turn_rewards=turns)"
            ) from wrong
        raise RewardError(
            f"reward {name!r} returned {short(value)} on task {episode.task.id!r}: a reward is a finite number, this "
            f"is {wrong}; raise an InfraError for a verifier that failed, or return Verdict(status='unverifiable')"
        ) from wrong


def boxed_all(text: str) -> tuple[str, ...]:
    r"""Find the contents of every balanced ``\boxed{…}``, in the order of their closing braces."""
    return tuple(text[start:end] for start, end in boxed_spans(text))


def boxed_spans(text: str) -> tuple[tuple[int, int], ...]:
    r"""Find where the content of every balanced ``\boxed{…}`` stands, in linear time.

    ``\{`` and ``\}`` are literal braces. An inner box of a nested one is left out.
    """
    opened: list[int] = []  # per open brace: where a box's content starts, or -1
    found: list[tuple[int, int]] = []
    for match in re.finditer(r"\\boxed\s{0,8}\{|\\.|[{}]", text, re.DOTALL):
        token = match.group()
        if token == "}":
            start = opened.pop() if opened else -1
            if start >= 0:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, match.start()))
        elif token.endswith("{") and token != r"\{":
            opened.append(match.end() if token != "{" else -1)
    return tuple(found)


def boxed(text: str) -> str | None:
    r"""Find the content of the last balanced ``\boxed{…}``, or return None."""
    found = boxed_all(text)
    return found[-1] if found else None


def sole_boxed(text: str) -> str | None:
    r"""Find the content of the ``\boxed{…}``, or return None where there is none or several differ.

    Hedging is no answer.
    """
    found = {content.strip() for content in boxed_all(text)}
    return found.pop() if len(found) == 1 else None


_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(rf"([+-]?)(?:({_INTEGER})/({_INTEGER})|({_INTEGER})?(?:\.([0-9]+))?)")


def number(text: str) -> sympy.Rational | None:
    """Read the exact value of a strictly written number, or return None.

    Grammar: an optional sign; digits, with thousands commas where they are placed correctly; an optional decimal part;
    or a fraction a/b of two integers with b ≠ 0. Surrounding spaces and dollar signs are dropped, nothing else is. At
    most 256 characters.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text.strip(" \t\r\n$"))
    if match is None:
        return None
    sign, above, below, whole, decimals = (group or "" for group in match.groups())
    if not (above or whole or decimals):
        return None
    from sympy import Rational  # half a second to import, and only scoring needs it

    if above:
        denominator = int(below.replace(",", ""))
        if denominator == 0:
            return None
        value = Rational(int(above.replace(",", "")), denominator)
    else:
        value = Rational(int((whole.replace(",", "") + decimals) or "0"), 10 ** len(decimals))
    return -value if sign == "-" else value


class _BoxedNumber:
    """What ``boxed_number`` makes."""

    __name__ = "correct"

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, episode: Episode) -> float:
        gold = self._gold(episode.task)
        said = sole_boxed(episode.answer or "")
        return float(said is not None and number(said) == gold)

    def require_scorable(self, task: Task) -> None:
        """Raise TaskError where the task has no gold answer that is a number."""
        self._gold(task)

    def _gold(self, task: Task) -> sympy.Rational:
        who = f"task {cut(task.id, 120)!r}"
        if self._key not in task.payload:
            raise TaskError(f"{who}: its payload has no {self._key!r}")
        gold = number(str(task.payload[self._key]))
        if gold is None:
            raise TaskError(f"{who}: payload[{self._key!r}] = {short(task.payload[self._key])} is no number")
        return gold


def boxed_number(key: str = "answer") -> Callable[[Episode], float]:
    r"""Make a reward that compares the answer's only ``\boxed{…}`` with the number in ``task.payload[key]``.

    It is 1 where they are equal, else 0.
    """
    return _BoxedNumber(key)
