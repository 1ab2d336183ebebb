"""The advantage estimator that the settings choose: it calls the function, and checks what comes back.

    groups of EpisodeView ─▶ estimator ─▶ advantages, a number a turn [K] or one a sampled token, K × [T_k]

An estimator is a pure function of one group (``group``) or of a whole batch (``groups``). What else it needs it
declares: where its baseline comes from (``compares_with``) and whether it reads a critic's values (``reads_values``).

Sums run in float64, results are float32. A difference that is mere rounding (``utils/tolerance.py``) is exactly 0, so
that equal rewards give no gradient: AdamW would take a step even for 1e-16, whatever its momentum says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.registry import ADVANTAGES, Choice
from areal_agents.errors import ConfigError
from areal_agents.group_reward import Declaration
from areal_agents.utils.tolerance import all_same, rounding_of

Baseline = Literal["others", "group", "batch", "greedy", "values", "none"]
Advantages = Tensor | tuple[Tensor, ...]
"""Of one episode: float32 [K], one number a turn, or for each turn [T_k], one number a sampled token."""
Group = Sequence[EpisodeView]
F = TypeVar("F", bound=Callable[..., Any])


def compares_with(baseline: Baseline) -> Callable[[F], F]:
    """Make a decorator that declares what an estimator takes an episode's baseline from.

    ``others`` are the group's other episodes, so that the baseline does not depend on the episode's own actions.
    ``group`` is the whole group, and ``batch`` all groups of the batch, itself included: a bias that the estimator
    states. ``greedy`` is an episode of the same task that is played without chance, which the trainer adds for it.
    ``values`` are a critic's. ``none`` is no episode at all.
    """

    def declare(function: F) -> F:
        function.baseline = baseline  # type: ignore[attr-defined]
        return function

    return declare


def reads_values(function: F) -> F:
    """Declare that an estimator reads ``values_K`` and ``tail_value``, so that a critic is trained for it."""
    function.reads_values = True  # type: ignore[attr-defined]
    return function


def reads_ratios(function: F) -> F:
    """Declare that an estimator reads ``log_ratio``, so that the learner is asked for log π before each step."""
    function.reads_ratios = True  # type: ignore[attr-defined]
    return function


def reads_state_keys(function: F) -> F:
    """Declare that an estimator compares turns by ``state_keys_K``, which the environment must give."""
    function.reads_state_keys = True  # type: ignore[attr-defined]
    return function


def needs_more_than(parameter: str) -> Callable[[F], F]:
    """Make a decorator that declares that a group must have more episodes than the estimator's ``parameter``."""

    def declare(function: F) -> F:
        function.more_than = parameter  # type: ignore[attr-defined]
        return function

    return declare


def per_turn(advantages: Advantages) -> list[float]:
    """Return one number a turn: where there is one a token, their mean, and 0 for a turn without tokens."""
    if isinstance(advantages, Tensor):
        return [float(a) for a in advantages]
    return [float(t.mean()) if t.numel() else 0.0 for t in advantages]


def entries(advantages: Advantages) -> list[float | list[float]]:
    """Return an entry a turn as ``rows_of`` takes it: a number, or a list of one for each token."""
    if isinstance(advantages, Tensor):
        return [float(a) for a in advantages]
    return [[float(a) for a in t] for t in advantages]


