from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import areal_agents

ROOT = Path(__file__).resolve().parents[1]
COLLECTIONS = ("envs", "tools", "sandboxes")
PUBLIC = {
    "AgentEnv", "AssistantMessage", "ChatSpace", "EnvSpec", "Episode", "Gate", "GroupReward", "LazyTasks", "Message",
    "Reward", "Sandbox", "SandboxBackend", "SandboxSpec", "Task", "TextProcessEnv", "TextSpace", "ToolCall", "ToolEnv",
    "ToolError", "ToolResult", "ToolSpec", "TrainConfig", "Verdict", "WeightedSum", "boxed", "boxed_number", "evaluate",
    "make", "number", "register", "reward_function", "sole_boxed", "spec", "specs", "tool", "train",
}  # fmt: skip


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_the_public_names() -> None:
    assert set(areal_agents.__all__) == PUBLIC
    assert len(areal_agents.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(areal_agents, name) is not None
    assert set(dir(areal_agents)) >= PUBLIC
    with pytest.raises(AttributeError, match="module 'areal_agents' has no attribute 'agent'"):
        areal_agents.agent  # noqa: B018


def test_each_name_comes_from_its_home() -> None:
    for module, names in areal_agents._HOMES.items():
        for name in names:
            assert getattr(areal_agents, name) is getattr(importlib.import_module(module), name)


def test_the_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys, areal_agents; heavy = {'torch', 'transformers', 'sympy', 'areal_agents.envs.arithmetic'}; "
        "assert not heavy & set(sys.modules); areal_agents.ToolEnv; areal_agents.make; "
        "assert not heavy & set(sys.modules); print(sorted(areal_agents.__all__)[0])"
    )
    done = python(code, tmp_path)
    assert (done.stderr, done.stdout.strip()) == ("", "AgentEnv")


def test_tool_stays_the_decorator(tmp_path: Path) -> None:
    code = (
        "import areal_agents.engine, areal_agents.tool; from areal_agents import tool; "
        "from areal_agents.tool import ToolSpec; assert callable(tool) and areal_agents.tool is tool"
    )
    assert python(code, tmp_path).stderr == ""


def test_packages_listed_are_the_folders_there_are() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"areal_agents"}
    for top, at in [("areal_agents", ROOT / "areal_agents"), *((f"areal_agents.{c}", ROOT / c) for c in COLLECTIONS)]:
        folders.add(top)
        for init in at.rglob("*/__init__.py"):  # links are not followed
            if "templates" not in init.parts:
                folders.add(".".join([top, *init.parent.relative_to(at).parts]))
    folders.add("areal_agents.configs")  # data only
    assert set(settings["packages"]) == folders
    homes = {name: ROOT / folder for name, folder in settings["package-dir"].items()}
    assert set(homes) == {"areal_agents", "areal_agents.configs", *(f"areal_agents.{c}" for c in COLLECTIONS)}
    assert all(home.is_dir() for home in homes.values())


@pytest.mark.parametrize("name", COLLECTIONS)
def test_the_links_inside_the_package(name: str) -> None:
    link = ROOT / "areal_agents" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    module = importlib.import_module(f"areal_agents.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


@pytest.mark.parametrize("name", COLLECTIONS)
def test_the_bare_names_are_refused(name: str) -> None:
    body = ast.parse((ROOT / name / "__init__.py").read_text()).body
    guard = body[1] if isinstance(body[0], ast.Expr) else body[0]  # nothing but a docstring comes before it
    assert ast.unparse(guard).startswith(f"if __name__ != 'areal_agents.{name}':")
    done = python(f"import {name}", ROOT)
    assert f"ImportError: import areal_agents.{name}, not {name}" in done.stderr


def test_a_users_own_folders_do_not_collide(tmp_path: Path) -> None:
    for name in COLLECTIONS:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    code = (
        "import tools, envs, sandboxes, areal_agents.tools.calculator as c; "
        "assert tools.MINE and envs.MINE and sandboxes.MINE; print(c.evaluate('1+1'))"
    )
    done = python(code, tmp_path)
    assert (done.stderr, done.stdout.strip()) == ("", "2")
