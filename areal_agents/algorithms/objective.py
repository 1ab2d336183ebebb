"""The training objective over rows: which tokens count, what they weigh, and their loss.

It bridges ``batch.Row`` (numpy, one path) and the element-wise functions of ``losses`` and ``offpolicy`` (torch, [T]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_agents.algorithms import losses, offpolicy
from areal_agents.algorithms.batch import LEFT_OUT, Batch, Row
from areal_agents.algorithms.offpolicy_stats import OffPolicyStats
from areal_agents.algorithms.registry import CORRECTIONS, LOSSES, MASKS, NO_MASK, Choice, Registry, kept_decay
from areal_agents.algorithms.scope import Scope, scope_of, widest
from areal_agents.errors import ConfigError

Aggregation = Literal["token", "episode", "sequence", "constant"]
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The sampled tokens of some rows, one after another.

    Every field is [T].
    """

    ids: Tensor
    behaviour: Tensor
    """log μ."""
    advantages: Tensor
    versions: Tensor
    turns: Tensor
    episodes: Tensor
    """Index of the episode inside the batch."""
    proximal: Tensor
    """log p; zeros where there is no proximal policy."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """``Row.columns``, those that every row has."""

    @classmethod
    def of(cls, rows: Sequence[Row], proximal: Sequence[NDArray[np.float32]] | None) -> Tokens:
        """Collect the sampled tokens of ``rows``.

        ``proximal`` holds log p for each row, float [T], where the row's mask is True. It is None without a proximal
        policy.
        """

        def column(parts: list[NDArray[np.generic]]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts))

        old = [np.zeros(len(r), np.float32) for r in rows] if proximal is None else proximal
        named = set.intersection(*(set(r.columns) for r in rows)) if rows else set()
        return cls(
            ids=column([r.ids[r.mask] for r in rows]),
            behaviour=column([r.logprobs[r.mask] for r in rows]),
            advantages=column([r.advantages[r.mask] for r in rows]),
            versions=column([r.versions[r.mask] for r in rows]),
            turns=column([r.turns[r.mask] for r in rows]),
            episodes=column([np.full(int(r.mask.sum()), r.episode, np.int64) for r in rows]),
            proximal=column([p[r.mask] for r, p in zip(rows, old, strict=True)]),
            columns={name: column([r.columns[name][r.mask] for r in rows]) for name in sorted(named)},
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Tokens:
        names = (f.name for f in fields(self) if f.name != "columns")
        cut = {n: getattr(self, n)[part] for n in names}
        return Tokens(**cut, columns={name: column[part] for name, column in self.columns.items()})


@dataclass(frozen=True, slots=True)
class Denominators:
    """The counts over a whole minibatch, rows without a gradient included.

    So any split into micro-batches adds up to the same loss.
    """

    tokens: int
    tokens_E: Tensor
    """int [E'], the sampled tokens of each episode of the batch over all its rows."""
    episodes: int

    @classmethod
    def of(cls, rows: Sequence[Row], *, total_episodes: int, episodes: int) -> Denominators:
        """Count the ``rows`` of a minibatch of ``episodes`` episodes, out of a batch of ``total_episodes``."""
        tokens_E = torch.zeros(total_episodes, dtype=torch.int64)
        for row in rows:
            tokens_E[row.episode] += int(row.mask.sum())
        return cls(int(tokens_E.sum()), tokens_E, episodes)


class PolicyObjective:
    """The objective that the settings choose: a loss a token, weighted by a correction, summed over a minibatch.

        Σ kept · weight · loss(π/old, A)        old: the correction's, else p where it takes ``proximal_T``, else μ

    bypass:           Σ 1[lo ≤ π/μ ≤ hi] · loss(π/μ, A)
    decoupled, kept:  Σ min(p/μ, C)·1[lo ≤ p/μ ≤ hi] · loss(π/p, A)
    """

    def __init__(
        self,
        *,
        loss: Choice,
        correction: Choice,
        aggregation: Aggregation,
        mask: Choice = NO_MASK,
        constant: int | None = None,
        max_staleness: int | None = None,
    ) -> None:
        """Look the three functions up.

        Args:
            loss: of ``registry.LOSSES``.
            correction: of ``registry.CORRECTIONS``.
            aggregation: how tokens add up (``losses`` has a function for each).
            mask: of ``registry.MASKS``.
            constant: what ``constant`` divides an episode's sum by.
            max_staleness: older tokens are masked; None: none is.

        Raises:
            ConfigError: for an unknown name, a wrong parameter, or a function that returns something else on a trial.
        """
        self._loss = _Chosen(LOSSES, loss)
        self._correction = _Chosen(CORRECTIONS, correction)
        self._mask = _Chosen(MASKS, mask)
        self.scope: Scope = widest(*(f.scope for f in (self._loss, self._correction, self._mask)))
        self._masks = mask.kind != NO_MASK.kind
        self.proximal_decay = kept_decay(correction)
        """β of the average of policies that p is. None: p is recomputed, or there is none."""
        self._aggregation, self._constant, self._max_staleness = aggregation, constant, max_staleness
        trial_T = torch.tensor([-0.5, -1.0])
        tokens = Tokens(
            ids=torch.tensor([1, 2]), behaviour=trial_T - 0.1, advantages=torch.tensor([1.0, -1.0]),
            versions=torch.tensor([0, 0]), turns=torch.tensor([0, 0]), episodes=torch.tensor([0, 1]),
            proximal=trial_T - 0.2,
        )  # fmt: skip
        self._parts(trial_T.clone().requires_grad_(), tokens, version=1, noise=0.0)

    @property
    def needs_proximal(self) -> bool:
        """Whether log p must be there: it costs a forward pass without gradient a batch."""
        return "proximal_T" in self._correction.takes

    @property
    def needs_noise(self) -> bool:
        """Whether the mask reads the distance between engine and learner on policy: a forward pass, once in a run.

        What a mask declares by ``masks.leaves_noise`` is held to its parameters.
        """
        unread: Mapping[str, object] = getattr(self._mask.function, "leaves_noise", {})
        options = self._mask.options
        if unknown := [name for name in unread if name not in options]:
            raise ConfigError(
                f"{self._mask.where}: @leaves_noise({unknown[0]} = …) names none of its parameters, which are "
                f"{', '.join(options) or 'none'}"
            )
        left = any(type(options[name]) is type(at) and options[name] == at for name, at in unread.items())
        return "noise_T" in self._mask.takes and not left

    def _parts(
        self, logprobs_T: Tensor, tokens: Tokens, *, version: int, noise: float
    ) -> tuple[offpolicy.Correction, Tensor, losses.LossTerms]:
        """Call the correction, the mask and the loss, and check what they return: they may be anybody's.

        Correction and mask see log π without its gradient: a weight that carried one would change the objective.
        """
        columns = {
            "logprobs_T": logprobs_T.detach(),
            "behaviour_T": tokens.behaviour,
            "proximal_T": tokens.proximal,
            "advantages_T": tokens.advantages,
            "ages_T": version - tokens.versions,
            "episodes_T": tokens.episodes,
            "turns_T": tokens.turns,
            "noise_T": torch.full_like(tokens.behaviour, noise),
        }
        corrected = self._correction(columns, offpolicy.Correction)
        self._correction.require("weight_T", corrected.weight_T, logprobs_T)
        self._correction.require("kept_T", corrected.kept_T, logprobs_T, boolean=True)
        kept_T = self._mask(columns, Tensor)
        self._mask.require("kept_T", kept_T, logprobs_T, boolean=True)
        old_T = corrected.old_T
        if old_T is None:
            old_T = tokens.proximal if self.needs_proximal else tokens.behaviour
        self._correction.require("old_T", old_T, logprobs_T)
        columns |= {"logprobs_T": logprobs_T, "old_logprobs_T": old_T.detach()}
        terms = self._loss(columns, losses.LossTerms)
        self._loss.require("loss_T", terms.loss_T, logprobs_T)
        self._loss.require("clipped_T", terms.clipped_T, logprobs_T, boolean=True)
        if not terms.loss_T.requires_grad:
            raise ConfigError(f"{self._loss.where} returned a loss_T without a gradient: nothing would be learned")
        return corrected, kept_T, terms

    def __call__(
        self,
        logprobs_T: Tensor,
        tokens: Tokens,
        counts: Denominators,
        stats: OffPolicyStats,
        *,
        version: int,
        extra_T: Tensor | None = None,
        noise: float = 0.0,
    ) -> Tensor:
        """Return these tokens' part of the minibatch's loss, a scalar.

        They are as many at once as ``scope`` says. Their off-policy figures go to ``stats``.

        Args:
            logprobs_T: log π with gradient, float [T].
            tokens: everything else about the T tokens.
            counts: what the sum is divided by.
            stats: is told of every token.
            version: the learner's.
            extra_T: what other terms add to the loss of each token that is not masked, float [T]. None: nothing.
            noise: the mean |log π − log μ| on policy, 0 where it was not measured.

        Raises:
            ValueError: what the loss, the correction and the mask raise.
        """
        corrected, unmasked_T, terms = self._parts(logprobs_T, tokens, version=version, noise=noise)
        kept = {"correction": corrected.kept_T}
        if self._masks:
            kept["mask"] = unmasked_T
        if self._max_staleness is not None:
            kept["age"] = offpolicy.age_mask(tokens.versions, version=version, max_staleness=self._max_staleness)
        if LEFT_OUT in tokens.columns:
            kept["overlong"] = tokens.columns[LEFT_OUT] == 0
        kept_T = torch.stack(list(kept.values())).all(0)
        # A masked token adds nothing, whatever weight it was given, and no weight carries a gradient.
        weight_T = torch.where(kept_T, corrected.weight_T.detach(), 0.0)
        loss_T = torch.where(kept_T, terms.loss_T, 0.0) * weight_T
        if extra_T is not None:
            loss_T = loss_T + torch.where(kept_T, extra_T, 0.0)
        # All of them, masked or not: a masked token still counts in the denominator (``losses`` says why).
        sampled_T = torch.ones_like(kept_T)
        stats.add(
            logprobs_T.detach(), tokens.behaviour, sampled_T, kept_T, terms.clipped_T, tokens.turns, tokens.versions,
            version=version, episode_tokens_T=counts.tokens_E[tokens.episodes], weight_T=weight_T,
            masked_by={name: ~by_T for name, by_T in kept.items()},
        )  # fmt: skip
        return self._sum(loss_T, sampled_T, tokens, counts)

    def _sum(self, loss_T: Tensor, sampled_T: Tensor, tokens: Tokens, counts: Denominators) -> Tensor:
        """Add the losses of some tokens up, each as the aggregation weighs it."""
        episodes = counts.episodes
        match self._aggregation:
            case "token":
                return losses.token_mean(loss_T, sampled_T, tokens=counts.tokens)
            case "episode":
                return losses.episode_mean(loss_T, sampled_T, tokens.episodes, counts.tokens_E, episodes=episodes)
            case "sequence":
                return losses.sequence_mean(loss_T, sampled_T, episodes=episodes)
            case "constant" if self._constant is not None:
                return losses.constant_mean(loss_T, sampled_T, episodes=episodes, constant=self._constant)
        raise ValueError(
            f"aggregation = {self._aggregation!r} with constant = {self._constant}: unknown, or no constant"
        )


class _Chosen:
    """A function that the settings choose, called with the columns that it names, and held to what it must return."""

    def __init__(self, registry: Registry, choice: Choice) -> None:
        self.where = f"{registry.key}.kind = {choice.kind!r}"
        self.takes = registry.takes(choice)
        self._function = registry.bound(choice)
        self.function, self.options = registry.function(choice.kind), registry.options(choice)
        self.scope = scope_of(self.function, self.where, self.options)

    def __call__(self, columns: Mapping[str, Tensor], expected: type[Found]) -> Found:
        found = self._function(**{name: columns[name] for name in self.takes})
        if not isinstance(found, expected):
            raise ConfigError(f"{self.where} returned {type(found).__name__}: expected {expected.__name__}")
        return found

    def require(self, name: str, value: object, like_T: Tensor, *, boolean: bool = False) -> None:
        """Raise ConfigError unless ``value`` is a tensor [T] of numbers, or of booleans."""
        if isinstance(value, Tensor) and value.shape == like_T.shape and (value.dtype == torch.bool) == boolean:
            return
        what = f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        kind = "booleans" if boolean else "numbers"
        raise ConfigError(f"{self.where} returned {name} = {what}: expected {kind}, one a token, {list(like_T.shape)}")


def live_rows(batch: Batch, *, max_staleness: int | None, scope: Scope, always: bool = False) -> list[int]:
    """Find the rows that must go through the model: all that can change the gradient.

    Where a loss sees whole episodes, a row without a gradient of its own may weigh another row's tokens.

    Args:
        batch: rows with advantages.
        max_staleness: tokens older than so many versions have no gradient. None is any age.
        scope: what the objective sees at once.
        always: a token has a gradient whatever its advantage is, as a KL term and an entropy bonus give it.

    Returns:
        Indices of rows, ascending.
    """
    if always:
        oldest = np.inf if max_staleness is None else max_staleness
        young = [bool(((batch.version - r.versions <= oldest) & trains(r)).any()) for r in batch.rows]
        if scope == "token":
            return [i for i, y in enumerate(young) if y]
        return list(range(len(batch.rows))) if any(young) else []
    has = [i for i, r in enumerate(batch.rows) if has_gradient(r, version=batch.version, max_staleness=max_staleness)]
    match scope:
        case "token":
            return has
        case "episode":
            episodes = {batch.rows[i].episode for i in has}
            return [i for i, r in enumerate(batch.rows) if r.episode in episodes]
        case "minibatch":
            return list(range(len(batch.rows))) if has else []
    raise ValueError(f"unknown scope {scope!r}")


def has_gradient(row: Row, *, version: int, max_staleness: int | None) -> bool:
    """Say whether any token of ``row`` can contribute a gradient.

    Such a token has an advantage that is not 0, and is not over age.
    """
    live = trains(row) & (row.advantages != 0)
    if max_staleness is not None:
        live &= version - row.versions <= max_staleness
    return bool(live.any())


def trains(row: Row) -> NDArray[np.bool_]:
    """Mark the sampled tokens of ``row`` that may have a gradient, those of an episode that was left out not, [T]."""
    return row.mask & (row.columns[LEFT_OUT] == 0) if LEFT_OUT in row.columns else row.mask


def split_episodes(episodes: int, parts: int, *, seed: int, version: int) -> list[NDArray[np.int64]]:
    """Split ``range(episodes)`` at random into at most ``parts`` non-empty sets.

    No generator state lives between steps, so a resumed run shuffles as the uninterrupted one.

    Args:
        episodes: how many there are in the batch.
        parts: most sets.
        seed: the run's.
        version: the learner's, so that each step shuffles anew.

    Returns:
        Index arrays, int64, which depend on the arguments alone.
    """
    order = np.random.default_rng([seed, version]).permutation(episodes)
    return [p for p in np.array_split(order, min(parts, max(episodes, 1))) if len(p)]


def check_batch(batch: Batch, version: int) -> None:
    """Raise ValueError for a batch of another version, without episodes, or with rows of unknown episodes."""
    if batch.version != version:
        raise ValueError(f"the batch is for version {batch.version}, the learner is at {version}")
    if batch.episodes < 1:
        raise ValueError("a batch without episodes has no loss")
    for row in batch.rows:
        if not 0 <= row.episode < batch.episodes:
            raise ValueError(f"a row of episode {row.episode} in a batch of {batch.episodes} episodes")


def sources(rows: Sequence[Row], at: Sequence[NDArray[np.int64]]) -> Tensor:
    """Find the hidden states that predict the rows' sampled tokens.

    They lie one token before each. ``at`` holds the places of each row's tokens among the states, int [T]. Raises
    ValueError where a row's first token is sampled.
    """
    if any(bool(r.mask[0]) for r in rows):
        raise ValueError("a row's first token is sampled: it has no context, so no probability")
    return torch.from_numpy(np.concatenate([a[np.flatnonzero(r.mask) - 1] for r, a in zip(rows, at, strict=True)]))


def batch_counts(batch: Batch, live: Sequence[int], max_staleness: int | None) -> dict[str, float]:
    """Count what the batch holds, the rows that are skipped included.

    ``live`` are the indices of the rows that are not skipped.
    """
    ages = np.concatenate([batch.version - r.versions[r.mask] for r in batch.rows] or [np.zeros(0, np.int64)])
    over = 0.0 if max_staleness is None or not len(ages) else float((ages > max_staleness).mean())
    return {
        "tokens": float(len(ages)),
        "rows": float(len(batch.rows)),
        "rows_skipped": float(len(batch.rows) - len(live)),
        "episodes": float(batch.episodes),
        "over_age_share": over,
    }
