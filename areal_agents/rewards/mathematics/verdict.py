"""The verdict on one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VERSION = "3"
"""Of the verifier: verdicts of another version are not this one's."""

Status = Literal["ok", "wrong", "no_answer", "parse_error", "timeout", "gold_error", "infra_error"]


@dataclass(frozen=True, slots=True)
class MathVerdict:
    """What a verifier says of one answer, and why."""

    status: Status
    detail: str = ""
    elapsed_ms: float = 0.0
    raised: str = ""
    """The kind of an exception that the verifier raised on it and that nobody expected of it, as ``ValueError``."""

    @property
    def score(self) -> int:
        return int(self.status == "ok")
