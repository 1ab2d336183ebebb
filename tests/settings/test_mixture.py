"""Several environments in a file, ``[[env]]``, and the settings of a curriculum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from areal_agents import settings
from areal_agents.errors import ConfigError
from areal_agents.settings.config import EnvConfig, MixedEnv, TrainConfig
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.settings.differences import differences, plain_key, values
from areal_agents.settings.evaluation import load_evaluation
from areal_agents.settings.mixture import label_of

TWO = """
steps = 3

[[env]]
id = "areal/Arithmetic-v0"
weight = 2
difficulty = "none"
kwargs = { max_turns = 3, path = "none" }

[[env]]
id = "areal/Hanoi-v0"
difficulty = 0.3
step_timeout = 90
"""


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    (tmp_path / "a.toml").write_text(text)
    return settings.load(tmp_path / "a.toml", overrides)


def test_tables_are_read_and_written(tmp_path: Path) -> None:
    c = load(tmp_path, TWO, "--learner.lr", "2e-6")
    assert c.mixture == (
        MixedEnv(id="areal/Arithmetic-v0", weight=2.0, kwargs={"max_turns": 3, "path": None}, label="Arithmetic"),
        MixedEnv(id="areal/Hanoi-v0", difficulty=0.3, step_timeout=90.0, label="Hanoi"),
    )
    assert (c.env, c.learner.lr) == (EnvConfig(), 2e-6)
    again = load(tmp_path, settings.dump(c))
    assert again == c
    assert settings.dump(again) == settings.dump(c)
    assert "\n[env]\n" not in settings.dump(c)
    assert "[[env]]" not in settings.dump(TrainConfig())
    assert TrainConfig.model_validate(c.model_dump()) == c


def test_python_takes_a_list_of_environments() -> None:
    c = TrainConfig.model_validate({"env": [{"id": "a/B-v0"}, {"id": "m.n:C", "weight": 3, "label": "c"}]})
    assert [(e.label, e.weight) for e in c.mixture] == [("B", 1.0), ("c", 3.0)]
    assert TrainConfig(mixture=(MixedEnv(id="a/B-v0"),)).mixture[0].label == "B"
    assert TrainConfig.model_validate({"env": {"id": "a/B-v0"}}).mixture == ()


@pytest.mark.parametrize(
    ("id", "label"),
    [("areal/Arithmetic-v0", "Arithmetic"), ("my_envs:Scales", "Scales"), ("a.b:C", "C"), ("x/A-v0-v12", "A-v0")],
)
def test_an_environment_is_called_by_its_name(id: str, label: str) -> None:
    assert label_of(id) == label


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight = 2", "weight = 0", r"\[\[env\]\] number 1: weight = 0: .* greater than 0"),
        ("weight = 2", "weight = -1.5", r"number 1: weight = -1\.5"),
        ("weight = 2", "weight = nan", r"number 1: weight = nan: .*finite"),
        ("weight = 2", "weight = inf", r"number 1: weight = inf: .*finite"),
        ("weight = 2", "weight = true", r"env\.weight = True \(\[\[env\]\] number 1, .*a\.toml\): expected a number"),
        ("weight = 2", "wieght = 2", r"unknown setting env\.wieght \(\[\[env\]\] number 1, .*: did you mean weight\?"),
        ("weight = 2", 'label = "Hanoi"', r"number 2 has the label 'Hanoi', as number 1 has: give one of them a label"),
        ("Arithmetic", "Hanoi", "number 2 has the label 'Hanoi', as number 1 has"),
        ("weight = 2", 'label = "a.b"', r"label = 'a\.b' must be letters"),
        ("weight = 2", 'label = "a/b"', "must be letters"),
        ("weight = 2", 'label = "split"', "is the name of a setting"),
        ('id = "areal/Hanoi-v0"', "", "number 2: id: Field required"),
        ("difficulty = 0.3", 'difficulty = "easy"', "number 2: difficulty = 'easy'"),
        ("difficulty = 0.3", "kwargs = 3", "number 2: kwargs = 3"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, TWO.replace(old, new))


def test_one_environment_and_several_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--env\.difficulty: .*a\.toml has several environments \(\[\[env\]\]\)"):
        load(tmp_path, TWO, "--env.difficulty", "0.2")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path, TWO + '\n[env]\nid = "areal/Nim-v0"\n')
    for text in ("env = []", 'env = ["areal/Nim-v0"]'):
        with pytest.raises(ConfigError, match=r"env (= \[\]|has 'areal/Nim-v0') \("):
            load(tmp_path, text)
    with pytest.raises(ConfigError, match="unknown setting mixture"):
        load(tmp_path, "", "--mixture", "[]")
    one: list[dict[str, Any]] = [{"id": "a/B-v0"}]
    trees: list[dict[str, Any]] = [{"env": []}, {"env": one, "mixture": one}, {"env": {"id": "x:Y"}, "mixture": one}]
    for tree in trees:
        with pytest.raises(ValidationError, match=r"env is an empty list|both given"):
            TrainConfig.model_validate(tree)


def test_differences_are_named_by_label(tmp_path: Path) -> None:
    old, new = load(tmp_path, TWO), load(tmp_path, TWO.replace("weight = 2", "weight = 3"))
    assert differences(old, new) == {"env.Arithmetic.weight": (2.0, 3.0)}
    assert values(old)["env.Hanoi.kwargs"] == {}
    assert "env.id" not in values(old)
    assert differences(old, TrainConfig(steps=3))["env.labels"] == (["Arithmetic", "Hanoi"], None)
    assert [plain_key(k) for k in ("env.Hanoi.sandbox", "env.id", "learner.lora.rank")] == [
        "env.sandbox", "env.id", "learner.lora.rank",
    ]  # fmt: skip


def test_an_evaluation_has_no_use_for_a_mixture_and_a_curriculum(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(TWO + '\n[curriculum]\nkind = "level"\n')
    c, unused = load_evaluation(tmp_path / "a.toml", ["--env.id", "areal/Nim-v0", "--model", "m"])
    assert (c.env.id, c.mixture, c.curriculum) == ("areal/Nim-v0", (), CurriculumConfig())
    assert sorted(unused) == ["curriculum.kind", "env", "steps"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "levels"}, "'levels': no such curriculum; did you mean 'level'"),
        ({"by": "level"}, "curriculum.by is a setting of curriculum.kind = 'learnability', and kind is 'none'"),
        ({"kind": "level", "explore": 0.1}, "curriculum.explore is a setting of curriculum.kind = 'learnability'"),
        ({"kind": "learnability", "window": 8}, "curriculum.window is a setting of curriculum.kind = 'level'"),
        ({"kind": "learnability", "level_step": 0.2}, "curriculum.level_step is the distance between levels"),
        ({"kind": "level", "low": 0.7}, r"curriculum\.low = 0\.7 must be under curriculum\.high = 0\.7"),
        ({"pass_rates": "f", "min": 0.6, "max": 0.5}, r"curriculum\.min = 0\.6 must be at most"),
        ({"min": 0.2}, "curriculum.min filters by curriculum.pass_rates, which is empty"),
        ({"missing": "keep"}, "curriculum.missing filters by"),
        ({"kind": "level", "pass_rates": "f"}, "of one difficulty"),
        ({"kind": "learnability", "by": "level", "pass_rates": "f"}, "of one difficulty"),
        ({"passes": 0.5}, "curriculum.passes is read by a curriculum"),
        ({"kind": "level", "passes": 0.0}, "greater than 0"),
        ({"kind": "level", "level_step": 0.0}, "greater than or equal to 0.001"),
        ({"kind": "learnability", "prior": [0.0, 1.0]}, "greater than 0"),
        ({"kind": "learnability", "explore": 1.5}, "less than or equal to 1"),
        ({"kind": "learnability", "explore": 0.0}, "plays the tasks of the first batches for ever"),
        ({"kind": "level", "level_step": 1e-10}, "greater than or equal to 0.001"),
    ],
)
def test_a_curriculum_reads_its_own_settings(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"curriculum": tree})


def test_curricula_that_are_taken() -> None:
    for tree, leveled in (
        ({}, False),
        ({"kind": "level", "start": 0.0, "level_step": 0.2, "low": 0.2, "high": 0.8, "window": 32}, True),
        ({"kind": "learnability", "explore": 0.1, "pass_rates": "f", "min": 0.2}, False),
        ({"kind": "learnability", "by": "level", "level_step": 0.5, "prior": [2, 3], "half_life": 4}, True),
        ({"pass_rates": "f", "missing": "keep"}, False),
    ):
        assert CurriculumConfig.model_validate(tree).leveled is leveled
