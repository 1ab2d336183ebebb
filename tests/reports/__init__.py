"""The small inputs of ``../shared/data/reports.jsonl``, each carried out on the product: a function a case.

They come from public bug reports of this field's projects. ``tests/test_reports.py`` runs them.
"""

from __future__ import annotations

import importlib

import pytest

ROOMS = ("calls", "commands", "evaluations", "rewards", "runs", "sandbox", "templates")

pytest.register_assert_rewrite(*(f"{__name__}.{room}" for room in ROOMS))


def load() -> None:
    """Import every file of cases."""
    for room in ROOMS:
        importlib.import_module(f"{__name__}.{room}")
