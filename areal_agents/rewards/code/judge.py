"""The judge of one submission: builds it, runs each test in a process of its own, compares on the host.

The tested process decides nothing but its output. It may exit early, print a report, patch what it likes, kill what it
sees or overwrite its own files: what a test expects is never inside the sandbox, so only the right output passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from areal_agents.errors import SandboxError
from areal_agents.rewards.code.checker import compare
from areal_agents.rewards.code.languages import CALL, LANGUAGES, Language
from areal_agents.rewards.code.problem import CodeTest, Problem
from areal_agents.sandbox import ExecResult, Sandbox, SandboxBackend, SandboxSpec

MAX_SOURCE = 1 << 18
MAX_OUTPUT = 1 << 20
DISK = 16 << 20
SUPERVISOR_ROOM = 32 << 20
TestStatus = Literal["passed", "wrong", "error", "timeout", "oom", "output_limit", "crash", "checker_error", "skipped"]


@dataclass(frozen=True, slots=True)
class CodeVerdict:
    """What became of a submission."""

    compiled: bool
    results: tuple[TestStatus, ...]
    """One a test. Empty where it did not compile."""
    detail: str = ""
    """What the compiler said."""

    @property
    def passed(self) -> int:
        return sum(r == "passed" for r in self.results)

    def share(self, problem: Problem) -> float:
        """Return the weight of the tests passed over that of all."""
        total = sum(t.weight for t in problem.tests)
        passed = sum(t.weight for t, r in zip(problem.tests, self.results, strict=False) if r == "passed")
        return passed / total if total else 0.0


async def run_tests(source: str, problem: Problem, backend: SandboxBackend, *, stop_early: bool = False) -> CodeVerdict:
    """Build and test a submission in one session.

    A session that is lost is opened once more for the same test. Where that is lost too, the submission did it.

    Args:
        source: the program, as the model wrote it.
        problem: the tests and their rules.
        backend: of the sandbox.
        stop_early: skip the tests behind the first that is not passed.

    Raises:
        SandboxError: no session can be opened or built in. Another attempt may succeed.
    """
    language = LANGUAGES[problem.language]
    code = source.encode(errors="backslashreplace")
    if len(code) > MAX_SOURCE or b"\0" in code:
        return CodeVerdict(False, (), f"the program has {len(code)} bytes or a NUL character")
    cpu = math.ceil(max(problem.seconds, language.compile_seconds)) + 1
    room = SUPERVISOR_ROOM + 3 * DISK  # /work, /tmp and /dev/shm count as memory
    runs = _Session(backend, SandboxSpec(memory=problem.memory + room, disk=DISK, cpu_seconds=cpu), language, code)
    try:
        built = await runs.built()
        if built.status != "ok":
            return CodeVerdict(False, (), (built.stderr + built.stdout).decode(errors="replace")[-2000:])
        results: list[TestStatus] = []
        for test in problem.tests:
            if stop_early and results and results[-1] != "passed":
                results.append("skipped")
            elif runs.spent >= problem.total_seconds:
                results.append("timeout")
            else:
                results.append(await runs.result(test, problem))
        return CodeVerdict(True, tuple(results))
    finally:
        await runs.close()


class _Session:
    """One session with the built program, opened again where it is lost."""

    def __init__(self, backend: SandboxBackend, spec: SandboxSpec, language: Language, code: bytes) -> None:
        self._backend, self._spec, self._language, self._code = backend, spec, language, code
        self._leave: Callable[[], Awaitable[object]] | None = None
        self._sandbox: Sandbox | None = None
        self.spent = 0.0
        """Seconds that tests ran."""

    async def built(self) -> ExecResult:
        """Open a fresh session and build the program in it."""
        await self.close()
        session = self._backend.session(self._spec)
        self._sandbox = await session.__aenter__()
        self._leave = lambda: session.__aexit__(None, None, None)
        await self._sandbox.write_file(self._language.file, self._code)
        limit = self._language.compile_seconds
        return await self._sandbox.exec(self._language.compile, timeout=limit, max_output=MAX_OUTPUT)

    async def result(self, test: CodeTest, problem: Problem) -> TestStatus:
        for attempt in range(2):
            try:
                if attempt and (await self.built()).status != "ok":
                    return "crash"
                done = await self._run(test, problem)
            except SandboxError:
                if not attempt:
                    continue
                await self._next()
                return "crash"
            self.spent += done.seconds
            if done.status in ("timeout", "oom", "output_limit"):
                return done.status
            if done.status != "ok":
                return "error"
            return await compare(problem, test, done.stdout.decode(errors="surrogateescape"))
        raise AssertionError("not reached")

    async def _run(self, test: CodeTest, problem: Problem) -> ExecResult:
        assert self._sandbox is not None
        await self._sandbox.write_file(self._language.file, self._code)  # an earlier test may have changed it
        if test.arguments is None:
            command, stdin = self._language.run, test.stdin.encode()
        else:
            asked = {"function": problem.function, "arguments": test.arguments}
            command, stdin = ("python3", "-I", "-X", "utf8", "-c", CALL), json.dumps(asked).encode()
        room = MAX_OUTPUT + 2 * len(json.dumps(test.expected))  # the longest way to write it, and its line ends
        return await self._sandbox.exec(command, stdin=stdin, timeout=problem.seconds, max_output=room)

    async def _next(self) -> None:
        """Have a session for the tests that follow one that ended two of them."""
        try:
            await self.built()
        except SandboxError:
            await self.close()
            raise

    async def close(self) -> None:
        leave, self._leave, self._sandbox = self._leave, None, None
        if leave is not None:
            await leave()
