"""What a critic is fitted to, and how far it is off.

V before each token ─▶ advantage estimator ─▶ A ─▶ R = A + V, the target of V, where V was read
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from areal_agents.algorithms.estimator import Advantages

Columns = dict[str, list[list[float]]]
"""Named numbers of an episode's sampled tokens, [T_k] a turn, as ``rows_of`` takes them."""


def target_columns(advantages: Advantages, values_K: Sequence[Sequence[float]]) -> Columns:
    """Return the columns that a critic learns from.

    ``values`` is V when the batch was made, ``returns`` R = A + V, and ``fitted`` 1 where V is fitted to R, else 0. An
    estimator that gives one number a turn has read V before the turn's first token: it is fitted there alone. One that
    gives one a token has read V before every token.
    """
    returns: list[list[float]] = []
    for k, values in enumerate(values_K):
        given = advantages[k].tolist()
        of_tokens = [given, *[0.0] * (len(values) - 1)] if isinstance(advantages, Tensor) else given
        returns.append([a + v for a, v in zip(of_tokens[: len(values)], values, strict=True)])
    by_turn = isinstance(advantages, Tensor)
    fitted = [[float(t == 0 or not by_turn) for t in range(len(values))] for values in values_K]
    return {"values": [list(v) for v in values_K], "returns": returns, "fitted": fitted}


@dataclass(frozen=True, slots=True)
class ValueTerms:
    """The loss of each token, and where the clip kept V from coming nearer to its target."""

    loss_T: Tensor
    clipped_T: Tensor


def value_loss(values_T: Tensor, old_T: Tensor, returns_T: Tensor, *, clip: float | None = None) -> ValueTerms:
    """Compute the squared error of a critic's values.

        L = ½·(V − R)²,   with a clip: L = ½·max((V − R)², (V_c − R)²),   V_c = V_old + clamp(V − V_old, ±ε)

    The clip is PPO's (1707.06347's code; 2005.12729): where V has moved by more than ε towards R its gradient is 0. It
    depends on the rewards' scale, and studies find no gain from it (2006.05990), so it is off by default.

    Args:
        values_T: V now, float [T].
        old_T: V when the batch was made, [T].
        returns_T: what V is fitted to, R, [T].
        clip: ε; None is no clip.
    """
    error_T = 0.5 * (values_T - returns_T).square()
    if clip is None:
        return ValueTerms(error_T, torch.zeros_like(error_T, dtype=torch.bool))
    bounded_T = 0.5 * (old_T + (values_T - old_T).clamp(-clip, clip) - returns_T).square()
    return ValueTerms(torch.maximum(error_T, bounded_T), bounded_T > error_T)


def explained_variance(values_T: Tensor, returns_T: Tensor) -> float | None:
    """Return 1 − Var(R − V)/Var(R): 1 for a perfect critic, 0 for a constant, negative for one that misleads.

    It is None where all targets are the same.
    """
    returns_T = returns_T.double()
    spread = float(returns_T.var(correction=0)) if len(returns_T) else 0.0
    if spread <= 1e-12 * max(1.0, float(returns_T.square().mean()) if len(returns_T) else 0.0):
        return None
    return 1.0 - float((returns_T - values_T.double()).var(correction=0)) / spread
