"""What the engine comparison decodes: real prompts, fixed lengths, and the cases that are timed.

Prompts are the first prompts of ``areal/Arithmetic-v0``: about 150 tokens, of which the system message and the
tool's schema (some 100) are the same for all. ``distinct`` prompts say the question first, so that nothing after the
template's first words is shared. Lengths are given, never sampled: end-of-sequence tokens are ignored on both sides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from areal_agents import registry
from areal_agents.chat.format import ChatFormat
from areal_agents.types import Completion, ToolCall, system, tool_result, user

EQUAL = 64
TURN = 32
"""Tokens of each of two turns."""

LONG_TAILED = (
    12, 20, 128, 9, 26, 17, 14, 38, 22, 11, 96, 18, 30, 15, 24, 44, 10, 19, 28, 13, 60, 16, 21, 33, 8, 25, 14, 76, 18,
    12, 36, 23,
)  # fmt: skip
"""Completion lengths with a long tail: median 20.5, mean 29.25, longest 128."""


@dataclass(frozen=True)
class Case:
    batch: int
    lengths: Literal["equal", "ragged"] = "equal"
    turns: Literal[1, 2] = 1
    prompts: Literal["shared", "distinct"] = "shared"

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {self.lengths}, {self.turns} turn{'s' * (self.turns > 1)}, {self.prompts} prefix"


HEADLINE = Case(32)
CASES = (
    Case(1), Case(8), HEADLINE,
    Case(8, prompts="distinct"), Case(32, prompts="distinct"),
    Case(8, lengths="ragged"), Case(32, lengths="ragged"),
    Case(1, turns=2), Case(8, turns=2), Case(32, turns=2),
)  # fmt: skip


def targets(case: Case) -> list[int]:
    """How many tokens each request samples a turn. Ragged: two batches' worth, so that a free row can be refilled."""
    if case.turns == 2:
        return [TURN] * case.batch
    if case.lengths == "equal":
        return [EQUAL] * case.batch
    return [LONG_TAILED[i % len(LONG_TAILED)] for i in range(2 * case.batch)]


def padded_tokens(lengths: list[int], batch: int) -> int:
    """Tokens that a batch-at-a-time decoder computes for ``lengths``: every batch runs to its longest."""
    parts = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return sum(max(part) * len(part) for part in parts)


class Prompts:
    """Token ids of first prompts and of the second turn's suffix, encoded as the trainer encodes them."""

    def __init__(self, model: Any) -> None:
        self._fmt = ChatFormat.load(model)
        spec = registry.spec("areal/Arithmetic-v0")
        self._cls: Any = spec.env_class()
        self._tasks = spec.tasks("train", difficulty=None)

    def first(self, case: Case) -> list[list[int]]:
        n = len(targets(case))
        return [self._ids(i, shared=case.prompts == "shared") for i in range(n)]

    def _ids(self, index: int, *, shared: bool) -> list[int]:
        instructions = self._cls.system_prompt
        question = str(self._tasks[index].payload["question"])
        head = instructions if shared else f"{question} {instructions}"
        tail = question if shared else "Solve it."
        return list(self._fmt.first_prompt([system(head), user(tail)], self._cls.tools))

    def suffix(self) -> list[int]:
        """A tool's answer after a first turn that was cut by its length."""
        cut = Completion((5,), (0.0,), (0,), "length")
        return list(self._fmt.suffix([tool_result("48213", call=ToolCall("1", "python", {}, ""))], cut))


def request(case: Case, prompts: Prompts, **more: Any) -> dict[str, Any]:
    """One case as a side understands it."""
    return {
        "case": asdict(case), "batch": case.batch, "prompts": prompts.first(case), "lengths": targets(case),
        "suffix": prompts.suffix() if case.turns == 2 else None,
    } | more  # fmt: skip
