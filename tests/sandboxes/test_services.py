"""Services as they are declared, and who refuses them. What an engine makes of them: test_docker_services.py."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from areal_agents import Task, sandboxes
from areal_agents.chat.toolcalls import parse_text
from areal_agents.errors import ConfigError
from areal_agents.registry import EnvSpec
from areal_agents.reward import boxed_number
from areal_agents.rollout.player import prove_sandbox
from areal_agents.sandbox import SandboxSpec
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.bash import bash
from tests.conftest import require
from tests.sandboxes.test_docker_services import web


@pytest.mark.parametrize("name", ["bubblewrap", "unsafe_local"])
def test_a_sandbox_without_images_refuses_services(name: str) -> None:
    async def whole() -> None:
        async with sandboxes.get(name).session(SandboxSpec(services=(web(),))):
            raise AssertionError("opened")

    with pytest.raises(ConfigError, match="has no services, and 'web'"):
        asyncio.run(whole())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "Web"}, "must be a host name"),
        ({"name": "localhost"}, "must be a host name"),
        ({"name": "a b"}, "must be a host name"),
        ({"name": "7"}, "must be a host name"),  # the address 0.0.0.7
        ({"name": "0x7f"}, "must be a host name"),
        ({"name": "ip6-localhost"}, "must be a host name"),  # itself
        ({"name": 7}, "must be a host name"),
        ({"image": ""}, "has no image"),
        ({"image": None}, "None is no text"),
        ({"port": "8000"}, "port '8000' is none"),
        ({"port": True}, "port True is none"),
        ({"ready": ["true"]}, "ready must be a tuple of texts, not a list"),
        ({"ready": ("sleep", 1)}, "1 is no text"),
        ({"command": ("a\0b",)}, "has a NUL"),
        ({"environment": {"A": 1}}, "1 is no text"),
        ({"memory": 5e8}, "memory=500000000.0: its limits must be whole numbers"),
        ({"memory": 1 << 20}, "32 MiB at least"),
        ({"cpus": float("nan")}, "cpus=nan"),
        ({"cpus": 0.001}, "cpus=0.001"),
        ({"start_seconds": float("inf")}, "start_seconds=inf"),
        ({"port": 0}, "say how it is seen"),
        ({"port": 70_000}, "port 70000 is none"),
        ({"command": "redis-server"}, "not a str"),
        ({"writable": ("data",)}, "no absolute path"),
        ({"writable": ("/a/../b",)}, "no absolute path"),
        ({"writable": ("/a:rw",)}, "no absolute path"),
        ({"environment": {"A=B": "1"}}, "no name of a variable"),
        ({"memory": 0}, "memory=0: it must be at least 33554432"),
    ],
)
def test_a_service_that_cannot_be(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        web(**given)


def test_what_a_service_is_told_in_secret_is_in_no_message() -> None:
    told = replace(web(), environment={"PASSWORD": "open sesame"})
    assert SandboxSpec(services=(told,)) != SandboxSpec(services=(web(),))
    with pytest.raises(ConfigError) as wrong:
        SandboxSpec(services=[told])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="environment must be names with values, not a list") as also:
        replace(told, environment=["PASSWORD=open sesame"])  # type: ignore[arg-type]
    assert "sesame" not in f"{wrong.value} {also.value} {told} {SandboxSpec(services=(told,))}"


def test_services_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="different names"):
        SandboxSpec(services=(web(), web()))
    for wrong in ([web()], ("web",), None):
        with pytest.raises(ConfigError, match="must be a tuple of Service"):
            SandboxSpec(services=wrong)  # type: ignore[arg-type]
    given = {"A": "1"}
    kept = SandboxSpec(services=(web(environment=given),))
    given["A"] = "2"
    assert kept == SandboxSpec(services=(web(environment={"A": "1"}),))
    assert hash(kept) == hash(SandboxSpec(services=(web(environment={"A": "1"}),)))


class Sized(ToolEnv):
    """Tasks that say how large their /work is."""

    tools = (bash,)
    rubric = boxed_number()

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> list[Task]:
        return [Task.make(str(n), split=split, seed=0, payload={"disk": n << 20, "answer": "1"}) for n in (4, 8)]

    @classmethod
    def sandbox_of(cls, task: Task) -> SandboxSpec:
        return SandboxSpec(disk=int(str(task.payload["disk"])))

    def prompt(self, task: Task) -> str:
        return "?"


def test_each_task_has_its_own_session() -> None:
    require("bwrap")

    async def whole() -> None:
        env = Sized()
        try:
            for task in (*Sized.tasks("train"), Sized.tasks("train")[0]):
                await env.areset(options={"task": task})
                text = '<tool_call>{"name": "bash", "arguments": {"command": "df -B1 /work | tail -1"}}</tool_call>'
                observation, *_ = await env.astep(parse_text(text))
                assert str(task.payload["disk"]) in str(observation[-1])
        finally:
            await env.aclose()
            await sandboxes.close_shared()

    asyncio.run(whole())


def test_what_a_backend_refuses_is_refused_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EnvSpec("areal-test/Sized-v0", f"{__name__}:Sized")
    asyncio.run(prove_sandbox(spec, "unsafe_local"))
    monkeypatch.setattr(Sized, "sandbox_of", classmethod(lambda cls, task: SandboxSpec(services=(web(),))))
    with pytest.raises(ConfigError, match="has no services, and 'web'"):
        asyncio.run(prove_sandbox(spec, "unsafe_local"))
