from __future__ import annotations

import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ConfigError
from areal_agents.settings import dump, load, shipped, split_overrides
from areal_agents.settings.config import TrainConfig


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults() -> None:
    assert load(None) == TrainConfig()


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "steps = 3\n[learner]\nlr = 1e-5\nweight_decay = 0.1\n[env]\nid = 'a/B-v0'\n")
    config = load(path, ["--learner.lr", "2e-6", "--rollout.mode=sync", "--out", "runs/a b"])
    assert (config.steps, config.learner.lr, config.learner.weight_decay) == (3, 2e-6, 0.1)
    assert (config.env.id, config.rollout.mode, config.out) == ("a/B-v0", "sync", Path("runs/a b"))


HOW_TO_WRITE = (
    "expected a table; write --env.kwargs '{\"NAME\": 2}' (JSON), --env.kwargs '{NAME = 2}' (TOML), or "
    "--env.kwargs.NAME 2"
)


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["--learner.betas", "[0.5, 0.75]"], "learner.betas", (0.5, 0.75)),
        (["--env.difficulty", "none"], "env.difficulty", None),
        (["--track.tensorboard", "false"], "track.tensorboard", False),
        (["--track.tensorboard=False"], "track.tensorboard", False),
        (["--track.tensorboard"], "track.tensorboard", True),
        (["--env.difficulty", "0.5", "--env.difficulty", "none"], "env.difficulty", None),
        (["--learner.grad-clip", "0.5"], "learner.grad_clip", 0.5),
        (["--model.path", "123"], "model.path", "123"),
        (["--model.path", "'a b'"], "model.path", "a b"),
        (["--model.path", "none"], "model.path", "none"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--engine.kv_tokens", "1_000"], "engine.kv_tokens", 1000),
        (["--env.kwargs.size", "3"], "env.kwargs", {"size": 3}),
        (
            ["--env.kwargs.name=x", "--env.kwargs.deep.a", "[1, 'none']"],
            "env.kwargs",
            {"name": "x", "deep": {"a": [1, None]}},
        ),
        (["--env.kwargs", "{a = 1}", "--env.kwargs.b-c", "-2"], "env.kwargs", {"a": 1, "b_c": -2}),
        (
            ["--env.kwargs.test-path", "", "--env.kwargs.models.big-one", "x"],
            "env.kwargs",
            {"test_path": "", "models": {"big-one": "x"}},
        ),
        (["--env.kwargs", '{"b-c": 1}'], "env.kwargs", {"b-c": 1}),
        (
            ["--model.template-variables.enable-thinking", "false"],
            "model.template_variables",
            {"enable_thinking": False},
        ),
        (["--cluster.worker-resources.my-node", "1"], "cluster.worker_resources", {"my-node": 1.0}),
        (
            ["--model.template_variables.enable_thinking", "false"],
            "model.template_variables",
            {"enable_thinking": False},
        ),
        (["--model.template-variables", "{date = 'x'}"], "model.template_variables", {"date": "x"}),
        (["--model.history", "append"], "model.history", "append"),
        (["--env.kwargs", '{"max_turns": 2}'], "env.kwargs", {"max_turns": 2}),
        (["--env.kwargs", '{"max_turns": 2}', "--env.kwargs.b", "3"], "env.kwargs", {"max_turns": 2, "b": 3}),
        (["--env.kwargs.b", "3", "--env.kwargs", '{"max_turns": 2}'], "env.kwargs", {"max_turns": 2, "b": 3}),
        (["--env.kwargs.a.b", "3", "--env.kwargs", '{"a": {"c": 2}}'], "env.kwargs", {"a": {"b": 3, "c": 2}}),
        (["--env.kwargs.a.b", "3", "--env.kwargs.a", '{"c": 2}'], "env.kwargs", {"a": {"b": 3, "c": 2}}),
        (["--env.kwargs.b", "3", "--env.kwargs", '{"b": 3}'], "env.kwargs", {"b": 3}),  # twice the same
        (["--env.kwargs.b", "3", "--env.kwargs.b", "4"], "env.kwargs", {"b": 4}),  # as of every setting
        (["--env.kwargs={}"], "env.kwargs", {}),
        (
            ["--env.kwargs", '{"a": null, "b": [true, {"c": -1.5e3}],\n "d": "x"}'],
            "env.kwargs",
            {"a": None, "b": [True, {"c": -1500.0}], "d": "x"},
        ),
        (["--env.kwargs.deep", '{"a": {"b": 1}}'], "env.kwargs", {"deep": {"a": {"b": 1}}}),
        (["--env.kwargs.rows", '[{"a": 1}, null]'], "env.kwargs", {"rows": [{"a": 1}, None]}),
        (["--env.kwargs.text", "{draft}"], "env.kwargs", {"text": "{draft}"}),
        (["--env.kwargs.text", "'{\"a\": 1}'"], "env.kwargs", {"text": '{"a": 1}'}),
        (["--cluster.worker_resources", '{"docker": 1}'], "cluster.worker_resources", {"docker": 1.0}),
        (["--cluster.engine_resources", "{docker = 1}"], "cluster.engine_resources", {"docker": 1.0}),
        (["--learner.betas", "[0.8, 0.9]"], "learner.betas", (0.8, 0.9)),
        (
            ["--algorithm.advantage", '{"kind": "grpo", "normalize": false}'],
            "algorithm.advantage",
            Choice("grpo", {"normalize": False}),
        ),
        (
            ["--algorithm.advantage", '{kind = "grpo"}', "--algorithm.advantage.normalize", "false"],
            "algorithm.advantage",
            Choice("grpo", {"normalize": False}),
        ),
    ],
)
def test_override_values(args: list[str], key: str, value: Any) -> None:
    found: Any = load(None, args)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_none_in_toml(tmp_path: Path) -> None:
    config = load(write(tmp_path, "[env]\ndifficulty = 'none'\n[env.kwargs]\na = 'none'\n"))
    assert config.env.difficulty is None
    assert config.env.kwargs == {"a": None}


