"""A reward for programs, tested in a sandbox."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from areal_agents.errors import ConfigError, TaskError
from areal_agents.reward import Episode, Verdict, VerdictStatus
from areal_agents.rewards.code.checker import fault
from areal_agents.rewards.code.fences import submission
from areal_agents.rewards.code.judge import CodeVerdict, run_tests
from areal_agents.rewards.code.languages import LANGUAGES
from areal_agents.rewards.code.problem import CodeTest, Problem
from areal_agents.rewards.code.toolchain import place, require_language
from areal_agents.rewards.submitted import submitted
from areal_agents.sandbox import SandboxBackend, backends
from areal_agents.types import Task
from areal_agents.utils.sync import on_exit

Mode = Literal["all", "fraction", "weighted", "compiles"]
FAILURES = ("wrong", "error", "timeout", "oom", "output_limit", "crash", "checker_error")
"""Statuses of tests that are components of the verdict, each the share of the tests that ended so."""


class code:
    """A reward for the last fenced block of the answer, by the tests in ``task.payload``.

        rubric = WeightedSum({"correct": code(), "compiles": (code(mode="compiles"), 0.1)})

    The tests run in a sandbox, in which nothing says what they expect. Components say what became of the submission:
    ``answered`` and ``compiles`` are 0 or 1, ``passed`` and the statuses of ``FAILURES`` are shares of the tests. The
    verdict's status is ``timeout`` where a test or the compiler took too long, ``unverifiable`` where a checker failed
    or the sandbox was lost twice in one test.
    """

    step_seconds = 1800.0
    """What a step may wait for its verdict: others are judged before it, and tests have bounds of their own."""

    def __init__(
        self,
        *,
        mode: Mode = "all",
        tool: str = "",
        argument: str = "",
        sandbox: SandboxBackend | str = "bubblewrap",
        problem: Callable[[Episode], Problem] | None = None,
        **rules: Any,
    ) -> None:
        """Choose what counts.

        Args:
            mode: what the score is. ``all`` is 1 where every test passes, and stops at the first that does not,
                ``fraction`` the share of the tests that pass, ``weighted`` their share of the weights, ``compiles`` 1
                for any program that compiles: it needs no tests, and runs none.
            tool: the tool whose last call holds the program. Empty reads a fenced block.
            argument: the name of its argument that does. Empty is its only text.
            sandbox: a backend or the name of one.
            problem: makes the problem of an episode's task. None reads the payload, as ``Problem.of`` says.
            rules: fields of ``Problem`` that hold for every task, such as ``seconds`` or ``float_tolerance``.

        Raises:
            ConfigError: the mode or a rule is unknown, a rule has a wrong value, or ``argument`` has no tool.
        """
        if mode not in get_args(Mode):
            raise ConfigError(f"unknown mode {mode!r}: there are {', '.join(get_args(Mode))}")
        known = [name for name in Problem.__dataclass_fields__ if name != "tests"]
        if unknown := set(rules) - set(known):
            raise ConfigError(f"unknown rule {min(unknown)!r}: there are {', '.join(known)}")
        if argument and not tool:
            raise ConfigError(f"argument = {argument!r} is one of a tool: name that too, tool=")
        if problem is not None and rules:
            raise ConfigError("problem= makes whole problems: it sets the rules itself")
        try:
            Problem((), **rules)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._mode, self._tool, self._argument = mode, tool, argument
        self._sandbox, self._problem, self._rules = sandbox, problem, rules
        self.__name__ = f"code({mode})"

    async def __call__(self, episode: Episode) -> Verdict:
        problem = self.problem(episode)
        source = self.source(episode, problem)
        if source is None:
            return self._verdict(CodeVerdict(False, ()), problem, answered=False)
        backend = self._backend()
        async with place():
            await require_language(problem.language, backend)
            found = await run_tests(source, problem, backend, stop_early=self._mode == "all")
        if "checker_error" in found.results:
            await self._require_checker(episode.task, problem, problem.tests[found.results.index("checker_error")])
        return self._verdict(found, problem, answered=True)

    def problem(self, episode: Episode) -> Problem:
        """Return the problem of an episode's task. Raises TaskError where it has none."""
        given = episode.task.payload
        try:
            if self._mode == "compiles":
                given = {**given, "tests": []}
            found = self._problem(episode) if self._problem else Problem.of(given, **self._rules)
            if not isinstance(found, Problem):
                raise TypeError(f"problem= made {found!r:.80}, which is no Problem")
            if self._mode == "compiles":
                return replace(found, tests=())
            if not found.tests:
                raise ValueError("there is no test")
        except (KeyError, ValueError, TypeError) as error:
            raise TaskError(f"task {episode.task.id!r} has no tests that can be run: {error!r:.200}") from error
        return found

    async def require_scorable(self, task: Task) -> None:
        """Raise TaskError where the payload has no tests that can be run, or the checker fails on any output.

        A ``problem`` function of the author's may look at the episode, so it is not asked.
        """
        if self._problem is None:
            problem = self.problem(Episode(task, (), None, (), "answer"))
            if problem.tests:
                await self._require_checker(task, problem, problem.tests[0])

    async def _require_checker(self, task: Task, problem: Problem, test: CodeTest) -> None:
        if why := await fault(problem, test):
            raise TaskError(f"task {task.id!r}: its checker {why}, whatever the output is")

    def source(self, episode: Episode, problem: Problem) -> str | None:
        """Return the submission, or None where there is none.

        Raises ConfigError where ``argument`` must be named.
        """
        if not self._tool:
            return submission(episode.answer or "", LANGUAGES[problem.language].names)
        found = submitted(episode, self._tool, self._argument)
        return found if found is not None and found.strip() else None

    def _verdict(self, found: CodeVerdict, problem: Problem, *, answered: bool) -> Verdict:
        """Turn what became of the submission into numbers."""
        tests = len(problem.tests)
        score = {
            "all": float(found.compiled and found.passed == tests),
            "fraction": found.passed / max(tests, 1),
            "weighted": found.share(problem),
            "compiles": float(found.compiled),
        }[self._mode]
        components = {self.__name__: score, "answered": float(answered), "compiles": float(found.compiled)}
        if tests:
            components["passed"] = found.passed / tests
            components |= {name: found.results.count(name) / tests for name in FAILURES}
        failed: VerdictStatus = "unverifiable" if {"checker_error", "crash"} & {*found.results} else "ok"
        return Verdict(score, components, status="timeout" if "timeout" in (found.build, *found.results) else failed)

    def _backend(self) -> SandboxBackend:
        if not isinstance(self._sandbox, str):
            return self._sandbox
        backend: SandboxBackend = backends().shared(self._sandbox)
        on_exit(backends().close_shared)  # a loop of the caller's own is closed by the caller
        return backend
