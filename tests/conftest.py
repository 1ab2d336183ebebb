"""Shared fixtures. A missing dependency skips a test on a developer's machine and fails it in CI."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

import areal_agents  # noqa: F401  before any test imports torch: it sets how torch's threads wait

CI = os.environ.get("CI", "").lower() in ("1", "true")
SHARED = Path(__file__).resolve().parents[2] / "shared"
TASK_PACKAGES = Path(sys.prefix) / "task-packages"
"""Where `make test` puts the packages whose tasks adapters play."""
if TASK_PACKAGES.is_dir():
    sys.path.append(str(TASK_PACKAGES))  # last: it holds nothing that is installed otherwise


def missing(reason: str) -> None:
    """Skip the test, or fail it in CI, where everything must be installed."""
    if CI:
        pytest.fail(f"CI must have it: {reason}")
    pytest.skip(reason)


def require(*dependencies: str) -> None:
    """Each is a command on PATH (``bwrap``) or an importable module (``module:psutil``)."""
    for name in dependencies:
        if name.startswith("module:"):
            if importlib.util.find_spec(name.removeprefix("module:")) is None:
                missing(f"{name.removeprefix('module:')} is not installed")
        elif shutil.which(name) is None:
            missing(f"{name} is not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no worker is left alone with one at the end."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the embedded model; `areal-agents model pull` puts it there."""
    from areal_agents import models

    folder = models.cache_dir() / "models" / "smollm2"
    if not models.intact(folder):
        if not CI:
            pytest.skip("run `areal-agents model pull smollm2` first")
        models.pull("smollm2", progress=False)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """``../shared/data``, data for tests that lies beside the checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        missing(f"{folder} is not there")
    return folder
