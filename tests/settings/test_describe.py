from __future__ import annotations

import pytest

from areal_agents.settings.describe import either, help_text, nearest, sections, settings


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("steps", "a whole number, at least 1"),
        ("learner.lr", "a number, more than 0"),
        ("rollout.failure_budget", "a number, at least 0, at most 1"),
        ("rollout.on_exceed", "one of 'wait', 'mask', 'drop'"),
        ("env.difficulty", "a number, or none"),
        ("learner.betas", "a list of 2 numbers"),
        ("track.tensorboard", "true or false"),
        (
            "algorithm.correction",
            "one of 'bypass', 'decoupled', 'kept', 'log_linear', 'importance', or module:function",
        ),
        ("env.kwargs", "a table"),
        ("env.id", "a text"),
        ("out", "a path"),
    ],
)
def test_expectation_in_words(key: str, words: str) -> None:
    assert settings()[key].expects == words


def test_sections_hold_every_setting_once() -> None:
    keys = [f"{section}.{name}" if section else name for section, names in sections().items() for name in names]
    assert sorted(keys) == sorted(settings())
    assert sections()["warm_start"] == ("demonstrations", "lr", "epochs", "batch")
    assert sections()[""] == ("steps", "seed", "out")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("learner.lrr", "learner.lr"),
        ("lerner.lr", "learner.lr"),
        ("lr", "learner.lr"),  # no section at all
        ("rollout.lr", "learner.lr"),  # a wrong section
        ("learner.groups", "rollout.groups"),
        ("rollout.max_stalenes", "rollout.max_staleness"),
        ("step", "steps"),
        ("algorithm.normalise", "algorithm.advantage.normalize"),
        ("gamma", "algorithm.advantage.gamma"),
        ("demonstration", "warm_start.demonstrations"),
    ],
)
def test_nearest(typo: str, meant: str) -> None:
    assert nearest(typo)[0] == meant


def test_nothing_near() -> None:
    assert nearest("learner.qqqqqq") == []


def test_either() -> None:
    assert either(["a"]) == "a"
    assert either(["a", "b", "c"]) == "a, b or c"


def test_help_names_every_setting_with_default_and_meaning() -> None:
    text = help_text()
    for key in settings():
        assert f"  --{key}  (" in text
    assert (
        "  --rollout.max_staleness  (a whole number, at least 0; default: 1)\n"
        "      η: how many versions a token may be older than the learner when it trains.\n"
    ) in text
    assert (
        "'gmpo', 'dppo_tv', 'reinforce', or module:function; default: ppo)\n"
        "      The policy loss of a token.\n"
        "      Parameters, as --algorithm.loss.NAME: see `areal-agents algorithms`.\n"
    ) in text
