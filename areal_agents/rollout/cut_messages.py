"""The endings of episodes whose last message was cut: by a limit on tokens or a server's filter, or one that is empty.

    astep(cut message) ─▶ goes on            a turn as any other
                       ─▶ truncated          the limit that was met is the stop reason
                       ─▶ ended by answer    truncated too, and what the answer earned is not paid,
                                             unless the environment ``scores_cut_messages``

A message with a whole tool call counts as whole (``AssistantMessage.cut``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

from areal_agents.rollout.env_results import Returned
from areal_agents.types import Cut, StopReason

WITHHELD = "withheld/"
"""Begins the name of a component of a reward that was not paid."""


def after_cut(got: Returned, reason: StopReason, before: Sequence[float], *, scored: bool) -> Returned:
    """Return what ``astep`` returned, as it counts for a message that was cut.

    Args:
        got: what it returned.
        reason: the limit that cut the message.
        before: the rewards of the turns before it.
        scored: whether the environment takes such a message for an answer.
    """
    if not (got.terminated or got.truncated):
        return got
    if got.ending == "answer":
        if scored:
            return replace(got, truncated=True, stop_reason=reason)
        return replace(_unpaid(got, before), terminated=False, truncated=True, stop_reason=reason)
    if got.stop_reason is None or got.stop_reason in get_args(Cut):
        return replace(got, terminated=False, truncated=True, stop_reason=reason)
    return got  # it ended by a limit of the environment's own


def _unpaid(got: Returned, before: Sequence[float]) -> Returned:
    """Return ``got`` without what the answer earned.

    What it cost stays, else a policy would ramble to get around a punishment. Where something is not paid, the
    components that explain it are of what was withheld, and are named so.
    """
    rewards = got.turn_rewards
    if rewards is not None:
        rewards = tuple(min(new, old) for new, old in zip(rewards, (*before, 0.0), strict=True))
    paid = replace(got, reward=min(got.reward, 0.0), turn_rewards=rewards)
    if not withheld(got, paid):
        return paid
    return replace(paid, components={WITHHELD + name: value for name, value in got.components.items()})


def withheld(got: Returned, paid: Returned) -> float:
    """Return by how much ``paid`` is less than what ``got`` said."""
    if got.turn_rewards is None or paid.turn_rewards is None:
        return got.reward - paid.reward
    return sum(got.turn_rewards) - sum(paid.turn_rewards)
