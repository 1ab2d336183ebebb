"""The tools whose session lives across turns: bash and the Python REPL."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents import sandboxes
from areal_agents.sandbox import SandboxSpec
from areal_agents.tool import ToolResult
from areal_agents.tool_dispatch import Dispatcher
from areal_agents.tools.bash import bash, bash_tool
from areal_agents.tools.files import read_file
from areal_agents.tools.python_repl import python_repl, python_repl_tool
from tests.conftest import require
from tests.tools.sessions import call, play


def test_python_keeps_names_echoes_and_tells_errors() -> None:
    results = play(
        (python_repl, bash, read_file),
        *(call("python", code=c) for c in (
            "x = 20", "x += 1\nx * 2", "1 / 0", "x", "print('a'); x; 'é漢'", "'\ud83d'", "a\0b", "def f(:",
            "f" * 70_000,
        )),
        call("python", code="open('f', 'w').write('hi')"),
        call("bash", command="cat f"),
        call("read_file", path="f"),
        backend="bubblewrap",
    )  # fmt: skip
    texts = [r.text for r in results]
    assert texts[0] == "(no output)"
    assert texts[1] == "42"
    assert texts[2].endswith("ZeroDivisionError: division by zero")
    assert texts[3] == "21"
    assert texts[4] == "a\n'é漢'"
    assert texts[5] == r"'\ud83d'"
    assert texts[6] == "error: the code has a NUL character"
    assert "SyntaxError" in texts[7]
    assert texts[8] == "error: the code has more than 65536 bytes"
    assert texts[10:] == ["hi", "1\thi"]
    assert [r.status for r in results[:9]] == ["ok", "ok", "error", "ok", "ok", "ok", "error", "error", "error"]


def test_a_call_that_takes_too_long_is_stopped_and_the_names_stay() -> None:
    tools = (python_repl_tool(seconds=1.0), bash_tool(seconds=1.0))
    loop, after, gone, fresh, sleep, folder = play(
        tools,
        call("python", code="y = 5\nwhile True: pass"),
        call("python", code="y"),
        call("python", code="import os; os._exit(3)"),
        call("python", code="'y' in globals()"),
        call("bash", command="mkdir -p d; cd d; export V=1; sleep 100"),
        call("bash", command="echo $V $PWD"),
        backend="bubblewrap",
    )
    assert loop.status == "timeout"
    assert "error: stopped after 1 s" in loop.text
    assert after == ToolResult("5")
    assert gone.status == "error"
    assert "the interpreter ended" in gone.text
    assert fresh.text in ("True", "False")
    assert ("nothing but files is left" in gone.text) == (fresh.text == "False")
    assert sleep.status == "timeout"
    assert folder.text == "1 /work/d"


def test_bash_keeps_its_folder_and_names_what_it_left() -> None:
    code, left, listed = play(
        (bash_tool(background=True), bash_tool(name="sh")),
        call("bash", command="cd /tmp; false"),
        call("bash", command="pwd; sleep 77 & until grep -q sleep /proc/$!/cmdline; do :; done; echo started"),
        call("sh", command="sleep 78 & until grep -q sleep /proc/$!/cmdline; do :; done; echo on"),
        backend="bubblewrap",
    )
    assert code == ToolResult("(exit code 1)", "error")
    assert left.text.startswith("/tmp\n")
    assert "still running: " in left.text
    assert "sleep 77" in left.text
    assert "(ended: " in listed.text
    assert "sleep 78" in listed.text


def test_output_is_bounded() -> None:
    flood, more, after = play(
        (python_repl,),
        call("python", code="print('x' * 10_000)"),
        call("python", code="while True: print('y' * 1000)"),
        call("python", code="1"),
        backend="bubblewrap",
    )
    assert len(flood.text) <= 4000
    assert flood.truncated
    assert more.status == "error"
    assert more.truncated
    assert after.text == "1"


def test_a_lost_sandbox_costs_nothing_and_the_session_is_what_it_was() -> None:
    require("bwrap")

    async def main() -> tuple[list[ToolResult], int]:
        backend = sandboxes.get("bubblewrap")
        dispatcher = Dispatcher((python_repl, bash), sandbox=backend, sandbox_spec=SandboxSpec())
        try:
            await dispatcher.run([call("python", code="z = 7"), call("bash", command="cd /tmp; W=9")])
            holder: Any = dispatcher._sandbox._holder  # type: ignore[union-attr]
            holder.kill()
            await holder.gone
            return await dispatcher.run(
                [call("python", code="z"), call("bash", command="echo $W $PWD")]
            ), dispatcher.replays
        finally:
            await dispatcher.aclose()
            await backend.aclose()

    results, replays = asyncio.run(main())
    assert [r.text for r in results] == ["7", "9 /tmp"]
    assert replays == 1


def test_settings_and_pickling() -> None:
    for make in (python_repl_tool, bash_tool):
        with pytest.raises(ValueError, match="positive"):
            make(seconds=0)
    again = pickle.loads(pickle.dumps((bash_tool(seconds=3, background=True), python_repl)))
    assert [(t.name, t.timeout) for t in again] == [("bash", 93.0), ("python", 100.0)]
    assert set(bash.parameters["properties"]) == {"command"}


@settings(max_examples=6, deadline=None)
@given(
    st.lists(
        st.text(max_size=30) | st.sampled_from(["exit", "exec false", "kill -9 $$", "cat", "((", "<<X", "'", "exit()"]),
        max_size=4,
    )
)
def test_any_code_is_answered(codes: list[str]) -> None:
    tools = (bash_tool(seconds=2.0), python_repl_tool(seconds=2.0))
    calls = [c for code in codes for c in (call("bash", command=code), call("python", code=code))]
    results = play(tools, *calls, call("python", code="1"), call("bash", command="echo 1"), backend="bubblewrap")
    assert [r.text for r in results[-2:]] == ["1", "1"]
