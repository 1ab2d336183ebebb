"""The longest conversation that a model and its engine can take, found before an engine starts.

    the model's positions  ─┐
    engine.kv_tokens       ─┼─▶ fit_context ─▶ what engine and episodes are held to
    model.max_context      ─┘

An engine that is asked for more would fail the long episodes alone, and what is trained on would be the short ones.
"""

from __future__ import annotations

import logging
from pathlib import Path

from areal_agents.engines.positions import read_positions
from areal_agents.errors import ConfigError
from areal_agents.settings.config import ModelConfig

DEFAULT: int = ModelConfig.model_fields["max_context"].default
_log = logging.getLogger(__name__)


def fit_context(
    model: Path, asked: int, *, kv_tokens: int | None = None, name: str = "model.max_context", default: int = DEFAULT
) -> int:
    """Return the longest conversation, in tokens.

    ``asked`` is refused where it is more than there can be. The default is lowered instead, with a warning.

    Args:
        model: the model's folder.
        asked: the setting.
        kv_tokens: the engine's, where they bound a conversation.
        name: of the setting, for messages.
        default: of the setting.

    Raises:
        ConfigError: it is too long.
    """
    limits = {"this model has {} positions": read_positions(model), "engine.kv_tokens = {}": kv_tokens}
    found = {words.format(n): n for words, n in limits.items() if n is not None}
    why, most = min(found.items(), key=lambda item: item[1], default=("", asked))
    if asked <= most:
        return asked
    if asked != default:
        more = ", or raise engine.kv_tokens" if most == kv_tokens else ""
        raise ConfigError(f"{name} = {asked}, but {why}: set it to {most} or less{more}")
    _log.warning("%s = %d is the default, but %s: conversations end at %d tokens", name, asked, why, most)
    return most
