"""The README's environment, exactly as it stands there, and its claims about the tree."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

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
def test_the_environment_passes_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: Path) -> None:
    from areal_agents import registry
    from areal_agents.check import check

    (tmp_path / "my_envs.py").write_text(example())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module = importlib.import_module("my_envs")
    try:
        report = check("my_envs:Scales", tokenizer=str(smollm2))
        assert report.passed, str(report)
        assert registry.spec("my/Scales-v0").env_class() is module.Scales
    finally:
        sys.modules.pop("my_envs", None)


def test_the_readme_is_short_and_names_every_file() -> None:
    assert len(README.splitlines()) < 200
    files = README.split("## Files")[1]
    for path in sorted((ROOT / "areal_agents").glob("*.py")):
        if not path.name.startswith("__"):
            assert path.name in files, f"README's file map lacks {path.name}"
