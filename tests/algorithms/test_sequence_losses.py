"""Hand-worked numbers, plain loops and identities of ``areal_agents.algorithms.sequence_losses``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.losses import LossTerms, ppo, reinforce
from areal_agents.algorithms.sequence_losses import gmpo, gspo, gspo_token
from areal_agents.algorithms.spans import Span, Spans

EVERY = [gspo, gspo_token, gmpo]
Loss = Callable[..., LossTerms]


def gradient_of(loss: Tensor, wrt: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(loss, wrt)
    return [float(x) for x in gradient]


def at(ratios: list[float]) -> tuple[Tensor, Tensor]:
    old_T = torch.linspace(-3.0, -0.5, len(ratios), dtype=torch.float64)
    return (old_T + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_(), old_T


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Episode 0 has ratios 1.2 and 0.9 (s = √1.08 = 1.0392), episode 1 has 2 and 0.5 and 1 (s = 1). They alternate.
EPISODES, TURNS = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 0, 1, 0, 1])
RATIOS = [1.2, 2.0, 0.9, 0.5, 1.0]
S = math.sqrt(1.08)


def test_gspo_by_hand() -> None:
    # A = 2 in episode 0, −1 in episode 1. Wide clip: loss −A·s, one value a sequence.
    # Each token's gradient: the sum over its sequence's tokens of −A·s/|y| = −2·1.0392·2/2 and 1·3/3.
    logprobs_T, old_T = at(RATIOS)
    a_T = f64(2.0, -1.0, 2.0, -1.0, -1.0)
    terms = gspo(logprobs_T, old_T, a_T, EPISODES, TURNS, clip_low=0.5, clip_high=0.5)
    assert terms.loss_T.tolist() == pytest.approx([-2 * S, 1.0, -2 * S, 1.0, 1.0])
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == pytest.approx([-2 * S, 1.0, -2 * S, 1.0, 1.0])
    assert not terms.clipped_T.any()


def test_the_published_clip_of_gspo_takes_half_of_what_rounding_alone_has_moved() -> None:
    # |Δlog p| of 0.036 a token, as bf16 has it on policy: over 100 tokens s is off by 0.0045, ten times the clip.
    noise_T = 0.036 * math.sqrt(math.pi / 2) * torch.randn(400 * 100, generator=torch.Generator().manual_seed(0))
    episodes_T = torch.arange(400).repeat_interleave(100)
    a_T = torch.where(episodes_T % 2 == 0, 1.0, -1.0)
    args = (noise_T, torch.zeros_like(noise_T), a_T, episodes_T, torch.zeros_like(episodes_T))
    assert 0.4 < float(gspo(*args).clipped_T.double().mean()) < 0.55
    wide = 4 * 0.036 / math.sqrt(100)
    assert float(gspo(*args, clip_low=wide, clip_high=wide).clipped_T.double().mean()) < 0.01


def test_gspo_clips_whole_sequences() -> None:
    # s = 1.0392 is over 1 + 0.03: episode 0 is clipped at 1.03, with all its tokens, though one of them has r = 0.9.
    logprobs_T, old_T = at(RATIOS)
    a_T = f64(2.0, -1.0, 2.0, -1.0, -1.0)
    terms = gspo(logprobs_T, old_T, a_T, EPISODES, TURNS, clip_low=0.03, clip_high=0.03)
    assert terms.loss_T.tolist() == pytest.approx([-2.06, 1.0, -2.06, 1.0, 1.0])
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == pytest.approx([0.0, 1.0, 0.0, 1.0, 1.0])
    assert terms.clipped_T.tolist() == [True, False, True, False, False]


def test_a_turns_ratio_is_its_own() -> None:
    # By turn: (0, 0): 1.2; (0, 1): 0.9; (1, 0): √(2·0.5) = 1; (1, 1): 1.
    logprobs_T, old_T = at(RATIOS)
    terms = gspo(logprobs_T, old_T, torch.ones(5), EPISODES, TURNS, clip_low=0.5, clip_high=0.5, scope="turn")
    assert terms.loss_T.tolist() == pytest.approx([-1.2, -1.0, -0.9, -1.0, -1.0])
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == pytest.approx([-1.2, -1.0, -0.9, -1.0, -1.0])


def test_gspo_token_moves_each_token_by_its_own_advantage() -> None:
    # Episode 0 has A = 2 and 0: gspo's gradient is the mean's for both (−1·s each), gspo_token's −2·s and 0.
    logprobs_T, old_T = at([1.2, 0.9])
    given: tuple[Any, ...] = (logprobs_T, old_T, f64(2.0, 0.0), torch.tensor([0, 0]), torch.tensor([0, 1]))
    whole, own = (f(*given, clip_low=0.5, clip_high=0.5) for f in (gspo, gspo_token))
    assert whole.loss_T.tolist() == pytest.approx(own.loss_T.tolist())
    assert gradient_of(whole.loss_T.sum(), logprobs_T) == pytest.approx([-S, -S])
    assert gradient_of(own.loss_T.sum(), logprobs_T) == pytest.approx([-2 * S, 0.0])


def test_gmpo_by_hand() -> None:
    # Clip of log r to ±0.4 (r in [0.67, 1.49]). Episode 0, A = 1: r = 2 is cut to e^0.4, r = 0.5 stays (A > 0 has no
    # lower clip): exp((0.4 + log 0.5)/2) = 0.8637. Gradient −0.8637·(2/2)... on the second token alone.
    # Episode 1, A = −1: r = 2 stays, r = 0.5 is cut to e^−0.4: exp((log 2 − 0.4)/2) = 1.1579, on the first alone.
    logprobs_T, old_T = at([2.0, 0.5, 2.0, 0.5])
    episodes_T, turns_T = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.long)
    terms = gmpo(logprobs_T, old_T, f64(1.0, 1.0, -1.0, -1.0), episodes_T, turns_T)
    assert terms.loss_T.tolist() == pytest.approx([-0.8637, -0.8637, 1.1579, 1.1579], abs=1e-4)
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == pytest.approx([0.0, -0.8637, 1.1579, 0.0], abs=1e-4)
    assert terms.clipped_T.tolist() == [True, False, False, True]


tokens_of = st.lists(
    st.tuples(st.floats(-1.0, 1.0), st.sampled_from([-2.0, -1.0, 0.0, 1.5]), st.integers(0, 2), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


def slow(name: str, tokens: list[tuple[float, float, int, int]], scope: str) -> list[float]:
    """The losses, token by token, as the formulas say it (clip 0.1 and 0.2)."""
    out = []
    for _, a, episode, turn in tokens:
        own = [t for t in tokens if t[2] == episode and (scope == "trajectory" or t[3] == turn)]
        if name == "gmpo":
            logs = [max(x, -0.1) if b < 0 else min(x, 0.2) for x, b, _, _ in own]
            out.append(-a * math.exp(sum(logs) / len(logs)))
        else:
            s = math.exp(sum(x for x, _, _, _ in own) / len(own))
            out.append(max(-s * a, -min(max(s, 0.9), 1.2) * a))
    return out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(tokens_of, st.sampled_from(["turn", "trajectory"]))
def test_losses_equal_the_loops(tokens: list[tuple[float, float, int, int]], scope: Any) -> None:
    logprobs_T, old_T = at([math.exp(x) for x, _, _, _ in tokens])
    a_T = torch.tensor([a for _, a, _, _ in tokens], dtype=torch.float64)
    episodes_T, turns_T = torch.tensor([e for _, _, e, _ in tokens]), torch.tensor([k for _, _, _, k in tokens])
    for f in EVERY:
        found = f(logprobs_T, old_T, a_T, episodes_T, turns_T, clip_low=0.1, clip_high=0.2, scope=scope)
        assert found.loss_T.tolist() == pytest.approx(slow(f.__name__, tokens, scope), abs=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-1.0, 1.0), st.floats(-2.0, 2.0)), min_size=1, max_size=8))
def test_of_one_token_episodes_gspo_is_ppo(tokens: list[tuple[float, float]]) -> None:
    logprobs_T, old_T = at([math.exp(x) for x, _ in tokens])
    a_T, n = torch.tensor([a for _, a in tokens], dtype=torch.float64), len(tokens)
    expected = ppo(logprobs_T, old_T, a_T, clip_low=0.2, clip_high=0.3, dual_clip=None)
    gradient = gradient_of(expected.loss_T.sum(), logprobs_T)
    for f in (gspo, gspo_token):
        found = f(logprobs_T, old_T, a_T, torch.arange(n), torch.zeros(n).long(), clip_low=0.2, clip_high=0.3)
        assert found.loss_T.tolist() == pytest.approx(expected.loss_T.tolist())
        assert found.clipped_T.tolist() == expected.clipped_T.tolist()
        assert gradient_of(found.loss_T.sum(), logprobs_T) == pytest.approx(gradient)


def test_with_equal_advantages_gspo_token_has_gspos_gradient() -> None:
    torch.manual_seed(0)
    episodes_T = torch.randint(0, 4, (40,))
    logprobs_T, old_T = at([math.exp(x) for x in torch.randn(40).mul(0.3).tolist()])
    a_T = f64(1.0, -2.0, 0.5, 0.0)[episodes_T]
    for clip in (1e-3, 0.5):
        grads = [
            gradient_of(
                f(logprobs_T, old_T, a_T, episodes_T, episodes_T, clip_low=clip, clip_high=clip).loss_T.sum(),
                logprobs_T,
            )
            for f in (gspo, gspo_token)
        ]
        assert grads[0] == pytest.approx(grads[1])


@pytest.mark.parametrize("f", EVERY)
def test_on_policy_the_gradient_is_that_of_reinforce(f: Loss) -> None:
    # With equal advantages in each sequence: −A a token, whatever its sequence's length.
    logprobs_T, old_T = at([1.0] * 5)
    a_T = f64(2.0, -1.0, 2.0, -1.0, -1.0)
    expected = gradient_of(reinforce(logprobs_T, a_T).loss_T.sum(), logprobs_T)
    terms = f(logprobs_T, old_T, a_T, EPISODES, TURNS)
    assert gradient_of(terms.loss_T.sum(), logprobs_T) == pytest.approx(expected)
    assert not terms.clipped_T.any()


@pytest.mark.parametrize("f", EVERY)
def test_the_order_of_tokens_and_other_episodes_change_nothing(f: Loss) -> None:
    logprobs_T, old_T = at(RATIOS)
    a_T = f64(2.0, -1.0, 2.0, -1.0, -1.0)
    whole = f(logprobs_T, old_T, a_T, EPISODES, TURNS, clip_low=0.1, clip_high=0.1).loss_T
    order = torch.tensor([4, 2, 0, 3, 1])
    mixed = f(
        logprobs_T[order], old_T[order], a_T[order], EPISODES[order] + 7, TURNS[order], clip_low=0.1, clip_high=0.1
    )
    assert mixed.loss_T.tolist() == pytest.approx(whole[order].tolist())
    alone = EPISODES == 1
    own = f(logprobs_T[alone], old_T[alone], a_T[alone], EPISODES[alone], TURNS[alone], clip_low=0.1, clip_high=0.1)
    assert own.loss_T.tolist() == pytest.approx(whole[alone].tolist())


@pytest.mark.parametrize("f", EVERY)
def test_no_gradient_reaches_the_old_policy_or_the_advantages_and_extremes_are_finite(f: Loss) -> None:
    logprobs_T = torch.tensor([-1.0, -300.0, -1.0]).requires_grad_()
    old_T, a_T = torch.tensor([-1.1, -1.0, -300.0]).requires_grad_(), torch.tensor([1.0, -1.0, -1.0]).requires_grad_()
    loss = f(logprobs_T, old_T, a_T, torch.tensor([0, 1, 2]), torch.zeros(3).long()).loss_T.sum()
    current, *others = torch.autograd.grad(loss, (logprobs_T, old_T, a_T), allow_unused=True)
    assert others == [None, None]
    assert loss.isfinite()
    assert current.isfinite().all()


@pytest.mark.parametrize("f", EVERY)
def test_bad_bounds_and_shapes_are_refused(f: Loss) -> None:
    two, index = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="clip_low"):
        f(two, two, two, index, index, clip_low=0.0)
    with pytest.raises(ValueError, match="1-D"):
        f(two, two, torch.zeros(1), index, index)
    with pytest.raises(ValueError, match="episodes_T"):
        f(two, two, two, index[:1], index)


# --- spans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "sums"), [("token", [1, 2, 4, 8, 16]), ("turn", [1, 10, 4, 10, 16]), ("trajectory", [5, 26, 5, 26, 26])]
)
def test_sums_over_spans(scope: Span, sums: list[int]) -> None:
    values_T = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    spans = Spans(scope, EPISODES, TURNS, values_T)
    assert spans.spread(spans.sum(values_T)).tolist() == sums
    counts = [sum(1 for s in sums if s == x) for x in sums]
    expected = [s / n for s, n in zip(sums, counts, strict=True)]
    assert spans.spread(spans.mean(values_T)).tolist() == pytest.approx(expected)


def test_spans_need_their_indices() -> None:
    values_T = torch.zeros(5)
    assert Spans("token", None, None, values_T).sum(values_T).shape == (5,)
    for scope, episodes_T, turns_T in (("turn", EPISODES, None), ("trajectory", None, TURNS), ("turn", None, TURNS)):
        with pytest.raises(ValueError, match="_T must say"):
            Spans(scope, episodes_T, turns_T, values_T)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are token"):
        Spans("sequence", EPISODES, TURNS, values_T)  # type: ignore[arg-type]
    assert Spans("turn", EPISODES[:0], TURNS[:0], values_T[:0]).sum(values_T[:0]).shape == (0,)
