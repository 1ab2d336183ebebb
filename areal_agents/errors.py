"""The errors that this package raises on purpose.

    ArealError
    ├── ConfigError                  a setting is unknown, contradictory or out of range
    ├── RegistryError                an id, "module:Class" or plug-in cannot be resolved
    ├── ModelError                   a model folder, hub id or embedded model cannot be loaded
    ├── TemplateError                a chat template breaks the token rules (T1-T4)
    ├── RewardError                  a reward returned something that is not a finite number
    ├── TaskError                    a task cannot be played or scored, whoever plays it: it is left out
    ├── CheckError                   `areal-agents check` found a violation
    ├── CheckpointError              a checkpoint cannot be written, or not be understood
    ├── Interrupted                  stopped by a signal, with everything saved
    ├── FailureBudgetError           too many episodes failed; carries the first failure
    ├── LearnerLost                  the learner's process died, hung or missed a deadline
    ├── SandboxUnavailable           a backend's self-probe failed; carries the remedy
    └── InfraError                   not the policy's doing: retried, counted, never rewarded
        ├── EngineError              the engine died, refused or missed its deadline
        ├── SandboxError             the sandbox itself failed (not the code inside it)
        ├── EnvError                 the environment raised or hung
        └── WorkerLost               the process that played the episode is gone

A *policy* error (malformed call, failing code) is no exception: it is an observation and costs reward.
"""

from __future__ import annotations

from typing import Literal


class ArealError(Exception):
    """Base class of every deliberate error of this package."""


class ConfigError(ArealError, ValueError):
    """A setting is unknown, contradictory or out of range."""


class RegistryError(ArealError, LookupError):
    """An id, ``"module:Class"`` string or plug-in cannot be resolved."""


class ModelError(ArealError):
    """A model cannot be found, verified or loaded."""


class TemplateError(ArealError):
    """A chat template breaks the token rules.

    The message names the rule and the remedy.
    """


class RewardError(ArealError):
    """A reward returned NaN, an infinity or something that is not a number."""


class TaskError(ArealError):
    """A task cannot be played or scored, and another attempt would find the same.

    Its first prompt is longer than the context, for example, or its gold answer does not parse. The task is left out
    and named, and costs no retry and no failure budget. An environment raises it where it is sure. Whether another
    error is the task's shows when all attempts at it fail in the same words (``rollout/task_faults.py``).
    """


class CheckError(ArealError):
    """A conformance check failed."""


class CheckpointError(ArealError):
    """A checkpoint cannot be written or read.

    The last complete one is untouched.
    """


class Interrupted(ArealError):
    """A signal stopped the run after it had saved everything.

    The message says how to go on.
    """


class FailureBudgetError(ArealError):
    """More episodes failed in a window than the budget allows.

    ``__cause__`` is the first failure.
    """


class LearnerLost(ArealError):
    """The learner's process died, hung or missed a deadline.

    The last committed checkpoint is whole.
    """


class SandboxUnavailable(ArealError):
    """A sandbox backend refused to start.

    ``probe`` is the failed self-probe, ``remedy`` the next action.
    """

    def __init__(self, backend: str, probe: str, remedy: str) -> None:
        super().__init__(f"sandbox {backend!r} is unavailable: {probe}. {remedy}")
        self.backend = backend
        self.probe = probe
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[SandboxUnavailable], tuple[str, str, str]]:
        # By default it would be rebuilt from its message alone, and its constructor takes three arguments.
        return type(self), (self.backend, self.probe, self.remedy)


class InfraError(ArealError):
    """The infrastructure failed, not the policy.

    Such a failure is retried and counted, and never turned into a reward. Where it struck is counted too, because
    failures that prefer a tool or long episodes bias what is left to train on.
    """

    final: bool = False
    """Whether another attempt would fail in the same way, so that there is none."""
    tool: str = ""
    """The tool whose call failed, where it was one."""
    turns: int = 0
    tokens: int = 0
    """Turns and sampled tokens that the episode had behind it."""


class EngineError(InfraError):
    """The engine died, refused the request or missed its deadline."""


class SandboxError(InfraError):
    """The sandbox itself failed (the code inside it is an ``ExecResult``, not an error)."""


class EnvError(InfraError):
    """The environment raised, hung or broke its contract."""

    blame: Literal["environment", "outside", "hang"] = "environment"
    """Where it came from: the environment's code, or its reset, which has only the task to do; something outside that
    it talks to (a refused connection); or a step that did not return in time, which may be anybody's."""


class WorkerLost(InfraError):
    """The rollout worker that played the episode died or hung.

    The episode itself may be innocent.
    """
