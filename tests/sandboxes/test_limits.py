"""Limits that are none: of a session, a service and a call. Each is refused where it is given, by name."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents import sandboxes
from areal_agents.errors import ConfigError
from areal_agents.sandbox import SandboxSpec, Service, check_call, open_console
from tests.conftest import require

NUMBERS = ("memory", "cpu_seconds", "processes", "disk", "open_files")
NONE: list[Any] = [0, -1, 1.0, 0.5, math.nan, math.inf, True, False, None, "5", b"5", [5], 1 << 60, -(1 << 70), 10**40]


@pytest.mark.parametrize("value", NONE, ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_a_spec_that_is_no_limit(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"SandboxSpec: {name}=") as caught:
        SandboxSpec(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("memory", 16 << 20, 1 << 50), ("cpu_seconds", 1, 10**9), ("processes", 1, 1 << 22), ("disk", 4096, 1 << 50),
        ("open_files", 16, 1 << 20),
    ],
)  # fmt: skip
def test_the_bounds_of_a_spec(name: str, least: int, most: int) -> None:
    for value in (least, most):
        assert getattr(SandboxSpec(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in (least - 1, most + 1):
        with pytest.raises(ConfigError, match=f"{name}={value}: it must be at least {least} and at most {most}"):
            SandboxSpec(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [None, 7, b"x", "a\nb", "a\0b", ["x"]])
def test_an_image_of_a_spec_is_a_text(image: Any) -> None:
    with pytest.raises(ConfigError, match="image="):
        SandboxSpec(image=image)


@given(st.dictionaries(st.sampled_from(NUMBERS), st.one_of(st.integers(), st.floats(), st.booleans(), st.text())))
@settings(max_examples=200, deadline=None)
def test_a_spec_is_made_of_whole_numbers_or_refused(given: Any) -> None:
    try:
        spec = SandboxSpec(**given)
    except ConfigError:
        return
    assert all(type(getattr(spec, name)) is int and 0 < getattr(spec, name) <= 1 << 50 for name in NUMBERS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": True}, "memory=True: its limits must be whole"),
        ({"memory": 1 << 60}, "memory=1152921504606846976: it must be at least 33554432"),
        ({"processes": 0}, "processes=0: it must be at least 1"),
        ({"disk": 0}, "disk=0: it must be at least 4096"),  # a file system in memory of no bound
        ({"disk": "1G"}, "disk='1G': its limits must be whole"),
        ({"cpus": "1"}, "cpus='1': write a number"),
        ({"cpus": True}, "cpus=True: write a number"),
        ({"cpus": None}, "cpus=None: write a number"),
        ({"start_seconds": "9"}, "start_seconds='9': it must be more than 0"),
        ({"start_seconds": True}, "start_seconds=True"),
        ({"start_seconds": 0}, "start_seconds=0: it must be more than 0"),
        ({"environment": "A=1"}, "environment must be names with values"),
        ({"environment": None}, "environment must be names with values"),
        ({"writable": ("/a/./b",)}, "no absolute path"),
        ({"writable": ("/..",)}, "no absolute path"),
        ({"writable": ("/.",)}, "no absolute path"),
        ({"writable": ("/a\n",)}, "no absolute path"),
    ],
)
def test_a_limit_of_a_service_that_is_none(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Service(**{"name": "web", "image": "x", "port": 1, **given})
    assert Service("web", "x", port=1, writable=("/a/.b", "/..c/d..", "/.../e")).writable[1] == "/..c/d.."


@pytest.mark.parametrize("timeout", [-1, -0.1, math.nan, math.inf, True, None, "5", 1e9])
def test_a_timeout_that_is_none(timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout="):
        check_call(timeout, 1)


@pytest.mark.parametrize("limit", [-1, 1.0, math.nan, True, None, "5", 1 << 40])
def test_a_limit_of_output_that_is_none(limit: Any) -> None:
    with pytest.raises(ConfigError, match="max_output="):
        check_call(1, limit)


@pytest.mark.parametrize("name", ["bubblewrap", "unsafe_local"])
def test_calls_are_checked_and_break_no_session(name: str) -> None:
    if name == "bubblewrap":
        require("bwrap")

    async def whole() -> None:
        backend = sandboxes.get(name)
        async with backend.session(SandboxSpec(memory=1 << 30, disk=16 << 20)) as sandbox:
            console = await open_console(sandbox, "shell")
            for timeout, limit in ((math.nan, 9), (math.inf, 9), (-1, 9), ("1", 9), (1, -1), (1, 1.5), (1, True)):
                with pytest.raises(ConfigError, match="it must be a"):
                    await sandbox.exec(["/bin/echo", "x"], timeout=timeout, max_output=limit)  # type: ignore[arg-type]
                with pytest.raises(ConfigError, match="it must be a"):
                    await console.call("echo x", timeout=timeout, max_output=limit)  # type: ignore[arg-type]
            assert (await sandbox.exec(["/bin/echo", "x"], timeout=60, max_output=9)).stdout == b"x\n"
            assert (await console.call("echo y", timeout=60)).output == b"y\n"
            await console.close()
        await backend.aclose()

    asyncio.run(whole())
