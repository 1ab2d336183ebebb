"""What a run asks for before anything is made or read: the packages that its settings need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents.cli.main import main

HIDE = """
import contextlib, importlib.abc, importlib.util, io, json, sys
hidden = ""
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None
sys.meta_path.insert(0, Hidden())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == hidden else found(name, package)
from areal_agents.cli.main import main
for hidden, argv in json.loads(sys.argv[1]):
    assert hidden not in sys.modules
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(argv)
    print(json.dumps([code, said.getvalue()]))
"""
MISSING = {
    "ray": (
        ["--cluster.backend", "ray"],
        "cluster.backend = 'ray' needs Ray, which is not installed: pip install 'areal-agents[ray]', or set "
        "cluster.backend = 'local'",
    ),
    "vllm": (
        ["--engine.kind", "vllm"],
        "engine.kind = 'vllm' needs vLLM, which is not installed: pip install \"areal-agents[vllm]\" (a GPU), or "
        "see docs/engines.md for the build for processors, or set engine.kind = 'transformers'",
    ),
    "wandb": (
        ["--track.wandb", "mine"],
        "track.wandb needs the wandb package, which is not installed: pip install 'areal-agents[wandb]', or leave "
        "it empty",
    ),
    "tensorboard": (
        [],
        "track.tensorboard needs the tensorboard package, which is not installed: pip install tensorboard, or set "
        "track.tensorboard = false",
    ),
}
"""Package → the settings that need it, and what is said."""


def test_a_missing_package_is_one_sentence_before_anything_is_made(tmp_path: Path) -> None:
    """The model does not exist either: nothing has looked for it. One process, which has imported none, tries all."""
    out = tmp_path / "run"
    argv = ["train", "--env.id", "areal/Arithmetic-v0", "--model.path", str(tmp_path / "none"), "--out", str(out)]
    asked = [(package, [*argv, *settings]) for package, (settings, _) in MISSING.items()]
    done = subprocess.run(
        [sys.executable, "-c", HIDE, json.dumps(asked)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[1, f"error: {said}\n"] for _, said in MISSING.values()]
    assert not out.exists()


VLLM = ["--engine.kind", "vllm", "--engine.deterministic", "true"]


@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        ("train", ["--engine.threads", "4096"], "engine.threads = 4096 exceeds the"),
        ("train", ["--learner.threads", "4096"], "learner.threads = 4096 exceeds the"),
        ("train", VLLM, "engine.kind = 'vllm' needs"),  # vLLM, or a GPU
        ("eval", ["--engine.threads", "4096"], "engine.threads = 4096 exceeds the"),
        ("eval", VLLM, "engine.kind = 'vllm' needs"),
    ],
)
def test_what_this_machine_cannot_start_is_said_before_the_model_is_looked_for(
    command: str, settings: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["--env.id", "areal/Arithmetic-v0", "--model.path", str(tmp_path / "none"), "--out", str(out)]
    assert main([command, *given, *settings]) == 1
    assert said in capsys.readouterr().err
    assert not out.exists()
