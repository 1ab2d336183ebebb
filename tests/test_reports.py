"""Small inputs made from public bug reports of this field's projects, each carried out as a user meets it.

``../shared/data/reports.jsonl`` says of each what is right (``expected``). What was seen when it was tried says nothing
here. ``tests/reports/`` has a function a case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import reports
from tests.conftest import SHARED, require
from tests.reports.place import CASES, Place

FILE = SHARED / "data" / "reports.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.is_file() else []

reports.load()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def place(tmp_path: Path, shared: Path, smollm2: Path, shared_data: Path) -> Place:
    return Place(tmp_path, shared, smollm2, shared_data / "chat_templates")


def test_the_cases_are_there(shared_data: Path) -> None:
    assert ROWS, f"{FILE} is not there, or empty"
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert set(CASES) <= {row["id"] for row in ROWS}, "functions without a case"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("row", [pytest.param(row, id=row["id"]) for row in ROWS])
def test_report(row: dict[str, Any], place: Place) -> None:
    require("bwrap")
    assert row["id"] in CASES, f"{row['id']} has no function in tests/reports: {row['input']} -> {row['expected']}"
    CASES[row["id"]](place)
