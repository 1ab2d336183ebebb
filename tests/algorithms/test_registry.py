"""Algorithms by name: ours, those of an installed package, ``module:function``; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents import settings
from areal_agents.algorithms import advantages, losses, offpolicy
from areal_agents.algorithms.advantages import EpisodeRewards, estimate
from areal_agents.algorithms.registry import ADVANTAGES, CORRECTIONS, LOSSES, REGISTRIES, Choice
from areal_agents.errors import ConfigError
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.settings.describe import algorithms_text

PACKAGE = """
from typing import Annotated

import torch
from pydantic import Field

from areal_agents.algorithms.losses import LossTerms
from areal_agents.algorithms.offpolicy import Correction

def last_turn(group, *, scale: Annotated[float, Field(gt=0)] = 1.0, shift: float):
    return [torch.tensor([0.0] * (len(e.rewards_K) - 1) + [scale * e.rewards_K[-1] + shift]) for e in group]

def linear(logprobs_T, old_logprobs_T, advantages_T, *, factor: float = 1.0):
    return LossTerms(-factor * advantages_T * (logprobs_T - old_logprobs_T), torch.zeros_like(advantages_T).bool())

def both(proximal_T, logprobs_T):
    return Correction(torch.exp(proximal_T - logprobs_T.detach()), torch.ones_like(proximal_T).bool())

def one_too_many(group):
    return [torch.zeros(len(e.rewards_K) + 1) for e in group]

def untyped(group, *, gamma=1.0):
    return []

