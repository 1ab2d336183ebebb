"""Packages of others that exit, raise or print while they are imported, seen from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
GOOD = "import areal_agents\nareal_agents.register('acmegood/Letters-v0', 'tests.letters_env:Letters')\n"
NOISE = """
import ctypes, os, subprocess, sys
print("noise of print")
sys.__stdout__.write("noise of __stdout__")
os.write(1, b"noise of a descriptor")
ctypes.CDLL(None).printf(b"noise of C")
subprocess.run(["echo", "noise of a process"], check=True)
"""


def install(folder: Path, name: str, code: str, group: str = "areal_agents.envs", attribute: str = "") -> None:
    (folder / f"{name}_envs.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {name}_envs{attribute}\n")


def areal(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "areal_agents", *argv],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}, cwd=folder,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys\nsys.exit('need key')", "it called sys.exit('need key')"),
        ("raise OSError('disk on fire')", "OSError: disk on fire"),
        ("raise SystemExit(3)", "it called sys.exit(3)"),
        ("class Stop(BaseException): pass\nraise Stop('now')", "it raised Stop: now"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_broken_package_costs_only_itself(tmp_path: Path, code: str, reason: str) -> None:
    install(tmp_path, "acmegood", GOOD)
    install(tmp_path, "acmebad", NOISE + code)
    done = areal(tmp_path, "envs")
    assert done.returncode == 0
    assert "areal/Arithmetic-v0" in done.stdout
    assert "acmegood/Letters-v0" in done.stdout
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("could not load")]
    assert line.startswith("could not load acmebad = acmebad_envs (acmebad): ")
    assert reason in line
    done = areal(tmp_path, "envs", "--json")
    found = json.loads(done.stdout)
    assert {"areal/Arithmetic-v0", "acmegood/Letters-v0"} <= {e["id"] for e in found["envs"]}
    assert reason in found["load_errors"]["acmebad = acmebad_envs (acmebad)"]
    if not code.startswith("def"):
        for noise in ("print", "__stdout__", "a descriptor", "C", "a process"):
            assert f"noise of {noise}" in done.stderr


def test_json_alone_on_standard_output_of_a_check(tmp_path: Path) -> None:
    env = "from tests.letters_env import Letters\nclass Loud(Letters):\n    chance = 1.0\n"
    (tmp_path / "loud.py").write_text(NOISE + env)
    done = areal(tmp_path, "check", "loud:Loud", "--tokenizer", "none", "--json")
    assert json.loads(done.stdout)["env"] == "loud:Loud", done.stderr
    assert "noise of a process" in done.stderr


def test_an_environment_that_exits_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('need key')")
    for argv in (["check", "leaves:Env", "--tokenizer", "none"], ["train", "--env.id", "leaves:Env"]):
        done = areal(tmp_path, *argv)
        assert done.returncode == 1
        assert (
            "importing 'leaves' failed: RuntimeError(\"it called sys.exit('need key')\")" in done.stdout + done.stderr
        )
        assert "Traceback" not in done.stderr


def test_an_algorithm_that_exits_costs_only_itself(tmp_path: Path) -> None:
    install(tmp_path, "acmebad", "import sys\nsys.exit('need key')", "areal_agents.advantages", ":estimate")
    done = areal(tmp_path, "algorithms")
    assert done.returncode == 0
    assert "turn_return" in done.stdout
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("  acmebad ")]
    assert "acmebad_envs:estimate cannot be imported: RuntimeError: it called sys.exit('need key')" in line
    done = areal(tmp_path, "train", "--algorithm.advantage", "acmebad")
    assert done.returncode == 1
    assert "it called sys.exit('need key')" in done.stderr
    assert "Traceback" not in done.stderr


def test_output_is_as_before_after_a_command_with_json(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["envs", "--json"]) == 0
        read: dict[str, Any] = json.loads(capfd.readouterr().out)
        assert "areal/Arithmetic-v0" in {e["id"] for e in read["envs"]}
    print("after")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\nafter\n"