def test_every_problem_is_reported_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "stepz = 3\nseed = true\n[learner]\nlearning_rate = 1\nlr = 'fast'\n[lerner]\nlr = 1\n")
    with pytest.raises(ConfigError) as caught:
        load(path, ["--rollout.mode", "asynk", "--rollout.lr=1", "--steps", "0", "--learner.betas", "[0.9]"])
    assert str(caught.value).splitlines() == [
        "9 problems in the settings:",
        f"  - unknown setting stepz ({path}): did you mean steps?",
        f"  - unknown setting learner.learning_rate ({path}): this is learner.lr here",
        f"  - unknown setting lerner.lr ({path}): did you mean learner.lr, warm_start.lr or algorithm.critic.lr?",
        "  - unknown setting rollout.lr (--rollout.lr): did you mean learner.lr, warm_start.lr or algorithm.critic.lr?",
        f"  - seed = True ({path}): expected a whole number, at least 0",
        "  - steps = 0 (--steps): expected a whole number, at least 1",
        "  - rollout.mode = 'asynk' (--rollout.mode): expected one of 'async', 'sync'; did you mean 'async'?",
        f"  - learner.lr = 'fast' ({path}): expected a number, more than 0",
        "  - learner.betas = [0.9] (--learner.betas): expected a list of 2 numbers",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learner", "3"], "--learner is a section, not a setting: use --learner.NAME with one of lr, "),
        (["--learner.lr"], "--learner.lr needs a value: a number, more than 0"),
        (["--learner.lr", "--steps", "3"], "--learner.lr needs a value"),
        (["steps"], "unexpected argument 'steps': overrides look like --engine.max_batch 8"),
        (["--"], "unexpected argument '--'"),
        (
            ["--env.kwargs.level", "3", "--env.kwargs", '{"level": 4}'],
            '--env.kwargs.level 3 and --env.kwargs {"level": 4} say two things of env.kwargs.level: give one',
        ),
        (
            ["--env.kwargs", '{"level": 4}', "--env.kwargs.level", "3"],
            '--env.kwargs {"level": 4} and --env.kwargs.level 3 say two things of env.kwargs.level: give one',
        ),
        (
            ["--env.kwargs", '{"a": 4}', "--env.kwargs", '{"b": 3}'],
            '--env.kwargs {"a": 4} and --env.kwargs {"b": 3} say two things of env.kwargs: give one',
        ),
        (
            ["--env.kwargs.a.b", "3", "--env.kwargs.a", "1"],
            "--env.kwargs.a.b 3 and --env.kwargs.a 1 say two things of env.kwargs.a.b: give one",
        ),
        (["--env.kwargs", "{max_turns: 2}"], HOW_TO_WRITE),
        (["--env.kwargs", '{"a": 1, "a": 2}'], HOW_TO_WRITE),
        (["--env.kwargs", '{"a": NaN}'], HOW_TO_WRITE),
        (["--env.kwargs", "3"], HOW_TO_WRITE),
        (["--env.kwargs", "[1]"], HOW_TO_WRITE),
        (["--env.kwargs", "[" * 5000], "expected a table; write --env.kwargs '{\"NAME\": 2}' (JSON)"),
        (["--env.kwargs"], "--env.kwargs needs a value: a table; write --env.kwargs '{\"NAME\": 2}' (JSON)"),
        (["--algorithm.advantage", "{kind: grpo}"], "--algorithm.advantage {kind: grpo}: this is no table; write"),
        (["--algorithm.advantage", '{"kind": "grpo", "gamma": 1}'], "algorithm.advantage.gamma is no parameter of"),
        (["--env.kwargs.", "3"], "unknown setting env.kwargs. (--env.kwargs.)"),
        (["--learner.lr=nan"], "learner.lr = nan (--learner.lr): expected a number, more than 0"),
        (["--learner.lr=1\nsteps = 2"], "learner.lr = '1\\nsteps = 2' (--learner.lr): expected a number"),
        (["--rollout.concurrency", "2"], "rollout.concurrency = 2 cannot hold one group of rollout.group_size = 8"),
        (["--model.max_context", "100"], "rollout.max_turn_tokens = 160 must be under model.max_context = 100"),
        (
            ["--foo", "1"],
            "sections: model, env, curriculum, engine, cluster, rollout, algorithm, algorithm.kl, algorithm.critic, "
            "algorithm.teacher, learner, learner.lora, warm_start, eval, checkpoint, track;",
        ),
    ],
)
def test_bad_overrides(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is not valid TOML: Invalid value (at"),
        ("learner = 3", "learner is a section; write [learner] and its settings"),
        ("[steps]\na = 1", "expected a whole number, at least 1"),
        ("[rollot]\nmode = 'sync'", "unknown setting rollot.mode"),
        ("[rollot]", "unknown setting rollot"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_offers_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"no such configuration: .*rum.toml. Did you mean run.toml\?"):
        load(tmp_path / "rum.toml")
    with pytest.raises(ConfigError, match="is a folder: name a TOML file"):
        load(tmp_path)


def test_shipped_configurations_load_by_name_and_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert "demo" in shipped()
    for name, path in shipped().items():
        config = load(name)
        assert config == load(path) == load(f"{name}.toml")
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50


def test_split_overrides() -> None:
    args = ["--learner.lr", "2e-6", "demo", "--steps=3", "--track.tensorboard", "--seed", "1", "--help"]
    rest, overrides = split_overrides(args, keep=("--help",))
    assert rest == ["demo", "--help"]
    assert overrides == ["--learner.lr", "2e-6", "--steps=3", "--track.tensorboard", "--seed", "1"]


def test_dump_keeps_a_none_that_is_not_the_default() -> None:
    config = load(None, ["--algorithm.correction.token_mask", "none"])
    table = tomllib.loads(dump(config))
    assert table["algorithm"]["correction"] == {"kind": "bypass", "token_mask": "none"}


TEXT = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda s: s.lower() != "none")
LEAF = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), TEXT)
TREE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    kwargs=st.dictionaries(TEXT, TREE, max_size=3),
    model=TEXT,
    lr=st.floats(min_value=1e-300, max_value=1e300),
    mask=st.none() | st.tuples(st.floats(0, 0.75), st.floats(1.3, 1e9)),  # the clip has to act inside it
    name=st.text(string.ascii_letters + "/_ .", min_size=1, max_size=20),
)
def test_dump_round_trips(
    tmp_path_factory: pytest.TempPathFactory, kwargs: Any, model: str, lr: float, mask: Any, name: str
) -> None:
    config = TrainConfig.model_validate(
        {
            "out": name,
            "env": {"kwargs": kwargs},
            "model": {"path": model},
            "learner": {"lr": lr},
            "algorithm": {"correction": {"kind": "bypass", "token_mask": mask}},
        }
    )
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load(path) == config


def test_adapters_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[learner.lora]\nrank = 8\ntargets = ["q_proj"]\n')
    lora = load(file, ["--learner.lora.targets", '["k_proj", "v_proj"]', "--learner.lora.alpha", "16"]).learner.lora
    assert (lora.rank, lora.alpha, lora.targets) == (8, 16.0, ("k_proj", "v_proj"))
    with pytest.raises(ConfigError, match=r"learner\.lora is a section"):
        load(None, ["--learner.lora", "8"])
    with pytest.raises(ConfigError, match=r"did you mean learner\.lora\.rank"):
        load(None, ["--learner.lora.ranks", "8"])
