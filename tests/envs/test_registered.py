"""Every registered environment keeps the contract, checked as `areal-agents check --all` does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.conformance import contract, golds, reward_audit, unskilled
from areal_agents.conformance.check import check
from tests.conftest import require

KWARGS: dict[str, dict[str, Any]] = {"areal/ReasoningGym-v0": {"generators": ["chain_sum", "spell_backward"]}}
"""Of environments whose every part would take long: tests/envs/test_reasoning_gym.py looks at all generators."""
BESIDE = {spec.id for spec in registry.specs() if spec.sandbox}
"""Environments that need an engine, which this suite has none of: tests/sandboxes/test_warehouse.py plays them."""


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at fewer tasks than the command does: a hash of its content says of which split each drawn task is."""
    monkeypatch.setattr(contract, "MAX_TASKS", 512)
    monkeypatch.setattr(contract, "PROCESS_TASKS", 64)
    monkeypatch.setattr(golds, "MOST", 256)
    monkeypatch.setattr(reward_audit, "COSTLY_TASKS", 12)  # as many as there are odd answers; one paid is too much
    monkeypatch.setattr(unskilled, "COSTLY_EPISODES", 12)
    monkeypatch.setattr(reward_audit, "GOLD_TASKS", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("id", sorted({spec.id for spec in registry.specs()} - BESIDE))
def test_passes_every_check(id: str, smollm2: Path) -> None:
    require("bwrap")
    needs = registry.spec(id).needs
    require(*([f"module:{needs}"] if needs else []))
    report = check(id, tokenizer=str(smollm2), kwargs=KWARGS.get(id))
    assert report.passed, str(report)
    # Nothing unaudited. The look at tasks is skipped where none can be wrong, because they are drawn, and the look for
    # answers that are shown where a task is played and not answered.
    left = {r.name: r.status for r in report.results if r.status != "passed"}
    assert left.items() <= {"golds": "skipped", "hidden": "skipped"}.items()


def test_what_is_left_out_here_says_its_sandbox() -> None:
    assert {"areal/Warehouse-v0"} == BESIDE


def test_there_is_something_to_check() -> None:
    assert "areal/Arithmetic-v0" in {spec.id for spec in registry.specs()}


@pytest.mark.parametrize(
    ("imports", "id"),
    [
        ("import areal_agents, gymnasium", "areal/Arithmetic-v0"),
        ("import gymnasium, areal_agents", "areal/Arithmetic-v0"),
        ("import gymnasium", "areal_agents:areal/Arithmetic-v0"),
    ],
)
def test_gymnasium_makes_what_comes_with_the_package(imports: str, id: str) -> None:
    """In a new process: in this one, other tests have registered it."""
    code = (
        f"{imports}; from gymnasium.utils.env_checker import check_env; env = gymnasium.make({id!r}); "
        "check_env(env.unwrapped, skip_render_check=True); print(env)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stderr, done.stdout) == ("", "<Arithmetic<areal/Arithmetic-v0>>\n")
