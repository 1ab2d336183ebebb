"""Held out means held out: the search for training tasks among those that are evaluated.

A task is there where its content hash is the same, or where its payload is the same but for how its texts are written:
case, white space and punctuation do not count, digits do. Of a question with an answer the question alone counts.

Tasks of a lazy sequence are made for it, so that a bounded number of them is looked at: those that the training draws
first. A report says how many.
"""

from __future__ import annotations

import json
import random
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.rollout.tasks import task_at
from areal_agents.types import Task

MOST = 2000
"""Tasks of a lazy sequence that are looked at."""
SECONDS = 10.0
SHOWN = 10
"""Pairs that an error lists."""
_QUESTION = frozenset({"question", "problem"})
_BESIDE = frozenset({
    "answer", "solution", "gold", "label", "id", "idx", "index", "uid", "uuid", "split", "task_id", "question_id",
})  # fmt: skip
"""Keys that tell nothing of a task that has a question: its answer, and its place in a file."""
_PROSE = 0.6
"""The share of letters and digits, of all but white space, from which on a text is prose and no drawing or code."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TOKEN = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|[-+*/^=<>%]")
_SIGNS = str.maketrans({"−": "-", "×": "*", "÷": "/", "·": "*"})


def normalised(text: str) -> str:
    """Return ``text`` without case, white space and punctuation.

    Numbers stay apart from each other, and so do the signs between them and between single letters: 12 + 3 is not 1 +
    23 nor 12 - 3. What has few letters and digits, a drawn map, is left as it is.
    """
    solid = [c for c in text if not c.isspace()]
    if sum(map(str.isalnum, solid)) < _PROSE * len(solid):
        return text
    plain = unicodedata.normalize("NFKC", text).translate(_SIGNS).casefold()
    tokens = _TOKEN.findall(_THOUSANDS.sub("", plain))
    kept: list[str] = []
    for i, token in enumerate(tokens):
        if token[0].isalnum():
            kept += [" "] if token[0].isdigit() and kept and kept[-1][0].isdigit() else []
            kept.append(token)
        elif any(t[0].isdigit() or len(t) == 1 for t in tokens[max(0, i - 1) : i + 2] if t[0].isalnum()):
            kept.append(token)
    return "".join(kept)


def near_key(task: Task) -> str:
    """Return what near-duplicates of a task share with it."""
    payload = task.payload
    names = {name.casefold() for name in payload}
    if names & _QUESTION:
        payload = {name: value for name, value in payload.items() if name.casefold() not in _BESIDE}
    return json.dumps(_plain(payload), sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return normalised(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a search for training tasks among held-out ones found."""

    train: str
    """The training split, for people."""
    held_out: str
    seen: int
    """Training tasks that were looked at."""
    of: int
    evaluated: int
    """Held-out tasks."""
    pairs: tuple[tuple[str, str, bool], ...] = ()
    """Ids of a training task and of a held-out one, and whether their content is the very same."""

    def __str__(self) -> str:
        looked = f"{self.seen} of {self.of}" if self.seen < self.of else f"all {self.of}"
        if not self.pairs:
            return (
                f"none of the {self.evaluated} tasks of {self.held_out} is among those of {self.train} "
                f"({looked} looked at)"
            )
        listed = [
            f"  {train} is {held}" + ("" if same else ", but for case, spaces or punctuation")
            for train, held, same in self.pairs[:SHOWN]
        ]
        listed += [f"  and {len(self.pairs) - SHOWN} more"] if len(self.pairs) > SHOWN else []
        return (
            f"{len({held for _, held, _ in self.pairs})} of the {self.evaluated} tasks of {self.held_out} are not held "
            f"out: {self.train} has them ({looked} looked at)\n" + "\n".join(listed)
        )

    def require_none(self, how: str) -> None:
        """Raise ConfigError where there are such tasks. ``how`` is what says that they may be there."""
        if self.pairs:
            raise ConfigError(f"{self}\nTake them out of one of the two, or say that they may be there with {how}")


def find_overlap(
    train: Sequence[Task],
    held_out: Iterable[Task],
    *,
    names: tuple[str, str],
    seed: int,
    most: int = MOST,
    seconds: float = SECONDS,
) -> Overlap:
    """Look for tasks of ``train`` among the held-out ones.

    Of a list every task is looked at, as long as the time lasts. Tasks that cannot be made are no one's.

    Args:
        train: the training split.
        held_out: the tasks that are evaluated.
        names: of the two splits, for people.
        seed: of the order in which a training draws its tasks. Those that it draws first are looked at first.
        most: tasks of a lazy sequence.
        seconds: wall clock.

    Returns:
        What was found.
    """
    evaluated = list(held_out)
    hashes = {task.content_hash: task.id for task in evaluated}
    near = {near_key(task): task.id for task in evaluated}
    order = list(range(len(train)))
    random.Random(seed).shuffle(order)
    order.reverse()  # a stream of tasks takes them from the end
    if not isinstance(train, list | tuple):
        order = order[:most]
    pairs: list[tuple[str, str, bool]] = []
    seen, end = 0, time.monotonic() + seconds
    for index in order:
        if time.monotonic() > end:
            break
        seen += 1
        task = task_at(train, index)
        if isinstance(task, str):
            continue
        if (same := hashes.get(task.content_hash)) is not None:
            pairs.append((task.id, same, True))
        elif (twin := near.get(near_key(task))) is not None:
            pairs.append((task.id, twin, False))
    return Overlap(*names, seen, len(train), len(evaluated), tuple(sorted(pairs)))
