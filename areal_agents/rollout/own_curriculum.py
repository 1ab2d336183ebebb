"""A curriculum of somebody's own: ``curriculum.kind = "module:function"``, or the name of an installed package's.

    function(seed, difficulty) ─▶ a Curriculum ─▶ OwnCurriculum: each call contained, each answer looked at

It is foreign code that runs where the run's tasks are drawn. Whatever is wrong with it is a ConfigError that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from areal_agents.algorithms.signature import positional
from areal_agents.errors import ConfigError
from areal_agents.settings.curriculum import CURRICULA
from areal_agents.types import Task
from areal_agents.utils.foreign import contained
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import described, short

if TYPE_CHECKING:
    from areal_agents.rollout.curriculum import Attempts, Curriculum

METHODS = ("level", "task_again", "drawn", "note", "state", "restore", "metrics")


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
        self._where, self._digits = f"curriculum.kind = {kind!r}", digits
        make, given = CURRICULA.function(kind), {"seed": seed, "difficulty": difficulty}
        wanted = {name: given[name] for name in positional(make)}
        self._own: Curriculum = self._call("making it", lambda: make(**wanted))
        if missing := [name for name in METHODS if not callable(getattr(self._own, name, None))]:
            raise ConfigError(
                f"{self._where} returned {short(self._own)}, which has no method {', '.join(missing)}: derive it from "
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
        if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 0):
            raise self._wrong("task_again", order, found, "a place in the split, from 0, or None")
        return found

    def drawn(self, task: Task, place: int) -> None:
        self._ask("drawn", task, place)

    def note(self, batch: Sequence[Attempts]) -> None:
        self._ask("note", tuple(batch))

    def state(self) -> dict[str, Any]:
        found: Any = self._ask("state")
        try:
            copy: Any = json.loads(json.dumps(found, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            told = f"{self._where}: state() is not JSON, as a checkpoint is: {described(error)}"
            raise ConfigError(told) from error
        if not isinstance(copy, dict):
            raise ConfigError(f"{self._where}: state() returned {short(found)}: expected a dictionary")
        return copy

    def restore(self, state: Mapping[str, Any]) -> None:
        self._ask("restore", dict(state))

    def metrics(self) -> dict[str, float]:
        found: Any = self._ask("metrics")
        try:
            return {str(name): finite(value) for name, value in dict(found).items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self._where}: metrics() returned {short(found)}: {error}") from error

    def _levels(self) -> list[float] | None:
        found: Any = self._call("levels", lambda: getattr(self._own, "levels", None))
        if found is None:
            return None
        try:
            levels = sorted({round(finite(level), self._digits) for level in found})
        except (TypeError, ValueError):
            levels = []
        if not levels or not 0.0 <= levels[0] <= levels[-1] <= 1.0:
            raise ConfigError(f"{self._where}: levels is {short(found)}: expected numbers from 0 to 1, or None")
        return levels

    def _ask(self, name: str, *given: Any) -> Any:
        return self._call(f"{name}()", lambda: getattr(self._own, name)(*given))

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            with contained():
                return call()
        except Exception as error:  # a boundary: the author's code may raise anything
            raise ConfigError(f"{self._where}: {what} raised {described(error)}") from error

    def _wrong(self, name: str, order: int, found: object, expected: str) -> ConfigError:
        return ConfigError(f"{self._where}: {name}({order}) returned {short(found)}: expected {expected}")
