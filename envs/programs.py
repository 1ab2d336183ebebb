r"""``areal/Programs-v0``: write a Python function, judged by tests that the model does not see.

Rows of a file (``env.kwargs.path``), each by its own fields:

    {"prompt", "entry_point", "test"}                    as HumanEval has them; "canonical_solution" where there is one
    {"text" or "prompt", "test_list"}                    as MBPP has them; "code", "test_setup_code", "test_imports"
    {"question", "tests": [{"arguments", "expected"}]}   with "function", "solution" and rules of ``rewards.code``

Rows whose assertions cannot be read (``assertions.py``) are left out, counted and told.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any, Final

from areal_agents.context import ContextLike
from areal_agents.env import Expert
from areal_agents.envs.assertions import program, read_assertions
from areal_agents.envs.function_specs import spec
from areal_agents.envs.procedural import drawn_tasks, split_of
from areal_agents.envs.questions import LeftOut, file_tasks
from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, WeightedSum
from areal_agents.rewards.code.problem import Problem
from areal_agents.rewards.code.reward import code
from areal_agents.sandbox import SandboxBackend
from areal_agents.tool import call_text
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.python import python
from areal_agents.types import Task, content_hash
from areal_agents.utils.short_text import short

DEFAULT_DIFFICULTY = 0.5
SIZES: Final = {"train": 2048, "test": 256}


class tested(code):
    """The reward ``code``, for tests that are expressions too."""

    def source(self, episode: Episode, problem: Problem) -> str | None:
        found = super().source(episode, problem)
        setup = episode.task.payload.get("setup")
        return found if found is None or setup is None else program(found, str(setup))


class Programs(ToolEnv):
    """Write a Python function; the answer is the last fenced block.

    An agent must learn to try a program with the python tool, on the cases that the description leaves to think of.
    Tests run in a sandbox of their own. The reward is 1 where all pass. Without ``path`` the functions are composed of
    steps on lists of numbers and words. ``difficulty``: three steps at 0, four at 0.5 (the default), six at 1.
    Functions of the same steps are of one split, whatever numbers are in them.
    """

    system_prompt = "Write the function. Try it with python. Then answer with the whole program in a ```python block."
    tools = (python,)
    rubric = WeightedSum({"correct": tested()})
    max_turns = 5

    def __init__(
        self,
        *,
        path: str = "",
        test_path: str = "",
        sandbox: SandboxBackend | str | None = "bubblewrap",
        max_turns: int | None = None,
        context: ContextLike | None = None,
    ) -> None:
        """Make an environment on a file, or on functions that are made up.

        Args:
            path: of the JSONL file. Empty makes functions up.
            test_path: of the file of the test split. Empty takes it from ``path``.
            sandbox: for the python tool and for the tests.
            max_turns: in place of the class's own.
            context: as ``ToolEnv`` has it.
        """
        super().__init__(sandbox=sandbox, max_turns=max_turns, context=context)
        self._source: dict[str, Any] = {"path": path, "test_path": test_path}
        if sandbox is not None:
            self._rubric = WeightedSum({"correct": tested(sandbox=sandbox)})

    @classmethod
    def tasks(
        cls, split: str, *, difficulty: float | None = None, path: str = "", test_path: str = ""
    ) -> Sequence[Task]:
        if path:
            if split not in SIZES:
                raise ConfigError(f"areal/Programs-v0 has no split {split!r}: its splits are {', '.join(SIZES)}")
            return file_tasks(payload_of, split, path, test_path)
        if test_path:
            raise ConfigError(f"env.kwargs.test_path = {test_path!r} goes with a path, which is empty")
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        steps = round(3 + 3 * level)

        def of_split(structure: str) -> bool:
            return split_of(content_hash({"steps": structure})) == split

        return drawn_tasks(
            "areal/Programs-v0", split, level, lambda rng: spec(rng, steps, wanted=of_split), SIZES, apart=True
        )

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", **self._source)

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    @classmethod
    def gold(cls, task: Task) -> str | None:
        solution = task.payload.get("solution")
        return None if solution is None else f"```python\n{solution.rstrip()}\n```"

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        gold = cls.gold(task)
        return None if gold is None else _tried(str(task.payload["solution"]), gold)


def _tried(solution: str, gold: str) -> Expert:
    yield call_text("python", code=solution)
    yield gold


def payload_of(row: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
    """Turn a row into a payload, whatever its kind. Raises LeftOut, ValueError or KeyError where it cannot be."""
    if "test_list" in row:
        return _mbpp(row)
    if "entry_point" in row:
        return _human_eval(row)
    if "tests" not in row:
        raise ValueError(f"it has neither entry_point, test_list nor tests, but {', '.join(map(repr, row))}")
    kept = {name: value for name, value in row.items() if name not in ("setup", "structure")}
    Problem.of(kept)  # raises where its tests cannot be run
    return {**kept, "question": row[question]}


def _human_eval(row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, function = _text(row, "prompt"), _text(row, "entry_point")
    question = f"Write this function:\n```python\n{prompt.rstrip()}\n```"
    payload = _asserted(_text(row, "test"), function, question)
    payload["setup"] = _before(prompt, function)
    if "canonical_solution" in row:
        payload["solution"] = prompt + _text(row, "canonical_solution")
    return payload


def _mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    asked = _text(row, "text" if "text" in row else "prompt")
    listed = row["test_list"]
    if not isinstance(listed, list) or not all(isinstance(line, str) for line in listed):
        raise ValueError(f"test_list = {short(listed)} is no list of texts")
    tests = "\n".join(listed)
    function = _called(tests, str(row.get("code", "")))
    payload = _asserted(tests, function, "")
    payload["question"] = f"{asked.strip()}\nIt is called like this: {payload['tests'][0]['input']}"
    imports = row.get("test_imports", [])
    setup = [str(row.get("test_setup_code", "")), *(imports if isinstance(imports, list) else [])]
    payload["setup"] = "\n".join(map(str, setup)).strip()
    if "code" in row:
        payload["solution"] = _text(row, "code").replace("\r\n", "\n")
    return payload


def _asserted(tests: str, function: str, question: str) -> dict[str, Any]:
    return {"question": question, "tests": read_assertions(tests, function)}


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name!r} = {short(row[name])} is no text")
    return str(row[name])


def _before(prompt: str, function: str) -> str:
    """Return what stands in a prompt before the function: imports, helpers."""
    lines = prompt.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith(f"def {function}(")), 0)
    return "\n".join(lines[:first]).strip()


def _called(tests: str, solution: str) -> str:
    """Return the function that assertions are about: the solution's own, or the first that is called by name."""
    try:
        defined = {n.name for n in ast.walk(ast.parse(solution)) if isinstance(n, ast.FunctionDef)}
        functions = [n.func for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LeftOut(f"its code or its tests are no Python: {type(error).__name__}") from error
    calls = [f.id for f in functions if isinstance(f, ast.Name)]
    plain = [name for name in calls if name not in ("set", "sorted", "list", "tuple", "len", "abs", "str")]
    named = [name for name in plain if name in defined] or plain
    if not named:
        raise LeftOut("its tests call no function")
    return named[0]
