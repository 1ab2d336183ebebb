"""What other policies make of the tokens that the sampler chose: pay for leaving a reference, credit from a teacher.

    KL in the reward     r_k ← r_k − β · Σ_{t in turn k} k(μ, ref)       before the estimator
    distillation         A_t ← A_t + c · (log teacher − log μ)           after it

μ is the policy that sampled, l = log μ − log ref. k is ``regularizers.kl_estimate`` with μ in the place of π: k1 = l,
k2 = ½·l², k3 = ref/μ − 1 + l. Under μ the mean of k1 and of k3 is KL(μ‖ref), and k2's is near it for near policies.
The policy gradient of the reward's term is the divergence's own for k1 alone: with k3 as a reward it is not.

The teacher's credit is the reverse KL a token: under μ its mean is −KL(μ‖teacher), and REINFORCE with it descends on
the divergence at each token, given what was sampled before. A later token's divergence gives an earlier one no credit
(a discount of 0). It is on-policy distillation as in 2306.08543 (MiniLLM's reverse KL, without its look ahead) and
2306.13649 (GKD, λ = 1); K. Lu et al., "On-policy distillation" (Thinking Machines, 2025) for the form as an advantage.

Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from areal_agents.algorithms.batch import Batch
from areal_agents.algorithms.estimator import Advantages, entries
from areal_agents.algorithms.regularizers import KlEstimator, kl_estimate
from areal_agents.types import Trajectory

ByTurn = Sequence[Sequence[float]]
"""A number of each sampled token of an episode, [T_k] a turn."""
TEACHER = "teacher"
"""The name of the teacher's log π among a row's columns, NaN where it has none."""


def penalties(kind: KlEstimator, trajectory: Trajectory, reference_K: ByTurn) -> list[list[float]]:
    """Return the estimate of KL(μ‖ref) at each sampled token, nats, [T_k] a turn.

    Raises ValueError for an unknown estimator.
    """
    out = []
    for turn, reference in zip(trajectory.turns, reference_K, strict=True):
        mu_T = torch.tensor(turn.completion.logprobs, dtype=torch.float64)
        ref_T = torch.tensor(list(reference), dtype=torch.float64)
        out.append([float(x) for x in kl_estimate(kind, mu_T, ref_T, mu_T)])
    return out


def taught(advantages: Advantages, trajectory: Trajectory, teacher_K: ByTurn, coef: float) -> list[float | list[float]]:
    """Return an episode's advantages with the teacher's credit, as ``rows_of`` takes them.

    Args:
        advantages: one number a turn [K], or one a sampled token.
        trajectory: the episode.
        teacher_K: the teacher's log π of each sampled token; one that is not finite gives no credit.
        coef: c.
    """
    out: list[float | list[float]] = []
    for given, turn, teacher in zip(entries(advantages), trajectory.turns, teacher_K, strict=True):
        mu_T = np.asarray(turn.completion.logprobs, np.float64)
        gap_T = np.asarray(teacher, np.float64) - mu_T
        out.append((np.asarray(given) + coef * np.where(np.isfinite(gap_T), gap_T, 0.0)).tolist())
    return out


def teacher_metrics(batch: Batch) -> dict[str, float]:
    """Return how far the sampler is from the teacher, none without a teacher.

    ``teacher_kl`` is the mean of log μ − log teacher over the sampled tokens that have both, nats a token, and
    ``teacher_kl/turn_K`` that of turn K. ``teacher_unscored`` is the share of tokens that the teacher gives no number.
    """
    rows = [row for row in batch.rows if TEACHER in row.columns]
    if not rows:
        return {}
    gap_T = np.concatenate([(r.logprobs - r.columns[TEACHER])[r.mask] for r in rows]).astype(np.float64)
    turn_T, known_T = np.concatenate([r.turns[r.mask] for r in rows]), np.isfinite(gap_T)
    found = {"teacher_unscored": float(1.0 - known_T.mean()) if len(known_T) else 0.0}
    if known_T.any():
        found["teacher_kl"] = float(gap_T[known_T].mean())
    for k in sorted(set(turn_T[known_T].tolist())):
        found[f"teacher_kl/turn_{k}"] = float(gap_T[known_T & (turn_T == k)].mean())
    return found
