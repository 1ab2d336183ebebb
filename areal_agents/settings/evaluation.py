"""The settings of an evaluation, which are those of a training less what only a training has a use for.

    areal-agents eval ENV_ID --model M --n 64 --engine.kind vllm --env.kwargs.max_turns 3 [--config FILE]

Some have a short name besides: ``--n`` is ``--eval.n``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from areal_agents.settings import describe
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.loading import failure, load, normal_key, override_keys

SHORT = {
    "model": "model.path",
    "n": "eval.n",
    "k": "eval.k",
    "temperature": "eval.temperature",
    "max_turn_tokens": "rollout.max_turn_tokens",
    "max_turns": "rollout.max_turns",
    "max_context": "model.max_context",
    "difficulty": "env.difficulty",
    "sandbox": "env.sandbox",
}
"""Short names of settings."""

DEFAULTS = {
    "out": "runs/eval-TIME",
    "env.id": "ENV_ID",
    "model.path": "none, it must be given",
}
"""What stands in for a default that a training has."""

_BATCHES = "it makes no batches"
_WEIGHTS = "its weights stay the same"
TRAINING_ONLY = {
    "steps": "it takes no learner steps (--n is its number of tasks)",
    "algorithm.": "it trains nothing",
    "learner.": "it trains nothing",
    "warm_start.": "it trains nothing",
    "checkpoint.": "it trains nothing",
    "cluster.": "it runs on this machine",
    "track.": "it writes a report and trajectories, no metrics of steps",
    "mixture": "it plays one environment, ENV_ID",
    "curriculum.": "it trains nothing",
    "env.split": "its split is eval.split, or ENV_ID:SPLIT",
    "engine.transport": _WEIGHTS,
    "engine.update_mode": _WEIGHTS,
    "engine.kv": _WEIGHTS,
    "rollout.mode": _BATCHES,
    "rollout.groups": _BATCHES,
    "rollout.group_size": f"{_BATCHES} (eval.k is its number of attempts a task)",
    "rollout.max_staleness": _BATCHES,
    "rollout.on_exceed": _BATCHES,
    "rollout.order": _BATCHES,
    "rollout.concurrency": "it plays as many episodes at once as its engines decode (engine.max_batch)",
    "rollout.group_reward": "it is scored by the environment's own rewards",
    "rollout.temperature": "its temperature is eval.temperature",
    "eval.every": "it is one evaluation",
    "eval.overlap": "it trains on nothing",
    "eval.baseline": "it is one evaluation",
}
"""Settings, and sections with a dot at their end, that mean nothing for an evaluation, and why."""

_RENDERED = "the model's server renders the conversation"
SERVED = {
    "engine.": "the model is served at its URL, no engine is started",
    "model.history": _RENDERED,
    "model.merge_system": _RENDERED,
}
"""The same, of a model behind a chat server."""


@cache
def training_only(key: str, *, served: bool = False) -> str | None:
    """Return why the setting ``key`` means nothing for an evaluation, or None where it means something.

    ``served`` says that the model is behind a chat server.
    """
    reasons = TRAINING_ONLY | SERVED if served and key != "engine.request_timeout" else TRAINING_ONLY
    return next((why for k, why in reasons.items() if key == k or (k.endswith(".") and f"{key}.".startswith(k))), None)


def is_setting(flag: str) -> bool:
    """Say whether a flag of ``eval`` such as ``--n=3`` names a setting, and no option of the command itself."""
    key = normal_key(flag.removeprefix("--").partition("=")[0])
    return "." in key or key in SHORT or key in describe.settings() or key in describe.sections()


def help_text() -> str:
    """Return every setting that an evaluation takes, with its accepted values, default and meaning."""
    return describe.help_text(leave_out=training_only, short=SHORT, defaults=DEFAULTS)


def load_evaluation(
    path: Path | str | None, overrides: Sequence[str] = (), *, served: bool = False
) -> tuple[TrainConfig, list[str]]:
    """Read the settings of an evaluation.

    Without ``--out`` it gets a folder of its own.

    Args:
        path: a TOML file or a shipped configuration, of a training too. None means all defaults.
        overrides: such as ``--n 64`` or ``--engine.kind vllm``.
        served: the model is behind a chat server.

    Returns:
        The settings, and what the file says that an evaluation does not use.

    Raises:
        ConfigError: every problem of the file and the overrides, or every override that means nothing here.
    """
    keys = override_keys(overrides, short=SHORT)
    refused = [
        f"{flag} means nothing for an evaluation: {why}"
        for key, flag in keys
        if (why := training_only(key, served=served)) is not None
    ]
    if refused:
        raise failure(refused)
    unused: list[str] = []
    without = partial(training_only, served=served)
    config = load(path, overrides, short=SHORT, without=without, left_out=unused)
    if "out" not in dict(keys):
        unused += ["out"] if "out" in config.model_fields_set else []
        config = config.model_copy(update={"out": eval_folder()})
    return config, unused


def eval_folder() -> Path:
    """Return where an evaluation goes that was given no folder."""
    return Path("runs") / f"eval-{time.strftime('%Y%m%d-%H%M%S')}"


def server_of(out: Path) -> dict[str, Any]:
    """Read how the server of the evaluation in ``out`` was reached, or nothing where there was none."""
    try:
        found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["server"]
    except (OSError, ValueError, KeyError, TypeError):  # who goes on with it says what is wrong with the file
        return {}
    return found if isinstance(found, dict) else {}
