"""Errors of an environment's calls: which call it was, and whether something outside the environment is to blame."""

from __future__ import annotations

from areal_agents.chat_model import MessageRefused
from areal_agents.errors import (
    ArealError,
    ConfigError,
    EnvError,
    InfraError,
    ModelError,
    RegistryError,
    RewardError,
    SandboxUnavailable,
    TaskError,
)
from areal_agents.rollout.env_results import Call
from areal_agents.types import Task
from areal_agents.utils.faults import from_outside
from areal_agents.utils.short_text import cut, described, text_of

_WHOSE = (InfraError, RewardError, TaskError, ConfigError, RegistryError, ModelError, SandboxUnavailable)


def says_whose(error: ArealError) -> bool:
    """Say whether an error that a call raised tells by its type whose failure it is.

    The settings' errors do (a judge without a key, say), and end the run. Others are no more than an exception of the
    environment's code: a template that cannot show what it asked its judge, or a stop that no signal made.
    """
    return isinstance(error, _WHOSE) and not isinstance(error, MessageRefused)


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


def refused(task: Task, turns: int, why: str) -> TaskError | EnvError:
    """Return the error for an observation that the model cannot be shown.

    The task cannot be played where it is the first one, and what came later is the environment's own failure.
    """
    who = f"task {cut(task.id, 120)}"
    return (
        EnvError(f"{who}, turn {turns}: the observation {why}")
        if turns
        else TaskError(f"{who}: the first prompt {why}")
    )
