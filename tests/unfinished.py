"""Evaluations of a served model that are interrupted on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from areal_agents.cli.main import main
from areal_agents.evaluation.unfinished import count_saved
from areal_agents.tracking.journal import Journal
from areal_agents.tracking.trajectories import read_shard
from tests.chat_server import Json, Step, completion

ENV = "tests.chat_envs:Sums"
SECONDS = 300.0


def answers(body: Json) -> Step:
    """Every second task is right."""
    a, b = (int(n) for n in body["messages"][1]["content"].rstrip("?").split("+"))
    return completion(f"\\boxed{{{a + b if a % 2 == 0 else 0}}}", tokens=3)


class Gate:
    """Answers ``first`` requests, and the others once it is open."""

    def __init__(self, first: int) -> None:
        self.left, self.open, self.lock = first, threading.Event(), threading.Lock()

    def __call__(self, body: Json) -> Step:
        with self.lock:
            self.left -= 1
            late = self.left < 0
        if late:
            self.open.wait(SECONDS)
        return answers(body)


def command(out: Path | str, url: str, *more: str) -> list[str]:
    return ["eval", ENV, "--model", "openai:m", "--url", url, "--n", "8", "--out", str(out), *more]


@contextlib.contextmanager
def started(*argv: str) -> Iterator[subprocess.Popen[str]]:
    env = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "areal_agents", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=env,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until_begun(cells: Path, process: subprocess.Popen[str]) -> Path:
    """Wait for the first folder in ``cells``, with the processor left to whoever makes it."""
    end = time.monotonic() + SECONDS
    while not (found := list(cells.glob("*"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
    return found[0]


def until_saved(out: Path, episodes: int) -> None:
    end = time.monotonic() + SECONDS
    while count_saved(out) < episodes:
        assert time.monotonic() < end
        time.sleep(0.02)


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    raise AssertionError(said)


def numbers(out: Path) -> Json:
    report: Json = json.loads((out / "report.json").read_text())
    return {name: value for name, value in report.items() if name not in ("seconds", "served")}


def uninterrupted(tmp_path: Path, url: str) -> Path:
    assert main(command(tmp_path / "whole", url)) == 0
    return tmp_path / "whole"


def partial_of(whole: Path, out: Path, episodes: int) -> None:
    """Copy an evaluation as a kill after so many episodes leaves it."""
    shutil.copytree(whole, out)
    shard = out / "trajectories/eval/step-000000.parquet"
    records = read_shard(shard)
    shard.unlink()
    (out / "report.json").unlink()
    with Journal(shard.with_suffix(".jsonl")) as journal:
        for record in records[:episodes]:
            journal.append(record)