class Estimator:
    """The estimator that the settings choose, looked up once and called for every batch."""

    def __init__(self, choice: Choice) -> None:
        """Look the function up, and try it on a small batch.

        Raises ConfigError for an unknown estimator, a wrong parameter, or a function that returns something else.
        """
        self.choice = choice
        self._estimate = ADVANTAGES.bound(choice)
        self.over_batch = ADVANTAGES.takes(choice) == ("groups",)
        """Whether it looks at a whole batch at once."""
        function = ADVANTAGES.function(choice.kind)
        self.baseline: Baseline | None = getattr(function, "baseline", None)
        self.reads_values: bool = getattr(function, "reads_values", False)
        self.reads_ratios: bool = getattr(function, "reads_ratios", False)
        self.reads_state_keys: bool = getattr(function, "reads_state_keys", False)
        self._more_than: str | None = getattr(function, "more_than", None)
        tried: Group = (EpisodeView((0.0, 1.0)), EpisodeView((0.5,), terminated=False, stop_reason="max_turns"))
        self.of_batch([self._told(tried, greedy_return=0.5)])

    def __call__(self, group: Group) -> list[Advantages]:
        """Return the advantages of one group's episodes, as of a batch of that group alone.

        Raises ConfigError where the function returns anything else, or a number that is not finite.
        """
        (found,) = self.of_batch([group])
        return found

    def judges_alone(self) -> bool:
        """Say whether a group has a signal in its batch exactly where the estimator finds one in the group alone.

        An estimator of whole batches is tried: a group of equal rewards, beside one of different rewards and lengths.
        """
        if not self.over_batch:
            return True
        same = (EpisodeView((1.0,)), EpisodeView((1.0,)))
        other = (EpisodeView((1.0,)), EpisodeView((0.0,), tokens_K=(3,)))
        return not _any(self.of_batch([self._told(group, greedy_return=1.0) for group in (same, other)])[0])

    def _told(self, group: Group, *, greedy_return: float) -> Group:
        """Return made-up episodes with what the estimator declares that it reads."""
        if self.reads_values:
            group = tuple(replace(e, values_K=tuple((0.25,) * n for n in e.tokens_K)) for e in group)
        if self.reads_ratios:
            group = tuple(replace(e, log_ratio=0.1) for e in group)
        if self.baseline == "greedy":
            group = tuple(replace(e, greedy_return=greedy_return) for e in group)
        return group

    def require_size(self, group_size: int) -> None:
        """Raise ConfigError where groups of ``rollout.group_size`` are too small for the estimator."""
        name = self._more_than
        if name is not None and group_size <= (least := ADVANTAGES.options(self.choice)[name]):
            raise ConfigError(
                f"algorithm.advantage.{name} = {least} of {self.choice.kind!r} needs more episodes a group than that, "
                f"and rollout.group_size = {group_size}: raise it, or lower {name}"
            )

    def of_batch(self, groups: Sequence[Group]) -> list[list[Advantages]]:
        """Return the advantages of each group's episodes.

        Raises ConfigError where the function returns anything else, or a number that is not finite.
        """
        if self.over_batch:
            every = [e for group in groups for e in group]
            flat = iter(self._snapped(every, lambda view: self._flat(view, [len(g) for g in groups])))
            return [[next(flat) for _ in group] for group in groups]
        return [self._snapped(group, lambda view: self._estimate(tuple(view))) for group in groups]

    def _flat(self, episodes: Group, sizes: Sequence[int]) -> Any:
        """Call an estimator of whole batches, and put its groups' results one behind the other."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        found = self._estimate(tuple(tuple(episodes[e - n : e]) for e, n in zip(ends, sizes, strict=True)))
        if not isinstance(found, list | tuple) or [len(g) for g in found] != list(sizes):
            raise ConfigError(f"{self._where} returned no list a group: expected one for each of {len(sizes)}")
        return [a for group in found for a in group]

    def _snapped(self, episodes: Group, estimate: Callable[[Group], Any]) -> list[Advantages]:
        advantages = self._checked(episodes, estimate(episodes))
        if self.reads_values:  # a critic's values are no exact numbers: their differences are what they are
            return advantages
        # For equal returns an estimator looks at more than returns, or makes much of a rounding: in float32, or by a
        # division by the spread. Numbers of few bits have exact means, and with them it shows which.
        equal = all_same([e.total for e in episodes])
        if equal and _any(advantages):
            plain = _of_few_bits(episodes)
            tried = [plain] if _as_different(episodes, plain) else [plain, _ranked(episodes)]
            if not any(_any(self._checked(views, estimate(views))) for views in tried):
                return [mapped(torch.zeros_like, a) for a in advantages]
        # of ±1, whatever the rewards, after a normalisation
        largest = max((float(t.abs().max()) for a in advantages for t in tensors_of(a) if t.numel()), default=0.0)
        return [mapped(lambda t: snapped(t, episodes, largest), a) for a in advantages]

    @property
    def _where(self) -> str:
        return f"algorithm.advantage.kind = {self.choice.kind!r}"

    def _checked(self, episodes: Group, found: Any) -> list[Advantages]:
        if not isinstance(found, list | tuple) or not all(
            isinstance(a, Tensor) or (isinstance(a, list | tuple) and all(isinstance(t, Tensor) for t in a))
            for a in found
        ):
            raise ConfigError(
                f"{self._where} returned {type(found).__name__}: expected a list of tensors, one an episode"
            )
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else [tuple(t.shape) for t in a] for a in found]
        fits = len(found) == len(episodes) and all(
            s == ((len(e.rewards_K),) if isinstance(s, tuple) else [(n,) for n in e.tokens_K])
            for s, e in zip(shapes, episodes, strict=True)
        )
        if not fits:
            turns = [(len(e.rewards_K),) for e in episodes]
            raise ConfigError(
                f"{self._where} returned advantages of shapes {shapes}: expected one number a turn, {turns}, or for "
                "each turn one a sampled token"
            )
        advantages: list[Advantages] = [
            a.detach().float() if isinstance(a, Tensor) else tuple(t.detach().float() for t in a) for a in found
        ]
        if not all(bool(torch.isfinite(t).all()) for a in advantages for t in tensors_of(a)):
            raise ConfigError(f"{self._where} returned an advantage that is not finite, for {list(episodes)}")
        return advantages


def refuse_biased(choice: Choice, declared: Declaration, reward: str) -> None:
    """Raise ConfigError where a group reward would be part of the very baseline that must not depend on the episode.

    A reward that reads the group's other episodes lets their rewards depend on this one's actions, and so the baseline
    too. Leave-one-out votes only scale the gradient of turns that all have (``Declaration.leave_one_out``).

    Args:
        choice: the estimator.
        declared: what the group reward declares.
        reward: its name.
    """
    if not declared.reads_others or declared.leave_one_out:
        return
    where, function = f"algorithm.advantage.kind = {choice.kind!r}", ADVANTAGES.function(choice.kind)
    baseline = getattr(function, "baseline", None)
    reads = f"the group reward {reward!r} reads the other episodes (reads_others)"
    if baseline not in get_args(Baseline):
        names = ", ".join(f'"{name}"' for name in get_args(Baseline))
        raise ConfigError(
            f"{where} does not say what it takes an episode's baseline from, and {reads}: declare it with "
            f"@compares_with({names}) (areal_agents.algorithms.estimator)"
        )
    if baseline == "others":
        raise ConfigError(
            f"{where} compares an episode with the others of its group, whose rewards must not depend on it, but "
            f"{reads}: the gradient would be biased. Use algorithm.advantage.kind = 'grpo', which states its "
            "bias, or a reward of leave-one-out votes (areal_agents.rewards.agreement)"
        )


def snapped(advantages: Tensor, group: Group, largest: float = math.inf) -> Tensor:
    """Replace what is mere rounding of the group's rewards, or of numbers up to ``largest``, by 0."""
    scale = max(math.fsum(map(abs, e.rewards_K)) for e in group)
    return torch.where(advantages.abs() > rounding_of(min(scale, largest)), advantages, 0.0)


