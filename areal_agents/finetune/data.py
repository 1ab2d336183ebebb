"""The data of a fine-tuning: what its sources hold, rendered for its model, split and named by a fingerprint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

from areal_agents.chat.format import ChatFormat
from areal_agents.errors import ConfigError, ModelError
from areal_agents.finetune.config import DpoConfig, SftConfig
from areal_agents.finetune.episodes import run_examples, run_pairs
from areal_agents.finetune.examples import Example, ItemT, Limits, Pair, Tally, fingerprint, split_holdout
from areal_agents.finetune.files import file_examples, file_pairs

Seen = Callable[[], None]


@dataclass(frozen=True)
class Data(Generic[ItemT]):
    """What trains, and what is held out."""

    train: list[ItemT]
    holdout: list[ItemT]
    tallies: tuple[Tally, ...] = field(default=())
    fingerprint: str = ""

    def lines(self) -> list[str]:
        """Return what was taken and left out, as lines for people."""
        what = "examples" if all(isinstance(i, Example) for i in self.train) else "pairs"
        lines = [line for tally in self.tallies for line in tally.lines(what)]
        earned = [r for item in self.train if (r := getattr(item, "reward", None)) is not None]
        if earned:
            mean = math.fsum(earned) / len(earned)
            lines.append(f"rewards of what is imitated: {min(earned):.4g} to {max(earned):.4g}, mean {mean:.4g}")
        tokens = sum(side.tokens for item in self.train for side in item.sides)
        held = f", {len(self.holdout)} held out" if self.holdout else ""
        return [*lines, f"training on {len(self.train)} {what}, {tokens} tokens{held}"]


_OF_RUNS = ("kind", "first_step", "last_step", "min_reward", "per_task", "min_gap", "pairs")
"""Settings that choose among a run's episodes."""


def load_examples(config: SftConfig, model: Path, *, seen: Seen = lambda: None) -> Data[Example]:
    """Load what is imitated. ``seen`` is called for each line or episode. Raises ConfigError where nothing is left."""
    _require_runs(config)
    fmt, limits = _format(config, model, seen)
    found = [
        (run_examples if path.is_dir() else file_examples)(path, config, fmt, limits)
        for path in map(_existing, config.data)
    ]
    return _data([item for items, _ in found for item in items], [tally for _, tally in found], config)


def load_pairs(config: DpoConfig, model: Path, *, seen: Seen = lambda: None) -> Data[Pair]:
    """Load the pairs of a preference training, as ``load_examples`` loads what is imitated."""
    _require_runs(config)
    fmt, limits = _format(config, model, seen)
    found = [
        (run_pairs if path.is_dir() else file_pairs)(path, config, fmt, limits) for path in map(_existing, config.data)
    ]
    return _data([item for items, _ in found for item in items], [tally for _, tally in found], config)


def _data(items: Sequence[ItemT], tallies: Sequence[Tally], config: SftConfig | DpoConfig) -> Data[ItemT]:
    if not items:
        what = "examples" if config.method == "sft" else "pairs"
        said = "\n".join(line for tally in tallies for line in tally.lines(what))
        raise ConfigError(f"there is nothing to train on:\n{said}")
    train, holdout = split_holdout(items, config.holdout, seed=config.seed)
    return Data(train, holdout, tuple(tallies), fingerprint(items))


def _existing(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise ConfigError(f"{name} does not exist: name a run's folder, or a JSONL file")
    return path


def _require_runs(config: SftConfig | DpoConfig) -> None:
    """Raise ConfigError where a setting chooses among a run's episodes, and no source is a run."""
    if any(_existing(name).is_dir() for name in config.data):
        return
    fields = type(config).model_fields
    given = [n for n in _OF_RUNS if n in fields and getattr(config, n) != fields[n].default]
    if given:
        name = "steps" if given[0].endswith("_step") else given[0].replace("_", "-")
        raise ConfigError(
            f"--{name} chooses among a run's episodes, and {', '.join(config.data)} is no run: choose among the lines "
            "of a file before, or leave it out"
        )


def _format(config: SftConfig | DpoConfig, model: Path, seen: Seen) -> tuple[ChatFormat, Limits]:
    try:
        sizes = json.loads((model / "config.json").read_text(encoding="utf-8"))
        inner = sizes.get("text_config") or sizes
        vocabulary, positions = int(inner["vocab_size"]), inner.get("max_position_embeddings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{model / 'config.json'} does not say vocab_size ({error!r}): use a transformers folder"
        ) from error
    if positions is not None and config.max_context > int(positions):
        raise ConfigError(
            f"--max-context is {config.max_context}, and {model} takes {positions} tokens at most: set --max-context "
            f"{positions} or less"
        )
    return ChatFormat.load(model, config.chat), Limits(config.max_context, vocabulary, seen)
