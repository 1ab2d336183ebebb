from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.errors import EnvError, SandboxError
from areal_agents.sandbox import Sandbox
from areal_agents.tool import ToolError, ToolResult, ToolSpec, cut_middle, tool

if TYPE_CHECKING:
    from areal_agents.engine import ChatModel


@tool(timeout=2, parallel=True, max_output_chars=100)
async def search(query: str, limit: int = 3, *, mode: Literal["web", "news"] = "web", title: str = "") -> str:
    """Search the index.

    A longer story that the model is not told.

    Args:
        query: what to
            look for
        limit (int): how many results
    """
    return f"{query!r} {limit} {mode} {title}"


@tool(name="shell")
async def run_shell(
    command: str, *, box: Sandbox, judges: Mapping[str, ChatModel], sandbox: Any, models: object
) -> list[str]:
    return [command, str(box), str(judges), str(sandbox), str(models)]


def test_schema_is_exact_and_compact() -> None:
    assert search.name == "search"
    assert search.description == "Search the index."
    assert search.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "what to look for"},
            "limit": {"type": "integer", "default": 3, "description": "how many results"},
            "mode": {"enum": ["web", "news"], "type": "string", "default": "web"},
            "title": {"type": "string", "default": ""},  # a parameter called title stays
        },
        "required": ["query"],
    }
    assert next(iter(search.parameters)) == "type"
    assert (search.timeout, search.parallel, search.max_output_chars) == (2, True, 100)


def test_injected_parameters_never_appear_and_cannot_be_set() -> None:
    assert run_shell.injected == {"box": "sandbox", "judges": "models", "sandbox": "sandbox", "models": "models"}
    assert list(run_shell.parameters["properties"]) == ["command"]
    told = run_shell.validate({"command": "ls", "sandbox": "mine"})
    assert told == "invalid arguments for 'shell': 'sandbox' is not a parameter. Expected: shell(command: string)"


def test_validate_converts_leniently_and_explains() -> None:
    assert search.validate({"query": "a", "limit": "7"}) == {"query": "a", "limit": 7, "mode": "web", "title": ""}
    told = search.validate({"limit": "many"})
    assert isinstance(told, str)
    assert "'query' is missing" in told
    assert "'limit': Input should be a valid integer" in told
    assert told.endswith('Expected: search(query: string, limit?: integer, mode?: "web" | "news", title?: string)')


def test_invoke_passes_checked_and_injected_arguments() -> None:
    checked = search.validate({"query": "x"})
    assert isinstance(checked, dict)
    assert asyncio.run(search.invoke(checked)) == ToolResult("'x' 3 web ")
    result = asyncio.run(run_shell.invoke({"command": "ls"}, {"sandbox": "S", "models": "M"}))
    assert json.loads(result.text) == ["ls", "S", "M", "S", "M"]


def test_invoke_refuses_a_missing_injection() -> None:
    with pytest.raises(EnvError, match="'shell' needs models, models, which the environment does not provide"):
        asyncio.run(run_shell.invoke({"command": "ls"}, {"sandbox": "S"}))


def test_long_output_is_cut_in_the_middle() -> None:
    result = asyncio.run(search.invoke({"query": "a" * 300, "limit": 1, "mode": "web", "title": "END"}))
    assert result.truncated
    assert len(result.text) <= 100
    assert result.text.startswith("'aaa")
    assert result.text.endswith("END")
    assert "characters cut" in result.text


@given(st.text(max_size=300), st.integers(64, 200))
def test_cut_middle_bounds_and_keeps_both_ends(text: str, limit: int) -> None:
    cut, was_cut = cut_middle(text, limit)
    assert was_cut == (len(text) > limit)
    assert len(cut) <= limit
    if not was_cut:
        assert cut == text
    else:
        assert (cut[:5], cut[-3:]) == (text[:5], text[-3:])


@tool(timeout=0.01)
async def slow() -> str:
    await asyncio.sleep(3600)
    return "never"


@tool()
async def failing(how: str) -> str:
    raise {"told": ToolError("no such file"), "bug": ValueError("oops"), "infra": SandboxError("gone")}.get(
        how, TimeoutError("inner")
    )


def test_a_timeout_is_a_result() -> None:
    assert asyncio.run(slow.invoke({})) == ToolResult("the call ran longer than 0.01 s and was stopped", "timeout")


def test_failures_go_to_whom_they_belong() -> None:
    assert asyncio.run(failing.invoke({"how": "told"})) == ToolResult("no such file", "error")
    with pytest.raises(SandboxError, match="gone"):
        asyncio.run(failing.invoke({"how": "infra"}))
    with pytest.raises(EnvError, match=r"tool 'failing' raised ValueError\('oops'\)") as caught:
        asyncio.run(failing.invoke({"how": "bug"}))
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(EnvError, match="inner"):  # a TimeoutError of the tool's own is no timeout of the call
        asyncio.run(failing.invoke({"how": "other"}))


def test_cancellation_passes_through() -> None:
    async def main() -> None:
        started = asyncio.Event()

        @tool()
        async def waits() -> str:
            started.set()
            await asyncio.Event().wait()
            return ""

        task = asyncio.create_task(waits.invoke({}))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_functions_that_cannot_be_tools() -> None:
    def blocking(x: int) -> int:
        return x

    async def untyped(x) -> None: ...  # type: ignore[no-untyped-def]

    async def variadic(*x: int) -> None: ...

    with pytest.raises(TypeError, match="must be an `async def`"):
        tool()(blocking)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parameter 'x' needs a type hint"):
        tool()(untyped)
    with pytest.raises(TypeError, match="must be an ordinary named parameter"):
        tool()(variadic)
    with pytest.raises(TypeError, match="tool name 'a b'"):
        tool(name="a b")(slow.function)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout = 0"):
        tool(timeout=0)


def test_specs_pickle_by_reference() -> None:
    assert pickle.loads(pickle.dumps(search)) is search
    described = ToolSpec("remote", "far away", {"type": "object", "properties": {}})
    assert pickle.loads(pickle.dumps(described)) == described
    with pytest.raises(EnvError, match="can be described to a model but not called"):
        asyncio.run(described.invoke({}))


def test_a_tool_can_be_called_as_the_function_it_was() -> None:
    assert asyncio.run(search("a", 1)) == "'a' 1 web "