def tensors_of(advantages: Advantages) -> tuple[Tensor, ...]:
    """Return the tensors that the advantages of an episode are made of."""
    return (advantages,) if isinstance(advantages, Tensor) else advantages


def mapped(function: Callable[[Tensor], Tensor], advantages: Advantages) -> Advantages:
    """Return the advantages of an episode with each of their tensors changed by ``function``."""
    return function(advantages) if isinstance(advantages, Tensor) else tuple(map(function, advantages))


def _any(advantages: Sequence[Advantages]) -> bool:
    return any(bool(t.any()) for a in advantages for t in tensors_of(a))


def _as_different(group: Group, plain: Group) -> bool:
    """Say whether rewards that differ by more than a rounding still differ in ``plain``, which was made of them."""
    rewards = [r for e in group for r in e.rewards_K]
    pairs, limit = sorted(zip(rewards, (r for e in plain for r in e.rewards_K), strict=True)), rounding_of(*rewards)
    return not any(b - a > limit and p == q for (a, p), (b, q) in pairwise(pairs))


def _ranked(group: Group) -> list[EpisodeView]:
    """Put small whole numbers in the place of rewards: different ones for different rewards, with one sum an episode.

    An estimator gives 0 for them where it looks at returns alone, however little the turns differ in the rewards.
    """
    rewards, rank = sorted({r for e in group for r in e.rewards_K}), 0
    limit, ranks = rounding_of(*rewards), {rewards[0]: 0}
    for lower, reward in pairwise(rewards):
        rank += reward - lower > limit
        ranks[reward] = rank
    heads = [tuple(float(ranks[r]) for r in e.rewards_K[:-1]) for e in group]
    total = max(map(sum, heads))
    return [replace(e, rewards_K=(*head, total - sum(head))) for e, head in zip(group, heads, strict=True)]


def _of_few_bits(group: Group) -> list[EpisodeView]:
    """Round the rewards to 14 bits below the largest of them, so that float32 has room for a thousand of them."""
    largest = max(abs(r) for e in group for r in e.rewards_K)
    unit = math.ldexp(1.0, max(math.frexp(largest)[1] - 14, -1000))  # below it there is nothing to round
    return [replace(e, rewards_K=tuple(round(r / unit) * unit for r in e.rewards_K)) for e in group]
