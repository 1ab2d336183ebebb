"""Real sandboxes: the conformance suite as this user and as a plain user, and what refuses to start."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import areal_agents.sandboxes as sandboxes
from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import bubblewrap, launch, memory, probes
from areal_agents.sandboxes.session import HeldSession
from tests import sandbox_suite as suite

ROOT = Path(__file__).parents[2]


def need(present: object, what: str) -> None:
    """Skip on a machine without ``what``; fail in CI, where a containment test must not be skipped."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"needs {what}")


@pytest.fixture(scope="session")
def bwrap() -> None:
    need(sys.platform == "linux", "Linux")
    need(shutil.which("bwrap"), "bubblewrap: apt-get install bubblewrap")
    need(importlib.util.find_spec("pyseccomp"), "pyseccomp: pip install pyseccomp")


@pytest.mark.usefixtures("bwrap")
def test_probe_reports_every_point() -> None:
    report = asyncio.run(sandboxes.get("bubblewrap").probe())
    assert [probe.name for probe in report.probes if probe.passed] == [
        "python starts",
        "no network",
        "file system read-only",
        "not host root",
        "no capabilities",
        "seccomp on",
        "no new privileges",
        "environment empty",
        "host processes invisible",
        "/proc/sys read-only",
        "memory bounded",
    ]
    assert report.memory_bound in ("cgroup-v1", "cgroup-v2", "systemd-scope", "rlimits")


@pytest.mark.usefixtures("bwrap")
def test_root_never_runs_bwrap_as_root() -> None:
    need(os.geteuid() == 0, "root")

    async def uids() -> list[int]:
        backend = bubblewrap.BubblewrapBackend(pool=0)
        async with backend.session(suite.SPEC) as first, backend.session(suite.SPEC) as second:
            await asyncio.gather(suite.run(first, ""), suite.run(second, ""))
            found = []
            for session in (first, second):
                assert isinstance(session, HeldSession)
                assert session._holder is not None
                found.append(session._holder.host_uid())
                assert session._holder._process is not None
                assert os.stat(f"/proc/{session._holder._process.pid}").st_uid == found[-1]
        return found

    first, second = asyncio.run(uids())
    assert first != second
    assert min(first, second) >= 200_000


class _Unbounded(memory.NoMeter):
    """A memory bound that promises a cgroup and makes none."""

    kind: memory.Kind = "cgroup-v1"

    def wrap(self, command: list[str], spec: SandboxSpec) -> list[str]:
        return command

    def environment(self) -> dict[str, str]:
        return {}

    def limits(self, spec: SandboxSpec) -> dict[str, int]:
        return {"AS": 4 << 30}

    def meter(self, name: str, spec: SandboxSpec) -> memory.Meter:
        return self


