"""The choices of a comparison, which a task or a reward declares."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from areal_agents.rewards.mathematics.choices import Choices, as_choices


@dataclass(frozen=True, slots=True)
class Options:
    """What counts as equal beyond exact mathematics. The defaults add nothing."""

    precision: int | None = None
    """Decimals to which numbers are rounded before they are compared: 1/3 is 0.333 with 3."""
    tolerance: float = 0.0
    """Largest difference of two real numbers."""
    relative: float = 0.0
    """Largest difference of two real numbers, as a share of the gold one."""
    decimal_comma: bool = False
    """3,14 is 3.14 and 1.234,5 is 1234.5."""
    units: bool = False
    """The answer must have the gold answer's unit. Otherwise a number without a unit fits."""
    ordered: bool = False
    """The order of a plain list counts: 1, 2 is not 2, 1."""
    intervals: bool = True
    """1 ≤ x ≤ 2 is [1, 2]."""
    names: bool = True
    """x = 5 is 5."""
    worked_out: bool = False
    """Nothing may be left to compute: gcd(4, 6), 2^10 and 2 · 3 are no answer."""
    choices: Choices = ()
    """The choices of a question: (B), B. 12 cm and 12 cm are B where B is declared as 12 cm."""
    dates: bool = False
    """Dates and times are read: March 5, 2024 is 2024-03-05, 3:05 pm is 15:05."""
    date_order: Literal["", "day", "month"] = ""
    """What comes first in 3/5/2024, which is not read otherwise."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", as_choices(self.choices))
        if self.date_order not in ("", "day", "month"):
            raise ValueError(f"date_order = {self.date_order!r} must be 'day' or 'month'")
        if self.date_order and not self.dates:
            raise ValueError("date_order means nothing without dates = True")
        if self.precision is not None and not 0 <= self.precision <= 100:
            raise ValueError(f"precision = {self.precision} must be between 0 and 100 decimals")
        for name in ("tolerance", "relative"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)} must be a finite number of at least 0")

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        """Read options by name. Raises ValueError for an unknown name or a value of another type."""
        known = {f.name: f.type for f in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise ValueError(f"unknown option {name!r}: there are {', '.join(known)}")
            wanted = known[name]
            if name in ("choices", "date_order"):  # which say themselves what they are
                continue
            if (wanted == "bool" and not isinstance(value, bool)) or (wanted != "bool" and (
                isinstance(value, bool) or not isinstance(value, int | float | None)
            )):  # fmt: skip
                raise ValueError(f"option {name} = {value!r} is no {wanted}")
        return cls(**given)
