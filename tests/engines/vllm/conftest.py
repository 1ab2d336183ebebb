"""Tests marked ``vllm`` need it."""

from __future__ import annotations

import pytest

from tests.conftest import require


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm"):
        require("module:vllm")
