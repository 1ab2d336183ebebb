"""Figures that say how far off the policy the sampled tokens of a batch were, and what was masked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from areal_agents.algorithms.offpolicy import LOG_RATIO_BOUND, check_same_shape, log_ratio, no_future
from areal_agents.algorithms.spans import Span


@dataclass
class OffPolicyStats:
    """Figures that say how far off the policy the tokens were.

    Call ``add`` for each micro-batch, then ``result``. Everything is a mean over sampled tokens (``mask_T``), masked
    ones included, so any split into micro-batches gives the same result. Holds Python numbers only: no tensor, no
    graph.
    """

    tokens: int = 0
    _sums: dict[str, float] = field(default_factory=dict)
    _by_turn: dict[int, tuple[int, float]] = field(default_factory=dict)
    _by_age: dict[int, int] = field(default_factory=dict)
    _by_length: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(
        self,
        logprobs_T: Tensor,
        behaviour_T: Tensor,
        mask_T: Tensor,
        kept_T: Tensor,
        clipped_T: Tensor,
        turns_T: Tensor,
        versions_T: Tensor,
        *,
        version: int,
        episode_tokens_T: Tensor | None = None,
        weight_T: Tensor | None = None,
        masked_by: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Count the sampled tokens of one micro-batch.

        Args:
            logprobs_T: log π, float [T].
            behaviour_T: log μ, float [T].
            mask_T: bool [T], True on sampled tokens.
            kept_T: bool [T], False where the correction or the age masks the token.
            clipped_T: bool [T], True where the loss clips the token.
            turns_T: int [T], turn index.
            versions_T: int [T], version that sampled the token.
            version: the learner's.
            episode_tokens_T: int [T], sampled tokens of the token's episode, for the masked share by episode length;
                None leaves that share out.
            weight_T: float [T], what multiplied the loss, 0 where masked; None leaves its mean out.
            masked_by: for each thing that masks, bool [T], True where it does.

        Raises:
            ValueError: for unequal shapes, or a token from a version after ``version``.
        """
        given = {"logprobs_T": logprobs_T, "behaviour_T": behaviour_T, "mask_T": mask_T, "kept_T": kept_T}
        given |= {"clipped_T": clipped_T, "turns_T": turns_T, "versions_T": versions_T}
        given |= {} if episode_tokens_T is None else {"episode_tokens_T": episode_tokens_T}
        given |= {} if weight_T is None else {"weight_T": weight_T}
        check_same_shape(**given, **masked_by)
        mask_T = mask_T.bool()
        no_future(versions_T[mask_T], version)
        log_u_N = log_ratio(logprobs_T.detach()[mask_T].double(), behaviour_T.detach()[mask_T].double())
        u_N, masked_N = log_u_N.exp(), ~kept_T[mask_T].bool()
        self.tokens += log_u_N.numel()
        sums = {
            "u": u_N,
            "u2": u_N.square(),
            "k1": -log_u_N,
            "k3": u_N - 1.0 - log_u_N,
            "abs": log_u_N.abs(),
            "clipped": clipped_T[mask_T],
            "masked": masked_N,
            **({} if weight_T is None else {"weight": weight_T[mask_T]}),
            **{f"masked/{name}": by_T[mask_T] for name, by_T in masked_by.items()},
        }
        totals = torch.stack([x.double().sum() for x in sums.values()]).tolist()
        for name, total in zip(sums, totals, strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + total
        for turn, n, total in _grouped(turns_T[mask_T], log_u_N.abs()):
            count, old = self._by_turn.get(turn, (0, 0.0))
            self._by_turn[turn] = count + n, old + total
        for age, n, _ in _grouped(version - versions_T[mask_T], log_u_N):
            self._by_age[age] = self._by_age.get(age, 0) + n
        if episode_tokens_T is not None:
            for length, n, total in _grouped(episode_tokens_T[mask_T], masked_N.double()):
                low = 1 << (length.bit_length() - 1)  # buckets are powers of two: 1, 2-3, 4-7, …
                count, masked = self._by_length.get(low, (0, 0))
                self._by_length[low] = count + n, masked + round(total)

    def result(self) -> dict[str, float]:
        """Return the metrics by name.

        Where no token was added, they are just ``{"tokens": 0.0}``.

        ess             (Σu)² / (N·Σu²), in (0, 1]; 1 on policy
        kl_k1, kl_k3    KL(μ‖π) from μ's samples: mean(−log u), and mean(u − 1 − log u) ≥ 0 (Schulman, "Approximating
                        KL divergence", 2020); log u is bounded as everywhere here
        abs_dlogp       mean |log π − log μ|; ``abs_dlogp/turn_K`` the same for turn index K
        clip_fraction   share of tokens clipped by the loss
        masked_share    share of tokens masked; ``masked_share/length_A_B`` for episodes of A to B sampled tokens,
                        ``masked_share/by_NAME`` by correction, mask or age, a token perhaps by several
        weight_mean     mean of what multiplied the loss, 0 where masked
        age_mean, age_max, age_share/AGE     learner's version minus the token's
        """
        n = self.tokens
        if n == 0:
            return {"tokens": 0.0}
        s = self._sums
        out = {
            "tokens": float(n),
            "ess": min(1.0, s["u"] ** 2 / (n * s["u2"])),  # rounding
            "kl_k1": s["k1"] / n,
            "kl_k3": s["k3"] / n,
            "abs_dlogp": s["abs"] / n,
            "clip_fraction": s["clipped"] / n,
            "masked_share": s["masked"] / n,
            "age_mean": sum(age * count for age, count in self._by_age.items()) / n,
            "age_max": float(max(self._by_age)),
        }
        out |= {"weight_mean": s["weight"] / n} if "weight" in s else {}
        out |= {f"masked_share/by_{k.partition('/')[2]}": v / n for k, v in s.items() if k.startswith("masked/")}
        out |= {f"age_share/{age}": count / n for age, count in sorted(self._by_age.items())}
        out |= {f"abs_dlogp/turn_{k}": total / count for k, (count, total) in sorted(self._by_turn.items())}
        out |= {f"masked_share/length_{b}_{2 * b - 1}": m / count for b, (count, m) in sorted(self._by_length.items())}
        return out


class EffectiveSize:
    """The effective sample size of a minibatch, as a share of its tokens, turns or trajectories.

    Call ``add`` for each micro-batch: a turn or a trajectory may be spread over several.
    """

    def __init__(self, scope: Span) -> None:
        self._scope: Span = scope
        self._logs: dict[tuple[int, int], float] = {}

    def add(self, logprobs_T: Tensor, behaviour_T: Tensor, episodes_T: Tensor, turns_T: Tensor) -> None:
        """Add the log ratios π/μ of some tokens to those of their spans. Raises ValueError for unequal shapes."""
        check_same_shape(logprobs_T=logprobs_T, behaviour_T=behaviour_T, episodes_T=episodes_T, turns_T=turns_T)
        logs = log_ratio(logprobs_T.detach().double(), behaviour_T.double()).tolist()
        for log, episode, turn in zip(logs, episodes_T.tolist(), turns_T.tolist(), strict=True):
            key = {"token": (-1, len(self._logs)), "turn": (episode, turn), "trajectory": (episode, -1)}[self._scope]
            self._logs[key] = self._logs.get(key, 0.0) + log

    def share(self) -> float:
        """Return (Σw)² / (N·Σw²) of the N spans' ratios w, in (0, 1]; 1 where none was added.

        A logarithm is bounded to ±LOG_RATIO_BOUND, as everywhere.
        """
        if not self._logs:
            return 1.0
        w_N = torch.tensor(list(self._logs.values()), dtype=torch.float64)
        w_N = torch.exp(w_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
        return min(1.0, float(w_N.sum().square() / (len(w_N) * w_N.square().sum())))


def _grouped(keys_N: Tensor, values_N: Tensor) -> list[tuple[int, int, float]]:
    """Return (key, count, sum of values) for each distinct key."""
    unique_M, index_N, count_M = torch.unique(keys_N, return_inverse=True, return_counts=True)
    total_M = torch.zeros(len(unique_M), dtype=torch.float64, device=values_N.device).index_add_(0, index_N, values_N)
    return list(zip(unique_M.tolist(), count_M.tolist(), total_M.tolist(), strict=True))
