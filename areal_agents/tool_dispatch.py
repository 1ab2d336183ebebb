"""The dispatch of one message's tool calls, in one sandbox session an episode.

    calls ─▶ check (known tool, valid arguments) ─▶ run, neighbours in parallel where they allow it ─▶ results in order

Whose failure is it, when the sandbox itself fails under a call? A fresh session is opened, and the episode's earlier
calls run in it again, which restores its files. Then the call is tried once more. If it fails again while a harmless
command succeeds, the call is what breaks the sandbox, and the model gets an error text. Otherwise a model would learn
to kill its sandbox. If the harmless command fails too, the SandboxError passes to the runner.

A call that acts on the episode is never run twice: only what it did in the sandbox is (``tool_session.py``).

An environment may prepare each session before its first call, and look into the last one (``Dispatcher.look``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from areal_agents.chat.tool_formats import tool_format
from areal_agents.errors import EnvError, SandboxError
from areal_agents.sandbox import Sandbox, SandboxBackend, SandboxSpec, backends
from areal_agents.tool import ToolResult, ToolSpec
from areal_agents.tool_outputs import Outputs, cut_middle
from areal_agents.tool_resources import Resources
from areal_agents.tool_session import BROKE, Operation, RepairedSandbox
from areal_agents.types import ToolCall
from areal_agents.utils.short_text import cut
from areal_agents.utils.sync import on_exit

_UNREADABLE = ("unclosed", "missing_name", "invalid_json")
_CANARY = ("/bin/true",)
_CANARY_TIMEOUT_S = 30.0
T = TypeVar("T")
Prepare = Callable[[Sandbox], Awaitable[None]]
"""Makes a fresh session ready for an episode's calls."""


async def _nothing(sandbox: Sandbox) -> None:
    """Leave a session as it is."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A call that may run: its tool and its validated arguments."""

    spec: ToolSpec
    arguments: Mapping[str, Any]

    @property
    def needs_sandbox(self) -> bool:
        return self.spec.needs_sandbox

    @property
    def acts(self) -> bool:
        return self.spec.acts


