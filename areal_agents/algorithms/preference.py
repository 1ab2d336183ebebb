"""Losses on pairs of sequences, of which one is preferred."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from areal_agents.algorithms.offpolicy import check_same_shape


class PreferenceTerms(NamedTuple):
    """The outcome of a preference loss, one entry a pair."""

    loss_P: Tensor
    """float [P], to be minimised; carries the gradient."""
    chosen_P: Tensor
    """float [P], β·(log π − log π_ref) of the better sequence, its implicit reward."""
    rejected_P: Tensor
    """float [P], the same of the worse one."""


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, ref_chosen_P: Tensor, ref_rejected_P: Tensor, *, beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceTerms:  # fmt: skip
    """Compute the DPO loss of each pair.

        m = β·[(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))]
        L = −(1−ε)·log σ(m) − ε·log σ(−m)

    DPO (2305.18290, eq. 7); ε > 0 is conservative DPO, for pairs of which a share ε has the wrong order (its authors'
    note, "A note on DPO with noisy preferences"). log π of a sequence is the sum over its assistant's tokens.

    Args:
        chosen_P: log π(y_w) with gradient, float [P].
        rejected_P: log π(y_l) with gradient, float [P].
        ref_chosen_P: log π_ref(y_w), float [P].
        ref_rejected_P: log π_ref(y_l), float [P].
        beta: β.
        label_smoothing: ε.

    Raises:
        ValueError: for unequal shapes, β ≤ 0, or ε outside [0, 0.5).
    """
    check_same_shape(chosen_P=chosen_P, rejected_P=rejected_P, ref_chosen_P=ref_chosen_P, ref_rejected_P=ref_rejected_P)
    if not beta > 0.0:
        raise ValueError(f"beta = {beta} must be positive")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing = {label_smoothing} must be at least 0 and below 0.5")
    better_P, worse_P = beta * (chosen_P - ref_chosen_P), beta * (rejected_P - ref_rejected_P)
    margin_P = better_P - worse_P
    log_sigmoid = torch.nn.functional.logsigmoid
    loss_P = -(1.0 - label_smoothing) * log_sigmoid(margin_P) - label_smoothing * log_sigmoid(-margin_P)
    return PreferenceTerms(loss_P, better_P.detach(), worse_P.detach())
