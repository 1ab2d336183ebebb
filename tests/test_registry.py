from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import pytest

from areal_agents import registry
from areal_agents.errors import ConfigError, RegistryError
from areal_agents.registry import Audit, make, register, spec, specs
from tests.test_env import Countdown

COUNTDOWN = "tests.test_env:Countdown"


pytestmark = pytest.mark.usefixtures("restored_registry")


def test_register_makes_it_here_and_in_gymnasium() -> None:
    added = register("mine/Countdown-v1", COUNTDOWN, description="d")
    assert spec("mine/Countdown-v1") is added
    assert isinstance(make("mine/Countdown-v1"), Countdown)
    assert isinstance(gymnasium.make("mine/Countdown-v1").unwrapped, Countdown)
    assert "mine/Countdown-v1" in [s.id for s in specs()]
    assert added.splits == ("train", "test")
    assert added.tasks("test")[3].id == "test-3"
    assert added.audit == Audit(chance=0.0, gold=False, expert=False)


def test_what_an_environment_needs_may_be_missing() -> None:
    assert register("mine/Plain-v0", COUNTDOWN).installed
    assert register("mine/Needs-v0", COUNTDOWN, needs="json").installed
    assert not register("mine/Lacks-v0", COUNTDOWN, needs="no_such_package").installed


def test_what_lacks_its_package_or_its_sandbox_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert register("mine/Plain-v0", COUNTDOWN).lacks() == ""
    lacks = register("mine/Lacks-v0", COUNTDOWN, needs="no_such_package").lacks()
    assert lacks == "it needs no_such_package, which is not installed"
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    where = register("mine/Beside-v0", COUNTDOWN, sandbox="docker").lacks()
    assert where.startswith("sandbox 'docker' is unavailable: ")
    assert re.search(r"Start it \(systemctl start docker\)|pip install 'areal-agents\[docker\]'", where)


class ByLevel(Countdown):
    chance = {None: 0.5, 0.0: 0.8, 0.5: 0.4, 1.0: 0.0}  # noqa: RUF012  as an author writes it


def test_chance_is_that_of_the_difficulty() -> None:
    plain = spec("tests.test_registry:ByLevel")
    said = {level: replace(plain, difficulty=level).audit.chance for level in (None, 0.0, 0.25, 0.5, 0.75, 1.0)}
    assert said == {None: 0.5, 0.0: 0.8, 0.25: pytest.approx(0.6), 0.5: 0.4, 0.75: 0.2, 1.0: 0.0}


class FewLevels(Countdown):
    chance = {0.25: 0.8, 0.5: 0.4}  # noqa: RUF012


@pytest.mark.parametrize("level", [None, 0.0, 0.6])
def test_a_level_without_chance_is_refused(level: float | None) -> None:
    with pytest.raises(RegistryError, match=rf"chance names no level {level}: it has 0\.25, 0\.5"):
        _ = replace(spec("tests.test_registry:FewLevels"), difficulty=level).audit


def test_registering_again() -> None:
    first = register("mine/Again-v0", COUNTDOWN)
    assert register("mine/Again-v0", COUNTDOWN) == first
    with pytest.raises(RegistryError, match=r"mine/Again-v0 is registered already, as 'tests.test_env:Countdown'"):
        register("mine/Again-v0", "tests.test_env:Empty")


@pytest.mark.parametrize("id", ["Countdown-v0", "mine/Countdown", "mine/a/b-v0", "mi ne/C-v0", ""])
def test_bad_ids_are_refused(id: str) -> None:
    with pytest.raises(RegistryError, match=r'must read "namespace/Name-v0"'):
        register(id, COUNTDOWN)


@pytest.mark.parametrize(
    "entry_point", ["tests.test_env", "tests/test_env:Countdown", "tests.test_env:", ":C", "a:b:c"]
)
def test_bad_entry_points_are_refused(entry_point: str) -> None:
    with pytest.raises(RegistryError, match=r'must read "package\.module:Class"'):
        register("mine/Bad-v0", entry_point)


