"""Real sandboxes: the conformance suite as this user and as a plain user, and what refuses to start."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import areal_agents.sandboxes as sandboxes
from areal_agents.errors import ConfigError, RegistryError, SandboxError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import bubblewrap, launch, memory, probes, slots
from areal_agents.sandboxes.session import BubblewrapSession
from tests import sandbox_suite as suite

ROOT = Path(__file__).parents[1]


def need(present: object, what: str) -> None:
    """Skip on a machine without ``what``; fail in CI, where a containment test must not be skipped."""
    if not present:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"needs {what}")


@pytest.fixture(scope="session")
def bwrap() -> None:
    need(sys.platform == "linux", "Linux")
    need(shutil.which("bwrap"), "bubblewrap: apt-get install bubblewrap")
    need(importlib.util.find_spec("pyseccomp"), "pyseccomp: pip install pyseccomp")


def _ids(check: suite.Check) -> str:
    return str(check.__name__)


@pytest.mark.parametrize("check", suite.FUNCTIONAL, ids=_ids)
def test_unsafe_local(check: suite.Check) -> None:
    need(os.access("/usr/bin/prlimit", os.X_OK), "prlimit: apt-get install util-linux")
    suite.run_check("unsafe_local", check)


@pytest.mark.usefixtures("bwrap")
@pytest.mark.parametrize("check", suite.FUNCTIONAL + suite.CONTAINMENT, ids=_ids)
def test_bubblewrap(check: suite.Check) -> None:
    suite.run_check("bubblewrap", check)


def _as_nobody(folder: Path, python: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [shutil.which("runuser") or "runuser", "-u", "nobody", "--", python, "-W", "error", *args]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="session")
def as_plain_user(bwrap: None) -> Iterator[dict[str, str]]:
    """The suite's results as ``nobody``, who reads neither this checkout's folder nor its Python."""
    need(os.geteuid() == 0, "root, to become a plain user")
    need(shutil.which("runuser"), "runuser: apt-get install util-linux")
    pyseccomp = importlib.util.find_spec("pyseccomp")
    assert pyseccomp is not None
    assert pyseccomp.origin is not None
    folder = Path(tempfile.mkdtemp(prefix="areal-agents-plain-"))
    try:
        package = folder / "areal_agents"
        shutil.copytree(ROOT / "sandboxes", package / "sandboxes", ignore=shutil.ignore_patterns("__pycache__"))
        (package / "__init__.py").touch()  # the package's own may import what a plain user's Python lacks
        for name in ("errors.py", "sandbox.py"):
            shutil.copy(ROOT / "areal_agents" / name, package / name)
        shutil.copy(pyseccomp.origin, folder / "pyseccomp.py")
        shutil.copy(suite.__file__, folder / "sandbox_suite.py")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        candidates = [
            sys.executable,
            *(shutil.which(f"python3{minor}", path="/usr/bin") for minor in ("", ".11", ".12")),
        ]
        modern = "import sys; sys.exit(sys.version_info < (3, 11))"
        usable = (
            python for python in candidates if python and _as_nobody(folder, python, "-c", modern).returncode == 0
        )
        python = next(usable, None)
        need(python, "a Python 3.11 or later that a plain user can run: apt-get install python3")
        assert python is not None
        done = _as_nobody(folder, python, str(folder / "sandbox_suite.py"), "bubblewrap")
        assert done.returncode == 0, done.stderr
        results: dict[str, str] = json.loads(done.stdout)
        yield results
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("check", suite.FUNCTIONAL + suite.CONTAINMENT, ids=_ids)
def test_bubblewrap_as_plain_user(check: suite.Check, as_plain_user: dict[str, str]) -> None:
    assert as_plain_user[check.__name__] == ""


@pytest.mark.usefixtures("bwrap")
def test_probe_reports_every_point() -> None:
    report = asyncio.run(sandboxes.get("bubblewrap").probe())
    assert [probe.name for probe in report.probes if probe.passed] == [
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
                assert isinstance(session, BubblewrapSession)
                assert session._holder is not None
                found.append(session._holder.host_uid())
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


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "_PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap") as caught:
        launch.find_tools(root=True, python="/usr/bin/python3")
    assert "dnf install bubblewrap" in caught.value.remedy
    (tmp_path / "bwrap").write_text("#!/bin/sh\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(SandboxUnavailable, match="util-linux"):
        launch.find_tools(root=True, python="/usr/bin/python3")
    with pytest.raises(SandboxUnavailable, match="/usr/bin/python9 was not found"):
        launch.find_tools(root=False, python="/usr/bin/python9")


def test_apparmor_restriction_names_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"kernel/apparmor_restrict_unprivileged_userns": "1"}
    monkeypatch.setattr(launch, "_setting", lambda name: settings.get(name, ""))
    problem, remedy = launch.explain("bwrap: setting up uid map: Permission denied")
    assert "setting up uid map" in problem
    assert "/etc/apparmor.d/bwrap" in remedy
    assert "profile bwrap /usr/bin/bwrap flags=(unconfined) {\n  userns," in remedy


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
            assert isinstance(sandbox, BubblewrapSession)
            process = await sandbox.spawn(["/bin/cat"])
            call = asyncio.ensure_future(suite.run(sandbox, "import time; time.sleep(600)", timeout=600))
            await process.send(b"x")
            assert await process.recv(1, timeout=20) == b"x"
            assert sandbox._holder is not None
            sandbox._holder.kill()
            with pytest.raises(SandboxError, match="died during the call"):
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
def test_a_dead_sandbox_leaves_the_pool() -> None:
    async def take() -> None:
        backend = bubblewrap.BubblewrapBackend(pool=1)
        async with backend.session(suite.SPEC) as sandbox:
            await suite.run(sandbox, "")
        (holder,) = await asyncio.gather(*backend._warm[suite.SPEC])
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
import asyncio
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes.bubblewrap import BubblewrapBackend

async def main():
    backend = BubblewrapBackend(pool=1)
    async with backend.session(SandboxSpec()) as sandbox:
        process = await sandbox.spawn(["/bin/cat"])
        warm = [await task for task in backend._warm[SandboxSpec()]]
        print(*(holder.pid for holder in (sandbox._holder, *warm)), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.usefixtures("bwrap")
def test_nothing_outlives_a_killed_host() -> None:
    with subprocess.Popen([sys.executable, "-c", _HOST], cwd=ROOT, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        inner = [os.pidfd_open(int(pid)) for pid in host.stdout.readline().split()]
        host.kill()
    assert len(inner) == 2
    for descriptor in inner:
        ended, _, _ = select.select([descriptor], [], [], 20)
        os.close(descriptor)
        assert ended


def test_slots_are_exclusive(tmp_path: Path) -> None:
    first, second = slots.acquire(5000, tmp_path), slots.acquire(5000, tmp_path)
    assert (first.uid, second.uid) == (5000, 5001)
    first.release()
    first.release()
    code = (
        "import pathlib, sys, areal_agents.sandboxes.slots as s; print(s.acquire(5000, pathlib.Path(sys.argv[1])).uid)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout == "5000\n"  # released here, and again with that process
    third = slots.acquire(5000, tmp_path)
    assert third.uid == 5000
    second.release()
    third.release()


def test_rlimits_keep_the_sum_below_the_bound() -> None:
    for spec in (SandboxSpec(), SandboxSpec(memory=2 << 30), SandboxSpec(memory=4 << 30, disk=1 << 20, processes=8)):
        limits = memory.RlimitBound().limits(spec)
        held = (limits["NPROC"] - 1) * limits["AS"] + 3 * spec.disk + memory.SUPERVISOR
        assert spec.memory - limits["NPROC"] < held <= spec.memory
        assert limits["NPROC"] - 1 <= spec.processes
    # 512 MB - 3 x 64 MB of tmpfs - 24 MB leave 296 MB: three processes of 98.67 MB.
    default = memory.RlimitBound().limits(SandboxSpec())
    assert (default["NPROC"], default["AS"]) == (4, (296 << 20) // 3)
    for bound in (memory.RlimitBound(), memory.ScopeBound(), memory.CgroupBound(Path("/"), 2)):
        with pytest.raises(ConfigError, match="Set memory to 327155712 or more"):  # 192 + 24 + 96 MB
            bound.limits(SandboxSpec(memory=64 << 20))


def _hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary folders stand in for cgroup mounts; the kernel's part (files in new cgroups) is not imitated."""
    monkeypatch.setattr(memory, "_can_create", lambda parent, limit: parent.is_dir())


