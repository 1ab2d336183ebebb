"""Services as they are declared, and who refuses them. What an engine makes of them: test_docker_services.py."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.errors import ConfigError
from areal_agents.sandbox import SandboxSpec
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
        ({"image": ""}, "has no image"),
        ({"port": 0}, "say how it is seen"),
        ({"port": 70_000}, "port 70000 is none"),
        ({"command": "redis-server"}, "not a text"),
        ({"writable": ("data",)}, "no absolute path"),
        ({"writable": ("/a/../b",)}, "no absolute path"),
        ({"writable": ("/a:rw",)}, "no absolute path"),
        ({"environment": {"A=B": "1"}}, "no name of a variable"),
        ({"memory": 0}, "more than 0"),
    ],
)
def test_a_service_that_cannot_be(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        web(**given)


def test_services_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="different names"):
        SandboxSpec(services=(web(), web()))
    with pytest.raises(ConfigError, match="must be a tuple"):
        SandboxSpec(services=[web()])  # type: ignore[arg-type]
    given = {"A": "1"}
    kept = SandboxSpec(services=(web(environment=given),))
    given["A"] = "2"
    assert kept == SandboxSpec(services=(web(environment={"A": "1"}),))
    assert hash(kept) == hash(SandboxSpec(services=(web(environment={"A": "1"}),)))
