"""vLLM engines under test. Each start takes 16 to 35 seconds: one engine a module, and one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.engines.vllm.serving import serve
from tests.served import Served


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm"):
        require("module:vllm")


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny Llama in fp32, or what the module's parameters ask for."""
    options: dict[str, Any] = getattr(request, "param", {})
    it = serve(Path(tmp_path_factory.mktemp("served")), **options)
    yield it
    it.close()
