"""A critic and an advantage that reads it come together, or are refused when the settings are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from areal_agents import settings
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import compares_with, reads_values
from areal_agents.algorithms.registry import ADVANTAGES, READ_VALUES, Choice, needs_critic
from areal_agents.errors import ConfigError


@compares_with("values")
@reads_values
def first_value(group: Sequence[EpisodeView]) -> list[torch.Tensor]:
    return [torch.full((len(e.rewards_K),), e.total - e.values_K[0][0]) for e in group if e.values_K]


PPO = ["--algorithm.advantage", "gae", "--algorithm.critic.kind", "trunk"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (PPO[:2], r"'gae' reads a critic's values: set algorithm.critic.kind = 'trunk' .* or 'own'"),
        (["--algorithm.advantage", f"{__name__}:first_value"], r"first_value' reads a critic's values"),
        (PPO[2:], r"'trunk' trains a critic that algorithm.advantage.kind = 'turn_return' never asks: set "
         r"algorithm.advantage.kind to one of 'gae', 'turn_gae', 'bilevel_gae', or algorithm.critic.kind = 'none'"),
        (["--algorithm.critic.kind", "own", "--algorithm.advantage", "grpo"], r"'own' trains a critic .*'grpo' never"),
        (["--algorithm.critic.kind", "both"], r"algorithm.critic.kind = 'both' .*'none', 'trunk', 'own'"),
        (["--algorithm.critic.value_clip", "0.2"], r"algorithm.critic.value_clip = 0.2 without a critic: set "
         r"algorithm.critic.kind"),
        ([*PPO[:3], "own", "--algorithm.critic.coefficient", "0.1"], r"coefficient = 0.1 weighs .*layers of its own"),
        ([*PPO, "--algorithm.critic.warmup_steps", "10"], r"warmup_steps = 10 of steps = 10: the policy would never"),
        ([*PPO, "--algorithm.critic.value_clip", "0.2"], r"value_clip = 0.2 never acts with learner.minibatches = 1"),
        ([*PPO, "--algorithm.critic.warmup_steps", "3", "--learner.warmup_steps", "3"],
         r"learner.warmup_steps = 3 would be over before the policy moves"),
        ([*PPO, "--algorithm.critic.value_clip", "0"], r"expected a number, more than 0"),
        ([*PPO, "--algorithm.critic.lr", "-1"], r"expected a number, more than 0"),
        ([*PPO, "--algorithm.critic.gamma", "1"], r"gamma"),
        (["--algorithm.critic", "trunk"], r"--algorithm.critic is a section"),
        (["--vf_coef", "0.1"], r"this is algorithm.critic.coefficient here"),
        (["--gae_lambda", "0.95"], r"this is algorithm.advantage.lam here"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_to_set(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(None, flags)


def test_a_critic_is_read_and_written(tmp_path: Path) -> None:
    more = [
        "--algorithm.critic.warmup_steps",
        "3",
        "--algorithm.critic.value_clip",
        "0.2",
        "--algorithm.advantage.lam",
        "0.9",
        "--learner.minibatches",
        "2",
        "--learner.warmup_steps",
        "4",
    ]
    config = settings.load(None, [*PPO, *more])
    assert config.algorithm.advantage == Choice("gae", {"lam": 0.9})
    assert (config.algorithm.critic.warmup_steps, config.algorithm.critic.value_clip) == (3, 0.2)
    file = tmp_path / "mine.toml"
    file.write_text(settings.dump(config))
    assert settings.load(file) == config
    assert settings.load(None, ["--algorithm.advantage", f"{__name__}:first_value", *PPO[2:]])


def test_a_rate_that_is_not_given_fits_the_kind() -> None:
    rates = [settings.load(None, [*PPO[:3], kind, *more]).algorithm.critic.rate
             for kind, more in (("trunk", []), ("own", []), ("own", ["--algorithm.critic.lr", "3e-6"]))]  # fmt: skip
    assert rates == [1e-4, 1e-5, 3e-6]


def test_what_is_known_without_an_import_is_what_the_functions_declare() -> None:
    for kind in ADVANTAGES.builtin():
        declared = getattr(ADVANTAGES.function(kind), "reads_values", False)
        assert needs_critic(kind) is declared is (kind in READ_VALUES), kind
