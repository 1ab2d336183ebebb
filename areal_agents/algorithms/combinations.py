"""The combinations of losses, corrections and masks that cannot do what their settings say.

Each rule returns the reasons against a combination, each with what to set instead. They are asked when the settings are
read. So nothing here imports torch: what is ours is known by name, and what is not has been imported already.

    ratio identically 1       decoupled with one minibatch: π = p at the only step
    ratio counted twice       importance with a loss that has the ratio in itself
    ratio dropped             reinforce off policy, without importance
    policy that nobody reads  decoupled, kept or log_linear with a loss without a ratio
    bound that never acts     a clip or truncation outside what a mask leaves; log_linear with young tokens alone
    two caps on one weight    opob's and importance's differ, so that the baseline is that of other terms
    sequence in pieces        a function of sequences that would be called with some of their tokens
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from areal_agents.algorithms.registry import CORRECTIONS, LOSSES, MASKS, NO_MASK, Choice
from areal_agents.algorithms.scope import scope_of
from areal_agents.errors import ConfigError

TOKEN_MASK = (0.5, 5.0)
"""The corrections' default."""
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
"""The defaults of ``ppo``."""
CAP = 2.0
"""The default of ``truncate`` of ``importance`` and of ``opob``."""
IN_RATIO = {"gspo", "gspo_token", "cispo", "sapo", "gmpo"}
"""Losses of ours that differ from ``reinforce`` by what they make of the ratio, and by nothing else."""
TRUNCATED = ("dppo_tv", "truncate")
"""A bound on the ratio of a loss whose other bound is on probabilities."""
WITHOUT_RATIO = {"reinforce"}


@dataclass(frozen=True, slots=True)
class Combination:
    """What is chosen together."""

    loss: Choice
    correction: Choice
    mask: Choice = NO_MASK
    advantage: Choice | None = None
    aggregation: str = "token"
    constant: int | None = None
    minibatches: int = 1
    staleness: int = 0
    """η in force."""
    episode_tokens: int | None = None
    """Most tokens that an episode may sample."""

    def problems(self) -> list[str]:
        """Return the reasons against it, none where it can do what it says."""
        return [reason for rule in RULES for reason in rule(self)]

    def takes_ratio(self) -> bool:
        """Say whether the loss reads the old policy."""
        if self.loss.kind in LOSSES.builtin():
            return self.loss.kind not in WITHOUT_RATIO
        return "old_logprobs_T" in LOSSES.takes(self.loss)

    def token_mask(self) -> tuple[float, float] | None:
        """Return the correction's mask of single tokens."""
        found: tuple[float, float] | None = self.correction.options.get("token_mask", TOKEN_MASK)
        return found


def _ratio_is_one(c: Combination) -> Iterator[str]:
    if c.correction.kind != "decoupled" or c.minibatches > 1:
        return
    why = (
        "with algorithm.correction.kind = 'decoupled' and learner.minibatches = 1 the ratio π/p is identically 1, for "
        "p is recomputed for each batch"
    )
    instead = "set learner.minibatches to 2 or more, or algorithm.correction.kind = 'bypass' or 'kept'"
    if c.correction.options.get("scope", "token") is None:
        yield f"{why}, and with algorithm.correction.scope = none nothing corrects for the sampler: {instead}"
    elif c.loss.kind in IN_RATIO:
        yield f"{why}: algorithm.loss.kind = {c.loss.kind!r} would be 'reinforce'; {instead}"
    elif bounds := [name for name in c.loss.options if c.loss.kind == "ppo" or (c.loss.kind, name) == TRUNCATED]:
        set_ = ", ".join(f"algorithm.loss.{name}" for name in bounds)
        yield f"{why}: {set_} would never act; leave it out, or {instead}"


def _ratio_twice(c: Combination) -> Iterator[str]:
    if c.correction.kind == "importance" and c.takes_ratio():
        yield (
            f"algorithm.correction.kind = 'importance' weighs by π/μ, and algorithm.loss.kind = {c.loss.kind!r} has "
            "that ratio in itself, so it would count twice: set algorithm.correction.kind = 'bypass', or "
            "algorithm.loss.kind = 'reinforce'"
        )


def _ratio_dropped(c: Combination) -> Iterator[str]:
    if c.loss.kind in WITHOUT_RATIO and c.correction.kind == "bypass" and (c.staleness or c.minibatches > 1):
        off = f"rollout.max_staleness = {c.staleness}" if c.staleness else f"learner.minibatches = {c.minibatches}"
        yield (
            f"algorithm.loss.kind = {c.loss.kind!r} has no ratio and algorithm.correction.kind = 'bypass' no weight: "
            f"nothing corrects for the older policy that sampled ({off}): set algorithm.correction.kind = "
            "'importance', or rollout.mode = 'sync' and learner.minibatches = 1"
        )


def _unread_policy(c: Combination) -> Iterator[str]:
    if c.correction.kind in ("decoupled", "kept", "log_linear") and not c.takes_ratio():
        yield (
            f"algorithm.correction.kind = {c.correction.kind!r} sets the policy that a loss takes its ratio to, and "
            f"algorithm.loss.kind = {c.loss.kind!r} takes none: set algorithm.correction.kind = 'importance', or a "
            "loss with a ratio such as 'ppo'"
        )


