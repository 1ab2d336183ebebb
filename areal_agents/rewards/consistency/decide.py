"""The decision whether statements can all be true at once.

    statements ─▶ clauses over propositions and "number < 0" ─▶ search ─▶ a choice that satisfies the clauses
                                                                  ▲              │ simplex.py: can it hold?
                                                                  └── a clause ◀─┘ no: why not

Exact, in the lazy way of SMT solvers: a propositional search proposes which comparisons hold, and exact arithmetic says
whether they can. All of it is ours, because its work must be bounded in steps, on every machine alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from areal_agents.rewards.consistency.simplex import Constraint, Work, conflict
from areal_agents.rewards.consistency.statement import (
    Below,
    Formula,
    Linear,
    Many,
    Name,
    Not,
    StatementError,
    TooLarge,
    Truth,
    read_statements,
)

ClaimStatus = Literal["consistent", "contradictory", "unparsed", "too_large"]
MAX_STEPS = 400_000
"""Elementary steps of one decision: about a second."""


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """What is known of statements that are claimed together."""

    status: ClaimStatus
    detail: str = ""


def decide(statements: Sequence[str], *, steps: int = MAX_STEPS) -> ClaimVerdict:
    """Say whether the statements can all be true at once. None at all can."""
    try:
        read = read_statements(statements)
        problem = _Problem(read.integers, Work(steps))
        for formula in read.formulas:
            problem.claim(formula)
        return ClaimVerdict("consistent" if problem.satisfiable() else "contradictory")
    except StatementError as error:
        return ClaimVerdict("unparsed", str(error))
    except TooLarge as error:
        return ClaimVerdict("too_large", str(error))


class _Problem:
    """Clauses of literals, which are ± the number of a variable, from 1."""

    def __init__(self, integers: frozenset[str], work: Work) -> None:
        self._integers, self._work = integers, work
        self._clauses: list[list[int]] = []
        self._propositions: dict[str, int] = {}
        self._numbers: dict[Linear, int] = {}
        self._count = 0

    def _new(self) -> int:
        self._count += 1
        return self._count

    def claim(self, formula: Formula) -> None:
        """Add that the formula is true."""
        self._clauses.append([self._literal(formula)])

    def _literal(self, formula: Formula) -> int:
        """Return a literal that is equivalent to the formula, by new variables for its parts (Tseitin)."""
        self._work.spend(4)
        match formula:
            case Name(name):
                if name not in self._propositions:
                    self._propositions[name] = self._new()
                return self._propositions[name]
            case Not(inner):
                return -self._literal(inner)
            case Truth(value):
                variable = self._new()
                self._clauses.append([variable if value else -variable])
                return variable
            case Below(number):
                return self._below(number)
            case Many(word, items):
                return self._many(word, [self._literal(item) for item in items])

    def _below(self, number: Linear) -> int:
        if number.terms:  # 2x < 4 is x < 2
            number = Linear((), number.constant * 0).plus(number, 1 / abs(number.terms[0][1]))
        if number not in self._numbers:
            self._numbers[number] = self._new()
        return self._numbers[number]

    def _many(self, word: Literal["and", "or", "iff"], items: list[int]) -> int:
        whole = self._new()
        self._work.spend(4 * len(items))
        if word != "iff":
            items = [*dict.fromkeys(items)]
        if word == "iff":
            a, b = items
            self._clauses += [[-whole, -a, b], [-whole, a, -b], [whole, a, b], [whole, -a, -b]]
            return whole
        sign = 1 if word == "and" else -1  # a or b is not (not a and not b)
        self._clauses += [[-sign * whole, sign * item] for item in items]
        self._clauses.append([sign * whole, *(-sign * item for item in items)])
        return whole

    def satisfiable(self) -> bool:
        """Say whether some choice satisfies all clauses, and its comparisons can hold."""
        search = _Search(self._clauses, self._count, self._work)
        while (choice := search.next()) is not None:
            chosen = [(v, number) for number, v in self._numbers.items() if choice[v]]
            constraints = [Constraint(number, choice[v] > 0) for v, number in chosen]
            core = conflict(constraints, self._integers, self._work)
            if core is None:
                return True
            if not search.learn([-choice[chosen[i][0]] * chosen[i][0] for i in core]):
                return False
        return False


class _Search:
    """A depth-first search with unit propagation (DPLL). It goes on where a choice was refused."""

    def __init__(self, clauses: Sequence[Sequence[int]], variables: int, work: Work) -> None:
        self._work = work
        self._value = [0] * (variables + 1)  # 1 true, -1 false, 0 open
        self._clauses: list[list[int]] = []
        self._with: dict[int, list[int]] = {}
        self._trail: list[int] = []
        self._decisions: list[tuple[int, int]] = []  # where in the trail, and the literal that was tried
        self._dead = False
        for clause in clauses:
            self._add(clause)
        self._dead = not all(self._assign_unit(c) for c in self._clauses) or not self._propagate(0)

    def _add(self, clause: Sequence[int]) -> None:
        for literal in clause:
            self._with.setdefault(literal, []).append(len(self._clauses))
        self._clauses.append([*clause])

    def _assign_unit(self, clause: Sequence[int]) -> bool:
        """Assign the only literal of a clause of one. Return False where that contradicts what is assigned."""
        return len(clause) > 1 or self._set(clause[0])

    def _set(self, literal: int) -> bool:
        now = self._value[abs(literal)] * (1 if literal > 0 else -1)
        if not now:
            self._value[abs(literal)] = 1 if literal > 0 else -1
            self._trail.append(literal)
        return now >= 0

    def next(self) -> list[int] | None:
        """Return values that satisfy every clause, 0 for variables that do not matter, or None where there are none."""
        while not self._dead:
            literal = self._open_literal()
            if literal is None:
                return [*self._value]
            start = len(self._trail)
            self._decisions.append((start, literal))
            self._set(literal)
            if not self._propagate(start):
                self._back()
        return None

    def learn(self, clause: Sequence[int]) -> bool:
        """Add a clause that the last choice violates, and go back. Return False where nothing is left."""
        self._add(clause)
        while not self._dead and all(self._of(literal) < 0 for literal in clause):
            self._back()
        return not self._dead

    def _of(self, literal: int) -> int:
        return self._value[abs(literal)] * (1 if literal > 0 else -1)

    def _open_literal(self) -> int | None:
        """Return a literal of a clause that is not satisfied yet, or None where all are."""
        for clause in self._clauses:
            self._work.spend(len(clause))
            if not any(self._of(literal) > 0 for literal in clause):
                return next(literal for literal in clause if not self._of(literal))
        return None

    def _propagate(self, start: int) -> bool:
        """Assign what follows from the trail from ``start`` on. Return False at a contradiction."""
        while start < len(self._trail):
            literal, start = self._trail[start], start + 1
            for index in self._with.get(-literal, ()):
                clause = self._clauses[index]
                self._work.spend(len(clause))
                if any(self._of(x) > 0 for x in clause):
                    continue
                open_ones = [x for x in clause if not self._of(x)]
                if not open_ones:
                    return False
                if len(open_ones) == 1:
                    self._set(open_ones[0])
        return True

    def _back(self) -> None:
        """Undo the last decision whose other side was not tried, and try that."""
        while self._decisions:
            start, literal = self._decisions.pop()
            for undone in self._trail[start:]:
                self._value[abs(undone)] = 0
            del self._trail[start:]
            # The other side follows from the decisions before it: it belongs to the last of them.
            self._set(-literal)
            if self._propagate(start):
                return
        self._dead = True
