"""The suite of checks and attacks, on real sandboxes: as this user, as a plain user, and on one without isolation."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.sandbox import Probe, ProbeReport
from areal_agents.sandboxes import suite
from areal_agents.sandboxes.attacks import ATTACKS
from areal_agents.sandboxes.conformance import CONFORMANCE
from areal_agents.sandboxes.subject import NotContained, NotTried, held, tried
from areal_agents.sandboxes.suite import Finding
from tests.sandboxes.test_backends import ROOT, bwrap, need

__all__ = ["bwrap"]

CONTRACT = [check.__name__.replace("_", " ") for check in CONFORMANCE]
NAMES = [*CONTRACT, *(attack.name for attack in ATTACKS)]


def by_name(report: dict[str, Any]) -> dict[str, Finding]:
    found = [Finding(**row) for row in (*report["contract"], *report["attacks"])]
    return {row.what if row.name == "contract" else row.name: row for row in found}


def check(name: str) -> dict[str, Finding]:
    return by_name(asyncio.run(suite.check(name)).to_json())


def fail_unless_good(finding: Finding) -> None:
    assert finding.status in suite.GOOD, finding


@pytest.fixture(scope="session")
def as_this_user(bwrap: None) -> dict[str, Finding]:
    return check("bubblewrap")


@pytest.mark.parametrize("name", NAMES)
def test_bubblewrap(name: str, as_this_user: dict[str, Finding]) -> None:
    fail_unless_good(as_this_user[name])


@pytest.fixture(scope="session")
def from_a_zygote(bwrap: None) -> dict[str, Finding]:
    return check("bubblewrap?preload=json,decimal")


@pytest.mark.parametrize("name", NAMES)
def test_bubblewrap_from_a_zygote(name: str, from_a_zygote: dict[str, Finding]) -> None:
    fail_unless_good(from_a_zygote[name])


def _as_nobody(folder: Path, python: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [shutil.which("runuser") or "runuser", "-u", "nobody", "--", python, "-W", "error", *args]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture(scope="session")
def plain_users_check(bwrap: None) -> Iterator[Callable[[str], dict[str, Finding]]]:
    """The suite as ``nobody`` runs it, who reads neither this checkout's folder nor its Python."""
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
        (package / "utils").mkdir()
        (package / "utils/__init__.py").touch()
        for name in ("errors.py", "sandbox.py", "utils/system.py"):
            shutil.copy(ROOT / "areal_agents" / name, package / name)
        shutil.copy(pyseccomp.origin, folder / "pyseccomp.py")
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

        def check(name: str) -> dict[str, Finding]:
            done = _as_nobody(folder, python, "-m", "areal_agents.sandboxes.suite", name)
            assert done.returncode == 0, done.stderr
            return by_name(json.loads(done.stdout))

        yield check
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def as_plain_user(plain_users_check: Callable[[str], dict[str, Finding]]) -> dict[str, Finding]:
    return plain_users_check("bubblewrap")


@pytest.mark.parametrize("name", NAMES)
def test_bubblewrap_as_plain_user(name: str, as_plain_user: dict[str, Finding]) -> None:
    fail_unless_good(as_plain_user[name])


@pytest.fixture(scope="session")
def as_plain_user_from_a_zygote(plain_users_check: Callable[[str], dict[str, Finding]]) -> dict[str, Finding]:
    return plain_users_check("bubblewrap?preload=json,decimal")


@pytest.mark.parametrize("name", NAMES)
def test_bubblewrap_as_plain_user_from_a_zygote(name: str, as_plain_user_from_a_zygote: dict[str, Finding]) -> None:
    fail_unless_good(as_plain_user_from_a_zygote[name])


@pytest.fixture(scope="session")
def not_isolated() -> dict[str, Finding]:
    need(os.access("/usr/bin/prlimit", os.X_OK), "prlimit: apt-get install util-linux")
    return check("unsafe_local")


@pytest.mark.parametrize("name", CONTRACT)
def test_unsafe_local(name: str, not_isolated: dict[str, Finding]) -> None:
    fail_unless_good(not_isolated[name])


def test_a_sandbox_without_isolation_is_told_so_and_its_host_is_spared(not_isolated: dict[str, Finding]) -> None:
    open_ = {"host processes", "network", "writes outside", "host environment", "memory by one"}
    assert {name for name in open_ if not_isolated[name].status != "NOT CONTAINED"} == set()
    dangerous = {"pid 1", "fork bomb", "disk", "inodes", "leftovers", "bombs", "memory by many"}
    assert {name for name in dangerous if not_isolated[name].status != "skipped"} == set()
    assert "host processes" in not_isolated["fork bomb"].detail


def test_what_needs_what_comes_later() -> None:
    seen: set[str] = set()
    for attack in ATTACKS:
        assert set(attack.needs) <= seen
        seen.add(attack.name)
    assert len(seen) == len(ATTACKS)


def test_what_a_report_says() -> None:
    probe = ProbeReport("x", (Probe("python starts", True, "/usr"),), "cgroup-v2", ("a note",))
    good = suite.SuiteReport(
        "x", probe, (Finding("contract", "a", "passed", ""),), (Finding("n", "w", "contained", ""),)
    )
    assert good.passed
    assert good.summary() == "x: passed, 1 of 1 attacks contained, memory bounded by cgroup-v2\nnote: a note"
    for status in ("NOT CONTAINED", "not tried", "skipped"):
        bad = suite.SuiteReport("x", probe, (), (Finding("n", "w", status, "seen"),))
        assert not bad.passed
        assert bad.to_json()["attacks"][0]["status"] == status
        assert "FAILED, 0 of 1" in bad.summary()


def test_what_was_seen_is_told_without_quotes_and_control_characters() -> None:
    with pytest.raises(NotContained) as text:
        held(False, "8 files of\x1b[2J the host's /tmp")
    assert str(text.value) == "8 files of\\x1b[2J the host's /tmp"
    with pytest.raises(NotTried) as other:
        tried([], {"a": "b" * 1000})
    assert str(other.value) == "the attack did not run: {'a': '" + "b" * 593
