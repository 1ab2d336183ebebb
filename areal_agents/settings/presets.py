"""Presets: named algorithms of the field as the settings that they are made of.

    algorithm = "dapo"                   in a file, where nothing else of the algorithm is set
    [algorithm] preset = "dapo" …        in a file, with more settings, which come on top
    --algorithm dapo                     takes the place of a file's whole [algorithm]

A preset is not kept: a run's ``config.toml`` and ``train --show`` have the settings that it stood for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from areal_agents.algorithms.registry import REGISTRIES
from areal_agents.errors import ConfigError

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preset:
    """One algorithm."""

    summary: str
    paper: str
    settings: Mapping[str, Any]
    """Section by section, as a file has them."""


PRESETS: Mapping[str, Preset] = {
    "grpo": Preset(
        "GRPO as published: returns normalised in their group, each episode weighs the same, a KL term to the start.",
        "2402.03300",
        {
            "algorithm": {
                "advantage": {"kind": "grpo"},
                "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2},
                "aggregation": "episode",
                "kl": {"coef": 0.04, "estimator": "k3"},
            }
        },
    ),
    "dapo": Preset(
        "DAPO: a higher upper clip, groups without signal replaced, every token weighs the same, no KL term.",
        "2503.14476",
        {
            "algorithm": {
                "advantage": {"kind": "grpo"},
                "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.28},
                "aggregation": "token",
                "overlong": "mask",
            },
            "rollout": {"dynamic_sampling": True},
        },
    ),
    "dr_grpo": Preset(
        "Dr. GRPO: no division by the group's spread, none by an episode's own length.",
        "2503.20783",
        {"algorithm": {"advantage": {"kind": "dr_grpo"}, "loss": {"kind": "ppo"}, "aggregation": "constant"}},
    ),
    "ppo": Preset(
        "PPO with a critic of its own and an advantage a token.",
        "1707.06347, 1506.02438",
        {
            "algorithm": {
                "advantage": {"kind": "gae", "gamma": 1.0, "lam": 0.95},
                "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2},
                "normalize": "batch",
                "aggregation": "token",
                "critic": {"kind": "own"},
            }
        },
    ),
    "gspo": Preset(
        "GSPO: the ratio and its clip are an episode's, not a token's.",
        "2507.18071",
        {"algorithm": {"advantage": {"kind": "grpo"}, "loss": {"kind": "gspo"}, "aggregation": "episode"}},
    ),
    "cispo": Preset(
        "CISPO: the ratio is bounded as a weight, so that no token loses its gradient.",
        "2506.13585",
        {"algorithm": {"advantage": {"kind": "grpo"}, "loss": {"kind": "cispo"}, "aggregation": "token"}},
    ),
    "areal": Preset(
        "AReaL: more staleness and several optimizer steps a batch, held by a proximal policy and its weight.",
        "2505.24298",
        {
            "algorithm": {
                "advantage": {"kind": "grpo"},
                "loss": {"kind": "ppo", "clip_low": 0.2, "clip_high": 0.2},
                "correction": {"kind": "decoupled"},
                "aggregation": "token",
            },
            "rollout": {"max_staleness": 4},
            "learner": {"minibatches": 4},
        },
    ),
    "turn": Preset(
        "Credit turn by turn: each turn's return against the group's other episodes at that turn. The default.",
        "2402.14740",
        {
            "algorithm": {
                "advantage": {"kind": "turn_return"},
                "loss": {"kind": "ppo"},
                "correction": {"kind": "bypass"},
                "aggregation": "token",
            }
        },
    ),
}


def preset(name: object) -> Preset:
    """Return the preset ``name``. Raises ConfigError where there is none."""
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(str(name), PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
    raise ConfigError(f"algorithm = {name!r}: no such preset; {hint}")


def take_preset(tree: Tree) -> str | None:
    """Remove the preset's name from settings, section by section, and return it."""
    algorithm = tree.get("algorithm")
    if isinstance(algorithm, str):
        del tree["algorithm"]
        return algorithm
    if isinstance(algorithm, Mapping) and "preset" in algorithm:
        tree["algorithm"] = {k: v for k, v in algorithm.items() if k != "preset"}
        return str(algorithm["preset"])
    return None


def expand(data: Mapping[str, Any]) -> Tree:
    """Put the settings of the preset that ``data`` names under its own. Without one, return ``data`` as it is.

    A section may be a table or a model of settings. What is said of an algorithm's parameters alone goes with the
    preset's kind. Raises ConfigError for an unknown preset, or one beside a section that is a model.
    """
    tree = dict(data)
    name = take_preset(tree)
    if name is None:
        return tree
    for section, below in preset(name).settings.items():
        above = tree.get(section, {})
        if not isinstance(above, Mapping):
            raise ConfigError(
                f"algorithm = {name!r} sets {section}.{next(iter(below))} too, so give {section} as a dictionary of "
                f"what differs, not as a {type(above).__name__}"
            )
        tree[section] = _merged(below, above, section)
    return derived(name, tree)


def derived(name: str, tree: Tree) -> Tree:
    """Add what a preset takes from other settings: Dr. GRPO's constant is the most tokens of an episode."""
    algorithm = tree.get("algorithm", {})
    if name == "dr_grpo" and algorithm.get("aggregation") == "constant" and "constant" not in algorithm:
        from areal_agents.settings.config import RolloutConfig  # which imports this file

        rollout = RolloutConfig.model_validate(tree.get("rollout", {}))
        tree["algorithm"] = {**algorithm, "constant": rollout.episode_tokens}
    return tree


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], key: str) -> Tree:
    """Return ``below`` with ``above`` in its place. An algorithm that is named replaces the whole table."""
    out = dict(below)
    for name, value in above.items():
        under, inner = out.get(name), f"{key}.{name}"
        named = inner in REGISTRIES and not (isinstance(value, Mapping) and "kind" not in value)
        if isinstance(under, Mapping) and isinstance(value, Mapping) and not named:
            out[name] = _merged(under, value, inner)
        else:
            out[name] = value
    return out