def test_cgroup_v1_and_hybrid_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hierarchy(tmp_path, monkeypatch)
    (tmp_path / "memory/mine").mkdir(parents=True)
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified/cgroup.subtree_control").write_text("cpu pids")
    own = "4:memory:/mine\n1:cpu:/\n0::/\n"
    mounts = (
        f"40 30 0:40 / {tmp_path}/unified rw - cgroup2 cgroup2 rw\n"
        f"41 30 0:41 / {tmp_path}/memory rw,relatime - cgroup cgroup rw,memory\n"
    )
    (tmp_path / "unified/cgroup.subtree_control").chmod(0o444)
    found = memory.find_cgroup(own, mounts.splitlines()[1])
    assert found == memory.CgroupBound(tmp_path / "memory/mine", 1)
    monkeypatch.setattr(memory, "_enabled", lambda folder: False)
    assert memory.find_cgroup(own, mounts) == found


def test_cgroup_v2_takes_the_nearest_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hierarchy(tmp_path, monkeypatch)
    mine = tmp_path / "system.slice/job.service"
    mine.mkdir(parents=True)
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory")
    (mine.parent / "cgroup.subtree_control").write_text("memory pids")
    mounts = f"40 30 0:40 / {tmp_path} rw - cgroup2 cgroup2 rw,nsdelegate\n"
    found = memory.find_cgroup("0::/system.slice/job.service\n", mounts)
    assert found == memory.CgroupBound(mine.parent, 2)
    assert found.kind == "cgroup-v2"
    assert memory.find_cgroup("0::/system.slice/job.service\n", "") is None


