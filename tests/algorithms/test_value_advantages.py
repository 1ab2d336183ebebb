"""Hand-worked numbers, loops, identities and exact enumeration of ``areal_agents.algorithms.value_advantages``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Advantages, Estimator
from areal_agents.algorithms.registry import ADVANTAGES, Choice
from areal_agents.algorithms.value_advantages import bilevel_gae, gae, turn_gae

KINDS = ("gae", "turn_gae", "bilevel_gae")
Values = Sequence[Sequence[float]]


def episode(rewards: Sequence[float], values: Values, tail: float | None = None) -> EpisodeView:
    """``tail`` is V after the last turn, of an episode that a limit cut."""
    return EpisodeView(
        tuple(rewards), tuple(len(v) for v in values), terminated=tail is None,
        values_K=tuple(tuple(v) for v in values), tail_value=tail or 0.0,
    )  # fmt: skip


def flat(found: Advantages) -> list[float]:
    parts = [found] if isinstance(found, Tensor) else list(found)
    return [float(x) for part in parts for x in part]


def drawn(seed: int, *, tail: bool) -> EpisodeView:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 5) for _ in range(rng.randint(1, 5))]
    return episode(
        [rng.uniform(-1, 1) for _ in lengths], [[rng.uniform(-1, 1) for _ in range(n)] for n in lengths],
        rng.uniform(-1, 1) if tail else None,
    )  # fmt: skip


# --- by hand --------------------------------------------------------------------------------------------------------

TWO_TURNS = episode([1.0, 3.0], [[0.5, 1.0], [2.0, 2.5]])
CUT = replace(TWO_TURNS, terminated=False, stop_reason="max_turns", tail_value=4.0)


def test_gae_by_hand() -> None:
    # γ = 0.5, λ = 0.5, δ_3 = 3 − 2.5 = 0.5; δ_2 = 0.5·2.5 − 2 = −0.75; δ_1 = 1 + 0.5·2 − 1 = 1;
    # δ_0 = 0.5·1 − 0.5 = 0. A_3 = 0.5, A_2 = −0.75 + 0.125 = −0.625, A_1 = 1 − 0.15625 = 0.84375, A_0 = 0.2109375.
    (found,) = gae([TWO_TURNS], gamma=0.5, lam=0.5)
    assert [t.tolist() for t in found] == [[0.2109375, 0.84375], [-0.625, 0.5]]
    # Cut, V = 4 behind it: δ_3 = 3 + 0.5·4 − 2.5 = 2.5; A_2 = −0.75 + 0.625, A_1 = 1 − 0.03125, A_0 = A_1/4.
    (found,) = gae([CUT], gamma=0.5, lam=0.5)
    assert [t.tolist() for t in found] == [[0.2421875, 0.96875], [-0.125, 2.5]]
    # The default: what comes, less V. G = 4 before turn 1's reward, 3 after it.
    (found,) = gae([TWO_TURNS])
    assert [t.tolist() for t in found] == [[3.5, 3.0], [1.0, 0.5]]
    assert all(t.dtype == torch.float32 for t in found)


def test_turn_gae_by_hand() -> None:
    # V before the turns: 0.5 and 2. γ = 0.5, λ = 0.5. δ_1 = 3 − 2 = 1; δ_0 = 1 + 0.5·2 − 0.5 = 1.5; A_0 = 1.5 + 0.25.
    (found,) = turn_gae([TWO_TURNS], gamma=0.5, lam=0.5)
    assert found.tolist() == [1.75, 1.0]
    # Cut: δ_1 = 3 + 0.5·4 − 2 = 3; A_0 = 1.5 + 0.25·3.
    (found,) = turn_gae([CUT], gamma=0.5, lam=0.5)
    assert found.tolist() == [2.25, 3.0]
    assert ADVANTAGES.options(Choice("turn_gae")) == {"gamma": 0.99, "lam": 0.9}


def test_bilevel_gae_by_hand() -> None:
    # At last tokens V = 1 and 2.5. γ_H = 0.5, λ = 0.5: A_1 = 3 − 2.5 = 0.5; A_0 = 1 + 0.5·2.5 − 1 + 0.25·0.5 = 1.375.
    # Tokens, γ = 1: turn 1 has δ = 2.5 − 2 = 0.5 before its last, A = 0.5 + 0.5·0.5 = 0.75.
    # Turn 0 has δ = 1 − 0.5 = 0.5, A = 0.5 + 0.5·1.375 = 1.1875.
    (found,) = bilevel_gae([TWO_TURNS], gamma=1.0, turn_gamma=0.5, lam=0.5)
    assert [t.tolist() for t in found] == [[1.1875, 1.375], [0.75, 0.5]]
    # Cut: A_1 = 3 + 0.5·4 − 2.5 = 2.5; A_0 = 1.25 + 0.25·2.5 = 1.875; then 0.5 + 0.5·2.5 and 0.5 + 0.5·1.875.
    (found,) = bilevel_gae([CUT], gamma=1.0, turn_gamma=0.5, lam=0.5)
    assert [t.tolist() for t in found] == [[1.4375, 1.875], [1.75, 2.5]]


def test_a_turn_without_tokens_pays_the_turn_before_it() -> None:
    # Nobody acted at turn 1: its 2 belongs to turn 0, beside its 1. What came before the first action is nobody's.
    odd = episode([5.0, 1.0, 2.0, 3.0], [[], [0.5], [], [2.0]])
    (tokens,), (turns,), (both,) = gae([odd]), turn_gae([odd], gamma=1.0, lam=1.0), bilevel_gae([odd], turn_gamma=1.0)
    assert [t.tolist() for t in tokens] == [t.tolist() for t in both] == [[], [5.5], [], [1.0]]
    assert turns.tolist() == [0.0, 5.5, 0.0, 1.0]


def test_without_values_they_refuse() -> None:
    for function in (gae, turn_gae, bilevel_gae):
        with pytest.raises(ValueError, match="reads a critic's values"):
            function([EpisodeView((1.0,))])


# --- against plain loops --------------------------------------------------------------------------------------------


def loop_gae(steps: list[tuple[float, float]], after: float, gamma: float, lam: float) -> list[float]:
    """A_t as the sum Σ_l (γλ)^l δ_{t+l}; ``steps`` are (reward, V)."""
    values = [v for _, v in steps] + [after]
    deltas = [r + gamma * b - a for (r, _), (a, b) in zip(steps, pairwise(values), strict=True)]
    return [sum((gamma * lam) ** (j - t) * deltas[j] for j in range(t, len(deltas))) for t in range(len(deltas))]


def loop_bilevel(e: EpisodeView, gamma: float, turn_gamma: float, lam: float) -> list[float]:
    assert e.values_K is not None
    ends = [(r, v[-1]) for r, v in zip(e.rewards_K, e.values_K, strict=True)]
    out = []
    for a, v in zip(loop_gae(ends, e.tail_value, turn_gamma, lam), e.values_K, strict=True):
        for t in range(len(v)):  # A_k is the last token's; before it one-step differences of V come on top
            deltas = [gamma * v[j + 1] - v[j] for j in range(t, len(v) - 1)]
            head = sum((gamma * lam) ** i * d for i, d in enumerate(deltas))
            out.append(head + (gamma * lam) ** len(deltas) * a)
    return out


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 0.7), (0.97, 1.0)])
def test_they_equal_the_loops(seed: int, gamma: float, lam: float) -> None:
    e = drawn(seed, tail=seed % 2 == 1)
    assert e.values_K is not None
    steps = [
        (r if t == len(v) - 1 else 0.0, x)
        for r, v in zip(e.rewards_K, e.values_K, strict=True)
        for t, x in enumerate(v)
    ]
    firsts = [(r, v[0]) for r, v in zip(e.rewards_K, e.values_K, strict=True)]
    (tokens,), (turns,) = gae([e], gamma=gamma, lam=lam), turn_gae([e], gamma=gamma, lam=lam)
    assert flat(tokens) == pytest.approx(loop_gae(steps, e.tail_value, gamma, lam), abs=1e-6)
    assert flat(turns) == pytest.approx(loop_gae(firsts, e.tail_value, gamma, lam), abs=1e-6)
    (both,) = bilevel_gae([e], gamma=gamma, turn_gamma=0.9, lam=lam)
    assert flat(both) == pytest.approx(loop_bilevel(e, gamma, 0.9, lam), abs=1e-6)


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [False, True])
def test_bilevel_gae_without_discounts_is_gae_and_else_it_is_not(tail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", lambda self: self)  # the sums are float64: so are these results
    differ = 0
    for seed in range(20):
        e = drawn(seed, tail=tail)
        one, other = flat(gae([e])[0]), flat(bilevel_gae([e], gamma=1.0, turn_gamma=1.0, lam=1.0)[0])
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 3e-15
        low, both = flat(gae([e], gamma=0.9)[0]), flat(bilevel_gae([e], gamma=0.9, turn_gamma=0.9, lam=1.0)[0])
        differ += max(abs(a - b) for a, b in zip(low, both, strict=True)) > 1e-3
    assert differ > 10


@pytest.mark.parametrize("seed", range(6))
def test_turn_gae_of_turns_of_one_token_is_gae(seed: int) -> None:
    e = drawn(seed, tail=True)
    assert e.values_K is not None
    short = episode(e.rewards_K, [v[:1] for v in e.values_K], e.tail_value)
    for gamma, lam in ((1.0, 1.0), (0.9, 0.7)):
        (turns,), (tokens,) = turn_gae([short], gamma=gamma, lam=lam), gae([short], gamma=gamma, lam=lam)
        assert flat(turns) == flat(tokens)
        (both,) = bilevel_gae([short], gamma=gamma, turn_gamma=gamma, lam=lam)
        assert flat(both) == pytest.approx(flat(tokens), abs=1e-6)


def test_without_values_and_with_whole_returns_they_are_returns() -> None:
    e = episode([1.0, -2.0, 4.0], [[0.0] * 2, [0.0], [0.0] * 3])
    (tokens,), (turns,), (both,) = gae([e]), turn_gae([e], gamma=1.0, lam=1.0), bilevel_gae([e], turn_gamma=1.0)
    assert flat(tokens) == flat(both) == [3.0, 3.0, 2.0, 4.0, 4.0, 4.0]
    assert turns.tolist() == [3.0, 2.0, 4.0]
    (turns,) = turn_gae([e], gamma=0.5, lam=1.0)  # discounted per turn
    assert turns.tolist() == [1.0, 0.0, 4.0]


def test_an_episode_depends_on_itself_alone() -> None:
    group = [drawn(s, tail=s % 2 == 0) for s in range(4)]
    for function in (gae, turn_gae, bilevel_gae):
        alone = [flat(function([e])[0]) for e in group]
        assert [flat(a) for a in function(group)] == alone


# --- bias, by exact enumeration -------------------------------------------------------------------------------------


class Mdp:
    """Two turns of two binary tokens each. A first turn of 0, 0 ends the episode.

    The reward of turn 0 is its number of ones; that of turn 1 is 2 where both its tokens equal turn 0's last token.
    π of each context's token is a free parameter, so the gradient is by those logits. V is any number per context.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.p: dict[tuple[int, ...], float] = {}
        self.v: dict[tuple[int, ...], float] = {}
        for n in range(5):
            for bits in range(2**n):
                context = tuple((bits >> i) & 1 for i in range(n))
                self.p[context], self.v[context] = self.rng.uniform(0.2, 0.8), self.rng.uniform(-2, 2)

    def episodes(self) -> list[tuple[float, tuple[int, ...], tuple[float, ...]]]:
        """Every episode: its probability, its tokens and its rewards."""
        out = []
        for bits in range(16):
            tokens = tuple((bits >> i) & 1 for i in range(4))
            rewards: tuple[float, ...] = (float(sum(tokens[:2])), 2.0 * (tokens[2] == tokens[3] == tokens[1]))
            if tokens[:2] == (0, 0):
                if tokens[2:] != (0, 0):
                    continue
                tokens, rewards = tokens[:2], rewards[:1]
            probability = 1.0
            for t, token in enumerate(tokens):
                p = self.p[tokens[:t]]
                probability *= p if token else 1 - p
            out.append((probability, tokens, rewards))
        return out

    def gradient(self, advantages: Callable[[tuple[int, ...], tuple[float, ...]], list[float]]) -> list[float]:
        """E[Σ_t A_t ∇log π] by the logit of each context."""
        total = dict.fromkeys(self.p, 0.0)
        for probability, tokens, rewards in self.episodes():
            for t, a in enumerate(advantages(tokens, rewards)):
                total[tokens[:t]] += probability * a * (tokens[t] - self.p[tokens[:t]])
        return list(total.values())

    def true(self) -> list[float]:
        return self.gradient(lambda tokens, rewards: [sum(rewards)] * len(tokens))

    def by(self, function: Any, *, last: bool = False, **options: Any) -> list[float]:
        def advantages(tokens: tuple[int, ...], rewards: tuple[float, ...]) -> list[float]:
            values = [[self.v[tokens[:t]] for t in (2 * k, 2 * k + 1)] for k in range(len(rewards))]
            if last:  # V read when the turn's tokens are known
                values = [[self.v[tokens[: 2 * k + 2]]] * 2 for k in range(len(rewards))]
            (found,) = function([episode(rewards, values)], **options)
            return [float(a) for a in found for _ in range(2)] if isinstance(found, Tensor) else flat(found)

        return self.gradient(advantages)

    def true_values(self) -> None:
        """Make V what it estimates."""
        for context in self.v:
            weight = reward = 0.0
            for probability, tokens, rewards in self.episodes():
                if tokens[: len(context)] == context:
                    weight += probability
                    reward += probability * sum(rewards[len(context) // 2 :])
            self.v[context] = reward / weight if weight else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_they_are_unbiased_without_discounts_whatever_the_critic_says(seed: int) -> None:
    mdp = Mdp(seed)
    for function, options in (
        (gae, dict[str, Any]()),
        (turn_gae, {"gamma": 1.0, "lam": 1.0}),
        (bilevel_gae, {"turn_gamma": 1.0}),
    ):
        assert mdp.by(function, **options) == pytest.approx(mdp.true(), abs=1e-6), function.__name__


def test_a_critic_in_error_biases_them_where_they_trust_it_and_a_right_one_does_not() -> None:
    mdp = Mdp(0)
    wrong: list[tuple[Any, dict[str, Any]]] = [(gae, {"lam": 0.5}), (turn_gae, {"gamma": 1.0, "lam": 0.5})]
    for function, options in wrong:
        assert mdp.by(function, **options) != pytest.approx(mdp.true(), abs=1e-2)
    mdp.true_values()
    for lam in (0.0, 0.5):
        assert mdp.by(gae, lam=lam) == pytest.approx(mdp.true(), abs=1e-6)
        assert mdp.by(turn_gae, gamma=1.0, lam=lam) == pytest.approx(mdp.true(), abs=1e-6)


def test_a_value_read_behind_the_turn_cancels_what_the_turn_did() -> None:
    # V after turn 0 knows its tokens. As its own baseline it takes away what they are worth.
    mdp = Mdp(1)
    mdp.true_values()
    assert mdp.by(turn_gae, last=True, gamma=1.0, lam=1.0) != pytest.approx(mdp.true(), abs=1e-1)


# --- the estimator that the settings choose -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_find_them(kind: str) -> None:
    made = Estimator(Choice(kind))
    assert (made.reads_values, made.baseline) == (True, "values")
    (found,) = made([episode([1.0], [[0.25, 0.5]])])
    assert flat(found) == pytest.approx({"turn_gae": [0.75]}.get(kind, [0.75, 0.5]))


def test_a_small_advantage_of_equal_rewards_is_kept() -> None:
    # Equal rewards are no signal to compare episodes by. A critic's error is one, however small.
    made = Estimator(Choice("gae"))
    found = made([episode([1.0], [[1.0 - 1e-6]]), episode([1.0], [[1.0]])])
    assert flat(found[0]) == pytest.approx([1e-6], rel=0.1)
    assert flat(found[1]) == [0.0]
