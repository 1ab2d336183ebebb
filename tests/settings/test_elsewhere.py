"""What other trainers' names of settings are here: every setting that is named exists, and ours are never taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from areal_agents.errors import ConfigError
from areal_agents.settings import elsewhere
from areal_agents.settings.describe import _parameter_keys, settings
from areal_agents.settings.elsewhere import meaning_of
from areal_agents.settings.loading import load

ROOT = Path(__file__).parents[2]


def test_what_a_meaning_names_exists() -> None:
    known = {*settings(), *_parameter_keys(), "algorithm.advantage.kind", "algorithm.loss.kind",
             "algorithm.correction.kind", "algorithm.mask.kind"}  # fmt: skip
    sections = "|".join(sorted({key.partition(".")[0] for key in settings() if "." in key}))
    for meaning in elsewhere._MEANINGS:
        named = re.findall(rf"\b(?:{sections})\.\w+(?:\.\w+)?", meaning)
        pages = re.findall(r"docs/[\w-]+\.md", meaning)
        assert set(named) <= known, meaning
        assert all((ROOT / page).is_file() for page in pages), meaning
        assert named or pages or "this is out" in meaning or "this is steps" in meaning


def test_no_name_stands_twice_and_none_is_ours() -> None:
    names = [name for names in elsewhere._MEANINGS.values() for name in names]
    assert len(names) == len(set(names))
    ours = {key.rpartition(".")[2] for key in (*settings(), *_parameter_keys())}
    allowed = {"epochs", "batch_size", "delta"}  # warm_start.epochs and opsm's delta are ours, and are found before
    assert {n for n in names if n in ours} <= allowed


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--beta", "has the weight algorithm.kl.coef here"),
        ("--algorithm.kl_ctrl.kl_coef", "has the weight algorithm.kl.coef here"),
        ("--algorithm.loss.beta", "has the weight algorithm.kl.coef here"),
        ("--algorithm.loss.epsilon", "this is algorithm.loss.clip_low and algorithm.loss.clip_high here"),
        ("--epsilon-high", "this is algorithm.loss.clip_high here"),
        ("--lora-r", "this is learner.lora.rank here"),
        ("--peft_config.lora_alpha", "this is learner.lora.alpha here"),
        ("--learner.target_modules", "this is learner.lora.targets here"),
        ("--lora_dropout", "there is no dropout"),
        ("--actor_rollout_ref.rollout.n", "this is rollout.group_size here"),
        ("--rollout.n", "this is rollout.group_size here"),
        ("--num_generations", "this is rollout.group_size here"),
        ("--learner.learning_rate", "this is learner.lr here"),
        ("--per_device_train_batch_size", "this is learner.token_budget here"),
        ("--max_completion_length", "this is rollout.max_turn_tokens here"),
        ("--rollout.top_p", "there is no top-k, top-p or repetition penalty"),
    ],
)
def test_a_name_of_another_trainer_gets_its_meaning(flag: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [flag, "1"])
    assert hint in str(caught.value)
    assert "eval.k" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--learner.beta", "did you mean learner.betas"),  # a typo of ours in its own section stays one
        ("--rollout.lr", "did you mean learner.lr"),
        ("--rollout.epochs", "did you mean warm_start.epochs"),
        ("--env.max_turns", "did you mean rollout.max_turns"),
    ],
)
def test_a_typo_of_ours_stays_one(flag: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(hint)):
        load(None, [flag, "1"])


def test_other_names_have_no_meaning() -> None:
    assert meaning_of("rollout.groupz") is None
    assert meaning_of("n") is None
    assert meaning_of("MAX-GRAD-NORM") == "this is learner.grad_clip here"
