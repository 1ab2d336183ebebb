"""The sampler: the right distribution, and the log-probability of exactly what was sampled."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.engine import Sampling
from areal_agents.engines.cpu.sampler import filter_logits, sample
from areal_agents.engines.cpu.scheduler import uniform
from areal_agents.errors import ConfigError


def one(temperature: float = 1.0, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Sampling:
    return Sampling(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def draws(seed: int, n: int) -> list[float]:
    return [uniform(seed, i) for i in range(n)]


def test_frequencies_match_the_distribution_at_each_temperature() -> None:
    """Pearson's chi-square over 7 tokens, 20,000 draws: below the 0.1 % point of 6 degrees of freedom (22.46)."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -1.5, 0.7])
    n = 20_000
    for temperature in (1.0, 0.6, 1.7):
        tokens, logprobs = sample(logits.expand(n, -1), [one(temperature)] * n, draws(11, n))
        expected = torch.log_softmax(logits / temperature, -1)
        torch.testing.assert_close(torch.tensor(logprobs), expected[torch.tensor(tokens)], atol=2e-6, rtol=0)
        counts = torch.bincount(torch.tensor(tokens), minlength=7)
        mean = expected.exp() * n
        assert float(((counts - mean) ** 2 / mean).sum()) < 22.46


def test_a_large_vocabulary_crosses_blocks() -> None:
    """Mass on ids 3, 255, 256, 700 of 1000: every one is drawn about as often as its probability says."""
    logits = torch.full((1000,), -math.inf)
    for id, p in {3: 0.1, 255: 0.2, 256: 0.3, 700: 0.4}.items():
        logits[id] = math.log(p)
    n = 8000
    tokens, logprobs = sample(logits.expand(n, -1), [one()] * n, draws(5, n))
    assert set(tokens) == {3, 255, 256, 700}
    for id, p in {3: 0.1, 255: 0.2, 256: 0.3, 700: 0.4}.items():
        assert abs(tokens.count(id) / n - p) < 4 * math.sqrt(p * (1 - p) / n)
        assert logprobs[tokens.index(id)] == pytest.approx(math.log(p), abs=1e-6)


def test_greedy_takes_the_maximum_with_the_logprob_of_temperature_one() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0], [5.0, 1.0, 1.0]])
    tokens, logprobs = sample(logits, [one(0.0), one(0.0)], draws(0, 2))
    assert tokens == [2, 0]
    # log(e^3 / (1 + e + e^3)), log(e^5 / (e^5 + 2e))
    assert logprobs == pytest.approx([3 - math.log(1 + math.e + math.e**3), -math.log(1 + 2 * math.exp(-4))], abs=1e-6)


def test_greedy_and_sampled_rows_mix() -> None:
    logits = torch.tensor([[0.0, 9.0, 0.0]]).expand(4, -1)
    tokens, _ = sample(logits, [one(0.0), one(50.0), one(0.0), one()], draws(0, 4))
    assert tokens[0] == tokens[2] == 1


def test_a_draw_does_not_depend_on_neighbours() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    alone, _ = sample(logits[:1], [one()], [0.7])
    for seed in range(5):
        crowd, _ = sample(logits, [one()] * 5, [0.7, *draws(seed, 4)])
        assert crowd[0] == alone[0]


def test_the_token_is_where_the_cumulative_sum_passes_the_draw() -> None:
    """Probabilities 0.5, 0.25, 0.25: 0 below 0.5, 1 below 0.75, then 2."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(5, -1)
    assert sample(logits, [one()] * 5, [0.0, 0.49, 0.51, 0.74, 0.76])[0] == [0, 0, 1, 1, 2]


def test_the_input_is_not_changed() -> None:
    logits = torch.randn(2, 8)
    before = logits.clone()
    sample(logits, [one(0.5), one(top_k=2)], draws(0, 2))
    assert torch.equal(logits, before)


def test_non_finite_logits_give_nan() -> None:
    logits = torch.tensor([[0.0, math.nan], [1.0, 0.0]])
    _, logprobs = sample(logits, [one(), one(0.0)], draws(0, 2))
    assert math.isnan(logprobs[0])
    assert logprobs[1] == pytest.approx(-math.log(1 + math.exp(-1)), abs=1e-6)


def test_filters_by_hand() -> None:
    row = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    assert torch.isfinite(filter_logits(row, one(top_k=2))).tolist() == [True, True, False, False]
    assert torch.isfinite(filter_logits(row, one(top_p=0.7))).tolist() == [True, True, False, False]
    assert torch.isfinite(filter_logits(row, one(top_p=0.5))).tolist() == [True, False, False, False]
    assert torch.isfinite(filter_logits(row, one(top_p=0.0))).tolist() == [True, False, False, False]
    assert torch.isfinite(filter_logits(row, one(min_p=0.3))).tolist() == [True, True, True, False]


def test_filtered_logprobs_are_of_the_filtered_distribution() -> None:
    row = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    seen = {}
    for seed in range(40):
        tokens, logprobs = sample(row, [one(top_k=2)], draws(seed, 1))
        seen[tokens[0]] = logprobs[0]
    assert seen == {0: pytest.approx(math.log(2 / 3), abs=1e-6), 1: pytest.approx(math.log(1 / 3), abs=1e-6)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 700), st.floats(0.05, 3.0), st.booleans())
def test_sampled_tokens_always_have_probability(seed: int, vocabulary: int, temperature: float, spiky: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocabulary, generator=generator) * (40 if spiky else 1)
    logits[torch.rand(3, vocabulary, generator=generator) < 0.5] = -math.inf
    logits[:, 0] = 0.0
    tokens, logprobs = sample(logits, [one(temperature)] * 3, draws(seed, 3))
    for row, token, logprob in zip(logits, tokens, logprobs, strict=True):
        assert torch.isfinite(row[token])
        assert logprob == pytest.approx(float(torch.log_softmax(row / temperature, -1)[token]), abs=1e-4)


def test_training_refuses_filters_and_greedy() -> None:
    with pytest.raises(ConfigError, match="top_p, min_p"):
        one(top_p=0.9, min_p=0.1).require_trainable()
    with pytest.raises(ConfigError, match="temperature > 0"):
        one(0.0).require_trainable()
    one(0.7).require_trainable()
