"""The user's path, from an installed wheel in a fresh environment outside the checkout.

build the wheel ─▶ install it with all dependencies ─▶ init ─▶ its tests ─▶ edit the reward ─▶ check ─▶ train ─▶ eval
─▶ eval --compare ─▶ edit the reward ─▶ rescore ─▶ replay

Real throughout: pip, the embedded model, the engine's process, the learner. Only the numbers are small, and torch
alone is not installed again (``lend_torch``): that pip gets it for the wheel is not shown here, but that the wheel asks
for it. Most of the time goes into training.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

from areal_agents.tracking.trajectories import read_records
from areal_agents.types import Trajectory

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("areal_agents", "envs", "tools", "sandboxes", "configs", "pyproject.toml", "README.md", "LICENSE")
ID = "scales_env/Boxes-v0"
TURNS = ("--max-turn-tokens", "40", "--max-turns", "4", "--max-context", "384")
SMALL = (
    "--steps", "2", "--eval.n", "4", "--warm_start.demonstrations", "8", "--rollout.groups", "2",
    "--rollout.group_size", "2", "--rollout.concurrency", "4", "--rollout.max_turn_tokens", "40",
)  # fmt: skip

EACH = """
import json, sys
from areal_agents.cli.main import main
for argv in json.loads(sys.argv[1]):
    code = main(argv)
    print(f"\\n{sys.argv[2]} {code}", flush=True)
"""
MARK = "--- ended with"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """The standard output of ``command``, in an environment that knows nothing of the checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONDONTWRITEBYTECODE")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    started = time.perf_counter()
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    print(f"{time.perf_counter() - started:6.1f} s  {' '.join(str(c) for c in command)}")  # for `pytest -s`
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class User:
    """A person with a fresh environment, at work in ``folder``."""

    folder: Path
    bin: Path

    def python(self, *args: str) -> str:
        return run([self.bin / "python", *args], self.folder)

    def areal_agents(self, *args: str | Path) -> str:
        return run([self.bin / "areal-agents", *args], self.folder)

    def each(self, *commands: Sequence[str]) -> list[tuple[str, int]]:
        """What each command prints, and its exit code. One process runs all of them: a start takes seconds."""
        said = run([self.bin / "python", "-P", "-c", EACH, json.dumps(commands), MARK], self.folder)
        parts = re.split(rf"\n{MARK} (\d+)\n", said)
        assert (len(parts), parts[-1]) == (2 * len(commands) + 1, ""), said
        return list(zip(parts[:-1:2], map(int, parts[1::2]), strict=True))

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
        lend_torch(venv)
        install(venv, wheel, "pytest")
        (tmp_path / "work").mkdir()
        yield User(tmp_path / "work", venv / "bin")
    finally:
        shutil.rmtree(venv)  # 1 GB, and checkpoints of as much: pytest would keep them for three runs
        shutil.rmtree(tmp_path / "work", ignore_errors=True)


def lend_torch(venv: Path) -> None:
    """Link torch as it is installed here into ``venv``, where pip finds it and installs what it needs.

    It is the half of all files, which `make setup` has just unpacked.
    """
    torch = distribution("torch")
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv)}))
    assert torch.files is not None
    for name in {file.parts[0] for file in torch.files} - {"..", "__pycache__"}:
        (site / name).symlink_to(Path(str(torch.locate_file(name))).resolve(strict=True))


def install(venv: Path, *what: str | Path) -> None:
    """pip install into ``venv``, and leave torch as it is: another one would be removed from where it lies."""
    command: list[str | Path] = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "-q"]
    run([*command, "--no-compile", f"torch=={version('torch')}", *what], venv)


def test_the_users_path(user: User) -> None:
    code = "import areal_agents; print(areal_agents.__file__, *requires('areal-agents'), sep='\\n')"
    home, *needs = user.python("-c", f"from importlib.metadata import requires; {code}").splitlines()
    assert Path(home).is_relative_to(user.bin.parent / "lib")
    assert any(re.match(r"torch\W", need) for need in needs)  # which was there before it was asked for
    user = new_package(user)
    change_the_reward(user)
    train_it(user)
    evaluate_it(user)
    compare_and_replay(user)
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


def compare_and_replay(user: User) -> None:
    """The same four held-out tasks before training, and with the trained model from its folder.

    An episode of the run plays again exactly as it was.
    """
    episode = user.saved("train")[0].id
    (compared, *_), (said, *_), (listed, *_), (replayed, *_) = found = user.each(
        ["eval", "--compare", "runs/first:before", "runs/eval", "--json", "-"],
        ["eval", "--compare", "runs/first:before", "runs/first:after_rl"],
        ["replay", "runs/first", "--list"],
        ["replay", "runs/first", "--episode", episode],
    )
    assert [code for _, code in found] == [0] * 4, found
    row = json.loads(compared)
    report = json.loads((user.folder / "runs" / "eval" / "report.json").read_text())
    before = user.saved("eval-before")
    assert (row["n"], row["attempts"], row["left_out"]) == (4, [1, 1], [0, 0])
    assert row["pass_at_1"]["a"] == sum(t.reward == 1.0 for t in before) / 4
    assert row["pass_at_1"]["b"] == report["pass_at_1"]
    assert row["reward"]["difference"] == pytest.approx(report["reward"] - sum(t.reward for t in before) / 4)
    assert len(row["gained"]) + len(row["lost"]) + row["ties"] == 4
    assert "4 tasks are few" in row["notes"][0]
    assert "4 tasks, 1 and 1 attempts a task, paired by task" in said
    assert episode in listed
    assert "identical" in replayed


def rescore_it(user: User) -> None:
    """Another edit, on the saved episodes: a right answer now pays 0.9. A replay notices it too."""
    user.edit("scales_env/rubric.py", "max(solved,", "max(0.9 * solved,")
    rescore = ("rescore", "runs/first", "--reward", "scales_env.rubric:rubric", "--json", "-", "--kind")
    replay = ("replay", "runs/first", "--kind", "demonstration", "--episode", user.saved("demonstration")[0].id)
    one, two, replayed = user.each((*rescore, "demonstration"), (*rescore, "train"), replay)
    assert (one[1], two[1]) == (0, 0)
    demonstrations, now = json.loads(one[0]), json.loads(two[0])
    assert (demonstrations["scored"], demonstrations["failed"]) == (8, 0)
    assert (demonstrations["mean_old"], demonstrations["mean_new"]) == (1.0, pytest.approx(0.9))
    assert (demonstrations["pass_old"], demonstrations["pass_new"], demonstrations["episodes_flipped"]) == (1.0, 0, 8)
    trained = user.saved("train")
    expected = [0.9 if t.reward == 1.0 else t.reward for t in trained]
    assert now["mean_old"] == pytest.approx(sum(t.reward for t in trained) / 8)
    assert now["mean_new"] == pytest.approx(sum(expected) / 8)
    assert now["changed"] == sum(t.reward == 1.0 for t in trained) / 8
    assert replayed[1] == 1
    assert "recorded 1.0, replayed 0.9" in replayed[0]
