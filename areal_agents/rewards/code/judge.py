"""The judge of one submission: builds it, runs each test in a process of its own, compares on the host.

The tested process decides nothing but its output. It may exit early, print a report, patch what it likes, kill what it
sees or overwrite its own files: what a test expects is never inside the sandbox, so only the right output passes. Each
test finds the files that the compiler left, and nothing else.
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
from areal_agents.sandbox import ExecResult, ExecStatus, Sandbox, SandboxBackend, SandboxSpec

MAX_SOURCE = 1 << 18
MAX_OUTPUT = 1 << 20
"""Bytes that a test may print beside what it is expected to."""
BUILD_MEMORY = 512 << 20
"""What a compiler may hold at least. A problem's memory is that of its tests."""
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
    build: ExecStatus = "ok"
    """How the compiler ended."""

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
        return CodeVerdict(False, (), f"the program has {len(code)} bytes or a NUL character", "error")
    runs = _Session(backend, problem, language)
    try:
        built = await runs.build(code)
        if built.status != "ok":
            said = (built.stderr + built.stdout).decode(errors="replace")[-2000:]
            return CodeVerdict(False, (), said or built.status, built.status)
        results: list[TestStatus] = []
        for test in problem.tests:
            if stop_early and results and results[-1] != "passed":
                results.append("skipped")
            elif runs.spent >= problem.total_seconds:
                results.append("timeout")
            else:
                results.append(await runs.result(test))
        return CodeVerdict(True, tuple(results))
    finally:
        await runs.close()


class _Session:
    """One session with the built program, whose files are put back before each test.

    What a test wrote or broke is no other's, so the session is opened again where the files cannot be put back.
    """

    def __init__(self, backend: SandboxBackend, problem: Problem, language: Language) -> None:
        self._backend, self._problem, self._language = backend, problem, language
        self._leave: Callable[[], Awaitable[object]] | None = None
        self._sandbox: Sandbox | None = None
        self._program = b""
        """The files that the compiler left."""
        self.spent = 0.0
        """Seconds of tests that did not pass."""

    def _spec(self, memory: int) -> SandboxSpec:
        room = SUPERVISOR_ROOM + 3 * DISK  # /work, /tmp and /dev/shm count as memory
        cpu = math.ceil(max(self._problem.seconds, self._language.compile_seconds)) + 1
        return SandboxSpec(memory=memory + room, disk=DISK, cpu_seconds=cpu)

    async def _open(self, memory: int) -> Sandbox:
        await self.close()
        session = self._backend.session(self._spec(memory))
        self._sandbox = await session.__aenter__()
        self._leave = lambda: session.__aexit__(None, None, None)
        return self._sandbox

    async def build(self, code: bytes) -> ExecResult:
        """Build the program, and keep it."""
        memory = max(BUILD_MEMORY, self._problem.memory)
        sandbox = await self._open(memory)
        await sandbox.write_file(self._language.file, code)
        limit, command = self._language.compile_seconds, self._language.compile
        built = await sandbox.exec(command, timeout=limit, max_output=MAX_OUTPUT)
        if built.status == "ok":
            self._program = await sandbox.snapshot()
            if memory != self._problem.memory:
                await self.close()
        return built

    async def result(self, test: CodeTest) -> TestStatus:
        """Run one test, and a second time where its session is lost."""
        for _ in range(2):
            sandbox = await self._ready()
            try:
                done = await self._run(sandbox, test)
            except SandboxError:
                await self.close()
                continue
            status = await self._status(done, test)
            self.spent += done.seconds if status != "passed" else 0.0
            return status
        await self._ready()  # a host that opens no more sessions lost these two as well
        return "crash"

    async def _status(self, done: ExecResult, test: CodeTest) -> TestStatus:
        if done.status in ("timeout", "oom", "output_limit"):
            return done.status
        if done.status != "ok":
            return "error"
        return await compare(self._problem, test, done.stdout.decode(errors="surrogateescape"))

    async def _ready(self) -> Sandbox:
        """Return a session that holds the program and nothing else.

        Raises SandboxError where not even a fresh one can.
        """
        if self._sandbox is not None:
            try:
                await self._sandbox.restore(self._program)
                return self._sandbox
            except (OSError, SandboxError):
                pass  # the test before did that, and a fresh session knows nothing of it
        sandbox = await self._open(self._problem.memory)
        try:
            await sandbox.restore(self._program)
        except OSError as error:
            raise SandboxError(f"the program cannot be put into a fresh session: {error}") from error
        return sandbox

    async def _run(self, sandbox: Sandbox, test: CodeTest) -> ExecResult:
        if test.arguments is None:
            command, stdin = self._language.run, test.stdin.encode()
        else:
            asked = {"function": self._problem.function, "arguments": test.arguments}
            command, stdin = ("python3", "-I", "-X", "utf8", "-c", CALL), json.dumps(asked).encode()
        room = MAX_OUTPUT + 2 * len(json.dumps(test.expected))  # the longest way to write it, and its line ends
        return await sandbox.exec(command, stdin=stdin, timeout=self._problem.seconds, max_output=room)

    async def close(self) -> None:
        leave, self._leave, self._sandbox = self._leave, None, None
        if leave is not None:
            await leave()
