from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_agents.errors import ConfigError, EnvError
from areal_agents.tool import ToolResult, ToolSpec
from areal_agents.tool_dispatch import Dispatcher
from areal_agents.tools import mcp, mcp_connection
from areal_agents.tools.mcp import mcp_tools
from areal_agents.types import ToolCall
from tests.conftest import require
from tests.tools.sessions import call, play

HERE = Path(__file__).parent
DRILL = [sys.executable, "-I", "-S", str(HERE / "mcp_drill_server.py")]


@pytest.fixture(autouse=True)
def _sdk() -> None:
    require("module:mcp")


def drill(**options: Any) -> tuple[ToolSpec, ...]:
    return mcp_tools(command=DRILL, **options)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve() as address:
        yield address


@contextlib.contextmanager
def serve() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "mcp_http_server.py"), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


def test_a_reference_server_tells_the_time() -> None:
    require("module:mcp_server_time")
    tools = mcp_tools(command=[sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC"])
    assert [t.name for t in tools] == ["get_current_time", "convert_time"]
    converted, wrong, missing = play(
        tools,
        call("convert_time", source_timezone="UTC", time="12:00", target_timezone="Asia/Tokyo"),
        call("convert_time", source_timezone="Mars/Base", time="12:00", target_timezone="UTC"),
        call("get_current_time"),
    )
    assert "T21:00:00+09:00" in converted.text
    assert wrong.status == "error"
    assert "Mars/Base" in wrong.text
    assert missing.status == "invalid_arguments"


def test_what_a_server_offers_is_checked_called_and_shown() -> None:
    tools = drill()
    added, default, text, extra, failed, refused, parts, empty, odd, slow = play(
        tools, call("add", a=2, b=40), call("add", a=2), call("add", a="two"), call("add", a=1, c=2), call("fail"),
        call("refuse"), call("parts"), call("echo", text=""), call("odd_name"), call("echo", text="a" * 40 + "!"),
    )  # fmt: skip
    assert (added, default) == (ToolResult("42"), ToolResult("3"))
    says = "error: invalid arguments for 'add': {}. Expected: add(a: integer, b?: integer)"
    assert text == ToolResult(says.format("'a': 'two' is not of type 'integer'"), "invalid_arguments")
    assert extra.text == says.format("Additional properties are not allowed ('c' was unexpected)")
    assert failed == ToolResult("error: no such city", "error")
    assert refused == ToolResult("error: refused: tools/call", "error")
    assert parts.text == "one\n(an image of 3 bytes, not shown)\n[file:///a]\ninside"
    assert (empty.text, odd.text) == ("(no output)", "done")
    assert slow.text == "a" * 40 + "!"  # its pattern would take forever
    assert tools[0].description == "Add two numbers. Over several lines."
    assert set(tools[0].parameters) == {"type", "properties", "required", "additionalProperties"}


def test_structured_content_is_shown_where_no_text_says_it() -> None:
    said, image = {"type": "text", "text": "12 °C"}, {"type": "image", "data": "AAAA", "mimeType": "image/png"}
    alone, text, blank, picture, failed = play(
        drill(only=["structured"]), call("structured"), call("structured", parts=[said]),
        call("structured", parts=[{"type": "text", "text": " "}]), call("structured", parts=[image]),
        call("structured", fails=True),
    )  # fmt: skip
    value = '{"city": "Zürich", "degrees": [1, 2.5]}'
    assert (alone, text) == (ToolResult(value), ToolResult("12 °C"))
    assert blank.text.strip() == value
    assert picture.text == f"(an image of 3 bytes, not shown)\n{value}"
    assert failed == ToolResult(f"error: {value}", "error")


def test_an_answer_that_is_none_is_the_servers() -> None:
    with pytest.raises(EnvError, match="failed: ") as caught:
        play(drill(only=["garble"]), call("garble"))
    assert caught.value.blame == "outside"


def test_an_episode_has_a_server_of_its_own_or_shares_one() -> None:
    def count(tools: tuple[ToolSpec, ...]) -> list[str]:
        async def main() -> list[str]:
            try:
                said = []
                for _ in range(2):
                    dispatcher = Dispatcher(tools)
                    both = await asyncio.gather(dispatcher.run([call("count")]), dispatcher.run([call("count")]))
                    said += [results[0].text for results in both]
                    await dispatcher.aclose()
                return said
            finally:
                await mcp_connection.close_shared()

        return asyncio.run(main())

    own = count(drill(only=["count"]))
    assert sorted(text.split()[0] for text in own) == ["1", "1", "2", "2"]
    pids = {int(text.split()[-1]) for text in own}
    assert len(pids) == 2
    shared = count(drill(only=["count"], one_for_all=True))
    assert sorted(text.split()[0] for text in shared) == ["1", "2", "3", "4"]
    pids |= {int(text.split()[-1]) for text in shared}
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("one_for_all", [False, True])
def test_a_server_that_dies_is_no_policys_doing(one_for_all: bool) -> None:
    tools = drill(only=["add", "die"], one_for_all=one_for_all)

    async def main() -> ToolResult:
        dispatcher = Dispatcher(tools)
        try:
            await dispatcher.run([call("add", a=1)])
            with pytest.raises(EnvError, match="MCP server 'python") as caught:
                await dispatcher.run([call("die")])
            assert (caught.value.blame, caught.value.tool) == ("outside", "die")
            assert "last words" in str(caught.value)
            await dispatcher.aclose()
            return (await dispatcher.run([call("add", a=41)]))[0]  # the next attempt has a new server
        finally:
            await dispatcher.aclose()
            await mcp_connection.close_shared()

    assert asyncio.run(main()) == ToolResult("42")


def test_a_slow_call_is_the_models_and_a_frozen_server_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp_connection, "ALIVE_S", 1.0)
    tools = drill(only=["wait", "freeze", "add"], seconds=1.0)
    slow, after = play(tools, call("wait", seconds=600), call("add", a=1))
    assert slow == ToolResult("error: stopped after 1 s", "timeout")
    assert after == ToolResult("2")
    with pytest.raises(EnvError, match="hangs"):
        play(tools, call("freeze", seconds=600))


def test_over_http(url: str) -> None:
    tools = mcp_tools(url=url, only=["add", "wait", "echo"], prefix="drill_", seconds=1.0)
    assert [t.name for t in tools] == ["drill_add", "drill_wait", "drill_echo"]
    added, slow, wrong, again = play(
        tools,
        call("drill_add", a=2),
        call("drill_wait", seconds=600),
        call("drill_add"),
        call("drill_echo", text="é\ud83d"),
    )
    assert added == ToolResult("3")
    assert slow.status == "timeout"
    assert wrong.status == "invalid_arguments"
    assert again.text.startswith("error: invalid arguments for 'drill_echo': they have half of a surrogate pair")


def test_a_server_over_http_that_dies() -> None:
    with serve() as address:
        tools = mcp_tools(url=address, only=["die"])
        with pytest.raises(EnvError, match="MCP server"):
            play(tools, call("die"))
        with pytest.raises(EnvError, match="did not start"):
            play(tools, call("die"))


def test_the_environment_of_the_trainer_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hidden")
    mine, given_ = play(
        drill(only=["secret"], env={"TOKEN": "t"}), call("secret", name="WANDB_API_KEY"), call("secret", name="TOKEN")
    )
    assert (mine.text, given_.text) == ("(none)", "t")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "needs either"),
        ({"command": ["a"], "url": "http://b"}, "needs either"),
        ({"command": "python x.py"}, "needs either"),
        ({"command": ["/no/such/program"]}, "did not start"),
        ({"command": [sys.executable, "-c", "print('no protocol')"]}, "did not start"),
        ({"command": [sys.executable, "-c", "import sys; sys.exit('why')"]}, "it said: why"),
        ({"url": "http://127.0.0.1:9/mcp"}, "did not start"),
        ({"command": DRILL, "only": ["sing"]}, "has no tool 'sing'; it has add, count"),
        ({"command": DRILL, "seconds": 0}, "must be positive"),
    ],
)
def test_what_is_no_server_is_refused_at_once(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        mcp_tools(**options)


def test_the_tools_pickle() -> None:
    (again,) = pickle.loads(pickle.dumps(drill(only=["add"], prefix="x_")))
    assert (again.name, again.validate({"a": 1})) == ("x_add", {"arguments": {"a": 1}})


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


ARGUMENTS = st.dictionaries(st.sampled_from(["a", "b", "text", ""]), ANY, max_size=3)


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(["add", "echo"]), ARGUMENTS), min_size=50, max_size=50))
def test_any_arguments_are_answered(wanted: list[tuple[str, dict[str, Any]]]) -> None:
    calls = [ToolCall("", name, arguments, "") for name, arguments in wanted]
    results = play(drill(only=["add", "echo"]), *calls, call("add", a=1))
    assert {r.status for r in results} <= {"ok", "error", "invalid_arguments"}
    assert results[-1] == ToolResult("2")


def test_no_name_of_an_argument_is_matched_with_a_servers_pattern() -> None:
    r"""``^(\w+\s?)*$`` takes twice as long with each letter."""
    slow: dict[str, Any] = {"patternProperties": {r"^(\w+\s?)*$": {}}}
    for schema in (
        {**slow, "additionalProperties": False},
        {"properties": {}, "allOf": [slow], "unevaluatedProperties": False},
    ):
        check = mcp._checker("t", {"type": "object", "required": ["a"], **schema})
        assert check({"a": 1, "a" * 60 + "!": 1}) is None
        assert "required" in str(check({"b": 1}))
    plain = mcp._checker("t", {"type": "object", "properties": {"a": {}}, "additionalProperties": False})
    assert "unexpected" in str(plain({"b": 1}))