class Dispatcher:
    """The runner of an episode's tool calls, which checks them and owns the sandbox session.

    The session is opened at the first call that needs one.
    """

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        *,
        sandbox: SandboxBackend | str | None = None,
        sandbox_spec: SandboxSpec = SandboxSpec(),  # noqa: B008  frozen
        models: Mapping[str, Any] = MappingProxyType({}),
        env: object | None = None,
        over: Callable[[], bool] = lambda: False,
        prepare: Prepare = _nothing,
    ) -> None:
        """Take the tools of one environment.

        Args:
            tools: what the model may call.
            sandbox: a backend or the name of one; None where no tool needs it.
            sandbox_spec: what a session may use.
            models: passed to tools that ask for ``models``.
            env: passed to methods and to tools that ask for ``env``; its ``state`` to those that ask for ``state``.
            over: says whether a call has ended the episode, so that those after it are not run.
            prepare: makes a session ready, before its first call and before earlier calls run in a fresh one again.

        Raises:
            EnvError: for two tools of the same name.
        """
        self._backend = sandbox
        self._sandbox_spec = sandbox_spec
        self._models = dict(models)
        self._env, self._over, self._prepare = env, over, prepare
        self._session: AbstractAsyncContextManager[Sandbox] | None = None
        self._sandbox: Sandbox | None = None
        self._journal: list[_Ready | Operation] = []
        self._resources = Resources()
        self.replays = 0
        """How often a fresh session saved a call in this episode."""
        self._tools: dict[str, ToolSpec] = {}
        self._outputs: Outputs | None = None
        self.offer(tools)

    def offer(self, tools: Sequence[ToolSpec]) -> None:
        """Run calls of these tools from now on, and of no others.

        Raises EnvError for two tools of the same name.
        """
        named = {spec.name: spec for spec in tools}
        if len(named) != len(tools):
            raise EnvError(f"two tools have the same name: {', '.join(spec.name for spec in tools)}")
        reader = next((spec.name for spec in tools if "outputs" in spec.injected.values()), None)
        if reader is None or self._outputs is None or self._outputs.reader != reader:
            self._outputs = None if reader is None else Outputs(reader)
        self._tools = named

    def use(self, spec: SandboxSpec) -> None:
        """Open sessions with another spec from now on."""
        self._sandbox_spec = spec

    async def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run the calls of one message, and return one result for each, in order.

        Raises SandboxError and EnvError. Policy errors are results.
        """
        checked = [self.check(call) for call in calls]
        results: list[ToolResult] = []
        for first, end in _batches([_parallel(entry) for entry in checked]):
            if self._over():
                ended = ToolResult("error: the episode had ended, so this call was not run", "error")
                results += [entry if isinstance(entry, ToolResult) else ended for entry in checked[first:end]]
            else:
                ran = await self._run_batch(checked[first:end])
                # In order, after all of them: numbers of long outputs must not depend on which call was faster.
                results += map(self._shown, checked[first:end], ran)
        return results

    async def look(self, act: Callable[[Sandbox], Awaitable[T]]) -> T:
        """Return what ``act`` finds in the session, which is opened where no call has done so.

        Where the session is lost, it is made again from the episode's calls and looked at once more. Raises
        SandboxError where that fails too, and what ``act`` raises.
        """
        sandbox = await self._open_session()
        try:
            return await act(sandbox)
        except SandboxError:
            await self._restore_session()
        assert self._sandbox is not None
        found = await act(self._sandbox)
        self.replays += 1
        return found

    def _shown(self, entry: _Ready | ToolResult, result: ToolResult) -> ToolResult:
        """Cut what a call said to what its tool may show."""
        if isinstance(entry, ToolResult):
            return result
        cut = cut_middle if self._outputs is None else self._outputs.show
        text, was_cut = cut(result.text, entry.spec.max_output_chars)
        return ToolResult(text, result.status, result.truncated or was_cut)

    def check(self, call: ToolCall) -> _Ready | ToolResult:
        """Make a call ready to run, or write the error text that tells the model what to write instead."""
        if call.status in _UNREADABLE:
            text = tool_format(call.format).explain(call.status, call.problem)
            return ToolResult(f"error: {text}", "malformed")
        spec = self._tools.get(call.name)
        if spec is None:
            known = ", ".join(self._tools) or "none"
            return ToolResult(f"error: no tool {call.name[:64]!r}; tools: {known}", "unknown_tool")
        if call.status == "invalid_arguments":
            problem = call.problem or '"arguments" must be a JSON object'
            return ToolResult(f"error: {problem}. Expected: {spec.signature()}", "invalid_arguments")
        arguments = spec.validate(call.arguments)
        if isinstance(arguments, str):
            return ToolResult(f"error: {arguments}", "invalid_arguments")
        return _Ready(spec, arguments)

    async def aclose(self) -> None:
        """Close the session and what tools keep open, and forget its calls.

        May be called twice.
        """
        self._journal, self.replays = [], 0
        if self._outputs is not None:
            self._outputs.clear()
        try:
            await self._resources.aclose()
        finally:
            await self._close_session()

    async def _run_batch(self, batch: Sequence[_Ready | ToolResult]) -> list[ToolResult]:
        if any(isinstance(entry, _Ready) and entry.needs_sandbox for entry in batch):
            await self._open_session()  # before the calls: two at once must not open two sessions
        if len(batch) == 1:
            outcomes = [await self._attempt(batch[0])]
        else:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._attempt(entry)) for entry in batch]
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            outcomes = [task.result() for task in tasks]
        # What ended well comes first: it ran beside the calls that failed, and a fresh session needs its files as well.
        self._note([(e, o) for e, o in zip(batch, outcomes, strict=True) if isinstance(o, ToolResult)])
        results = []
        for entry, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, SandboxError):
                assert isinstance(entry, _Ready)
                if entry.acts:  # what it did in the sandbox was repaired, and that failed
                    outcome.tool = entry.spec.name
                    raise outcome
                outcome = await self._replay(entry)
                self._note([(entry, outcome)])
            results.append(outcome)
        return results

    def _note(self, ended: Sequence[tuple[_Ready | ToolResult, ToolResult]]) -> None:
        """Remember calls that a fresh session must run again."""
        self._journal += [
            entry for entry, outcome in ended
            if isinstance(entry, _Ready) and entry.needs_sandbox and not entry.acts
            and outcome.status != "sandbox_failed"
        ]  # fmt: skip

    async def _attempt(self, entry: _Ready | ToolResult) -> ToolResult | SandboxError:
        if isinstance(entry, ToolResult):
            return entry
        offered: dict[str, Any] = {"models": self._models, "resources": self._resources}
        if self._outputs is not None:
            offered["outputs"] = self._outputs
        if self._env is not None:
            offered |= {"env": self._env, "state": getattr(self._env, "state", None)}
        if self._sandbox is not None:
            offered["sandbox"] = self._sandbox
        try:
            if entry.acts and entry.needs_sandbox:
                return await self._act(entry, offered)
            return await entry.spec.run(entry.arguments, offered)
        except SandboxError as error:
            return error

    async def _act(self, entry: _Ready, offered: Mapping[str, Any]) -> ToolResult:
        """Run a call that acts on the episode, once, however often its sandbox is lost."""
        box = RepairedSandbox(self._open, self._restore_session, self._journal.append)
        result = await entry.spec.run(entry.arguments, {**offered, "sandbox": box})
        if box.repairs and result.status == "timeout":
            raise SandboxError(f"{entry.spec.name} ran out of time while its sandbox was repaired")
        if box.broke and result.status == "error":
            return ToolResult(BROKE, "sandbox_failed")
        self.replays += bool(box.repairs)
        return result

    def _open(self) -> Sandbox:
        assert self._sandbox is not None
        return self._sandbox

    async def _replay(self, entry: _Ready) -> ToolResult:
        try:
            await self._restore_session()
            again = await self._attempt(entry)
            if isinstance(again, ToolResult):
                self.replays += 1
                return again
            # A harmless command and the earlier calls: where they succeed, this call is what breaks the sandbox.
            await self._restore_session()
        except SandboxError as error:
            error.tool = entry.spec.name
            raise
        return ToolResult(BROKE, "sandbox_failed")

    async def _restore_session(self) -> None:
        """Open a fresh session and run the episode's earlier calls in it again.

        Raises SandboxError if it is broken too.
        """
        with suppress(SandboxError):  # it failed already
            await self._close_session()
        sandbox = await self._open_session(self._checked)
        for earlier in self._journal:
            if isinstance(earlier, Operation):
                await earlier.run(sandbox)
                continue
            outcome = await self._attempt(earlier)
            if isinstance(outcome, SandboxError):
                raise outcome

    async def _checked(self, sandbox: Sandbox) -> None:
        """Prepare a session that takes another's place, where a harmless command succeeds in it."""
        canary = await sandbox.exec(_CANARY, timeout=_CANARY_TIMEOUT_S)
        if canary.status != "ok":
            said = canary.stderr.decode(errors="replace").strip()
            raise SandboxError(
                f"a fresh sandbox cannot run {_CANARY[0]}: {canary.status}, exit code {canary.exit_code}"
                + (f", {cut(said, 200)}" if said else "")
            )
        await self._prepare(sandbox)

    async def _open_session(self, prepare: Prepare | None = None) -> Sandbox:
        if self._sandbox is None:
            backend = self._backend
            if isinstance(backend, str):
                backend = backends().shared(backend)
                on_exit(backends().close_shared)  # a loop of the caller's own is closed by the caller
            if backend is None:
                raise EnvError("a tool needs a sandbox, but the environment was made with sandbox=None")
            session: AbstractAsyncContextManager[Sandbox] = backend.session(self._sandbox_spec)
            self._sandbox = await session.__aenter__()
            self._session = session
            try:
                await (prepare or self._prepare)(self._sandbox)
            except BaseException:  # no call may meet half of what it needs
                with suppress(SandboxError):
                    await self._close_session()
                raise
        return self._sandbox

    async def _close_session(self) -> None:
        session, self._session, self._sandbox = self._session, None, None
        if session is not None:
            await session.__aexit__(None, None, None)


def seconds_of(calls: Sequence[ToolCall], tools: Sequence[ToolSpec]) -> float:
    """Return the most seconds that the calls of one message may take by their tools' own limits.

    One after the other they add up. Of neighbours that run in parallel the slowest counts.
    """
    known = {spec.name: spec for spec in tools}
    specs = [known.get(call.name) for call in calls]
    total = 0.0
    for first, end in _batches([spec is None or spec.parallel for spec in specs]):
        total += max(0.0 if spec is None else spec.timeout for spec in specs[first:end])
    return total


def _batches(parallel: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges of calls that run together, in order."""
    first = 0
    while first < len(parallel):
        end = first + 1
        while parallel[first] and end < len(parallel) and parallel[end]:
            end += 1
        yield first, end
        first = end


def _parallel(entry: _Ready | ToolResult) -> bool:
    return isinstance(entry, ToolResult) or entry.spec.parallel