def test_module_and_class_work_without_registering() -> None:
    found = spec(COUNTDOWN)
    assert (found.id, found.entry_point) == (COUNTDOWN, COUNTDOWN)
    assert isinstance(found.make(), Countdown)


def test_an_unknown_id_is_answered_with_a_suggestion() -> None:
    expected = (
        r"unknown environment 'areal/Aritmetic-v0' \(did you mean 'areal/Arithmetic-v0'\?\); "
        r"`areal-agents envs` lists what there is"
    )
    with pytest.raises(RegistryError, match=expected):
        spec("areal/Aritmetic-v0")
    with pytest.raises(RegistryError, match=r"did you mean 'areal/Arithmetic-v0'\?"):
        spec("arithmetic")
    with pytest.raises(RegistryError, match="unknown environment 'q/Zzzzzzzzzzzzzz-v0'; `areal"):
        spec("q/Zzzzzzzzzzzzzz-v0")


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("no_such_module:C", "importing 'no_such_module' failed: ModuleNotFoundError"),
        ("tests.test_env:Missing", "module 'tests.test_env' has no class 'Missing'"),
        ("tests.test_env:make_task", "is no AgentEnv"),
        ("gymnasium:Env", "is no AgentEnv"),
    ],
)
def test_what_cannot_be_resolved_says_why(entry_point: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        spec(entry_point).env_class()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(RegistryError, match=r"Countdown\(colour\) failed: .*unexpected keyword argument 'colour'"):
        make(COUNTDOWN, colour="red")


def test_kwargs_of_make_override_those_registered() -> None:
    added = register("mine/Sums-v0", "tests.test_toolenv:Sums", kwargs={"max_turns": 5, "sandbox": None})
    assert getattr(added.make(), "max_turns") == 5  # noqa: B009  AgentEnv has no such attribute
    assert getattr(added.make(max_turns=2), "max_turns") == 2  # noqa: B009
    assert getattr(gymnasium.make("mine/Sums-v0").unwrapped, "max_turns") == 5  # noqa: B009


def test_splits_and_difficulty_are_checked() -> None:
    added = register("mine/Splits-v0", COUNTDOWN, splits=("train", "validation"))
    assert added.splits == ("train", "validation")
    with pytest.raises(
        RegistryError, match=r"no split 'valid' \(did you mean 'validation'\?\); its splits are train, v"
    ):
        added.tasks("valid")
    with pytest.raises(RegistryError, match="no split 'test'"):
        added.tasks("test")
    for difficulty in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
            added.tasks("train", difficulty=difficulty)


def distribution(folder: Path, namespace: str, code: str) -> None:
    """An installed package ``<namespace>_envs`` with an entry point."""
    package = f"{namespace}_envs"
    (folder / f"{package}.py").write_text(code)
    info = folder / f"{namespace}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {namespace}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[areal_agents.envs]\n{namespace} = {package}\n")


def test_entry_points_load_at_the_first_use_of_their_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "acme", f"import areal_agents\nareal_agents.register('acme/Shop-v0', {COUNTDOWN!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec("areal/Arithmetic-v0")
    assert "acme_envs" not in sys.modules
    assert spec("acme/Shop-v0").env_class() is Countdown
    assert "acme/Shop-v0" in [s.id for s in specs()]


def test_a_broken_package_is_reported_and_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "acmebad", "raise OSError('disk on fire')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "areal/Arithmetic-v0" in [s.id for s in specs()]
    [(label, error)] = registry.load_errors.items()
    assert label == "acmebad = acmebad_envs (acmebad)"
    assert isinstance(error, OSError)
    with (
        pytest.warns(UserWarning, match=r"environments of acmebad = acmebad_envs \(acmebad\) could not be loaded"),
        pytest.raises(RegistryError, match="unknown environment 'acmebad/Shop-v0'"),
    ):
        spec("acmebad/Shop-v0")


def test_a_lookup_imports_no_environment() -> None:
    code = (
        "import sys, areal_agents; areal_agents.spec('areal/Arithmetic-v0'); "
        "loaded = {'areal_agents.envs.arithmetic', 'torch', 'transformers', 'sympy'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
