"""Hand-worked numbers, a textbook reference, gradients and additivity of ``areal_agents.algorithms.losses``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.losses import cross_entropy, episode_mean, ppo, token_mean
from areal_agents.algorithms.offpolicy import LOG_RATIO_BOUND

CLIP = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}


def gradient_of(loss: Tensor, wrt: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(loss, wrt)
    return [float(x) for x in gradient]


def ppo_at(ratios: Sequence[float], advantages: Sequence[float]) -> tuple[list[float], list[float], list[bool]]:
    """Loss, dL/dlogπ and clipped of tokens whose π/p is given, with CLIP."""
    old_T = torch.full((len(ratios),), -1.5, dtype=torch.float64)
    logprobs_T = (old_T + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    terms = ppo(logprobs_T, old_T, torch.tensor(advantages, dtype=torch.float64), **CLIP)
    return terms.loss_T.tolist(), gradient_of(terms.loss_T.sum(), logprobs_T), terms.clipped_T.tolist()


# --- ppo ------------------------------------------------------------------------------------------------------------


def test_ppo_by_hand() -> None:
    # Clip to [0.8, 1.3], c = 3. dL/dlogπ = −A·r where not clipped.
    # A = 2:  r = 1: −2.            r = 1.25: −2.5, inside.    r = 1.5: clipped at 1.3: −2.6, gradient 0.
    #         r = 0.5: min(1.0, 0.8 · 2) = 1.0, so −1.0 and gradient −1.0: a good token that became rarer is pulled up.
    # A = −2: r = 1: 2.             r = 0.5: max(1.0, 1.6) = 1.6, clipped.
    #         r = 1.5: max(3.0, 2.6) = 3.0, gradient 3.0.      r = 4: max(8, 2.6) = 8, dual clip 3 · 2 = 6.
    loss, gradient, clipped = ppo_at([1.0, 1.25, 1.5, 0.5, 1.0, 0.5, 1.5, 4.0], [2.0] * 4 + [-2.0] * 4)
    assert loss == pytest.approx([-2.0, -2.5, -2.6, -1.0, 2.0, 1.6, 3.0, 6.0])
    assert gradient == pytest.approx([-2.0, -2.5, 0.0, -1.0, 2.0, 0.0, 3.0, 0.0])
    assert clipped == [False, False, True, False, False, True, False, True]


def test_ppo_on_policy_is_the_policy_gradient() -> None:
    # r = 1: descending L raises log π of good tokens, lowers it of bad ones, by exactly A.
    _, gradient, clipped = ppo_at([1.0, 1.0, 1.0], [0.7, -0.4, 0.0])
    assert gradient == pytest.approx([-0.7, 0.4, 0.0])
    assert clipped == [False] * 3


def test_a_token_without_advantage_is_never_clipped() -> None:
    loss, gradient, clipped = ppo_at([0.1, 10.0], [0.0, 0.0])
    assert loss == [0.0, 0.0]
    assert gradient == [0.0, 0.0]
    assert clipped == [False, False]


def test_dual_clip_bounds_the_loss_and_infinity_turns_it_off() -> None:
    # r = 100, A = −1: 100 without the dual clip, 3 with it.
    logprobs_T, old_T, advantages_T = torch.tensor([math.log(100.0)]), torch.zeros(1), torch.tensor([-1.0])
    bounded = ppo(logprobs_T, old_T, advantages_T, **CLIP)
    free = ppo(logprobs_T, old_T, advantages_T, clip_low=0.2, clip_high=0.3, dual_clip=math.inf)
    assert bounded.loss_T.item() == pytest.approx(3.0)
    assert free.loss_T.item() == pytest.approx(100.0, rel=1e-5)
    assert (bounded.clipped_T.item(), free.clipped_T.item()) == (True, False)


def test_extreme_ratios_stay_finite_without_gradient() -> None:
    # Without a dual clip the bound of the log ratio itself stops the gradient: e^20 = 4.85e8.
    logprobs_T = torch.tensor([200.0, -200.0, -math.inf]).requires_grad_()
    terms = ppo(
        logprobs_T, torch.zeros(3), torch.tensor([-1.0, 1.0, 1.0]), clip_low=0.2, clip_high=0.3, dual_clip=math.inf
    )
    assert terms.loss_T.tolist() == pytest.approx([math.exp(LOG_RATIO_BOUND), -math.exp(-20), -math.exp(-20)], rel=1e-5)
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == [0.0, 0.0, 0.0]


def test_no_gradient_reaches_the_old_policy_or_the_advantages() -> None:
    logprobs_T = torch.tensor([-1.0]).requires_grad_()
    old_T, advantages_T = torch.tensor([-1.1]).requires_grad_(), torch.tensor([1.0]).requires_grad_()
    loss = ppo(logprobs_T, old_T, advantages_T, **CLIP).loss_T.sum()
    current, *others = torch.autograd.grad(loss, (logprobs_T, old_T, advantages_T), allow_unused=True)
    assert current is not None
    assert others == [None, None]


def test_ppo_with_the_current_policy_as_old_has_a_gradient() -> None:
    # A caller may pass the same tensor twice: r ≡ 1, and the gradient must not cancel.
    logprobs_T = torch.tensor([-1.0, -2.0]).requires_grad_()
    loss = ppo(logprobs_T, logprobs_T, torch.tensor([1.0, -1.0]), **CLIP).loss_T.sum()
    assert gradient_of(loss, logprobs_T) == [-1.0, 1.0]


def textbook_ppo(r: float, a: float) -> float:
    """max(−rA, −clip(r)A), and min(c|A|, that) for A < 0."""
    loss = max(-r * a, -min(max(r, 0.8), 1.3) * a)
    return min(3.0 * abs(a), loss) if a < 0 else loss


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-3.0, 3.0), st.floats(-5.0, 5.0)), min_size=1, max_size=8))
def test_ppo_equals_the_textbook_form(tokens: list[tuple[float, float]]) -> None:
    ratios, advantages = [math.exp(x) for x, _ in tokens], [a for _, a in tokens]
    loss, gradient, clipped = ppo_at(ratios, advantages)
    assert loss == pytest.approx([textbook_ppo(r, a) for r, a in zip(ratios, advantages, strict=True)], abs=1e-9)
    expected = [0.0 if c else -a * r for r, a, c in zip(ratios, advantages, clipped, strict=True)]
    assert gradient == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"dual_clip": math.nan}, "dual_clip"),
    ],
)
def test_ppo_refuses_bad_bounds(changed: dict[str, float], message: str) -> None:
    bounds = CLIP | changed
    with pytest.raises(ValueError, match=message):
        ppo(torch.zeros(1), torch.zeros(1), torch.zeros(1), **bounds)


def test_shapes_are_checked() -> None:
    # Broadcasting [2] with [2, 1] would silently give [2, 2].
    with pytest.raises(ValueError, match="1-D"):
        ppo(torch.zeros(2), torch.zeros(2), torch.zeros(1), **CLIP)
    with pytest.raises(ValueError, match="1-D"):
        ppo(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1), **CLIP)
    with pytest.raises(ValueError, match="1-D"):
        token_mean(torch.zeros(2), torch.ones(1, dtype=torch.bool), tokens=1)


# --- cross entropy --------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand() -> None:
    # −log 0.5 = 0.6931, −log 0.25 = 1.3863; gradient −1 each.
    logprobs_T = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss_T = cross_entropy(logprobs_T)
    assert loss_T.tolist() == pytest.approx([0.6931, 1.3863], abs=1e-4)
    assert gradient_of(loss_T.sum(), logprobs_T) == [-1.0, -1.0]


# --- aggregation ----------------------------------------------------------------------------------------------------


def test_token_mean_by_hand() -> None:
    # (1 + 4) / 2 sampled tokens; over the whole batch's 10 it is 0.5. The unsampled 100 does not count.
    loss_T, mask_T = torch.tensor([1.0, 100.0, 4.0]), torch.tensor([True, False, True])
    assert token_mean(loss_T, mask_T, tokens=2).item() == 2.5
    assert token_mean(loss_T, mask_T, tokens=10).item() == 0.5


def test_episode_mean_by_hand() -> None:
    # Episode 0: tokens 1, 3 -> 2. Episode 1: tokens 8 -> 8. Mean (2 + 8) / 2 = 5; over 4 episodes 2.5.
    loss_T, mask_T = torch.tensor([1.0, 3.0, 8.0, 100.0]), torch.tensor([True, True, True, False])
    episode_T, tokens_E = torch.tensor([0, 0, 1, -1]), torch.tensor([2, 1])
    assert episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=2).item() == 5.0
    assert episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=4).item() == 2.5


def test_tokens_that_were_not_sampled_cannot_spoil_the_sum() -> None:
    loss_T, mask_T = torch.tensor([1.0, math.nan]), torch.tensor([True, False])
    assert token_mean(loss_T, mask_T, tokens=1).item() == 1.0
    assert episode_mean(loss_T, mask_T, torch.tensor([0, 0]), torch.tensor([1]), episodes=1).item() == 1.0


def test_empty_denominators_are_refused() -> None:
    loss_T, mask_T, episode_T = torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)
    for none in (0, -1, math.nan):
        with pytest.raises(ValueError, match="tokens"):
            token_mean(loss_T, mask_T, tokens=none)
        with pytest.raises(ValueError, match="episodes"):
            episode_mean(loss_T, mask_T, episode_T, torch.ones(1), episodes=none)
    with pytest.raises(ValueError, match="tokens_E"):
        episode_mean(loss_T, mask_T, episode_T, torch.zeros(1), episodes=1)


def test_a_micro_batch_without_sampled_tokens_adds_zero() -> None:
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    assert token_mean(nothing, none, tokens=5).item() == 0.0
    assert episode_mean(nothing, none, torch.zeros(0, dtype=torch.long), torch.ones(1), episodes=1).item() == 0.0


tokens_strategy = st.lists(
    st.tuples(st.floats(-5.0, 5.0), st.booleans(), st.integers(0, 3)), min_size=1, max_size=24
).filter(lambda rows: any(mask for _, mask, _ in rows))


def tensors(tokens: list[tuple[float, bool, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss_T = torch.tensor([x for x, _, _ in tokens], dtype=torch.float64).requires_grad_()
    mask_T = torch.tensor([m for _, m, _ in tokens])
    episode_T = torch.tensor([e for _, _, e in tokens])
    return loss_T, mask_T, episode_T, torch.bincount(episode_T[mask_T], minlength=4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens_strategy)
def test_aggregations_equal_the_loops(tokens: list[tuple[float, bool, int]]) -> None:
    loss_T, mask_T, episode_T, tokens_E = tensors(tokens)
    sampled = [x for x, m, _ in tokens if m]
    expected = sum(sampled) / len(sampled)
    assert token_mean(loss_T, mask_T, tokens=len(sampled)).item() == pytest.approx(expected, abs=1e-9)
    means = []
    for e in range(4):
        own = [x for x, m, who in tokens if m and who == e]
        means.append(sum(own) / len(own) if own else 0.0)
    value = episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=4).item()
    assert value == pytest.approx(sum(means) / 4, abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tokens_strategy, st.lists(st.integers(0, 24), max_size=4))
def test_micro_batches_add_up(tokens: list[tuple[float, bool, int]], cuts: list[int]) -> None:
    # The same losses in any split: the sum of the parts and its gradient equal the whole's.
    loss_T, mask_T, episode_T, tokens_E = tensors(tokens)
    n = float(mask_T.sum())
    edges = [0, *sorted(min(c, len(tokens)) for c in cuts), len(tokens)]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    pairs = [
        (
            token_mean(loss_T, mask_T, tokens=n),
            sum((token_mean(loss_T[p], mask_T[p], tokens=n) for p in parts), torch.zeros(())),
        ),
        (
            episode_mean(loss_T, mask_T, episode_T, tokens_E, episodes=4),
            sum(
                (episode_mean(loss_T[p], mask_T[p], episode_T[p], tokens_E, episodes=4) for p in parts),
                torch.zeros(()),
            ),
        ),
    ]
    for whole, split in pairs:
        assert split.item() == pytest.approx(whole.item(), abs=1e-9)
        (g_whole,) = torch.autograd.grad(whole, loss_T)
        (g_split,) = torch.autograd.grad(split, loss_T)
        assert torch.allclose(g_whole, g_split, atol=1e-12)


def test_an_episode_weighs_the_same_in_one_row_or_in_three() -> None:
    # T6. Episode 0 has tokens 1, 2, 3, 6 (mean 3), episode 1 has one token 5: (3 + 5) / 2 = 4.
    # As three rows (1 | 2, 3 | 6) in two micro-batches, with tokens_E counted over all rows: still 4.
    # A mean per row would give ((1 + 2.5 + 6 + 5) / 4) = 3.625.
    tokens_E = torch.tensor([4, 1])

    def value(losses: list[float], who: list[int]) -> float:
        ones_T = torch.ones(len(losses), dtype=torch.bool)
        return episode_mean(torch.tensor(losses), ones_T, torch.tensor(who), tokens_E, episodes=2).item()

    assert value([1.0, 2.0, 3.0, 6.0, 5.0], [0, 0, 0, 0, 1]) == pytest.approx(4.0)
    assert value([1.0, 5.0], [0, 1]) + value([2.0, 3.0, 6.0], [0, 0, 0]) == pytest.approx(4.0)


def test_a_masked_token_still_counts_in_the_denominator() -> None:
    # Losses 2 and 4, the second masked by a correction (weight 0): 2 / 2 = 1, not 2 / 1.
    loss_T, weight_T, mask_T = torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]), torch.tensor([True, True])
    assert token_mean(loss_T * weight_T, mask_T, tokens=2).item() == 1.0
    episode_T, tokens_E = torch.tensor([0, 0]), torch.tensor([2])
    assert episode_mean(loss_T * weight_T, mask_T, episode_T, tokens_E, episodes=1).item() == 1.0
