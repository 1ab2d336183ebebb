"""Shared fixtures. A missing dependency skips a test on a developer's machine and fails it in CI."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import areal_agents  # noqa: F401  before any test imports torch: it sets how torch's threads wait

CI = os.environ.get("CI", "").lower() in ("1", "true")
SHARED = Path(__file__).resolve().parents[2] / "shared"
TESTS = Path(__file__).resolve().parent
FOLDERS = {"ray": "cluster", "vllm": "engines/vllm", "docker": "sandboxes"}
"""Where the Makefile looks for tests by marker. Of two markers the first counts."""
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
    """Begin with the files that take long, so that no worker is left alone with one at the end.

    Raises UsageError for a test outside the folder of its marker, where ``make ci`` would never run it.
    """
    for item in items:
        folder = next((folder for marker, folder in FOLDERS.items() if item.get_closest_marker(marker)), "")
        if not item.path.resolve().is_relative_to(TESTS / folder):
            raise pytest.UsageError(f"{item.nodeid} must be below tests/{folder}, where the Makefile looks for it")
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@contextmanager
def _registry_restored() -> Iterator[None]:
    """Take back what is registered, and the user's packages that are imported, inside the block."""
    import gymnasium

    from areal_agents import registry

    registry.specs()  # the built-in collection registers at its first import only
    specs, loaded, errors = dict(registry._specs), set(registry._loaded), dict(registry._load_errors)
    known, modules = set(gymnasium.registry), set(sys.modules)
    yield
    registry._specs.clear()
    registry._specs.update(specs)
    registry._load_errors.clear()
    registry._load_errors.update(errors)
    registry._loaded.clear()
    registry._loaded.update(loaded)
    for id in set(gymnasium.registry) - known:
        del gymnasium.registry[id]
    for name in set(sys.modules) - modules:
        if name.startswith("acme"):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="module")
def _registry_of_a_module() -> Iterator[None]:
    """Keep what one file's tests register from the files that the same worker runs later."""
    with _registry_restored():
        yield


@pytest.fixture
def restored_registry() -> Iterator[None]:
    """Take back after one test what it registers."""
    with _registry_restored():
        yield


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
