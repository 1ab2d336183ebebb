"""Every registered environment keeps the contract, checked as `areal-agents check --all` does."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_agents import registry
from areal_agents.conformance.check import check
from tests.conftest import require


@pytest.mark.slow
@pytest.mark.parametrize("id", sorted(spec.id for spec in registry.specs()))
def test_passes_every_check(id: str, smollm2: Path) -> None:
    require("bwrap")
    report = check(id, tokenizer=str(smollm2))
    assert report.passed, str(report)
    assert {r.status for r in report.results} == {"passed"}  # nothing skipped, nothing unaudited


def test_there_is_something_to_check() -> None:
    assert "areal/Arithmetic-v0" in {spec.id for spec in registry.specs()}
