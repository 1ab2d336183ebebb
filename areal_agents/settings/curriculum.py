"""The settings of a curriculum: which tasks a training draws, and how hard they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from areal_agents.algorithms.registry import Registry
from areal_agents.errors import ConfigError
from areal_agents.settings.section import Count, Fraction, Positive, Section

_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "level": ("start", "low", "high", "window"),
    "learnability": ("by", "explore", "prior", "half_life"),
}
"""The settings that one kind alone reads. ``level_step`` is read by all that have levels."""
_OF_RATES = ("min", "max", "missing")
CURRICULA = Registry(
    "curriculum",
    "curriculum",
    group="areal_agents.curricula",
    builtin={"none": "", "level": "", "learnability": ""},  # rollout/curriculum.py makes them
    given=("seed", "difficulty"),
    required=("seed",),
)
"""Names of ours, and what finds a function of somebody else's (``rollout/own_curriculum.py``)."""


class CurriculumConfig(Section):
    kind: Literal["none", "level", "learnability"] | str = "none"
    """``level``: ``difficulty`` follows the recent pass rate. ``learnability``: tasks or levels are drawn by p(1 − p).
    ``module:function``, or an installed package's name: your own. Each environment has one (docs/curriculum.md)."""
    passes: Positive = 1.0
    """An episode with at least this reward has passed."""
    start: Fraction | None = None
    """``level``: the difficulty to begin with; none: ``env.difficulty``, or 0 where that is none too."""
    level_step: Annotated[float, Field(ge=0.001, le=1.0)] = 0.1
    """From one level to the next."""
    low: Fraction = 0.3
    """``level``: a pass rate of at most this lowers the level."""
    high: Fraction = 0.7
    """``level``: a pass rate of at least this raises it."""
    window: Count = 64
    """``level``: episodes of a level whose pass rate is looked at, after which the count begins anew."""
    by: Literal["task", "level"] = "task"
    """``learnability``: of each task that was played, or of each level."""
    explore: Fraction = 0.5
    """``learnability``: the share of groups that do not go by it: the split's next task, or any level."""
    prior: tuple[Positive, Positive] = (1.0, 1.0)
    """``learnability``: passes and failures that every task or level is taken to have had."""
    half_life: Positive = 20.0
    """``learnability``: batches after which an episode counts half."""
    pass_rates: str = ""
    """A file of `areal-agents eval … --save-pass-rates`: tasks with other pass rates than ``min`` to ``max`` are left
    out."""
    min: Fraction = 0.1
    """The least pass rate of a task that trains."""
    max: Fraction = 0.9
    """The largest pass rate of a task that trains."""
    missing: Literal["refuse", "keep", "leave_out"] = "refuse"
    """What to do with a task that the file does not have."""

    @property
    def own(self) -> bool:
        """Whether it is somebody's own."""
        return self.kind not in CURRICULA.builtin()

    @property
    def leveled(self) -> bool:
        """Whether it chooses the difficulty of tasks, as far as the settings say: not of somebody's own."""
        return self.kind == "level" or (self.kind == "learnability" and self.by == "level")

    @model_validator(mode="after")
    def _check(self) -> CurriculumConfig:
        try:
            CURRICULA.require(self.kind)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        changed = {n for n, info in type(self).model_fields.items() if getattr(self, n) != info.default}
        for kind, names in _OF_KIND.items():
            if kind != self.kind and (found := sorted(changed & set(names))):
                raise ValueError(
                    f"curriculum.{found[0]} is a setting of curriculum.kind = {kind!r}, and kind is {self.kind!r}: set "
                    "the kind, or leave it out"
                )
        if "level_step" in changed and not self.leveled:
            raise ValueError(
                "curriculum.level_step is the distance between levels, and this curriculum has none: set "
                "curriculum.kind = 'level', or curriculum.by = 'level', or leave it out"
            )
        if "passes" in changed and self.kind == "none":
            raise ValueError("curriculum.passes is read by a curriculum, and curriculum.kind is 'none': leave it out")
        if not self.pass_rates and (found := sorted(changed & set(_OF_RATES))):
            raise ValueError(f"curriculum.{found[0]} filters by curriculum.pass_rates, which is empty: name a file")
        if self.kind == "learnability" and self.by == "task" and not self.explore:
            raise ValueError(
                "curriculum.explore = 0 with by = 'task' plays the tasks of the first batches for ever, and no other "
                "one: set it above 0"
            )
        if not self.low < self.high:
            raise ValueError(f"curriculum.low = {self.low:g} must be under curriculum.high = {self.high:g}")
        if self.min > self.max:
            raise ValueError(f"curriculum.min = {self.min:g} must be at most curriculum.max = {self.max:g}")
        if self.leveled and self.pass_rates:
            raise ValueError(
                "curriculum.pass_rates are of tasks of one difficulty, and this curriculum changes it: leave "
                "pass_rates out, or set curriculum.kind = 'learnability' with by = 'task'"
            )
        return self
