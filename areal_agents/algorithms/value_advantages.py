"""Advantage estimators that read a critic's values, one function each, registered by name in ``registry.py``.

V_{k,t} is the critic's value before the sampled token t of turn k, on everything before it. V_K is the value after the
last turn: 0 where the task ended, else V on the prompt that the next turn would have had (``tail_value``). A turn's
reward comes with its last sampled token. What the environment writes between two turns takes no time of its own.

A turn without a sampled token has no action and no value: its reward counts as the turn's before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import compares_with, reads_values

Gamma = Annotated[float, Field(ge=0.0, le=1.0, description="Discount per sampled token.")]
TurnGamma = Annotated[float, Field(ge=0.0, le=1.0, description="Discount per turn.")]
Lambda = Annotated[
    float, Field(ge=0.0, le=1.0, description="How far returns are trusted: 1 to the end, 0 for one step, then V.")
]


@compares_with("values")
@reads_values
def gae(group: Sequence[EpisodeView], *, gamma: Gamma = 1.0, lam: Lambda = 1.0) -> list[tuple[Tensor, ...]]:
    """Compare what came after each sampled token with the critic's value before it.

        δ_t = r_t + γ·V_{t+1} − V_t,    A_t = δ_t + γ·λ·A_{t+1},    t over all sampled tokens of the episode

    The step is a token, as PPO on language models has it (1909.08593). r_t is the turn's reward at its last token, else
    0.

    Paper: GAE, 1506.02438.

    Bias: none for γ = λ = 1 where the task ended, whatever V is: A_t = G_t − V_t, and V_t does not depend on the token.
    λ < 1 replaces returns by V, so V's errors bias it, and less of a reward that is n tokens away reaches a token
    (λ^n: at 0.95 and 100 tokens 0.006). γ < 1 prefers early rewards. Where a limit cut the episode, V stands for what
    would have come.

    Use it: where turns are long and their tokens differ in worth. The defaults, γ = λ = 1, are what long turns need.

    Returns for each episode one float32 tensor [T_k] a turn. Raises ValueError without values.
    """
    out = []
    for episode in group:
        turns = _turns(episode)
        values = [v for turn in turns for v in turn.values]
        rewards = [r for turn in turns for r in turn.token_rewards]
        out.append(_by_turn(episode, _recursion(rewards, values, episode.tail_value, gamma, gamma * lam)))
    return out


@compares_with("values")
@reads_values
def turn_gae(group: Sequence[EpisodeView], *, gamma: TurnGamma = 0.99, lam: Lambda = 0.9) -> list[Tensor]:
    """Compare what came after each turn with the critic's value before its first token.

        δ_k = r_k + γ·V_{k+1} − V_k,    A_k = δ_k + γ·λ·A_{k+1},    V_k read before turn k's first sampled token

    The whole turn is the action, and all its tokens get A_k. V is read before the turn: read at its last token it would
    know the action, and cancel its effect. The critic is fitted at turns' first tokens alone.

    Paper: Turn-PPO, 2512.17008, whose γ and λ are the defaults.

    Bias: none for γ = λ = 1 where the task ended, whatever V is. λ < 1 trusts V, γ < 1 prefers early rewards. Both
    count turns, not tokens, so long turns lose nothing.

    Use it: for episodes of many turns with rewards, or states, that differ from turn to turn.

    Returns one float32 tensor [K_i] an episode. Raises ValueError without values.
    """
    out = []
    for episode in group:
        turns = _turns(episode)
        first = [turn.values[0] for turn in turns]
        found = _recursion([t.reward for t in turns], first, episode.tail_value, gamma, gamma * lam)
        advantages_K = torch.zeros(len(episode.rewards_K))
        for turn, a in zip(turns, found, strict=True):
            advantages_K[turn.index] = a
        out.append(advantages_K)
    return out


@compares_with("values")
@reads_values
def bilevel_gae(
    group: Sequence[EpisodeView], *, gamma: Gamma = 1.0, turn_gamma: TurnGamma = 0.95, lam: Lambda = 1.0
) -> list[tuple[Tensor, ...]]:
    """Estimate an advantage for each turn, then share it out over the turn's tokens.

        turns:   δ_k = r_k + γ_H·V_{k+1,e} − V_{k,e},    A_k = δ_k + γ_H·λ·A_{k+1},    V_{k,e} before k's last token
        tokens:  GAE with γ and λ inside each turn alone, whose last token is paid A_k + V_{k,e}

    γ_H is ``turn_gamma``. The form is that of the code that its authors released: a turn's last token gets A_k itself,
    and no token sees past its turn but through that. For γ = γ_H = λ = 1 it is ``gae`` exactly; else the two differ, as
    one counts turns too.

    Paper: bi-level GAE, 2510.16907.

    Bias: none for γ = γ_H = λ = 1 where the task ended, whatever V is. Discounts and λ as in ``gae``.

    Use it: as ``gae``, where a discount per turn is wanted beside one per token.

    Returns for each episode one float32 tensor [T_k] a turn. Raises ValueError without values.
    """
    out = []
    for episode in group:
        turns = _turns(episode)
        last = [turn.values[-1] for turn in turns]
        high = _recursion([t.reward for t in turns], last, episode.tail_value, turn_gamma, turn_gamma * lam)
        found: list[float] = []
        for turn, a in zip(turns, high, strict=True):
            paid = [*(0.0,) * (len(turn.values) - 1), a + turn.values[-1]]
            found += _recursion(paid, turn.values, 0.0, gamma, gamma * lam)
        out.append(_by_turn(episode, found))
    return out


class _Turn:
    """One turn with a sampled token: its index, the values before its tokens, its reward, and that at each token."""

    def __init__(self, index: int, values: Sequence[float], episode: EpisodeView) -> None:
        self.index, self.values, self.reward = index, values, episode.rewards_K[index]
        self.token_rewards = episode.token_rewards(index)

    def earn(self, reward: float) -> None:
        """Add a reward that came without a token of its own, after this turn's last."""
        self.reward += reward
        self.token_rewards[-1] += reward


def _turns(episode: EpisodeView) -> list[_Turn]:
    if episode.values_K is None:
        raise ValueError("this estimator reads a critic's values, and the episode has none")
    turns: list[_Turn] = []
    for k, (values, reward) in enumerate(zip(episode.values_K, episode.rewards_K, strict=True)):
        if values:
            turns.append(_Turn(k, values, episode))
        elif turns:  # before the first action nothing can be earned
            turns[-1].earn(reward)
    return turns


def _recursion(
    rewards: Sequence[float], values: Sequence[float], after: float, discount: float, decay: float
) -> list[float]:
    """Return A_t = r_t + discount·V_{t+1} − V_t + decay·A_{t+1} of each step, in float64.

    ``after`` is the value behind the last one.
    """
    out = [0.0] * len(values)
    following, advantage = after, 0.0
    for t in reversed(range(len(values))):
        advantage = rewards[t] + discount * following - values[t] + decay * advantage
        out[t], following = advantage, values[t]
    return out


def _by_turn(episode: EpisodeView, flat: Sequence[float]) -> tuple[Tensor, ...]:
    return torch.split(torch.tensor(flat, dtype=torch.float64).float(), list(episode.tokens_K))
