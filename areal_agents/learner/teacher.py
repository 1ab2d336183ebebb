"""The teacher of an on-policy distillation in the learner's process: a frozen model that scores the student's tokens.

Its vocabulary may be padded to another size than the student's. A student may, rarely, sample an id that only its own
padding has. The teacher knows nothing of that token and of what follows it in the row: their numbers are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from areal_agents.algorithms.batch import Row
from areal_agents.errors import ConfigError
from areal_agents.learner.forward import Decoder, load_model
from areal_agents.learner.passes import Logprobs, Passes
from areal_agents.learner.reference import Limits
from areal_agents.models import resolve
from areal_agents.settings.teacher import TeacherConfig


class Teacher:
    """A frozen model of a folder."""

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, limits: Limits, *, before_pack: Callable[[], None]
    ) -> None:
        """Load it, with its matrices in the format that they are computed in.

        Args:
            name: its folder, or what ``models.resolve`` finds one for.
            device: where it computes, the student's.
            dtype: the format of its products, the student's.
            limits: on memory.
            before_pack: called before each pack.

        Raises:
            ModelError: there is no such causal language model.
        """
        model = load_model(resolve(name, progress=False), device, dtype).requires_grad_(False)
        decoder = Decoder(model, dtype)
        self._known: int = model.get_input_embeddings().num_embeddings
        self._context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._passes = Passes(
            decoder, token_budget=limits.token_budget, chunk=limits.logprob_chunk, before_pack=before_pack
        )

    @classmethod
    def of(
        cls, config: TeacherConfig, student: Decoder, limits: Limits, *, before_pack: Callable[[], None]
    ) -> Self | None:
        """Load what ``config`` asks for, to compute as ``student`` does: None without a teacher, or of a server."""
        if not config.model or config.url:
            return None
        return cls(config.model, student.device, student.dtype, limits, before_pack=before_pack)

    def logprobs(self, rows: Sequence[Row], temperature: float) -> tuple[Logprobs, int]:
        """Compute log π of the rows' sampled tokens, NaN where it cannot, and count the tokens through the model.

        Raises ConfigError where a row is longer than the teacher's context.
        """
        longest = max(map(len, rows), default=0)
        if self._context is not None and longest > self._context:
            raise ConfigError(
                f"a conversation of {longest} tokens is longer than the teacher's context of {self._context} "
                "(algorithm.teacher.model): lower model.max_context to that"
            )
        heads = {i: head for i, row in enumerate(rows) if (head := known_part(row, self._known)).mask.any()}
        found, forwarded = self._passes.logprobs(list(heads.values()), temperature)
        scored = dict(zip(heads, found, strict=True))
        return [placed(row, scored.get(i, np.zeros(0, np.float32))) for i, row in enumerate(rows)], forwarded


def known_part(row: Row, known: int) -> Row:
    """Return the row up to its first id that is not under ``known``."""
    unknown = np.flatnonzero(row.ids >= known)
    if not len(unknown):
        return row
    part = slice(0, int(unknown[0]))
    return replace(
        row, ids=row.ids[part], mask=row.mask[part], logprobs=row.logprobs[part], versions=row.versions[part],
        turns=row.turns[part], advantages=row.advantages[part],
        columns={name: column[part] for name, column in row.columns.items()},
    )  # fmt: skip


def placed(row: Row, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put numbers of a row's first tokens into an array [T] that is NaN at sampled tokens behind them, and else 0."""
    out = np.where(row.mask, np.float32(np.nan), np.float32(0.0)).astype(np.float32)
    n = len(numbers)
    out[:n] = np.where(row.mask[:n], numbers, np.float32(0.0))
    return out
