"""A reward for programs, tested in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from areal_agents.errors import ConfigError, TaskError
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards.code.judge import CodeVerdict, run_tests
from areal_agents.rewards.code.languages import LANGUAGES
from areal_agents.rewards.code.problem import Problem
from areal_agents.sandbox import SandboxBackend, backends
from areal_agents.types import AssistantMessage, Task
from areal_agents.utils.sync import on_exit

Mode = Literal["all", "fraction"]
_FENCE = re.compile(r"```([A-Za-z0-9+#]*)[^`]*")


class code:
    """A reward for the last fenced block of the answer, by the tests in ``task.payload``.

        rubric = WeightedSum({"correct": code(), "compiles": (code(mode="compiles"), 0.1)})

    ``all`` is 1 where every test passes, ``fraction`` the weight of those that pass. The tests run in a sandbox, in
    which nothing says what they expect.
    """

    def __init__(
        self,
        *,
        mode: Mode | Literal["compiles"] = "all",
        tool: str = "",
        sandbox: SandboxBackend | str = "bubblewrap",
        problem: Callable[[Episode], Problem] | None = None,
        **rules: Any,
    ) -> None:
        """Choose what counts.

        Args:
            mode: what the score is: ``all``, ``fraction`` or ``compiles``.
            tool: the tool whose last call holds the program, in its first text argument. Empty reads a fenced block.
            sandbox: a backend or the name of one.
            problem: makes the problem of an episode's task. None reads the payload, as ``Problem.of`` says.
            rules: fields of ``Problem`` that hold for every task, such as ``seconds`` or ``float_tolerance``.

        Raises:
            ConfigError: the mode or a rule is unknown.
        """
        if mode not in ("all", "fraction", "compiles"):
            raise ConfigError(f"unknown mode {mode!r}: there are all, fraction and compiles")
        unknown = set(rules) - set(Problem.__dataclass_fields__)
        if unknown:
            raise ConfigError(f"unknown rule {min(unknown)!r}: there are {', '.join(Problem.__dataclass_fields__)}")
        self._mode, self._tool, self._sandbox, self._problem, self._rules = mode, tool, sandbox, problem, rules
        self.__name__ = f"code({mode})"

    async def __call__(self, episode: Episode) -> Verdict:
        problem = self.problem(episode)
        source = self.source(episode, problem)
        if source is None:
            return Verdict(0.0, {self.__name__: 0.0})
        found = await run_tests(source, problem, self._backend(), stop_early=self._mode == "all")
        score = self._score(found, problem)
        components = {self.__name__: score, "compiles": float(found.compiled), "passed": found.share(problem)}
        return Verdict(score, components, status="timeout" if "timeout" in found.results else "ok")

    def problem(self, episode: Episode) -> Problem:
        """Return the problem of an episode's task. Raises TaskError where it has none."""
        try:
            found = self._problem(episode) if self._problem else Problem.of(episode.task.payload, **self._rules)
            if found.language not in LANGUAGES:
                raise ValueError(f"unknown language {found.language!r}: there are {', '.join(LANGUAGES)}")
        except (KeyError, ValueError, TypeError) as error:
            raise TaskError(f"task {episode.task.id!r} has no tests that can be run: {error!r:.200}") from error
        return found

    def require_scorable(self, task: Task) -> None:
        """Raise TaskError where the payload has no tests that can be run.

        A ``problem`` function of the author's may look at the episode, so it is not asked.
        """
        if self._problem is None:
            self.problem(Episode(task, (), None, (), "answer"))

    def source(self, episode: Episode, problem: Problem) -> str | None:
        """Return the submission, or None where there is none."""
        if self._tool:
            for message in reversed(episode.messages):
                if isinstance(message, AssistantMessage):
                    for call in reversed(message.tool_calls):
                        if call.name == self._tool and call.status == "ok":
                            return next((v for v in call.arguments.values() if isinstance(v, str)), None)
            return None
        fences = LANGUAGES[problem.language].fences
        blocks = [body for name, body in fenced(episode.answer or "") if name in fences]
        return blocks[-1] if blocks else None

    def _score(self, found: CodeVerdict, problem: Problem) -> float:
        if self._mode == "compiles":
            return float(found.compiled)
        if self._mode == "fraction":
            return found.share(problem)
        return float(found.compiled and found.passed == len(problem.tests))

    def _backend(self) -> SandboxBackend:
        if not isinstance(self._sandbox, str):
            return self._sandbox
        backend: SandboxBackend = backends().shared(self._sandbox)
        on_exit(backends().close_shared)  # a loop of the caller's own is closed by the caller
        return backend


def fenced(text: str) -> list[tuple[str, str]]:
    """Return the closed fenced blocks of a Markdown text, each with its language in lower case, in linear time."""
    blocks: list[tuple[str, str]] = []
    name = ""
    body: list[str] | None = None
    for line in text.splitlines(keepends=True):
        opened = _FENCE.fullmatch(line.rstrip())
        if body is not None and line.rstrip() == "```":
            blocks.append((name, "".join(body)))
            body = None
        elif body is not None:
            body.append(line)
        elif opened is not None:
            name, body = opened[1].lower(), []
    return blocks
