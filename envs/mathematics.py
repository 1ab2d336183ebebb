r"""``areal/Math-v0``: problems of mathematics with the python tool, of a file or made up.

Rows of a file (``env.kwargs.path``), each by its own fields: ``question`` and ``answer``, as GSM8K has them, with the
answer behind ``####``; ``problem`` and ``solution``, as MATH has them, with the answer in its last ``\boxed{}``; or
``problem`` and ``answer``, with a ``solution`` or without. Rows without an answer are left out, counted and told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Final

from areal_agents.context import ContextLike
from areal_agents.env import Expert
from areal_agents.envs.problems import LEVELS
from areal_agents.envs.procedural import drawn_tasks
from areal_agents.envs.questions import LeftOut, Questions, file_tasks
from areal_agents.errors import ConfigError
from areal_agents.reward import WeightedSum, boxed
from areal_agents.rewards import boxed_math
from areal_agents.sandbox import SandboxBackend
from areal_agents.tool import call_text
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.python import python
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
SIZES: Final = {"train": 4096, "test": 512}


class Mathematics(ToolEnv):
    r"""Solve a problem of mathematics with python; the answer in ``\boxed{}`` is compared by SymPy.

    An agent must learn what to leave to a program, to read what it printed, and to say the answer in its exact form.
    Without ``path`` the problems are made up, and what says the question again, such as gcd(84, 36), is no answer.
    ``difficulty``: divisors, remainders and equations below 1/3, powers,
    pairs of equations, sequences and square roots below 2/3 (0.5 is the default), congruences, counting, three
    equations and recurrences above.
    """

    system_prompt = r"Work it out, with python where it helps. Then answer \boxed{answer}, exactly."
    tools = (python,)
    rubric = WeightedSum({"correct": boxed_math(worked_out=True)})
    max_turns = 4

    def __init__(
        self,
        *,
        path: str = "",
        test_path: str = "",
        verify: Mapping[str, Any] | None = None,
        sandbox: SandboxBackend | str | None = "bubblewrap",
        max_turns: int | None = None,
        context: ContextLike | None = None,
    ) -> None:
        """Make an environment on a file, or on problems that are made up.

        Args:
            path: of the JSONL file. Empty makes problems up.
            test_path: of the file of the test split. Empty takes it from ``path``.
            verify: options of the verifier, such as ``{"tolerance": 0.01}``.
            sandbox: for the python tool.
            max_turns: in place of the class's own.
            context: as ``ToolEnv`` has it.
        """
        super().__init__(sandbox=sandbox, max_turns=max_turns, context=context)
        self._source: dict[str, Any] = {"path": path, "test_path": test_path}
        if path or verify:  # a file's own gold answers may be such that something is left to compute
            options: dict[str, Any] = {"worked_out": not path, **(verify or {})}
            self._rubric = WeightedSum({"correct": boxed_math(**options)})

    @classmethod
    def tasks(
        cls, split: str, *, difficulty: float | None = None, path: str = "", test_path: str = ""
    ) -> Sequence[Task]:
        if path:
            if split not in SIZES:
                raise ConfigError(f"areal/Math-v0 has no split {split!r}: its splits are {', '.join(SIZES)}")
            return file_tasks(payload_of, split, path, test_path)
        if test_path:
            raise ConfigError(f"env.kwargs.test_path = {test_path!r} goes with a path, which is empty")
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Math-v0", split, level, lambda rng: _drawn(rng, level), SIZES)

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", **self._source)

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    @classmethod
    def gold(cls, task: Task) -> str | None:
        return Questions.gold(task)

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        """Return a program and what it printed, or a file's own solution."""
        if "program" not in task.payload:
            return Questions.expert(task)
        return _computed(str(task.payload["program"]))


def _computed(program: str) -> Expert:
    shown = yield call_text("python", code=program)
    yield rf"\boxed{{{shown[-1].text.strip()}}}"


def _drawn(rng: Random, level: float) -> dict[str, str]:
    question, answer, program = rng.choice(LEVELS[min(2, int(3 * level))])(rng)
    return {"question": question, "answer": answer, "program": program}


def payload_of(row: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
    """Turn a row into a payload. Raises LeftOut, ValueError or KeyError where it cannot be."""
    asked = "problem" if "problem" in row else question
    if answer in row:
        worked = row.get("solution")
        payload = Questions.payload(row, asked, answer)
        return payload | ({"solution": worked} if isinstance(worked, str) and worked.strip() else {})
    solution = row["solution"]
    if not isinstance(solution, str):
        raise ValueError(f"'solution' is no text, but a {type(solution).__name__}")
    gold = boxed(solution)
    if gold is None or not gold.strip():
        raise LeftOut(r"its solution has no \boxed{answer}")
    return {"question": row[asked], "answer": gold.strip(), "solution": solution}
