"""Limits that are none: of a session, a service and a call. Each is refused where it is given, by name."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents import sandboxes
from areal_agents.errors import ConfigError
from areal_agents.sandbox import SandboxSpec, Service, check_call, open_console
from areal_agents.sandboxes import launch
from areal_agents.sandboxes.docker_backend import DockerBackend
from tests.conftest import require
from tests.sandboxes.engines import containers
from tests.sandboxes.engines import play as docker_play
from tests.sandboxes.test_backends import ROOT

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
        ("memory", 16 << 20, 1 << 50), ("cpu_seconds", 1, 10**9), ("processes", 1, 1 << 20), ("disk", 4096, 1 << 50),
        ("open_files", 64, 1 << 20),
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


def test_limits_beyond_the_hard_ones_are_refused_and_not_the_models_failure() -> None:
    hard = {"NOFILE": 256, "NPROC": 65, "CPU": -1, "FSIZE": -1}
    launch.require_limits({"NOFILE": 256, "NPROC": 65, "CPU": 10**9, "FSIZE": 1 << 50}, hard)
    for limits, message in (
        ({"NOFILE": 257}, "open_files=257: programs may have 256 here"),
        ({"NPROC": 66}, "processes=66: programs may have 65 here"),
    ):
        with pytest.raises(ConfigError, match=message):
            launch.require_limits(limits, hard)
    with pytest.raises(ConfigError, match="cpu_seconds=10: programs may have 10 here"):  # SIGKILL comes a second later
        launch.require_limits({"CPU": 10}, {"CPU": 10})


def test_a_session_of_a_host_with_less_is_refused() -> None:
    """Its own process has the limits that ``ulimit -H`` would set."""
    require("bwrap")
    code = """
import asyncio, resource
from areal_agents import sandboxes
from areal_agents.sandbox import SandboxSpec
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
async def main():
    backend = sandboxes.get("bubblewrap")
    for files in (301, 300):
        try:
            async with backend.session(SandboxSpec(open_files=files)) as sandbox:
                print((await sandbox.exec(["/bin/echo", "ok"], timeout=60)).status)
        except Exception as error:
            print(type(error).__name__, error)
    await backend.aclose()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "ConfigError open_files=301: programs may have 300 here (a hard limit, ulimit -H).", "ok",
    ]  # fmt: skip


@pytest.mark.docker
def test_an_engine_that_gives_fewer_files_is_a_matter_of_settings(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(open_files=1 << 20)) as sandbox:
            (done,) = await asyncio.gather(
                sandbox.exec(["/bin/sh", "-c", "ulimit -n"], timeout=60), return_exceptions=True
            )
            if isinstance(done, BaseException):
                assert type(done) is ConfigError
                assert "open_files=1048576: the engine does not allow as many" in str(done)
            else:
                assert done.stdout == b"1048576\n"

    docker_play(calls)
    assert containers(engine) == []
