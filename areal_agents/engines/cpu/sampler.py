"""Batched sampling with the exact log-probability of what was sampled.

A row's distribution is softmax(filter(logits / T)), in float32. One uniform number u in [0, 1) picks the token by
inverting the cumulative sum in two levels, over the blocks and then inside one block. So there is no random number per
vocabulary entry, and float64 only for block sums. T = 0 is greedy. Its log-probability is that of T = 1.

The uniform number is a hash of the request's seed and the number of tokens that it has sampled. There is no state to
keep or to lose: a row draws the same whoever its neighbours are, and a turn that is taken up again goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from areal_agents.engine import Sampling

_BLOCK = 256


def filter_logits(scaled_V: Tensor, sampling: Sampling) -> Tensor:
    """Return one row of logits / T with the tokens outside top_k, top_p and min_p at -inf.

    The filters apply in this order, in float32.
    """
    out = scaled_V.clone()
    if 0 < sampling.top_k < out.shape[0]:
        kth = torch.topk(out, sampling.top_k).values[-1]
        out[out < kth] = -torch.inf
    if sampling.top_p < 1.0:
        ordered, index = torch.sort(out, descending=True)
        probabilities = torch.softmax(ordered, -1)
        # A token stays while the mass before it is below top_p: the most likely one always stays.
        before = torch.cumsum(probabilities, -1) - probabilities
        drop = before >= sampling.top_p
        drop[0] = False
        out[index[drop]] = -torch.inf
    if sampling.min_p > 0.0:
        probabilities = torch.softmax(out, -1)
        out[probabilities < sampling.min_p * probabilities.max()] = -torch.inf
    return out


def sample(
    logits_RV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float], *, alone: bool = False
) -> tuple[list[int], list[float]]:
    """Sample one token a row.

    Args:
        logits_RV: [rows, vocabulary]. They are not changed.
        samplings: how to sample, one a row.
        uniforms: the number in [0, 1) that picks the token, one a row.
        alone: compute each row by itself, so that rounding does not depend on how many there are.

    Returns:
        Token ids and log-probabilities, one a row. A row of non-finite logits has a NaN log-probability.
    """
    if alone:
        each = zip(torch.split(logits_RV, 1), samplings, uniforms, strict=True)
        rows = [sample(logits_1V, [sampling], [u]) for logits_1V, sampling, u in each]
        return [token for (token,), _ in rows], [logprob for _, (logprob,) in rows]
    scaled = logits_RV.float()
    # What follows works in place, and `float` returns logits that are float32 already as they are.
    if scaled.data_ptr() == logits_RV.data_ptr():
        scaled = scaled.clone()
    if any(s.temperature not in (0.0, 1.0) for s in samplings):
        scaled /= torch.tensor([s.temperature or 1.0 for s in samplings])[:, None]
    for i, s in enumerate(samplings):
        if s.temperature > 0 and (s.top_p < 1.0 or s.top_k > 0 or s.min_p > 0.0):
            scaled[i] = filter_logits(scaled[i], s)
    scaled -= scaled.amax(-1, keepdim=True)
    weights, sums = _block_sums(scaled)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1]
    greedy = [i for i, s in enumerate(samplings) if s.temperature == 0.0]
    if len(greedy) == len(samplings):
        tokens = scaled.argmax(-1)
    else:
        tokens = _invert(weights, sums, cumulative, torch.tensor(uniforms, dtype=torch.float64) * total)
        if greedy:
            tokens[greedy] = scaled[greedy].argmax(-1)
    logprobs = scaled.gather(-1, tokens[:, None])[:, 0].double() - total.log()
    return tokens.tolist(), logprobs.tolist()


def _block_sums(scaled_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(scaled) as [R, blocks, 256], and its block sums [R, blocks] in float64."""
    weights = scaled_RV.exp()
    if rest := -weights.shape[-1] % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, rest))
    weights = weights.view(weights.shape[0], -1, _BLOCK)
    return weights, weights.sum(-1).double()


def _invert(weights: Tensor, sums: Tensor, cumulative: Tensor, target: Tensor) -> Tensor:
    rows = torch.arange(weights.shape[0])
    block = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=sums.shape[1] - 1)
    rest = target - (cumulative[rows, block] - sums[rows, block])
    inner = weights[rows, block].double().cumsum(-1)
    offset = torch.searchsorted(inner, rest[:, None], right=True)[:, 0].clamp_(max=_BLOCK - 1)
    # Rounding can leave `rest` past the last token of its block that has any weight: take that block's likeliest.
    empty = weights[rows, block, offset] <= 0
    if bool(empty.any()):
        offset = torch.where(empty, weights[rows, block].argmax(-1), offset)
        still = weights[rows, block, offset] <= 0
        token = block * _BLOCK + offset
        return torch.where(still, weights.flatten(1).argmax(-1), token)
    return block * _BLOCK + offset
