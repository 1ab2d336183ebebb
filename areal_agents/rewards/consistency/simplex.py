"""Exact feasibility of linear inequalities over the rationals, and over the integers for names declared so.

The general simplex of Dutertre and de Moura (CAV 2006): a row a linear form, a bound on each, pivots by Bland's rule
until no bound is violated, or a row shows why one must be. Strict bounds are numbers with a second, infinitesimal part.
Numbers are fractions, so that nothing is rounded.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from areal_agents.rewards.consistency.statement import Linear, TooLarge, bits_of

Delta: TypeAlias = "tuple[Fraction, Fraction]"
"""A number and its multiple of an infinitesimal: x < 3 is x ≤ (3, −1)."""
_ZERO: Delta = (Fraction(0), Fraction(0))
MAX_BRANCHES = 200
"""Of the search for whole numbers."""


class Work:
    """A budget of elementary steps, so that a decision takes the same bounded work on every machine."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def spend(self, steps: int) -> None:
        """Raise TooLarge where the budget is spent."""
        self.left -= steps
        if self.left < 0:
            raise TooLarge("undecided within the bounds on work")


@dataclass(frozen=True, slots=True)
class Constraint:
    """``number`` is below 0, or it is not."""

    number: Linear
    below: bool


def conflict(constraints: Sequence[Constraint], integers: frozenset[str], work: Work) -> list[int] | None:
    """Return which constraints contradict each other, or None where all can hold at once.

    Args:
        constraints: all of which shall hold.
        integers: the names that stand for whole numbers.
        work: the budget. Raises TooLarge where it is spent, or where whole numbers are not found in time.
    """
    bounds: list[tuple[dict[str, Fraction], Delta, bool, int]] = []  # form, bound, is it an upper one, whose
    for i, constraint in enumerate(constraints):
        if not constraint.number.terms:
            if (constraint.number.constant < 0) != constraint.below:
                return [i]
            continue
        bounds.append((*_bound(constraint, integers), i))
    left = MAX_BRANCHES
    open_branches = deque([bounds])  # breadth first: one side may go on for ever
    core: set[int] = set()
    while open_branches:
        branch = open_branches.popleft()
        left -= 1
        if left < 0:
            raise TooLarge("no whole numbers were found within the bounds on work")
        tableau = _Tableau(branch, work)
        found = tableau.conflict()
        if found is not None:
            core |= found
            continue
        split = next(((n, v) for n, v in tableau.values().items() if n in integers and not _whole(v)), None)
        if split is None:
            return None
        name, value = split
        floor = _floor(value)
        one = {name: Fraction(1)}
        # No constraint of ours: its reason is -1, and the core is that of all branches together.
        open_branches.append([*branch, (one, (Fraction(floor + 1), Fraction(0)), False, -1)])
        open_branches.append([*branch, (one, (Fraction(floor), Fraction(0)), True, -1)])
    return sorted(core - {-1})


def _whole(value: Delta) -> bool:
    return value[0].denominator == 1 and not value[1]


def _floor(value: Delta) -> int:
    """Return the largest whole number that is not above ``value``."""
    floor = math.floor(value[0])
    return floor - 1 if value[0] == floor and value[1] < 0 else floor


def _bound(constraint: Constraint, integers: frozenset[str]) -> tuple[dict[str, Fraction], Delta, bool]:
    """Return the form of a constraint, the bound on it, and whether it is an upper bound.

    A form with whole coefficients over whole numbers has multiples of their divisor as values alone, and a bound that
    says so.
    """
    form, limit = dict(constraint.number.terms), -constraint.number.constant
    if all(name in integers for name in form):
        scale = Fraction(math.lcm(*(c.denominator for c in form.values())))
        scale /= math.gcd(*((c * scale).numerator for c in form.values()))
        form, limit = {n: c * scale for n, c in form.items()}, limit * scale
        whole = math.ceil(limit) - 1 if constraint.below else math.ceil(limit)
        return form, (Fraction(whole), Fraction(0)), constraint.below
    return form, (limit, Fraction(-1 if constraint.below else 0)), constraint.below


