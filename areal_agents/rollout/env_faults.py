"""Errors of an environment's calls: which call it was, and whether something outside the environment is to blame."""

from __future__ import annotations

from areal_agents.errors import ArealError, EnvError, RewardError, TaskError
from areal_agents.rollout.env_results import Call
from areal_agents.utils.faults import from_outside
from areal_agents.utils.short_text import described, text_of


def raised(error: Exception, where: str) -> EnvError:
    """Return the EnvError for what the environment's own code raised in the call that ``where`` names."""
    failed = EnvError(f"{where} raised {described(error)}")
    failed.blame = "outside" if from_outside(error) else "environment"
    failed.__cause__ = error
    return failed


def located(error: ArealError, call: Call, where: str) -> ArealError:
    """Return ``error``, which ``call`` raised on purpose, with what names that call in its text."""
    if isinstance(error, EnvError | RewardError | TaskError) and where not in text_of(error):
        error.args = (f"{where}: {text_of(error)}",)
    if isinstance(error, EnvError):
        if call == "areset" and error.blame == "hang":  # it has only the task to do, and no orders of a model
            error.blame = "environment"
        elif error.blame == "environment" and from_outside(error):
            error.blame = "outside"
    return error
