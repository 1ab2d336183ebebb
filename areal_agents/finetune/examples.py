"""What is trained on: examples and pairs of them, where they come from, and what was left out."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np

from areal_agents.algorithms.batch import Row
from areal_agents.errors import ConfigError
from areal_agents.finetune.messages import RowRefused
from areal_agents.utils.short_text import cut

_NUMBER = re.compile(r"\d+")
_SHOWN = 8
"""Reasons that are told one by one."""


@dataclass(frozen=True)
class Sequences:
    """The rows of one episode or conversation, whose masks are True on the tokens that train."""

    name: str
    """For people: a file and its line, or a run and its episode."""
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """The tokens that train."""
        return sum(int(row.mask.sum()) for row in self.rows)

    @property
    def key(self) -> bytes:
        """A digest of the tokens and their masks."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(row.ids.astype("<i8").tobytes() + b"|" + row.mask.tobytes() + b"/")
        return digest.digest()


class Item(Protocol):
    """An example or a pair: what an epoch visits once."""

    @property
    def task(self) -> str:
        """Items of one task are held out together."""
        ...

    @property
    def sides(self) -> tuple[Sequences, ...]: ...


ItemT = TypeVar("ItemT", bound=Item)


@dataclass(frozen=True)
class Example:
    """One conversation to imitate."""

    task: str
    said: Sequences
    reward: float | None = None
    """Of a run's episode, what it earned."""

    @property
    def sides(self) -> tuple[Sequences, ...]:
        return (self.said,)


@dataclass(frozen=True)
class Pair:
    """Two answers to the same, of which the first is better."""

    task: str
    chosen: Sequences
    rejected: Sequences

    @property
    def sides(self) -> tuple[Sequences, ...]:
        return (self.chosen, self.rejected)


@dataclass
class Tally:
    """The counts of one source: what was found, taken and left out, and why."""

    source: str
    unit: str
    """What is counted: episodes, groups, lines."""
    found: int = 0
    taken: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """By reason."""
    first: dict[str, str] = field(default_factory=dict)
    """By reason, the first that it struck, with the details."""
    rendered: int = 0
    """Episodes without tokens of their own, which the model's chat template rendered."""
    unused: set[str] = field(default_factory=set)
    """Columns and fields that were not read."""

    def count(self, limits: Limits) -> None:
        """Count something that is read."""
        self.found += 1
        limits.seen()

    def leave_out(self, name: str, reason: str) -> None:
        """Count something that is not trained on. Reasons that differ in numbers alone are one."""
        kind = _NUMBER.sub("N", reason)
        self.left_out[kind] += 1
        self.first.setdefault(kind, f"{name}: {cut(reason, 400)}")

    def lines(self, what: str) -> list[str]:
        """Return the counts as lines for people."""
        out = [f"{self.source}: {self.taken} {what} of {self.found} {self.unit}"]
        if self.rendered:
            out.append(
                f"  {self.rendered} have no tokens (a server's model played them): rendered by the chat template"
            )
        shown = self.left_out.most_common(_SHOWN)
        out += [f"  left out {n}, the first {self.first[kind]}" for kind, n in shown]
        if len(self.left_out) > _SHOWN:
            out.append(f"  left out {self.left_out.total() - sum(n for _, n in shown)} for other reasons")
        if self.unused:
            out.append(f"  not used: {', '.join(sorted(self.unused))}")
        return out

    def to_json(self) -> dict[str, object]:
        row = {"source": self.source, "found": self.found, "taken": self.taken, "left_out": dict(self.left_out)}
        return row | {"unused": sorted(self.unused)}


@dataclass(frozen=True)
class Limits:
    """What a row may be."""

    max_context: int
    vocabulary: int
    seen: Callable[[], None] = lambda: None
    """Is called for each line or episode that is read."""


def require_fitting(rows: Sequence[Row], limits: Limits) -> None:
    """Raise RowRefused for no rows, for one that is too long, or for ids that the model does not have."""
    if not rows:
        raise RowRefused("no token of it trains")
    longest = max(len(row) for row in rows)
    if longest > limits.max_context:
        raise RowRefused(f"a row has {longest} tokens, more than --max-context {limits.max_context}")
    if (top := max(int(row.ids.max()) for row in rows)) >= limits.vocabulary:
        raise RowRefused(f"it has the token id {top}, and the model's vocabulary ends at {limits.vocabulary - 1}")


def guarded(tally: Tally, name: str, make: Callable[[], Sequence[Row]], limits: Limits) -> Sequences | None:
    """Make the rows of one conversation, or count why there are none."""
    try:
        rows = make()
        require_fitting(rows, limits)
    except RowRefused as error:
        tally.leave_out(name, str(error))
    else:
        return Sequences(name, tuple(rows))
    return None


def last_turn(rows: Sequence[Row]) -> list[Row]:
    """Take all turns but the last one out of the masks, and the rows without a target."""
    last = max((int(row.turns.max()) for row in rows), default=-1)
    kept = [replace(row, mask=row.mask & (row.turns == last)) for row in rows]
    return [row for row in kept if row.mask.any()]


def split_holdout(items: Sequence[ItemT], share: float, *, seed: int) -> tuple[list[ItemT], list[ItemT]]:
    """Split items into those that train and those held out, all of a task on one side.

    Raises ConfigError where a side would be empty.
    """
    tasks = sorted({item.task for item in items})
    if not share:
        return list(items), []
    count = max(1, round(share * len(tasks)))
    if count >= len(tasks):
        raise ConfigError(
            f"--holdout is {share}, and the data has {len(tasks)} tasks: nothing would be left to train on; lower it, "
            "or give more data"
        )
    held = {tasks[i] for i in np.random.default_rng([seed, 1]).permutation(len(tasks))[:count]}
    return [i for i in items if i.task not in held], [i for i in items if i.task in held]


def fingerprint(items: Sequence[Item]) -> str:
    """Return a digest of all that is trained on, in order, and of the tasks, which decide what is held out."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.task.encode("utf-8", "surrogatepass") + b"\0")
        for side in item.sides:
            digest.update(side.key)
        digest.update(b"\n")
    return digest.hexdigest()
