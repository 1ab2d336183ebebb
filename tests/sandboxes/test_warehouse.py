"""``areal/Warehouse-v0`` on a real engine: its service beside the sandbox is what is graded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.chat.toolcalls import parse_text
from areal_agents.envs.warehouse import HELPERS, URL, Warehouse
from areal_agents.rollout.player import prove_sandbox
from areal_agents.rollout.script import expert_of
from areal_agents.sandboxes.docker_backend import DockerBackend
from areal_agents.tool import call_text
from areal_agents.types import Task
from tests.sandboxes.engines import containers, networks, play

SPEC = registry.spec("areal/Warehouse-v0")
HOSTILE = f"""
import json, os, urllib.error, urllib.request
for path in ("/state", "/load"):
    request = urllib.request.Request("{URL}" + path, b'{{"items": [], "orders": []}}', {{"X-Sign": "0" * 64}})
    try:
        print(urllib.request.urlopen(request).status)
    except urllib.error.HTTPError as error:
        print(error.code)
print("KEY" in os.environ)
try:
    open("/etc/hosts", "a")
except OSError as error:
    print(error.strerror)
"""


async def played(backend: DockerBackend, task: Task, texts: list[str] | None = None) -> tuple[float, Any, list[str]]:
    """Play the expert, or these texts, and return the reward, the outcome and what was shown."""
    env = Warehouse(sandbox=backend)
    shown: list[str] = []
    try:
        observation, _ = await env.areset(seed=0, options={"task": task})
        speaker = expert_of(SPEC, task)
        assert speaker is not None
        said = texts[0] if texts else next(speaker)
        while True:
            observation, reward, terminated, truncated, info = await env.astep(parse_text(said, tools=env.tools))
            if terminated or truncated:
                return float(reward), info["outcome"], shown
            shown.append(observation[-1].text)
            said = texts[len(shown)] if texts else speaker.send(observation)
    finally:
        await env.aclose()


@pytest.mark.docker
def test_the_service_is_graded_by_the_state_that_it_is_left_in(engine: Any) -> None:
    easy, hard = (Warehouse.tasks("test", difficulty=level)[0] for level in (0.0, 1.0))
    other = easy.payload["before"]["items"][-1]
    more = f'item, = every("items", "&name={other[0].replace(" ", "%20")}")\n'
    more += 'print(ask("PATCH", f"/items/{item[\'id\']}", version=item["version"], stock=77)["stock"])'

    async def calls(backend: DockerBackend) -> None:
        await prove_sandbox(SPEC, "docker")
        (won, _, shown), (nothing, untouched, _) = await asyncio.gather(
            played(backend, hard), played(backend, hard, ["Done."])
        )  # at once, of one task: each has a service of its own
        assert (won, nothing) == (1.0, 0.0)
        assert shown[0].startswith("The warehouse. Bodies are JSON.")
        assert {tuple(row) for row in untouched["items"]} == {tuple(row) for row in hard.payload["before"]["items"]}
        python = [HELPERS + easy.payload["programs"][0], HELPERS + more, HOSTILE]
        texts = [*(call_text("python", code=code) for code in python), "All is done."]
        too_much, outcome, shown = await played(backend, easy, texts)
        assert shown[1:] == ["77", "403\n403\nFalse\nPermission denied"]
        assert too_much == float(other[3] == 77)
        assert next(row for row in outcome["items"] if row[0] == other[0])[3] == 77
        assert outcome["problem"] == ""

    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])


@pytest.mark.docker
def test_where_there_is_an_engine_nothing_is_lacking(engine: Any) -> None:
    assert SPEC.lacks() == ""
