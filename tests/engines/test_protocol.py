"""Frames between client and worker."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents.engine import Sampling, UpdateReport
from areal_agents.engines import protocol as p
from areal_agents.engines.cpu.architecture import Shape
from areal_agents.types import Completion
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    "message",
    [
        p.Generate(1, "s", (1, 2), Sampling(3, stop_ids=(2,), seed=4)),
        p.Done(1, Completion((5,), (-0.5,), (7,), "stop")),
        p.Updated(2, UpdateReport(3, 0.1, 4, 5)),
        p.Settings("folder", Shape.of(tiny_config(), 64), "bf16", 1, 2, 3, 4, 5),
    ],
)
def test_a_frame_round_trips_and_a_cut_one_is_the_end(message: p.WorkerCommand | p.Reply | p.Settings) -> None:
    frame = p.encode(message)
    stream = io.BytesIO(frame + frame)
    assert p.read_frame(stream) == message
    assert p.read_frame(stream) == message
    assert p.read_frame(stream) is None
    for cut in (3, 8, len(frame) - 1):
        assert p.read_frame(io.BytesIO(frame[:cut])) is None


_CHATTY = """
import os
from areal_agents.engines import protocol as p
from areal_agents.engines.cpu.worker import take_pipes
commands, replies = take_pipes()
print("a library's banner", flush=True)
os.write(1, b"a C library's banner")
replies.write(p.encode(p.Ready(len(os.read(0, 10)))))
print(p.read_frame(commands), flush=True)
"""


def test_stray_prints_of_the_worker_go_to_stderr() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _CHATTY],
        input=p.encode(p.Cancel(9)),
        capture_output=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": "."},
        timeout=60,
        check=True,
    )
    assert p.read_frame(io.BytesIO(done.stdout)) == p.Ready(0)  # descriptor 0 is empty: commands were moved away
    assert len(done.stdout) == len(p.encode(p.Ready(0)))
    assert b"a library's banner" in done.stderr
    assert b"a C library's banner" in done.stderr
    assert b"Cancel(id=9)" in done.stderr
