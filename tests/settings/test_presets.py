"""Presets expand to settings that can be seen and overridden, in files, on the command line and in Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_agents import TrainConfig
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ConfigError
from areal_agents.settings import dump, load
from areal_agents.settings.catalogue import flat
from areal_agents.settings.config import RolloutConfig
from areal_agents.settings.presets import PRESETS


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_each_says_what_it_sets_and_is_the_same_by_every_way(tmp_path: Path, name: str) -> None:
    found = load(None, ["--algorithm", name])
    assert found == load(None, [f"--algorithm.preset={name}"])
    assert found == load(file(tmp_path, f'algorithm = "{name}"\n'))
    assert found == load(file(tmp_path, f'[algorithm]\npreset = "{name}"\n'))
    assert found == TrainConfig.model_validate({"algorithm": name})
    shown = file(tmp_path, dump(found))
    assert "preset" not in shown.read_text()
    assert load(shown) == found
    for key, value in flat(PRESETS[name].settings):
        section, _, parameter = key.rpartition(".")
        written = found.model_dump()
        for part in section.split("."):
            written = written[part]
        assert written[parameter] == value, key


def test_a_files_own_settings_come_on_top_of_the_preset_that_it_names(tmp_path: Path) -> None:
    text = '[algorithm]\npreset = "dapo"\nentropy = 0.01\n[algorithm.loss]\nclip_high = 0.4\n'
    found = load(file(tmp_path, text + "[rollout]\ngroups = 3\n")).algorithm
    assert found.loss == Choice("ppo", {"clip_high": 0.4})
    assert (found.entropy, found.model_dump()["overlong"]) == (0.01, "mask")
    named = load(file(tmp_path, '[algorithm]\npreset = "gspo"\n[algorithm.loss]\nkind = "ppo"\n')).algorithm
    assert named.loss == Choice("ppo"), "a kind replaces the whole table"
    parameters = load(file(tmp_path, '[algorithm]\npreset = "gspo"\n[algorithm.loss]\nclip_high = 0.1\n')).algorithm
    assert parameters.loss == Choice("gspo", {"clip_high": 0.1}), "parameters alone are those of the preset's kind"


def test_a_preset_on_the_command_line_takes_the_place_of_a_files_algorithm(tmp_path: Path) -> None:
    path = file(tmp_path, "[algorithm]\nentropy = 0.5\n[algorithm.loss]\nclip_high = 0.4\n[learner]\nlr = 1e-4\n")
    found = load(path, ["--algorithm", "areal", "--rollout.max_staleness", "2"])
    assert (found.algorithm.entropy, found.algorithm.loss, found.learner.lr) == (0.0, Choice("ppo"), 1e-4)
    assert (found.learner.minibatches, found.rollout.max_staleness) == (4, 2)


def test_dr_grpos_constant_is_the_most_tokens_of_an_episode(tmp_path: Path) -> None:
    assert load(None, ["--algorithm", "dr_grpo"]).algorithm.constant == RolloutConfig().episode_tokens == 2560
    flags = ["--algorithm", "dr_grpo", "--rollout.max_turns", "3", "--rollout.max_turn_tokens", "50"]
    assert load(None, flags).algorithm.constant == 150
    assert load(None, [*flags, "--algorithm.constant", "7"]).algorithm.constant == 7
    given = {"algorithm": "dr_grpo", "rollout": RolloutConfig(max_episode_tokens=99)}
    assert TrainConfig.model_validate(given).algorithm.constant == 99


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algorithm", "dapoo"], "algorithm = 'dapoo': no such preset; did you mean 'dapo'?"),
        (["--algorithm", "zzz"], "no such preset; there are grpo, dapo,"),
        (["--algorithm"], "--algorithm needs a value: one of grpo, dapo,"),
    ],
)
def test_an_unknown_preset_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, flags)
    assert message in str(caught.value)


def test_python_refuses_what_it_cannot_merge() -> None:
    with pytest.raises(ValueError, match="give rollout as a dictionary of what differs, not as a RolloutConfig"):
        TrainConfig.model_validate({"algorithm": "dapo", "rollout": RolloutConfig()})
