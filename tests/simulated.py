"""Cases of the simulation that can be worked out by hand, and the benchmarks' modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks import their neighbours, as scripts do. It is for every test of a module that imports it."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])


def module(name: str) -> Any:
    return importlib.import_module(name)


def case(**chosen: Any) -> Any:
    settings: dict[str, Any] = {
        "engines": 2, "slots": 4, "groups": 3, "group_size": 3, "sigma": 1.0, "eta": 2, "on_exceed": "wait",
        "updates": 10, "warmup": 3, "oversubscription": 1.5,
    }  # fmt: skip
    return module("simulate_model").Case(**settings | chosen)


def constant(tokens: float, *, update: float) -> Any:
    """Every sequence gets 1 token/s whatever the batch; no tools within an episode of at most ``tokens``."""
    return module("simulate_model").Calibration(
        rates=((1, 1.0), (64, 64.0)), update_seconds=update, tool_seconds=(0.0, 0.0), learner_rate=1.0,
        mean_tokens=tokens, turn_tokens=1 << 20,
    )  # fmt: skip


def fix_lengths(monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int], size: int = 1) -> None:
    monkeypatch.setattr(
        module("simulate_model").Workload, "lengths", lambda self, order: [lengths[order % len(lengths)]] * size
    )