def _young_tokens(c: Combination) -> Iterator[str]:
    if c.correction.kind == "log_linear" and c.staleness < 2 and c.takes_ratio():
        yield (
            "algorithm.correction.kind = 'log_linear' is 'bypass' for tokens of age 0 and 1, and no older ones train "
            f"(the bound on staleness in force is {c.staleness}): set rollout.max_staleness to 2 or more, with "
            "rollout.mode = 'async', or algorithm.correction.kind = 'bypass'"
        )


def _inert_clip(c: Combination) -> Iterator[str]:
    options = c.loss.options
    if c.loss.kind in ("ppo", "gspo", "gspo_token") and options.get("clip_low", 0.0) >= 1.0:
        yield (
            f"algorithm.loss.clip_low = {options['clip_low']:g} never acts, since no ratio is under 1 − clip_low ≤ 0: "
            "set it under 1"
        )
        return
    if (
        c.correction.kind != "bypass"
        or (mask := c.token_mask()) is None
        or c.loss.kind not in ("ppo", "cispo", "dppo_tv")
    ):
        return
    masked = f"algorithm.correction.token_mask = [{mask[0]:g}, {mask[1]:g}] masks such tokens already"
    instead = "bring it inside the mask, or set algorithm.correction.token_mask = none"
    acts = {
        "clip_high": lambda x: 1.0 + x < mask[1],
        "clip_low": lambda x: 1.0 - x > mask[0],
        "dual_clip": lambda x: x < mask[1],
        "truncate": lambda x: x < mask[1],
    }
    for name, value in options.items():
        if value is not None and name in acts and not acts[name](value):
            yield f"algorithm.loss.{name} = {value:g} never acts, since {masked}: {instead}"
    own = c.loss.kind == "ppo" and not any(name in options for name in CLIP)
    if own and not any(acts[name](value) for name, value in CLIP.items()):
        yield (
            f"the clip of 'ppo' ({CLIP['clip_low']:g}, {CLIP['clip_high']:g}) never acts, since {masked}: set "
            "algorithm.loss.clip_low and clip_high inside the mask, or widen it"
        )


def _inert_truncation(c: Combination) -> Iterator[str]:
    truncate, scope = c.correction.options.get("truncate"), c.correction.options.get("scope", "token")
    if truncate is None or c.correction.kind not in ("decoupled", "kept", "log_linear", "importance"):
        return
    if scope is None:
        yield (
            f"algorithm.correction.truncate = {truncate:g} never acts, since algorithm.correction.scope = none has no "
            "weight: leave one of them out"
        )
    elif scope == "token" and (mask := c.token_mask()) is not None and truncate >= mask[1]:
        yield (
            f"algorithm.correction.truncate = {truncate:g} never acts, since algorithm.correction.token_mask = "
            f"[{mask[0]:g}, {mask[1]:g}] masks such tokens already: set it under {mask[1]:g}, or token_mask = none"
        )


def _two_caps(c: Combination) -> Iterator[str]:
    if c.advantage is None or (c.advantage.kind, c.correction.kind) != ("opob", "importance"):
        return
    if c.correction.options.get("scope", "token") != "trajectory":  # a token's cap is no trajectory's
        return
    own, weight = (choice.options.get("truncate", CAP) for choice in (c.advantage, c.correction))
    if own != weight:
        shown = ["none" if cap is None else f"{cap:g}" for cap in (own, weight)]
        yield (
            f"algorithm.advantage.truncate = {shown[0]} caps the weights that 'opob' has its least variance for, and "
            f"algorithm.correction.truncate = {shown[1]} those of the gradient: set both to the same"
        )


def _constant(c: Combination) -> Iterator[str]:
    if c.aggregation == "constant" and c.constant is None:
        most = "" if c.episode_tokens is None else f", {c.episode_tokens}"
        yield (
            "algorithm.aggregation = 'constant' needs algorithm.constant, what an episode's sum is divided by: set it, "
            f"for example to the most tokens that an episode may sample{most}"
        )
    if c.aggregation != "constant" and c.constant is not None:
        yield (
            f"algorithm.constant = {c.constant} is a setting of algorithm.aggregation = 'constant', which is "
            f"{c.aggregation!r}: set the aggregation, or leave it out"
        )


def _pieces(c: Combination) -> Iterator[str]:
    for registry, choice in ((LOSSES, c.loss), (CORRECTIONS, c.correction), (MASKS, c.mask)):
        if choice.kind not in registry.builtin():
            options: dict[str, Any] = registry.options(choice)
            try:
                scope_of(registry.function(choice.kind), f"{registry.key}.kind = {choice.kind!r}", options)
            except ConfigError as error:
                yield str(error)


RULES = (
    _ratio_is_one,
    _ratio_twice,
    _ratio_dropped,
    _unread_policy,
    _young_tokens,
    _inert_clip,
    _inert_truncation,
    _two_caps,
    _constant,
    _pieces,
)
