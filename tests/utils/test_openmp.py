"""How torch's threads wait, as libgomp itself says it (OMP_DISPLAY_ENV) when it is loaded."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.utils import openmp
from tests.tiny_models import save_tiny, tiny_model


def spin_count(code: str, **chosen: str) -> str:
    """The value that libgomp prints when ``code`` loads torch."""
    environment = {k: v for k, v in os.environ.items() if k not in openmp.CHOICES}
    environment |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.getcwd()} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    return line.split("'")[1]


def test_threads_sleep_where_they_wait_unless_the_user_chose() -> None:
    ours = "import areal_agents, torch"
    assert spin_count(ours) == "0"
    assert spin_count(ours, GOMP_SPINCOUNT="7") == "7"
    assert spin_count(ours, OMP_WAIT_POLICY="active") != "0"
    assert spin_count("import torch, areal_agents") != "0"  # too late, and said when a learner starts


@pytest.mark.parametrize("first", ["torch", "areal_agents"])
def test_a_process_whose_torch_came_first_is_warned(first: str) -> None:
    other = {"torch": "areal_agents", "areal_agents": "torch"}[first]
    code = f"import {first}, {other}; from areal_agents.utils.openmp import *; warn_where_threads_spin()"
    environment = {k: v for k, v in os.environ.items() if k not in openmp.CHOICES} | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ("import areal_agents first" in done.stderr) == (first == "torch")


def test_an_engine_has_it_too(tmp_path: Path) -> None:
    async def work() -> None:
        async with await TransformersEngine.start(save_tiny(tmp_path, tiny_model()), max_context=64) as engine:
            assert b"GOMP_SPINCOUNT=" in await asyncio.to_thread(Path(f"/proc/{engine.pid}/environ").read_bytes)

    asyncio.run(work())
