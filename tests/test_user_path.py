"""The user's path, from an installed wheel in a fresh environment outside the checkout.

build the wheel ─▶ install it with all dependencies ─▶ init ─▶ its tests ─▶ edit the reward ─▶ check ─▶ train ─▶ eval
─▶ eval --compare ─▶ edit the reward ─▶ rescore ─▶ replay

Real throughout: pip, the embedded model, the engine's process, the learner. Only the numbers are small. Most of the
time goes into installing (torch alone is 200 MB) and training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from areal_agents.tracking.trajectories import read_records
from areal_agents.types import Trajectory

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("areal_agents", "envs", "tools", "sandboxes", "configs", "pyproject.toml", "README.md", "LICENSE")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ID = "scales_env/Boxes-v0"
TURNS = ("--max-turn-tokens", "40", "--max-turns", "4", "--max-context", "384")
SMALL = (
    "--steps", "2", "--eval.n", "4", "--warm_start.demonstrations", "8", "--rollout.groups", "2",
    "--rollout.group_size", "2", "--rollout.concurrency", "4", "--rollout.max_turn_tokens", "40",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(command: Sequence[str | Path], cwd: Path, *, code: int = 0) -> str:
    """The standard output of ``command``, in an environment that knows nothing of the checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    started = time.perf_counter()
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    print(f"{time.perf_counter() - started:6.1f} s  {' '.join(str(c) for c in command)}")  # for `pytest -s`
    assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class User:
    """A person with a fresh environment, at work in ``folder``."""

    folder: Path
    bin: Path

    def python(self, *args: str) -> str:
        return run([self.bin / "python", *args], self.folder)

    def areal_agents(self, *args: str | Path, code: int = 0) -> str:
        return run([self.bin / "areal-agents", *args], self.folder, code=code)

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
        path.write_text(text.replace(old, new))

    def saved(self, kind: str) -> list[Trajectory]:
        return [r.trajectory for r in read_records(self.folder / "runs" / "first", kind=kind)]


@pytest.fixture
def user(tmp_path: Path, smollm2: Path) -> Iterator[User]:
    """The wheel, built from a copy of the sources, and everything it needs, in an environment of its own."""
    source, dist, venv = tmp_path / "source", tmp_path / "dist", tmp_path / "venv"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", dist, source], tmp_path)
    (wheel,) = dist.glob("areal_agents-*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", venv], tmp_path)
    try:
        install(venv, wheel, "pytest")
        (tmp_path / "work").mkdir()
        yield User(tmp_path / "work", venv / "bin")
    finally:
        shutil.rmtree(venv)  # 1.5 GB, and checkpoints of as much: pytest would keep them for three runs
        shutil.rmtree(tmp_path / "work", ignore_errors=True)


def install(venv: Path, *what: str | Path) -> None:
    """pip install into ``venv``, with the same torch build as outside: a CUDA build would add gigabytes."""
    command: list[str | Path] = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "-q"]
    command += ["--no-compile", f"torch=={version('torch')}", *what]
    index = os.environ.get("TORCH_INDEX", "")  # as in the Makefile, which goes on to PyTorch's own index too
    try:
        run([*command, *(("--extra-index-url", index) if index else ())], venv)
    except AssertionError:
        run([*command, "--extra-index-url", CPU_INDEX], venv)


def test_the_users_path(user: User) -> None:
    home = user.python("-c", "import areal_agents; print(areal_agents.__file__)").strip()
    assert Path(home).is_relative_to(user.bin.parent / "lib")
    user = new_package(user)
    change_the_reward(user)
    train_it(user)
    evaluate_it(user)
    compare_them(user)
    replay_it(user)
    rescore_it(user)


def new_package(user: User) -> User:
    """``init``, install, and the generated tests."""
    said = user.areal_agents("init", "scales_env")
    assert "  areal-agents train train.toml" in said
    inside = User(user.folder / "scales_env", user.bin)
    install(user.bin.parent, "-e", inside.folder)
    listed = user.areal_agents("envs").splitlines()  # by its entry point, from anywhere
    assert [ID, "follow a trail of boxes to the code at its end"] in [line.split(maxsplit=1) for line in listed]
    # What is deselected runs the check, which the command does next; tests/cli/test_scaffold.py runs it.
    assert "7 passed" in inside.python("-W", "error", "-m", "pytest", "-q", "-k", "not keeps_the_contract")
    return inside


