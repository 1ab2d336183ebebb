"""The README's environment, exactly as it stands there, and its claims about the tree."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return str(code)


def test_the_environment_is_complete_in_under_30_lines() -> None:
    lines = [line for line in example().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) < 30


@pytest.mark.slow
def test_the_environment_passes_the_check_as_the_readme_runs_it(tmp_path: Path, smollm2: Path) -> None:
    (tmp_path / "my_envs.py").write_text(example())
    command = [
        str(Path(sys.executable).parent / "areal-agents"),
        "check",
        "my_envs:Scales",
        "--tokenizer",
        str(smollm2),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unaudited" not in done.stdout


def test_gymnasium_makes_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_envs.py").write_text(example())
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("my_envs")
    try:
        env = gymnasium.make("my/Scales-v0").unwrapped
        assert isinstance(env, module.Scales)
        observation, _ = env.reset(seed=0)
        dogs = int(re.findall(r"\d+", observation[-1].text)[0])
        _, reward, terminated, _, _ = env.step(rf"\boxed{{{20 * dogs}}}")
        assert (reward, terminated) == (1.0, True)
        env.close()
    finally:
        sys.modules.pop("my_envs", None)


def test_the_readme_is_short_and_names_every_file() -> None:
    assert len(README.splitlines()) < 200
    files = README.split("## Files")[1]
    for path in sorted((ROOT / "areal_agents").glob("*.py")):
        if not path.name.startswith("__"):
            assert path.name in files, f"README's file map lacks {path.name}"
