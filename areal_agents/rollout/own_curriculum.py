"""A curriculum of somebody's own: ``curriculum.kind = "module:function"``, or the name of an installed package's.

    function(seed, difficulty) ─▶ a Curriculum ─▶ OwnCurriculum: each call contained, each answer looked at

It is foreign code that runs where the run's tasks are drawn. Whatever is wrong with it is a ConfigError that names it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from areal_agents.algorithms.signature import positional
from areal_agents.errors import ConfigError
from areal_agents.settings.curriculum import CURRICULA
from areal_agents.types import Task
from areal_agents.utils.foreign import contained
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import described, short, text_of

if TYPE_CHECKING:
    from areal_agents.rollout.curriculum import Attempts, Curriculum

METHODS = ("level", "task_again", "drawn", "note", "state", "restore", "metrics")
OF_THE_BATCH = "pass_rate"
"""The metric beside a curriculum's own that is of the batch (``trainer/rollout_metrics.py``)."""


class OwnCurriculum:
    """Somebody's curriculum, which may raise or return anything."""

    def __init__(self, kind: str, *, difficulty: float | None, seed: str, digits: int) -> None:
        """Make it, and try its state.

        Args:
            kind: as ``curriculum.kind`` names it.
            difficulty: of the environment, by its own settings.
            seed: of the run and the environment.
            digits: to which levels are rounded.

        Raises:
            ConfigError: there is no such function, it makes no curriculum, or its state is not JSON.
        """
        self.name, self._digits = f"curriculum.kind = {kind!r}", digits
        make, given = CURRICULA.function(kind), {"seed": seed, "difficulty": difficulty}
        wanted = {name: given[name] for name in positional(make)}
        self._own: Curriculum = self._call("making it", lambda: make(**wanted))
        if missing := [name for name in METHODS if not callable(getattr(self._own, name, None))]:
            raise ConfigError(
                f"{self.name} returned {short(self._own)}, which has no method {', '.join(missing)}: derive it from "
                "areal_agents.rollout.curriculum.Curriculum"
            )
        self.levels: Sequence[float] | None = self._levels()
        self.restore(self.state())

    def level(self, order: int) -> float | None:
        """Return the difficulty of group ``order``, which is None or one of ``levels``."""
        found: Any = self._ask("level", order)
        if found is None and self.levels is None:
            return None
        try:
            level = round(finite(found), self._digits)
        except ValueError:
            level = -1.0
        if self.levels is None or level not in self.levels:
            raise self._wrong("level", order, found, f"one of its levels, {short(self.levels)}")
        return level

    def task_again(self, order: int) -> int | None:
        """Return a place in the split, or None. Who draws the task knows which places there are."""
        found: Any = self._ask("task_again", order)
        if found is None:
            return None
        place = -1
        if isinstance(found, int | np.integer) and not isinstance(found, bool):
            place = int(found)
        if place < 0:
            raise self._wrong("task_again", order, found, "a place in the split, from 0, or None")
        return place

    def drawn(self, task: Task, place: int) -> None:
        self._ask("drawn", task, place)

    def note(self, batch: Sequence[Attempts]) -> None:
        self._ask("note", tuple(batch))

    def state(self) -> dict[str, Any]:
        found: Any = self._ask("state")
        try:
            with contained():
                copy: Any = json.loads(json.dumps(found, allow_nan=False))
        except Exception as error:  # the author's own values
            told = f"{self.name}: state() is not JSON, as a checkpoint is: {described(error)}"
            raise ConfigError(told) from error
        if not isinstance(copy, dict):
            raise ConfigError(f"{self.name}: state() returned {short(found)}: expected a dictionary")
        if odd := [key for key in _keys(found) if not isinstance(key, str)]:
            raise ConfigError(
                f"{self.name}: state() has the key {short(odd[0])}, which comes back from JSON as a text: use texts as "
                "keys"
            )
        return copy

    def restore(self, state: Mapping[str, Any]) -> None:
        """Let it know what ``state`` returned. Raises ConfigError where it does not say the same afterwards."""
        self._ask("restore", dict(state))
        found, nothing = self.state(), object()
        if other := [key for key in {**state, **found} if state.get(key, nothing) != found.get(key, nothing)]:
            raise ConfigError(
                f"{self.name}: after restore(), state() has {other[0]!r} = {short(found.get(other[0]))}: expected "
                f"{short(state.get(other[0]))}, as it was saved. A run that was cut would go on as another one (sort "
                "what has no order)"
            )

    def metrics(self) -> dict[str, float]:
        found: Any = self._ask("metrics")
        try:
            with contained():
                numbers = {str(name): finite(value) for name, value in dict(found).items()}
        except Exception as error:  # the author's own mapping
            raise ConfigError(f"{self.name}: metrics() returned {short(found)}: {text_of(error)}") from error
        if OF_THE_BATCH in numbers:
            raise ConfigError(f"{self.name}: metrics() has {OF_THE_BATCH!r}, which is the batch's: call it otherwise")
        return numbers

    def _levels(self) -> list[float] | None:
        found: Any = self._call("levels", lambda: getattr(self._own, "levels", None))
        if found is None:
            return None
        try:
            with contained():
                levels = sorted({round(finite(level), self._digits) for level in found})
        except Exception:  # noqa: BLE001  the author's own sequence
            levels = []
        if not levels or not 0.0 <= levels[0] <= levels[-1] <= 1.0:
            raise ConfigError(f"{self.name}: levels is {short(found)}: expected numbers from 0 to 1, or None")
        return levels

    def _ask(self, name: str, *given: Any) -> Any:
        found = self._call(f"{name}()", lambda: getattr(self._own, name)(*given))
        if inspect.isawaitable(found) or inspect.isgenerator(found) or inspect.isasyncgen(found):
            if inspect.iscoroutine(found):
                found.close()
            raise ConfigError(
                f"{self.name}: {name}() is a {type(found).__name__}, which nobody runs: write `def` without `async` "
                "and `yield`"
            )
        return found

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            with contained():
                return call()
        except Exception as error:  # a boundary: the author's code may raise anything
            raise ConfigError(f"{self.name}: {what} raised {described(error)}") from error

    def _wrong(self, name: str, order: int, found: object, expected: str) -> ConfigError:
        return ConfigError(f"{self.name}: {name}({order}) returned {short(found)}: expected {expected}")


def _keys(value: object) -> Iterator[object]:
    """Return the keys of all dictionaries in a value that is JSON."""
    if isinstance(value, dict):
        yield from value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for one in inner:
        yield from _keys(one)
