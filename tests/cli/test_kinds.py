"""The packages that ``areal-agents init --kind …`` makes: their own tests, one step of training, and a wheel of one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.cli.scaffold import KINDS, Kind, init
from tests.tiny_models import tiny_chat_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--steps", "1", "--eval.n", "2", "--rollout.groups", "1", "--rollout.group_size", "2", "--rollout.concurrency", "2",
    "--rollout.max_turn_tokens", "8", "--warm_start.demonstrations", "2", "--warm_start.batch", "2",
    "--model.max_context", "480", "--engine.threads", "1", "--learner.threads", "1",
)  # fmt: skip
pytestmark = pytest.mark.slow


def run(folder: Path, *command: str, paths: tuple[Path, ...] = ()) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONPATH")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*paths, ROOT)))
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("kind", "passed"), [("dataset", "6 passed"), ("gymnasium", "3 passed")])
def test_its_own_tests_pass(kind: Kind, passed: str, tmp_path: Path) -> None:
    folder = init("acme_env", tmp_path, kind)
    # What is deselected runs `check`, as the test of a wheel does.
    told = run(folder, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not keeps_the_contract")
    assert passed in told


@pytest.mark.parametrize("kind", ["game", "gymnasium"])
def test_it_trains_one_step(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tool`` is trained by tests/test_user_path.py, ``dataset`` as a wheel."""
    name = f"acme_{kind}"
    folder, tiny = init(name, tmp_path, kind), tiny_chat_model(tmp_path / "tiny")
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 1024})
    )  # a game's history is long
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    env = f"{name}.env:{KINDS[kind].env.removesuffix('-v0')}"  # it is not installed, so no entry point names its id
    assert (
        main(["train", "train.toml", "--model.path", str(tiny), "--env.id", env, *SMALL, "--model.max_context", "1000"])
        == 0
    )
    steps = [json.loads(line) for line in (folder / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert {"warm_start", "train"} <= {row["kind"] for row in steps}


COMMANDS = """
import json, sys
from areal_agents.cli.main import main
for argv in json.loads(sys.argv[1]):
    print("$", *argv, flush=True)
    if code := main(argv):
        sys.exit(f"{argv} ended with {code}")
import acme_data
print("from", acme_data.__file__)
"""


def test_a_wheel_with_environment_reward_tool_and_suite(tmp_path: Path) -> None:
    """Built and installed without a network, and used from a folder that knows nothing of its sources."""
    folder, tiny = init("acme_data", tmp_path / "sources", "dataset"), str(tiny_chat_model(tmp_path / "tiny"))
    dist, site, work = tmp_path / "dist", tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(folder, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(dist))
    (wheel,) = dist.glob("acme_data-0.1.0-*.whl")
    run(work, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    commands = [
        ["envs"],
        ["check", "acme_data/Measures-v0", "--tokenizer", tiny],
        ["eval", "acme_data", "--model", tiny, "--out", "suites", "--engine.threads", "1"],
        ["train", "--env.id", "acme_data/Measures-v0", "--model.path", tiny, "--out", "run", *SMALL],
    ]
    told = run(work, "-c", COMMANDS, json.dumps(commands), paths=(site,))
    assert f"from {site}" in told
    assert re.search(r"^acme_data/Measures-v0 +questions of a file, about old measures$", told, re.MULTILINE)
    assert "acme_data/Measures-v0: passed" in told
    assert "16 gold answers and 4 expert episodes earn 1" not in told  # the test split has twelve tasks
    assert "12 gold answers and 4 expert episodes earn 1" in told
    assert (work / "suites/acme_data-v1/leaderboard.json").is_file()
    board = json.loads((work / "suites/acme_data-v1/leaderboard.json").read_text())
    assert [(s["entry"], s["n"], s["attempts"]) for s in board["scores"]] == [("greedy", 12, 12), ("sampled", 12, 24)]
    rows = [json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines()]
    assert {"warm_start", "train"} <= {row["kind"] for row in rows}
