"""The Docker engine that the environment names, for the tests of the docker backend."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest

from areal_agents.sandboxes import docker_image
from tests.sandboxes.test_backends import need


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """The SDK's client of the engine that the environment names, with the backend's image."""
    docker = pytest.importorskip("docker") if os.environ.get("CI") != "true" else __import__("docker")
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except docker.errors.DockerException as error:
        need(None, f"a Docker engine: {error}")
    asyncio.run(docker_image.build())
    yield client
    client.close()