def test_cgroup_v2_limits_and_counter(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/memory.events").write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert memory.CgroupMeter(tmp_path / "one", 2).oom_kills() == 2
    assert memory.CgroupMeter(tmp_path / "none", 2).oom_kills() == 0


def test_names_are_resolved() -> None:
    assert sandboxes.names() == ("bubblewrap", "unsafe_local")
    assert sandboxes.get("areal_agents.sandboxes.unsafe_local:UnsafeLocalBackend").name == "unsafe_local"
    with pytest.raises(RegistryError, match="Did you mean 'bubblewrap'"):
        sandboxes.get("bubblewarp")
    with pytest.raises(RegistryError, match="cannot be loaded"):
        sandboxes.get("no_such_module:Backend")


def test_shared_backends_belong_to_a_loop() -> None:
    async def both() -> tuple[object, object]:
        first, again = sandboxes.shared("unsafe_local"), sandboxes.shared("unsafe_local")
        assert first is again
        await sandboxes.close_shared()
        return first, sandboxes.shared("unsafe_local")

    first, second = asyncio.run(both())
    third, _ = asyncio.run(both())
    assert len({id(first), id(second), id(third)}) == 3


def test_importing_takes_no_heavy_library() -> None:
    code = (
        "import sys, areal_agents.sandboxes.bubblewrap, areal_agents.sandboxes.unsafe_local; "
        "print([name for name in ('torch', 'transformers', 'pyseccomp', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_bare_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sandboxes"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "import areal_agents.sandboxes, not sandboxes" in done.stderr