def misnamed(rewards):
    return []
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that brings an estimator, a loss and a correction, and a second one that is broken."""
    install(tmp_path, "acme_algo", PACKAGE, {
        "areal_agents.advantages": "last_turn = acme_algo:last_turn\nlong = acme_algo:one_too_many\n"
        "untyped = acme_algo:untyped\nmisnamed = acme_algo:misnamed\n",
        "areal_agents.losses": "linear = acme_algo:linear\n",
        "areal_agents.corrections": "both = acme_algo:both\n",
    })  # fmt: skip
    install(tmp_path, "acme_broken", "raise OSError('disk on fire')", {
        "areal_agents.advantages": "burning = acme_broken:f\n",
    })  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_algo", raising=False)


def install(folder: Path, name: str, code: str, groups: dict[str, str]) -> None:
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{lines}" for group, lines in groups.items()))


def test_ours() -> None:
    assert ADVANTAGES.names() == ["turn_return", "grpo"]
    assert ADVANTAGES.function("grpo") is advantages.grpo
    assert ADVANTAGES.options(Choice("turn_return")) == {"gamma": 1.0}
    assert LOSSES.function("ppo") is losses.ppo
    assert LOSSES.options(Choice("ppo")) == {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
    assert CORRECTIONS.function("bypass") is offpolicy.bypass
    assert CORRECTIONS.takes(Choice("bypass")) == ("logprobs_T", "behaviour_T")
    assert CORRECTIONS.takes(Choice("decoupled")) == ("proximal_T", "behaviour_T")
    assert CORRECTIONS.options(Choice("decoupled")) == {"truncate": None, "token_mask": (0.5, 5.0)}


def test_every_parameter_of_ours_is_explained_and_has_a_default() -> None:
    for registry in REGISTRIES.values():
        for kind in registry.names():
            for name, info in registry.parameters(kind).model_fields.items():
                assert info.description, f"{registry.key}.{name} of {kind}"
                assert not info.is_required()


def test_choosing_ours_imports_nothing() -> None:
    code = (
        "import sys; from areal_agents import settings; "
        "settings.load(None, ['--algorithm.advantage', 'grpo']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == "False\n"


def test_equal_choices_are_equal_whether_a_default_was_said_or_not() -> None:
    said = settings.load(None, ["--algorithm.advantage.gamma", "1", "--algorithm.loss.clip_high", "0.3"])
    assert said.algorithm == AlgorithmConfig(loss=Choice("ppo", {"clip_high": 0.3}))


def test_a_name_takes_the_place_of_the_whole_table_and_a_kind_does_not(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[algorithm.advantage]\nkind = "grpo"\nnormalize = false\n')
    assert settings.load(file).algorithm.advantage == Choice("grpo", {"normalize": False})
    assert settings.load(file, ["--algorithm.advantage", "turn_return"]).algorithm.advantage == Choice("turn_return")
    with pytest.raises(ConfigError, match="normalize belongs to kind = 'grpo'"):
        settings.load(file, ["--algorithm.advantage.kind", "turn_return"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--algorithm.advantage", "gae"], r"algorithm.advantage.kind = 'gae': no such advantage estimator; there are "
         r"turn_return, grpo .* \(--algorithm.advantage\)"),
        (["--algorithm.advantage=gropo"], r"did you mean 'grpo'\? \(or give module:function\)"),
        (["--algorithm.advantage.gama", "1"], r"gama is no parameter of algorithm.advantage.kind = 'turn_return', "
         r"which has gamma: did you mean gamma\?"),
        (["--algorithm.advantage.gamma", "2"], r"algorithm.advantage.gamma = 2 \(--algorithm.advantage.gamma\): "
         r"expected a number, at least 0, at most 1"),
        (["--algorithm.advantage.gamma", "true"], r"algorithm.advantage.gamma = True"),
        (["--algorithm.advantage.gamma"], r"needs a value: a number"),
        (["--algorithm.advantage"], r"--algorithm.advantage needs a value: one of 'turn_return', 'grpo'"),
        (["--algorithm.correction.token_mask", "[2, 3]"], r"the bounds \[2.0, 3.0\] must enclose 1"),
        (["--algorithm.loss.dual_clip", "1"], r"algorithm.loss.dual_clip = 1 .*more than 1"),
        (["--algorithm.advantage", "math:sin"], r"takes \(x\): an algorithm of algorithm.advantage takes \(group\)"),
        (["--algorithm.advantage", "math:nothing"], r"math:nothing cannot be imported: AttributeError"),
        (["--algorithm.advantage", "nowhere:f"], r"nowhere:f cannot be imported: ModuleNotFoundError"),
        (["--algorithm.advantage", "math:pi"], r"is 3.14.*: an algorithm is a function"),
    ],
)  # fmt: skip
def test_refused_when_the_settings_are_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(None, overrides)


@pytest.mark.usefixtures("package")
def test_a_package_brings_its_own() -> None:
    assert ADVANTAGES.names() == ["turn_return", "grpo", "burning", "last_turn", "long", "misnamed", "untyped"]
    c = settings.load(None, [
        "--algorithm.advantage", "last_turn", "--algorithm.advantage.shift", "0.5", "--algorithm.advantage.scale", "2",
        "--algorithm.loss", "linear", "--algorithm.correction", "both",
    ]).algorithm  # fmt: skip
    assert c.advantage == Choice("last_turn", {"scale": 2.0, "shift": 0.5})
    found = estimate([EpisodeRewards((1.0, 3.0)), EpisodeRewards((1.0,))], c.advantage)
    assert [t.tolist() for t in found] == [[0.0, 6.5], [2.5]]
    assert CORRECTIONS.takes(c.correction) == ("proximal_T", "logprobs_T")
    assert "--algorithm.advantage.shift  (a number)" in algorithms_text()
    assert "disk on fire" in algorithms_text()


def test_the_list_of_algorithms() -> None:
    text = algorithms_text()
    assert "[algorithm.loss]\n  ppo          Compute the clipped PPO loss" in text
    assert "    --algorithm.correction.token_mask  (a list of 2 numbers, or none; default: [0.5, 5.0])\n" in text
    assert "2402.03300" not in text
    one = algorithms_text("grpo")
    assert one.startswith("[algorithm.advantage]\n  grpo\n  Compare each episode")
    assert "2402.03300" in one
    assert "turn_return" not in one
    with pytest.raises(ConfigError, match="there is no algorithm 'gae': there are turn_return, grpo, ppo, bypass"):
        algorithms_text("gae")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("last_turn", "algorithm.advantage.shift is missing: this algorithm has no default for it"),
        ("burning", "acme_broken:f cannot be imported: OSError: disk on fire"),
        ("untyped", "its parameter 'gamma' needs a type hint"),
        ("misnamed", r"takes \(rewards\): an algorithm of algorithm.advantage takes \(group\)"),
    ],
)
def test_a_packages_mistakes_are_told_when_the_settings_are_read(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(None, ["--algorithm.advantage", kind])


@pytest.mark.usefixtures("package")
def test_a_name_that_two_packages_use_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "acme_twin", PACKAGE, {"areal_agents.losses": "linear = acme_twin:linear\n"})
    with pytest.raises(ConfigError, match="several packages use that name: acme_algo:linear, acme_twin:linear"):
        settings.load(None, ["--algorithm.loss", "linear"])


@pytest.mark.usefixtures("package")
def test_ours_keep_their_names(tmp_path: Path) -> None:
    install(tmp_path, "acme_thief", PACKAGE, {"areal_agents.advantages": "grpo = acme_thief:last_turn\n"})
    with pytest.raises(ConfigError, match="acme_thief:last_turn uses a name of ours"):
        settings.load(None, ["--algorithm.advantage", "grpo"])


@pytest.mark.usefixtures("package")
def test_advantages_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"long returned advantages of shapes \[\(2,\)\]: expected .* \[\(1,\)\]"):
        estimate([EpisodeRewards((1.0,))], Choice("long"))


@pytest.mark.parametrize("value", [3, None, [1]])
def test_what_is_no_choice_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"(algorithm|advantage|Choice)"):
        AlgorithmConfig(advantage=value)


def test_bound_parameters_reach_the_function() -> None:
    one = torch.zeros(1)
    loss = LOSSES.bound(Choice("ppo", {"clip_high": 0.5}))(torch.ones(1), one, torch.ones(1))
    assert loss.loss_T.tolist() == [-1.5]
