"""macOS and Windows, as far as Linux can play them: a served model is evaluated, the rest says what it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from areal_agents.errors import ConfigError, SandboxUnavailable
from areal_agents.sandbox import backends
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.preflight import require_runnable
from areal_agents.utils.system import available_cores, is_linux, require_linux
from tests.chat_server import chat_server
from tests.evaluation.test_chat_evaluation import ENV, scripted
from tests.other_systems import ENDED

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    out: str
    err: str
    code: int


def areal(system: str, *commands: list[str]) -> list[Said]:
    """One process runs all ``commands``: a start takes seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.other_systems", system, json.dumps(commands)],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out, err = (re.split(rf"\n{ENDED} (.+)\n", text) for text in (done.stdout, done.stderr))
    assert len(out) == len(err) == 2 * len(commands) + 1, done.stderr
    return [Said(*said) for said in zip(out[:-1:2], err[:-1:2], map(int, out[1::2]), strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["macos", "windows"])
def test_a_served_model_is_evaluated(tmp_path: Path, system: str) -> None:
    with chat_server(scripted) as server:
        (done,) = areal(system, [
            "eval", ENV, "--model", "openai:m", "--url", server.url, "--n", "8", "--max-turns", "4",
            "--max-turn-tokens", "20", "--out", str(tmp_path / "out"), "--json", "-",
        ])  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["pass_at_1"] == 0.5
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("system", ["macos", "windows"])
def test_commands_that_need_no_linux_work(system: str) -> None:
    done = areal(system, ["--help"], ["envs"], ["train", "--help"], ["algorithms"], ["model", "list"])
    assert [(said.code, said.err) for said in done] == [(0, "")] * 5


SERVED = ["--model", "openai:m", "--url", "http://127.0.0.1:1/v1"]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["macos", "windows"])
@pytest.mark.parametrize(
    "refused",
    [
        [(["train"], "training needs Linux"), (["demo"], "training needs Linux")],
        [
            (["eval", "areal/Arithmetic-v0", "--model", "smollm2"], "an engine for smollm2 needs Linux"),
            (["eval", "areal/Arithmetic-v0", *SERVED], "sandbox 'bubblewrap' is unavailable: it needs Linux"),
        ],
    ],
)
def test_the_rest_says_what_it_needs(tmp_path: Path, system: str, refused: list[tuple[list[str], str]]) -> None:
    done = areal(system, *([*argv, "--out", str(tmp_path / "out")] for argv, _ in refused))
    for said, (_, why) in zip(done, refused, strict=True):
        assert said.code == 1
        assert said.err.startswith(f"error: {why}"), said.err
        assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_affinity_the_machines_cores_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()
    assert is_linux()  # a Linux that cannot say it still runs engines
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


def test_another_platform_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_linux("training")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"training needs Linux .* darwin lacks\. What works here: .*openai:MODEL"):
        require_runnable(TrainConfig())
    for name in ("bubblewrap", "unsafe_local"):
        with pytest.raises(SandboxUnavailable, match="the platform is darwin"):
            backends().get(name)