def change_the_reward(user: User) -> None:
    """Partial credit; and the audit that would catch a reward for nothing."""
    user.edit("scales_env/rubric.py", "PARTIAL_CREDIT = 0.0", "PARTIAL_CREDIT = 0.4")
    said = user.areal_agents("check", ID)
    assert said.startswith(f"{ID}: passed\n")
    assert "16 gold answers and 4 expert episodes earn 1; empty 0.00" in said
    assert "prefix-exact prompts with smollm2" in said


def train_it(user: User) -> None:
    said = user.areal_agents("train", "train.toml", *SMALL)
    assert "trained model: runs/first/model" in said
    rows = ["before", "warm_start", "after_rl"]
    assert [line.split()[0] for line in said.splitlines() if line.startswith(tuple(f"{row} " for row in rows))] == rows
    assert (user.folder / "runs" / "first" / "model" / "model.safetensors").stat().st_size > 200_000_000
    demonstrations, trained = user.saved("demonstration"), user.saved("train")
    assert [t.reward for t in demonstrations] == [1.0] * 8
    assert len(trained) == 8  # 2 steps of 2 groups of 2
    assert {t.reward for t in trained} <= {0.0, 0.2, 0.4, 1.0}  # a right answer, or the edited credit for a box or two
    for t in trained:
        shares = t.turns[-1].components
        assert t.reward == max(shares["correct"], 0.4 * shares["followed"])
    held_out = {t.task.content_hash for t in user.saved("eval-after_rl")}
    assert len(held_out) == 4
    assert not held_out & {t.task.content_hash for t in trained + demonstrations}


def evaluate_it(user: User) -> None:
    said = user.areal_agents("eval", ID, "--model", "runs/first/model", "--n", "4", "--out", "runs/eval", *TURNS)
    assert f"{ID}:test" in said
    report = json.loads((user.folder / "runs" / "eval" / "report.json").read_text())
    assert (report["env"], report["n"], report["k"], report["infra_rate"]) == (ID, 4, 1, 0.0)


def compare_them(user: User) -> None:
    """The same four held-out tasks before training, and with the trained model from its folder."""
    row = json.loads(user.areal_agents("eval", "--compare", "runs/first:before", "runs/eval", "--json", "-"))
    report = json.loads((user.folder / "runs" / "eval" / "report.json").read_text())
    before = user.saved("eval-before")
    assert (row["n"], row["attempts"], row["left_out"]) == (4, [1, 1], [0, 0])
    assert row["pass_at_1"]["a"] == sum(t.reward == 1.0 for t in before) / 4
    assert row["pass_at_1"]["b"] == report["pass_at_1"]
    assert row["reward"]["difference"] == pytest.approx(report["reward"] - sum(t.reward for t in before) / 4)
    assert len(row["gained"]) + len(row["lost"]) + row["ties"] == 4
    assert "4 tasks are few" in row["notes"][0]
    said = user.areal_agents("eval", "--compare", "runs/first:before", "runs/first:after_rl")
    assert "4 tasks, 1 and 1 attempts a task, paired by task" in said


def replay_it(user: User) -> None:
    """An episode of the run plays again exactly as it was."""
    episode = user.saved("train")[0].id
    assert episode in user.areal_agents("replay", "runs/first", "--list")
    assert "identical" in user.areal_agents("replay", "runs/first", "--episode", episode)


def rescore_it(user: User) -> None:
    """Another edit, on the saved episodes: a right answer now pays 0.9. A replay notices it too."""
    user.edit("scales_env/rubric.py", "max(solved,", "max(0.9 * solved,")
    demonstrations = rescored(user, "demonstration")
    assert (demonstrations["scored"], demonstrations["failed"]) == (8, 0)
    assert (demonstrations["mean_old"], demonstrations["mean_new"]) == (1.0, pytest.approx(0.9))
    assert (demonstrations["pass_old"], demonstrations["pass_new"], demonstrations["episodes_flipped"]) == (1.0, 0, 8)
    trained, now = user.saved("train"), rescored(user, "train")
    expected = [0.9 if t.reward == 1.0 else t.reward for t in trained]
    assert now["mean_old"] == pytest.approx(sum(t.reward for t in trained) / 8)
    assert now["mean_new"] == pytest.approx(sum(expected) / 8)
    assert now["changed"] == sum(t.reward == 1.0 for t in trained) / 8
    command = ("replay", "runs/first", "--kind", "demonstration", "--episode", user.saved("demonstration")[0].id)
    assert "recorded 1.0, replayed 0.9" in user.areal_agents(*command, code=1)


def rescored(user: User, kind: str) -> dict[str, Any]:
    reward = "scales_env.rubric:rubric"
    said = user.areal_agents("rescore", "runs/first", "--reward", reward, "--kind", kind, "--json", "-")
    found: dict[str, Any] = json.loads(said)
    return found
