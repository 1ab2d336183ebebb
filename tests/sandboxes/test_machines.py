"""Machines that no table of ours has: each is refused by name, and nothing runs with a filter of another one."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.errors import SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import attacks_reach, docker_seccomp, fresh_namespaces, memory, seccomp
from areal_agents.sandboxes.docker_image import IMAGE
from areal_agents.sandboxes.docker_images import _TRIPLETS, Images
from areal_agents.sandboxes.launch import Tools
from areal_agents.sandboxes.zygote import obstacle
from tests.conftest import require

OTHERS = ("riscv64", "ppc64le", "s390x", "armv7l", "i686", "loongarch64", "mips64", "")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=request.param, release="6.1.0", nodename="x"))
    seccomp.program.cache_clear()
    seccomp.gate.cache_clear()
    return str(request.param)


@pytest.mark.parametrize("machine", OTHERS, indirect=True)
def test_bubblewrap_refuses_a_machine_whose_calls_it_does_not_know(machine: str) -> None:
    for compiled in (seccomp.program, seccomp.gate, lambda: obstacle(Tools("bwrap", None, preload=("json",)), BOUND)):
        with pytest.raises(SandboxUnavailable, match=rf"written for x86_64 and aarch64, and this is {machine}"):
            compiled()
    require("bwrap")

    async def whole() -> None:
        backend = sandboxes.get("bubblewrap")
        try:
            async with backend.session(SandboxSpec()) as sandbox:
                await sandbox.exec(["/bin/true"], timeout=60)
        finally:
            await backend.aclose()

    with pytest.raises(SandboxUnavailable, match=rf"this is {machine}\b" if machine else "this is "):
        asyncio.run(whole())


BOUND = memory.RlimitBound()


def test_a_python_of_32_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(struct, "calcsize", lambda form: 4)
    if os.uname().machine in seccomp.MACHINES:
        with pytest.raises(SandboxUnavailable, match="with a Python of 32 bits"):
            seccomp.require_machine()


def test_tables_have_the_same_machines() -> None:
    assert set(seccomp.MACHINES) == set(fresh_namespaces.CLONE) == set(_TRIPLETS)
    assert set(docker_seccomp._ARCHITECTURES) == set(docker_seccomp._MACHINES.values()) == set(seccomp.MACHINES)


@pytest.mark.parametrize(
    ("name", "filtered"),
    [
        ("x86_64", "SCMP_ARCH_X86_64"), ("amd64", "SCMP_ARCH_X86_64"),
        ("aarch64", "SCMP_ARCH_AARCH64"), ("arm64", "SCMP_ARCH_AARCH64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("service", [False, True])
def test_the_filter_of_an_engine_names_its_machine(name: str, filtered: str, service: bool) -> None:
    assert json.loads(docker_seccomp.profile(name, service=service))["architectures"] == [filtered]


class Described:
    """An engine that says of itself which machine it is."""

    def __init__(self, machine: str) -> None:
        self.info = {"Architecture": machine, "ID": "x"}

    async def image(self, name: str) -> dict[str, Any]:
        return {"Id": f"sha256:{name}", "Os": "linux", "Architecture": "whatever", "Config": {}}


@pytest.mark.parametrize("name", OTHERS)
def test_docker_refuses_an_engine_of_another_machine(name: str) -> None:
    said = name or "not named"
    with pytest.raises(SandboxUnavailable, match=rf"machine is {said}\. Take an engine"):
        docker_seccomp.profile(name)

    async def look(image: str) -> None:
        await Images(Described(name), 1 << 30).look(image)  # type: ignore[arg-type]

    with pytest.raises(SandboxUnavailable, match=f"machine is {said}"):
        asyncio.run(look("other:1"))
    asyncio.run(look(IMAGE))  # the backend's own is described; its containers get no filter


def test_an_attack_whose_numbers_are_not_known_says_so() -> None:
    """It is run here, outside of any sandbox, only up to where it says that it does not know the machine."""
    unknown = "import os, types\nos.uname = lambda: types.SimpleNamespace(machine='riscv64')\n"
    start = attacks_reach.SYSCALLS[: attacks_reach.SYSCALLS.index("def call(")]
    done = subprocess.run([sys.executable, "-c", unknown + start], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, "riscv64, 64 bits"]
