"""The parts a sandbox is made of: names, programs, slots, memory bounds. No sandbox is started."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import areal_agents.sandboxes as sandboxes
from areal_agents.errors import ConfigError, RegistryError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import launch, memory, uids

ROOT = Path(__file__).parents[2]


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


def test_slots_are_exclusive(tmp_path: Path) -> None:
    first, second = uids.acquire(tmp_path), uids.acquire(tmp_path)
    assert (first.uid, second.uid) == (200_000, 200_001)
    first.release()
    first.release()
    code = "import pathlib, sys, areal_agents.sandboxes.uids as s; print(s.acquire(pathlib.Path(sys.argv[1])).uid)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout == "200000\n"  # released here, and again with that process
    third = uids.acquire(tmp_path)
    assert third.uid == 200_000
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
    # 2048 MB less the same leave 1832 MB: nine of 203.6 MB, not nineteen of 96. 808 MB of 1024 are four of 202 MB.
    for memory_, places in ((2 << 30, 9), (1 << 30, 4)):
        limits = memory.RlimitBound().limits(SandboxSpec(memory=memory_))
        assert (limits["NPROC"], limits["AS"] >> 20) == (places + 1, {9: 203, 4: 202}[places])
    # A program without others beside it: all the 296 MB, and 64 places beside pid 1's for its threads.
    assert memory.alone(SandboxSpec()) == {"AS": 296 << 20, "NPROC": 65, "STACK": 2 << 20}
    for bound in (memory.RlimitBound(), memory.ScopeBound(), memory.CgroupBound(Path("/"), 2)):
        with pytest.raises(ConfigError, match="Set memory to 327155712 or more"):  # 192 + 24 + 96 MB
            bound.limits(SandboxSpec(memory=64 << 20))


def test_cgroups_of_dead_hosts_are_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/true"]) as ended:
        dead = ended.pid
    names = (f"u{dead}-1", f"u{dead}-2", f"u{dead}-3", f"u{os.getpid()}-1", "7", f"u{dead}-1x")
    for name in names:
        (tmp_path / f"areal-agents-{name}").mkdir()
        os.utime(tmp_path / f"areal-agents-{name}", (0, 0))
    (tmp_path / f"areal-agents-u{dead}-2" / "holds").touch()
    os.utime(tmp_path / f"areal-agents-u{dead}-2", (0, 0))
    os.utime(tmp_path / f"areal-agents-u{dead}-3")  # made just now
    memory.CgroupBound(tmp_path, 1).reap()
    left = sorted(folder.name for folder in tmp_path.iterdir())
    assert left == sorted(f"areal-agents-{name}" for name in names[1:])


def test_a_cgroup_leaves_address_space_to_threads() -> None:
    for bound in (memory.ScopeBound(), memory.CgroupBound(Path("/"), 2)):
        limits = bound.limits(SandboxSpec(processes=20, cpu_seconds=7, disk=1 << 20))
        assert limits == {"CPU": 7, "NPROC": 21, "FSIZE": 1 << 20, "CORE": 0, "NOFILE": 256}


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
    assert sandboxes.names() == ("bubblewrap", "docker", "unsafe_local")
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
        "print([name for name in ('torch', 'transformers', 'pyseccomp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_bare_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sandboxes"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "import areal_agents.sandboxes, not sandboxes" in done.stderr
