"""Somebody else's backend: the page's example, by its class and by an entry point."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from areal_agents import sandboxes
from areal_agents.errors import RegistryError
from areal_agents.sandboxes import suite
from areal_agents.sandboxes.attacks import ATTACKS
from tests import doc_blocks
from tests.sandboxes.test_backends import bwrap

__all__ = ["bwrap"]


def example() -> str:
    (block,) = (b for b in doc_blocks.blocks("docs/sandboxes.md") if b.language == "python")
    return block.text


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the page's backend, as pip leaves it: a module, and metadata with an entry point."""
    (tmp_path / "logged_sandbox.py").write_text(example())
    info = tmp_path / "logged_sandbox-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: logged-sandbox\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{sandboxes.GROUP}]\nlogged = logged_sandbox:LoggedBackend\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "logged_sandbox", raising=False)
    return tmp_path


def test_the_example_is_short() -> None:
    assert 30 < len(example().splitlines()) <= 60


def test_the_page_counts_the_attacks() -> None:
    assert f" {len(ATTACKS)} attacks on this machine" in doc_blocks.PAGES["docs/sandboxes.md"]


@pytest.mark.usefixtures("bwrap")
def test_the_example_passes_the_suite(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What else bubblewrap holds is tested as bubblewrap's: these attacks show that they reach this backend too.
    monkeypatch.setattr(suite, "ATTACKS", [attack for attack in ATTACKS if attack.name in ("network", "links")])
    report = asyncio.run(suite.check("logged"))
    assert report.passed, report
    assert len(report.attacks) == 2
    rows = [json.loads(line) for line in (installed / "sandbox.jsonl").read_text().splitlines()]
    assert {"ok", "error", "timeout", "spawned"} <= {row["status"] for row in rows}


@pytest.mark.usefixtures("bwrap")
def test_names_and_options_of_an_installed_package(installed: Path) -> None:
    assert "logged" in sandboxes.names()
    assert sandboxes.get("logged?log=other.jsonl").name == "logged"
    assert sandboxes.get("logged_sandbox:LoggedBackend").name == "logged"
    with pytest.raises(RegistryError, match="'size=3' is no option"):
        sandboxes.get("logged?size=3")
    with pytest.raises(RegistryError, match="Did you mean 'logged'"):
        sandboxes.get("loged")


def test_names_that_clash_or_do_not_load(installed: Path) -> None:
    points = installed / "logged_sandbox-1.0.dist-info/entry_points.txt"
    points.write_text(f"[{sandboxes.GROUP}]\nbubblewrap = logged_sandbox:LoggedBackend\nbroken = no_such_module:X\n")
    with pytest.raises(RegistryError, match="uses a name of ours"):
        sandboxes.get("bubblewrap")
    with pytest.raises(RegistryError, match="'broken' cannot be loaded"):
        sandboxes.get("broken")
    other = installed / "other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text(f"[{sandboxes.GROUP}]\nbroken = elsewhere:Y\n")
    with pytest.raises(RegistryError, match=r"several packages use that name: elsewhere:Y, no_such_module:X"):
        sandboxes.get("broken")
