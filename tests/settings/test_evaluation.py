"""What ``eval`` says of settings: it offers those that it has, whatever is typed, and reads any training's file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from areal_agents import settings
from areal_agents.errors import ConfigError
from areal_agents.settings import elsewhere
from areal_agents.settings.describe import _parameter_keys, sections
from areal_agents.settings.describe import settings as known_settings
from areal_agents.settings.evaluation import load_evaluation, training_only

KEYS = [*known_settings(), *_parameter_keys()]


def said(*overrides: str, path: Path | None = None, served: bool = False) -> str:
    try:
        load_evaluation(path, overrides, served=served)
    except ConfigError as error:
        return str(error)
    return ""


def offered(message: str, *, served: bool = False) -> list[str]:
    """The settings that a message names, and an evaluation does not have."""
    words = re.findall(r"[a-z_]+(?:\.[a-z_]+)+", message)
    return [w for w in words if w in KEYS and training_only(w, served=served) is not None]


def test_what_is_typed_wrongly_is_never_answered_with_a_setting_of_trainings() -> None:
    """Every setting without its third letter, with one more at its end, and without its section."""
    asked = 0
    for key in KEYS:
        section, _, name = key.rpartition(".")
        dot = "." if section else ""
        for typo in (f"{section}{dot}{name[:2]}{name[3:]}", f"{key}s", name + "_", f"evaluation.{name}"):
            if typo in KEYS or typo == "out":
                continue
            message = said(f"--{typo}", "1")
            means_nothing = f"--{typo} means nothing for an evaluation: "
            if "model.template_variables" in typo or "env.kwargs" in typo or not message:
                continue
            asked += 1
            assert message.startswith(means_nothing) or not offered(message), message
    assert asked > 200


@pytest.mark.parametrize("name", sorted(elsewhere._BY_NAME))
def test_what_other_trainers_call_it_is_never_answered_with_a_setting_of_trainings(name: str) -> None:
    assert not offered(said(f"--{name}", "1").replace(f"--{name}", ""))


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("top_p", "tokens are drawn from the model's own distribution, at eval.temperature"),
        ("num_generations", "this is eval.k here"),
        ("dtype", "this is engine.precision here"),
        ("load_in_4bit", "there is no quantisation yet: engine.precision is bf16 or fp32"),
        ("train_batch_size", "there is nothing like it in an evaluation: it makes no batches"),
        ("max_steps", "there is nothing like it in an evaluation: it takes no learner steps (--n is its number of"),
        ("max_new_tokens", "this is rollout.max_turn_tokens here"),
        ("output_dir", "this is out here"),
        ("kl_coef", "there is nothing like it in an evaluation: it trains nothing"),
    ],
)
def test_what_other_trainers_call_it(flag: str, hint: str) -> None:
    assert hint in said(f"--{flag}", "1")


def test_sections_list_what_an_evaluation_has() -> None:
    assert said("--learner", "3") == "--learner means nothing for an evaluation: it trains nothing"
    names = said("--rollout", "3").partition("with one of ")[2].split(", ")
    assert names == [n for n in sections()["rollout"] if training_only(f"rollout.{n}") is None]
    assert "max_turns" in names
    assert "groups" not in names
    assert said("--rollout.zzzzzz", "3").endswith(f"settings of rollout: {', '.join(names)}")
    end = said("--qqqqqq", "1").partition(": ")[2]
    assert end == "sections: model, env, engine, rollout, eval; top level: seed, out"
    assert "engine" in said("--qqqqqq", "1", served=True).partition("sections: ")[2]  # request_timeout


@pytest.mark.parametrize("name", sorted(settings.shipped()))
def test_a_trainings_file_is_taken_with_any_setting_of_an_evaluation(name: str) -> None:
    """What holds between a training's settings alone is no affair of an evaluation."""
    more = ["--engine.kind", "transformers", "--engine.tensor_parallel", "1", "--engine.gpu_memory", "0.85"]
    config, unused = load_evaluation(name, more)
    assert config.engine.kind == "transformers"
    assert config.cluster.backend == "local"
    assert all(training_only(key) is not None or key == "out" for key in unused)
    assert "steps" in unused


def test_what_a_training_alone_uses_is_named_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(
        "steps = -1\n[rollout]\nconcurrency = 2\nmax_turns = 3\n[learner]\nlr = 'fast'\nnew = 1\n"
        "[engine]\ntransport = 'nccl'\n[algorithm.loss]\nkind = 'gone:away'\n[eval]\nn = 3\nevery = 1\n"
    )
    config, unused = load_evaluation(path)
    assert (config.rollout.max_turns, config.eval.n) == (3, 3)
    assert unused == [
        "algorithm.loss", "engine.transport", "eval.every", "learner.lr", "learner.new", "rollout.concurrency", "steps",
    ]  # fmt: skip
    path.write_text("[eval]\nn = 0\nm = 1\n")
    assert "eval.n = 0" in said(path=path)
    assert "unknown setting eval.m" in said(path=path)


def test_a_served_models_file_keeps_the_one_setting_of_the_engine_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text("[engine]\nrequest_timeout = 7.0\nmax_batch = 2\n[model]\nhistory = 'template'\n")
    config, unused = load_evaluation(path, served=True)
    assert (config.engine.request_timeout, config.engine.max_batch, config.model.history) == (7.0, 48, "auto")
    assert unused == ["engine.max_batch", "model.history"]
