from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from areal_agents.errors import EnvError, SandboxError
from areal_agents.sandbox import Sandbox, SandboxSpec
from areal_agents.tool import ToolResult, ToolSpec, tool
from areal_agents.tool_dispatch import Dispatcher, seconds_of
from areal_agents.types import CallStatus, ToolCall
from tests.fake_sandbox import Script, ScriptedBackend


@tool()
async def run(code: str, *, sandbox: Sandbox) -> str:
    """Run code."""
    return (await sandbox.exec(("run",), stdin=code.encode(), timeout=5)).stdout.decode()


@tool(parallel=True)
async def run_parallel(code: str, *, sandbox: Sandbox) -> str:
    return (await sandbox.exec(("run",), stdin=code.encode(), timeout=5)).stdout.decode()


def call(name: str = "run", status: CallStatus = "ok", **arguments: Any) -> ToolCall:
    return ToolCall("c", name, arguments, "", status)


def dispatcher(backend: ScriptedBackend | None = None, tools: Sequence[ToolSpec] = (run, run_parallel)) -> Dispatcher:
    return Dispatcher(tools, sandbox=backend, sandbox_spec=SandboxSpec(), models={})


def results(backend: ScriptedBackend, *messages: Sequence[ToolCall]) -> list[list[ToolResult]]:
    async def main() -> list[list[ToolResult]]:
        d = dispatcher(backend)
        try:
            return [await d.run(calls) for calls in messages]
        finally:
            await d.aclose()
            await d.aclose()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("bad", "status", "says"),
    [
        (call(status="unclosed"), "malformed", "no closing </tool_call>"),
        (call(status="invalid_json"), "malformed", "not valid JSON"),
        (call(status="missing_name"), "malformed", 'no "name"'),
        (call("rum", code="1"), "unknown_tool", "error: no tool 'rum'; tools: run, run_parallel"),
        (
            call(status="invalid_arguments"),
            "invalid_arguments",
            '"arguments" must be a JSON object. Expected: run(code',
        ),
        (
            call(cod="1"),
            "invalid_arguments",
            "'code' is missing; 'cod' is not a parameter. Expected: run(code: string)",
        ),
    ],
)
def test_a_bad_call_is_answered_and_its_neighbours_run(bad: ToolCall, status: str, says: str) -> None:
    backend = ScriptedBackend()
    [[first, second, third]] = results(backend, [call(code="a"), bad, call(code="b")])
    assert (first, third) == (ToolResult("A"), ToolResult("B"))
    assert second.status == status
    assert says in second.text


def test_one_session_an_episode_opened_late_and_closed_once() -> None:
    backend = ScriptedBackend()
    results(backend, [call("nope")])
    assert (backend.opened, backend.closed) == (0, 0)
    results(backend, [call(code="a"), call("run_parallel", code="b")], [call(code="c")])
    assert (backend.opened, backend.closed) == (1, 1)
    assert backend.ran == [(1, "a"), (1, "b"), (1, "c")]


def test_parallel_calls_overlap_and_keep_their_order() -> None:
    async def main() -> None:
        met = asyncio.Barrier(2)

        @tool(parallel=True)
        async def meet(who: str) -> str:
            await met.wait()  # passes only when both calls run at once
            return who

        log: list[str] = []

        @tool()
        async def alone(who: str) -> str:
            log.append(f"in {who}")
            await asyncio.sleep(0)
            log.append(f"out {who}")
            return who

        d = dispatcher(tools=(meet, alone))
        both = await d.run([call("meet", who="a"), call("meet", who="b")])
        assert [r.text for r in both] == ["a", "b"]
        await d.run([call("alone", who="x"), call("alone", who="y")])
        assert log == ["in x", "out x", "in y", "out y"]

    asyncio.run(main())


def script(*failing: tuple[int, str]) -> Script:
    """Sessions and codes under which the sandbox itself fails."""
    return lambda session, code: None if (session, code) in failing else f"{code}@{session}"


def test_a_failure_that_does_not_recur_is_repaired_with_the_files_restored() -> None:
    backend = ScriptedBackend(script((1, "c")))
    got = results(backend, [call(code="a")], [call(code="b")], [call(code="c")], [call(code="d")])
    assert [m[0].text for m in got] == ["a@1", "b@1", "c@2", "d@2"]
    assert backend.ran == [(1, "a"), (1, "b"), (1, "c"), (2, "/bin/true"), (2, "a"), (2, "b"), (2, "c"), (2, "d")]
    assert backend.opened == backend.closed == 2


def test_replays_are_counted() -> None:
    async def main() -> None:
        d = dispatcher(ScriptedBackend(script((1, "a"))))
        await d.run([call(code="a")])
        assert d.replays == 1
        await d.aclose()
        assert d.replays == 0

    asyncio.run(main())