class _Tableau:
    """The forms as rows over the names, with a value for each."""

    def __init__(self, bounds: Sequence[tuple[Mapping[str, Fraction], Delta, bool, int]], work: Work) -> None:
        self._work = work
        self._names: dict[str, int] = {}
        self._rows: dict[int, dict[int, Fraction]] = {}  # basic variable ─▶ its row over the nonbasic ones
        self._lower: dict[int, tuple[Delta, int]] = {}
        self._upper: dict[int, tuple[Delta, int]] = {}
        self._clash: set[int] | None = None
        for form, _, _, _ in bounds:
            work.spend(2 * len(form))
            for name in form:
                self._names.setdefault(name, len(self._names))
        forms: dict[tuple[tuple[int, Fraction], ...], int] = {}
        self._value = [_ZERO] * len(self._names)
        for form, limit, upper, reason in bounds:
            row = {self._names[name]: c for name, c in form.items()}
            key = tuple(sorted(row.items()))
            if key not in forms:
                forms[key] = len(self._value)
                self._rows[forms[key]] = row
                self._value.append(_ZERO)
            self._restrict(forms[key], limit, upper, reason)

    def _restrict(self, variable: int, limit: Delta, upper: bool, reason: int) -> None:
        mine, other = (self._upper, self._lower) if upper else (self._lower, self._upper)
        if variable not in mine or (limit < mine[variable][0] if upper else limit > mine[variable][0]):
            mine[variable] = (limit, reason)
        if variable in other:
            facing, why = other[variable]
            if (limit < facing) if upper else (limit > facing):
                self._clash = {reason, why}

    def values(self) -> dict[str, Delta]:
        """Return the values of the names."""
        return {name: self._value[i] for name, i in self._names.items()}

    def conflict(self) -> set[int] | None:
        """Return the reasons of bounds that contradict each other, or None with values within all bounds."""
        if self._clash is not None:
            return self._clash
        while True:
            basic = min((v for v in self._rows if self._gap(v)), default=None)
            if basic is None:
                return None
            rises = self._gap(basic) > 0
            row = self._rows[basic]
            self._work.spend(8 * len(row) + len(self._rows))
            free = min((v for v, c in row.items() if self._may(v, rises == (c > 0))), default=None)
            if free is None:
                limits = [(self._lower if rises else self._upper)[basic]]
                limits += [(self._upper if rises == (c > 0) else self._lower)[v] for v, c in row.items()]
                return {reason for _, reason in limits}
            self._pivot(basic, free, (self._lower if rises else self._upper)[basic][0])

    def _gap(self, variable: int) -> int:
        """Return 1 where a value must rise, -1 where it must fall, else 0."""
        value = self._value[variable]
        if variable in self._lower and value < self._lower[variable][0]:
            return 1
        return -1 if variable in self._upper and value > self._upper[variable][0] else 0

    def _may(self, variable: int, rise: bool) -> bool:
        bounds = self._upper if rise else self._lower
        if variable not in bounds:
            return True
        value, limit = self._value[variable], bounds[variable][0]
        return value < limit if rise else value > limit

    def _pivot(self, basic: int, free: int, target: Delta) -> None:
        """Give ``basic`` the value ``target`` by moving ``free``, and swap their places."""
        row = self._rows.pop(basic)
        c = row.pop(free)
        step = _times(_minus(target, self._value[basic]), 1 / c)
        self._value[basic], self._value[free] = target, _plus(self._value[free], step)
        new = {v: -k / c for v, k in row.items()} | {basic: 1 / c}
        for other, terms in self._rows.items():
            k = terms.pop(free, None)
            if k is None:
                continue
            self._value[other] = _plus(self._value[other], _times(step, k))
            for v, x in new.items():
                total = terms.get(v, Fraction(0)) + k * x
                limbs = bits_of(total) // 64
                self._work.spend(4 + limbs + limbs * limbs // 1000)  # a fraction is reduced in quadratic time
                if total:
                    terms[v] = total
                else:
                    terms.pop(v, None)
        self._rows[free] = new


def _plus(a: Delta, b: Delta) -> Delta:
    return a[0] + b[0], a[1] + b[1]


def _minus(a: Delta, b: Delta) -> Delta:
    return a[0] - b[0], a[1] - b[1]


def _times(a: Delta, k: Fraction) -> Delta:
    return a[0] * k, a[1] * k
