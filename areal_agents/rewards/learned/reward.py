"""A reward by a learned reward model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from areal_agents.errors import ConfigError, ModelError, RewardError, TemplateError
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards.learned.server import ModelServer, WorkerSettings, shared_server
from areal_agents.types import AssistantMessage, without_reasoning
from areal_agents.utils.short_text import cut, short

Transform = Literal["raw", "sigmoid", "softmax"]
TooLong = Literal["worst", "cut"]
Turns = Sequence[tuple[str, str]]
"""Roles and texts."""


class reward_model:
    """A reward by a transformers folder of sequence classification, such as a trained preference model.

        rubric = reward_model("models/preference", transform="sigmoid")

    It reads the question and the final answer by the folder's chat template. The model runs in a process of its own,
    which all rewards of one folder and setting share. Batches are padded, so a score may differ in its last digits by
    what was scored beside it; ``batch=1`` gives the same bits always.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        transform: Transform = "raw",
        worst: float | None = None,
        too_long: TooLong = "worst",
        messages: Callable[[Episode], Turns | None] | None = None,
        server: ModelServer | None = None,
        **process: Any,
    ) -> None:
        """Start nothing yet. The model is loaded at the first score.

        Args:
            folder: weights, tokenizer and chat template.
            transform: ``raw`` is the logit. ``sigmoid`` takes it to 0…1, ``softmax`` is the label's probability among
                several.
            worst: score of an episode without an answer, and of one that is too long. None is 0 for sigmoid and
                softmax. A raw score has no lowest value, so it must be given.
            too_long: what is longer than the model's positions gets ``worst`` and the status unverifiable, or is
                ``cut``: tokens in its middle are left out and counted in ``tokens_left_out``.
            messages: what the model reads, as (role, text). None is what was asked and the final answer.
            server: the process to use. None shares one with these settings.
            process: further fields of ``WorkerSettings``: label, max_tokens, precision, device, threads, batch,
                deadline, start_seconds.

        Raises:
            ConfigError: an unknown name, or a setting out of range.
        """
        for name, given, known in (("transform", transform, Transform), ("too_long", too_long, TooLong)):
            if given not in get_args(known):
                raise ConfigError(f"reward_model: unknown {name} {given!r}: there are {', '.join(get_args(known))}")
        if worst is None and transform == "raw":
            raise ConfigError("reward_model: a raw score has no lowest value: give worst, for answers that have none")
        if worst is not None and not math.isfinite(worst):
            raise ConfigError(f"reward_model: worst = {worst} must be finite")
        known_fields = set(WorkerSettings.__dataclass_fields__) - {"folder", "cuts", "softmax"}
        if unknown := set(process) - known_fields:
            raise ConfigError(f"reward_model: unknown argument {min(unknown)!r}: there are {sorted(known_fields)}")
        place = str(Path(folder).expanduser().absolute())
        self._settings = WorkerSettings(place, too_long == "cut", transform == "softmax", **process)
        self._transform, self._worst, self._messages = transform, 0.0 if worst is None else float(worst), messages
        self._server = server
        self.__name__ = "reward_model"

    async def __call__(self, episode: Episode) -> Verdict:
        turns = self._messages(episode) if self._messages else asked_and_answered(episode)
        if turns is None:
            return Verdict(self._worst, {self.__name__: self._worst, "no_answer": 1.0})
        rows = _rows(turns, episode)
        server = self._server or shared_server(self._settings)
        found = await asyncio.wrap_future(server.submit(rows))
        if "error" in found:
            raise TemplateError(found["error"])
        if "long" in found:
            return Verdict(self._worst, {self.__name__: self._worst, "too_long": 1.0}, status="unverifiable")
        if not all(map(math.isfinite, found["logits"])):
            raise ModelError(f"reward model: {self._settings.folder} gave {found['logits'][:3]}: no finite score")
        score = _transformed(found["logits"], found["index"], self._transform)
        components = {self.__name__: score, "tokens_left_out": float(found["left_out"])}
        return Verdict(score, components)


def _rows(turns: object, episode: Episode) -> list[dict[str, str]]:
    """Return what the worker is sent. Raises RewardError for what are no roles and texts."""
    pairs = [*turns] if isinstance(turns, list | tuple) else []
    if not pairs or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise RewardError(
            f"task {cut(episode.task.id, 120)!r}: messages returned {short(turns)}: return a list with a role and a "
            "text of each message, or None"
        )
    return [{"role": role, "content": text} for role, text in pairs]


def asked_and_answered(episode: Episode) -> Turns | None:
    """Return what the model was shown before its first turn and its final answer, or None without one."""
    answer = without_reasoning(episode.answer or "")
    if not answer.strip():
        return None
    shown: list[tuple[str, str]] = []
    for message in episode.messages:
        if isinstance(message, AssistantMessage):
            break
        shown.append((message.role, message.text))
    return [*shown, ("assistant", answer)]


def _transformed(logits: Sequence[float], index: int, transform: Transform) -> float:
    x = logits[index]
    if transform == "raw":
        return x
    if transform == "sigmoid":
        return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
    top = max(logits)
    return math.exp(x - top) / sum(math.exp(y - top) for y in logits)