def test_a_failure_that_recurs_is_the_policys() -> None:
    backend = ScriptedBackend(script((1, "kill"), (2, "kill")))
    got = results(backend, [call(code="a")], [call(code="kill")], [call(code="b")])
    assert got[1] == [ToolResult("error: this call made the sandbox fail twice; do something else", "sandbox_failed")]
    assert got[2] == [ToolResult("b@3")]
    assert [code for session, code in backend.ran if session == 3] == ["/bin/true", "a", "b"]  # "kill" is not repeated
    assert backend.opened == backend.closed == 3


@pytest.mark.parametrize("session", [2, 3])
def test_a_sandbox_that_cannot_run_anything_is_infrastructure(session: int) -> None:
    backend = ScriptedBackend(script((1, "x"), (2, "x"), (session, "/bin/true")))
    with pytest.raises(SandboxError, match=f"session {session} died") as caught:
        results(backend, [call(code="x")])
    assert caught.value.tool == call(code="x").name
    assert backend.opened == backend.closed


@pytest.mark.parametrize("session", [2, 3])
def test_the_canarys_own_status_counts(session: int) -> None:
    backend = ScriptedBackend(script((1, "x"), (2, "x")))
    backend.fails.add((session, "/bin/true"))
    why = "a fresh sandbox cannot run /bin/true: error, exit code 127, no such program"
    with pytest.raises(SandboxError, match=why) as caught:
        results(backend, [call(code="x")])
    assert caught.value.tool == "run"


def test_parallel_failures_are_replayed_one_by_one() -> None:
    backend = ScriptedBackend(script((1, "a"), (1, "c")))
    [got] = results(backend, [call("run_parallel", code=code) for code in "abc"])
    assert [r.text for r in got] == ["a@2", "b@1", "c@3"]
    # The sibling b is run again in every fresh session, whether it stood before or after the call that failed.
    in_session = {n: [code for session, code in backend.ran if session == n] for n in (2, 3)}
    assert in_session == {2: ["/bin/true", "b", "a"], 3: ["/bin/true", "b", "a", "c"]}


def test_a_siblings_files_survive_a_call_that_fails_twice() -> None:
    backend = ScriptedBackend(script((1, "kill"), (2, "kill")))
    results(backend, [call("run_parallel", code="kill"), call("run_parallel", code="write")], [call(code="read")])
    assert [code for session, code in backend.ran if session == 3] == ["/bin/true", "write", "read"]


@tool(timeout=7)
async def slow(x: int) -> str:
    return str(x)


@tool(timeout=3, parallel=True)
async def side(x: int) -> str:
    return str(x)


@pytest.mark.parametrize(
    ("names", "seconds"),
    [
        ("", 0.0),
        ("slow", 7.0),
        ("slow slow slow", 21.0),
        ("side side side", 3.0),
        ("side side slow side", 13.0),
        ("nope", 0.0),
        ("side nope side", 3.0),
        (" ".join(["slow"] * 64), 448.0),
    ],
)
def test_the_seconds_that_calls_may_take(names: str, seconds: float) -> None:
    assert seconds_of([call(name, x=1) for name in names.split()], (slow, side)) == seconds


def test_author_bugs_in_parallel_calls_come_out_as_one_error() -> None:
    @tool(parallel=True)
    async def broken(x: int) -> str:
        raise ValueError(x)

    with pytest.raises(EnvError, match=r"tool 'broken' raised ValueError\(1\)"):
        asyncio.run(dispatcher(tools=(broken,)).run([call("broken", x=1), call("broken", x=2)]))


def test_misuse_is_refused() -> None:
    with pytest.raises(EnvError, match="two tools have the same name: run, run"):
        dispatcher(tools=(run, run))
    with pytest.raises(EnvError, match="sandbox=None"):
        asyncio.run(dispatcher(None).run([call(code="a")]))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hermes", 'no closing </tool_call>. Write <tool_call>{"name": ..., "arguments": {...}}</tool_call>'),
        ("qwen_xml", "no closing </function>. Write <tool_call>\n<function=NAME>"),
        ("llama_json", 'the call is cut off. Write {"name": ..., "parameters": {...}} and nothing else'),
        ("mistral", 'the call is cut off. Write [TOOL_CALLS][{"name"'),
        ("api", "Call the tool again, with its arguments as a JSON object"),
    ],
)
def test_an_error_tells_the_models_own_format(name: str, told: str) -> None:
    broken = ToolCall("c", "", {}, "…", "unclosed", format=name)
    (result,) = asyncio.run(Dispatcher([], sandbox=None, sandbox_spec=SandboxSpec(), models={}).run([broken]))
    assert result.status == "malformed"
    assert told in result.text
