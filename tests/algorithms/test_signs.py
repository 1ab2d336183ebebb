"""Each loss learns what advantages say, and unlearns it with their sign flipped: a policy of a table, sampled stale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from areal_agents.algorithms.objective import Denominators, PolicyObjective, Tokens
from areal_agents.algorithms.offpolicy_stats import OffPolicyStats
from areal_agents.algorithms.registry import CORRECTIONS, LOSSES, MASKS, Choice

EPISODES, TURNS, LENGTH, WORDS = 24, 2, 3, 4


def trained(policy: PolicyObjective, sign: float, *, steps: int = 30) -> float:
    """Train a table of logits [place, word], where word 0 is worth 1, and return its probability in the end.

    Each batch is sampled two versions back, and gives each turn the share of its words that are word 0.
    """
    torch.manual_seed(0)
    n = TURNS * LENGTH
    logits = torch.zeros(n, WORDS, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=4.0)
    history = [logits.detach().clone()] * 3
    shape = (EPISODES, n)
    episodes_T = torch.arange(EPISODES).repeat_interleave(n)
    turns_T = torch.arange(TURNS).repeat_interleave(LENGTH).repeat(EPISODES)
    for version in range(2, steps + 2):
        logs_mu = torch.log_softmax(history[-3], -1)
        words = torch.multinomial(logs_mu.exp(), EPISODES, replacement=True).T
        rewards = (words == 0).float().view(EPISODES, TURNS, LENGTH).mean(-1)
        advantages = sign * (rewards - rewards.mean(0)).repeat_interleave(LENGTH, 1)

        def of(table: Tensor, words: Tensor = words) -> Tensor:
            return torch.log_softmax(table, -1).expand(*shape, WORDS).gather(-1, words[..., None]).flatten()

        tokens = Tokens(
            ids=words.flatten(), behaviour=of(history[-3]), advantages=advantages.flatten(),
            versions=torch.full((EPISODES * n,), version - 2), turns=turns_T, episodes=episodes_T,
            proximal=of(history[-2]),
        )  # fmt: skip
        counts = Denominators(EPISODES * n, torch.full((EPISODES,), n), EPISODES)
        loss = policy(of(logits), tokens, counts, OffPolicyStats(), version=version)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        history.append(logits.detach().clone())
    return float(torch.softmax(logits, -1)[:, 0].mean().detach())


def require_signs(policy: PolicyObjective) -> None:
    up, down = trained(policy, 1.0), trained(policy, -1.0)
    assert up > 0.35, up
    assert down < 0.18, down


@pytest.mark.parametrize("loss", LOSSES.builtin())
def test_each_loss(loss: str) -> None:
    # The clip of GSPO is 1,000 times narrower than two steps of a table.
    wide = {"clip_low": 0.3, "clip_high": 0.4} if loss.startswith("gspo") else {}
    correction = Choice("importance" if loss == "reinforce" else "bypass")
    require_signs(PolicyObjective(loss=Choice(loss, wide), correction=correction, aggregation="token"))


@pytest.mark.parametrize("correction", [c for c in CORRECTIONS.builtin() if c not in ("bypass", "importance")])
def test_each_correction(correction: str) -> None:
    require_signs(PolicyObjective(loss=Choice("ppo"), correction=Choice(correction), aggregation="episode"))


@pytest.mark.parametrize("mask", [m for m in MASKS.builtin() if m != "none"])
def test_each_mask(mask: str) -> None:
    options = {"geometric": {"bounds": (0.5, 2.0)}}.get(mask, {})
    policy = PolicyObjective(
        loss=Choice("ppo"), correction=Choice("bypass"), mask=Choice(mask, options), aggregation="episode"
    )
    require_signs(policy)
