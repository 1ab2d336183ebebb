"""``areal-agents init``: names, the folder, and the generated package's own tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import areal_agents
from areal_agents import settings
from areal_agents.cli.main import main
from areal_agents.cli.scaffold import KINDS, PLACEHOLDER, init
from areal_agents.errors import ConfigError

FILES = {
    ".gitignore", "README.md", "pyproject.toml", "train.toml", "acme_env/__init__.py", "acme_env/boxes.py",
    "acme_env/env.py", "acme_env/rubric.py", "acme_env/tasks.py", "tests/test_acme_env.py",
}  # fmt: skip


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )


def test_the_files_and_their_names(tmp_path: Path) -> None:
    folder = init("acme_env", tmp_path / "new" / "place")
    assert folder == tmp_path / "new" / "place" / "acme_env"
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == FILES
    assert [p.name for p in folder.parent.iterdir()] == ["acme_env"]  # nothing of the work is left
    for path in folder.rglob("*"):
        assert PLACEHOLDER not in path.name
        assert path.is_dir() or PLACEHOLDER not in path.read_text()
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "acme_env"
    assert project["project"]["entry-points"]["areal_agents.envs"] == {"acme_env": "acme_env"}
    assert project["tool"]["setuptools"]["packages"] == ["acme_env"]
    assert settings.load(folder / "train.toml").env.id == "acme_env/Boxes-v0"


GAME_FILES = {
    ".gitignore", "README.md", "pyproject.toml", "train.toml", "acme_env/__init__.py", "acme_env/env.py",
    "acme_env/tasks.py", "acme_env/world.py", "tests/test_acme_env.py",
}  # fmt: skip


DATASET_FILES = {
    ".gitignore", "README.md", "pyproject.toml", "train.toml", "acme_env/__init__.py", "acme_env/env.py",
    "acme_env/questions.py", "acme_env/measures.py", "acme_env/rubric.py", "acme_env/data/__init__.py",
    "acme_env/data/train.jsonl", "acme_env/data/test.jsonl", "acme_env/suites/__init__.py",
    "acme_env/suites/acme_env.toml", "tests/test_acme_env.py",
}  # fmt: skip
GYMNASIUM_FILES = {
    ".gitignore", "README.md", "pyproject.toml", "train.toml", "acme_env/__init__.py", "acme_env/env.py",
    "acme_env/game.py", "tests/test_acme_env.py",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "there"), [("dataset", DATASET_FILES), ("gymnasium", GYMNASIUM_FILES)])
def test_other_kinds(kind: str, there: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "acme_env", "--kind", kind, "--into", str(tmp_path)]) == 0
    out, folder, template = capsys.readouterr().out, tmp_path / "acme_env", KINDS[kind]  # type: ignore[index]
    assert f"  areal-agents check acme_env/{template.env}\n" in out
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == there
    for path in folder.rglob("*"):
        assert template.placeholder not in path.name
        assert path.is_dir() or template.placeholder not in path.read_text()
    assert settings.load(folder / "train.toml").env.id == f"acme_env/{template.env}"
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    packages = {p.parent.relative_to(folder).as_posix().replace("/", ".") for p in folder.glob("acme_env/**/*.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_a_game(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "acme_env", "--kind", "game", "--into", str(tmp_path)]) == 0
    out, folder = capsys.readouterr().out, tmp_path / "acme_env"
    assert "  areal-agents check acme_env/Cellar-v0\n" in out
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == GAME_FILES
    for path in folder.rglob("*"):
        assert "my_game" not in path.name
        assert path.is_dir() or "my_game" not in path.read_text()
    assert settings.load(folder / "train.toml").env.id == "acme_env/Cellar-v0"


def checked(
    folder: Path, env: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What the command that checks an environment prints, in the package's folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    assert main(["check", f"acme_env.env:{env}", "--tokenizer", str(model)]) == 0, capsys.readouterr()
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("restored_registry")
def test_a_games_tests_pass_and_so_does_its_check(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = init("acme_env", tmp_path, "game")
    # What is deselected runs the check, as the command does below.
    without = ("-k", "not keeps_the_contract")
    done = run(folder, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", *without)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
    said = checked(folder, "Cellar", smollm2, monkeypatch, capsys)
    assert not re.findall("FAILED|unaudited", said)
    assert "4 expert episodes (up to 1.1) earn 1" in said


@pytest.mark.slow
def test_its_tests_pass_and_fail_with_a_broken_reward(tmp_path: Path) -> None:
    folder = init("acme_env", tmp_path)
    done = run(folder, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout
    rubric = folder / "acme_env" / "rubric.py"
    text = rubric.read_text()
    assert text.count("PARTIAL_CREDIT * share") == 1
    rubric.write_text(text.replace("PARTIAL_CREDIT * share", "0.3"))  # pays whoever says anything
    done = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 1
    assert "test_the_environment_keeps_the_contract" in done.stdout
    assert "the policy 'empty' earns 0.300 on 64 tasks" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("restored_registry")
def test_the_check_of_the_command_line_passes(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = checked(init("acme_env", tmp_path), "Boxes", smollm2, monkeypatch, capsys)
    assert not re.findall("FAILED|unaudited", said)
    assert re.findall(r"skipped +(\w+)", said) == ["golds"]  # the rubric is a function of the package's own
    assert "16 gold answers and 4 expert episodes earn 1" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-env", "'my-env' is no package name: .* for example 'my_env'"),
        ("2d", "for example 'd'"),
        ("_hidden", "for example 'hidden'"),
        ("ends_", "for example 'ends'"),
        ("a/b", "is no package name"),
        ("../up", "is no package name"),
        ("naïve", "is no package name"),
        ("", "'' is no package name: use letters, digits and inner underscores, a letter first$"),
        ("class", "is a keyword of Python"),
        ("x" * 41, "has 41 characters: at most 40"),
        ("json", "is a module of Python's standard library"),
        ("torch", r"torch/__init__.py is imported by that name\. Choose another, for example 'torch_env'"),
        ("areal_agents", "is an importable module"),
        ("tests", "it is the folder of the tests"),
        ("areal", "the namespace of the built-in environments"),
    ],
)
def test_names_that_cannot_be_used(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(ConfigError, match=message):
        init(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_namespace_that_an_installed_package_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[areal_agents.envs]\nacme = acme_environments\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ConfigError, match="an installed package registers environments as acme/…"):
        init("acme", tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    taken = tmp_path / "acme_env"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=re.escape(f"{taken} exists already: choose another name, another --into")):
        init("acme_env", tmp_path)
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        init("dangling", tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*; choose another --into"):
        init("acme_env", tmp_path / "file")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "acme_env", "--into", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"  cd {tmp_path / 'acme_env'}\n" in out
    assert "  acme_env/rubric.py\n" in out
    assert "  areal-agents check acme_env/Boxes-v0\n" in out
    assert main(["init", "acme_env", "--into", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'acme_env'} exists already")


def test_every_command_of_the_generated_readme_exists() -> None:
    """Their options too: each is parsed, none is run (tests/test_user_path.py runs them)."""
    from areal_agents.cli.main import _parse

    named = {}
    for kind, template in KINDS.items():
        readme = (template.folder / "README.md").read_text()
        commands = re.findall(r"^    areal-agents ([^#\n]+)", readme, re.MULTILINE)
        named[kind] = [command.split()[0] for command in commands]
        for command in commands:
            parsed, _ = _parse(command.split())
            assert type(parsed).__name__.lower() == command.split()[0]
    assert named == {
        "tool": ["check", "train", "eval", "eval", "replay", "replay", "rescore", "train"],
        "game": ["check", "train", "eval", "train"],
        "dataset": ["check", "train", "eval", "rescore"],
        "gymnasium": ["check", "train", "eval"],
    }


def test_the_template_is_shipped() -> None:
    """pyproject.toml's patterns find every file that ``init`` copies."""
    root = Path(__file__).resolve().parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "areal_agents.cli"
    ]
    package = root / "areal_agents" / "cli"
    shipped = {p for pattern in patterns for p in package.glob(pattern)}
    assert areal_agents.__file__ is not None
    everything = {"tool": FILES, "game": GAME_FILES, "dataset": DATASET_FILES, "gymnasium": GYMNASIUM_FILES}
    assert set(KINDS) == set(everything)
    for kind, files in everything.items():
        template = KINDS[kind]  # type: ignore[index]
        there = {p.relative_to(template.folder).as_posix() for p in shipped if p.is_relative_to(template.folder)}
        assert {place.replace(template.placeholder, "acme_env") for place in there} == files