@pytest.mark.usefixtures("bwrap")
def test_unbounded_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "detect", _Unbounded)
    monkeypatch.setattr(bubblewrap, "_reports", {})

    async def first_call() -> None:
        backend = sandboxes.get("bubblewrap")
        async with backend.session(suite.SPEC) as sandbox:
            await suite.run(sandbox, "")

    with pytest.raises(SandboxUnavailable, match="384 MB held at most of 256 MB allowed") as caught:
        asyncio.run(first_call())
    assert "memory bounded" in caught.value.probe
    assert "cgroup" in caught.value.remedy


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize(
    ("dropped", "probe"),
    [
        (("--remount-ro", "/"), "file system read-only"),
        (("--remount-ro", "/dev"), "file system read-only"),
        (("--unshare-net",), "no network"),
    ],
)
def test_a_missing_protection_is_refused(dropped: tuple[str, ...], probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = launch.command

    def command(*args: Any, **options: Any) -> list[str]:
        words = whole(*args, **options)
        start = next(i for i in range(len(words)) if tuple(words[i : i + len(dropped)]) == dropped)
        return words[:start] + words[start + len(dropped) :]

    monkeypatch.setattr(launch, "command", command)
    monkeypatch.setattr(bubblewrap, "_reports", {})
    with pytest.raises(SandboxUnavailable, match=f"probe '{probe}' failed"):
        asyncio.run(sandboxes.get("bubblewrap").probe())


@pytest.mark.parametrize(
    ("name", "field", "seen"),
    [
        ("no network", "interfaces", ["eth0", "lo"]),
        ("no network", "host_port", ""),
        ("file system read-only", "writes", {"/probe": ""}),
        ("not host root", "host_uid", 0),
        ("no capabilities", "caps", {"CapEff": 0, "CapBnd": 1 << 21}),
        ("seccomp on", "seccomp", "0"),
        ("no new privileges", "no_new_privs", "0"),
        ("environment empty", "environment", ["HOME", "TOKEN"]),
        ("environment empty", "init_environment", "TOKEN=1"),
        ("host processes invisible", "pids", [1, 2, 900]),
        ("/proc/sys read-only", "core_pattern", ""),
    ],
)
def test_each_probe_can_fail(name: str, field: str, seen: object) -> None:
    good = {
        "interfaces": ["lo"],
        "routes": [],
        "host_port": "refused",
        "host_abstract": "refused",
        "outside": "unreachable",
        "writes": {"/probe": "Read-only file system"},
        "core_pattern": "denied",
        "hostname": "denied",
        "host_uid": 200_000,
        "uids": [1000],
        "caps": {"CapEff": 0, "CapBnd": 0},
        "seccomp": "2",
        "no_new_privs": "1",
        "environment": ["HOME"],
        "init_environment": "",
        "pids": [1, 2],
        "self": 2,
    }
    assert [check[0] for check in probes.CHECKS if not check[2](good)] == []
    assert [check[0] for check in probes.CHECKS if not check[2]({**good, field: seen})] == [name]


@pytest.mark.usefixtures("bwrap")
def test_a_bwrap_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(bubblewrap, "_reports", {})
    monkeypatch.setattr(launch, "find_tools", lambda **_: launch.Tools(str(program), None))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(memory, "detect", memory.RlimitBound)
    with pytest.raises(SandboxUnavailable, match="No permissions to create new namespace"):
        asyncio.run(sandboxes.get("bubblewrap").probe())


@pytest.mark.usefixtures("bwrap")
def test_a_dead_sandbox_is_an_error_not_an_output() -> None:
    async def die() -> None:
        backend = bubblewrap.BubblewrapBackend(pool=0)
        async with backend.session(suite.SPEC) as sandbox:
            assert isinstance(sandbox, HeldSession)
            process = await sandbox.spawn(["/bin/cat"])
            call = asyncio.ensure_future(suite.run(sandbox, "import time; time.sleep(600)", timeout=600))
            await process.send(b"x")
            assert await process.recv(1, timeout=60) == b"x"
            assert sandbox._holder is not None
            sandbox._holder.kill()
            with pytest.raises(
                SandboxError, match=r"died during the call|does not take requests"
            ):  # it may not have begun
                await call
            with pytest.raises(SandboxError, match="Open a new session"):
                await suite.run(sandbox, "")

    asyncio.run(die())


# Each process opts out of being killed first and stays smaller than pid 1, so that the kernel picks pid 1.
_STARVE_PID_1 = """
import os, time
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("0")
while True:
    try:
        pid = os.fork()
    except OSError:
        time.sleep(600)
    if pid == 0:
        block = bytearray(4 << 20)
        for i in range(0, len(block), 4096):
            block[i] = 1
        time.sleep(600)
"""


@pytest.mark.usefixtures("bwrap")
def test_memory_exhaustion_that_takes_pid_1_is_an_oom() -> None:
    async def starve() -> None:
        backend = bubblewrap.BubblewrapBackend(pool=0)
        if not (await backend.probe()).memory_bound.startswith("cgroup"):
            pytest.skip("memory is not bounded by a cgroup here")
        async with backend.session(SandboxSpec(memory=160 << 20, disk=8 << 20)) as sandbox:
            assert (await suite.run(sandbox, _STARVE_PID_1, timeout=60)).status == "oom"
            with pytest.raises(SandboxError, match="Open a new session"):
                await suite.run(sandbox, "")

    asyncio.run(starve())


@pytest.mark.usefixtures("bwrap")
def test_a_reply_that_is_no_frame_ends_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    source = launch.supervisor_source().replace(b"FRAME.pack(EXIT, ident, code)", b"b'x' * 100000")
    monkeypatch.setattr(launch, "supervisor_source", lambda warm: source)

    async def forge() -> None:
        backend = bubblewrap.BubblewrapBackend(pool=0)
        backend_bound = memory.RlimitBound()
        holder = await backend._start(suite.SPEC, backend_bound)
        pid = os.pidfd_open(holder.pid)
        request = {"op": "exec", "argv": ["/bin/true"], "env": {}, "limits": {}}
        finished = await holder.run(request, stdin=b"", timeout=60, max_output=10)
        assert (finished.cause, finished.code, holder.alive) == ("lost", None, False)
        assert select.select([pid], [], [], 20)[0]
        os.close(pid)
        await holder.close()

    asyncio.run(forge())


@pytest.mark.usefixtures("bwrap")
def test_a_dead_sandbox_leaves_the_pool() -> None:
    async def take() -> None:
        backend = bubblewrap.BubblewrapBackend(pool=1)
        async with backend.session(suite.SPEC) as sandbox:
            await suite.run(sandbox, "")
        (holder,) = await asyncio.gather(*backend._pool._warm[suite.SPEC])
        holder.kill()
        await holder.gone
        async with backend.session(suite.SPEC) as sandbox:
            assert (await suite.run(sandbox, "print(1)")).stdout == b"1\n"
        await backend.aclose()

    asyncio.run(take())


@pytest.mark.usefixtures("bwrap")
def test_closing_the_backend_ends_open_sessions() -> None:
    async def close() -> None:
        backend = sandboxes.get("bubblewrap")
        async with backend.session(suite.SPEC) as sandbox:
            await suite.run(sandbox, "")
            await backend.aclose()
            with pytest.raises(SandboxError, match="closed"):
                await suite.run(sandbox, "")
        async with backend.session(suite.SPEC) as sandbox:
            with pytest.raises(SandboxError, match="backend is closed"):
                await suite.run(sandbox, "")

    asyncio.run(close())


_HOST = """
import asyncio, sys
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes.bubblewrap import BubblewrapBackend

async def main():
    backend = BubblewrapBackend(pool=1, preload="".join(sys.argv[1:]))
    async with backend.session(SandboxSpec()) as sandbox:
        process = await sandbox.spawn(["/bin/cat"])
        warm = [await task for task in backend._pool._warm[SandboxSpec()]]
        zygote = [backend._zygote._holder] if backend._zygote else []
        print(*(holder.pid for holder in (sandbox._holder, *warm, *zygote)), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize("preload", [[], ["json"]], ids=["cold", "zygote"])
def test_nothing_outlives_a_killed_host(preload: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOST, *preload], cwd=ROOT, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        inner = [os.pidfd_open(int(pid)) for pid in host.stdout.readline().split()]
        host.kill()
    assert len(inner) == 2 + len(preload)
    for descriptor in inner:
        ended, _, _ = select.select([descriptor], [], [], 20)
        os.close(descriptor)
        assert ended
