"""The passes of rows through the model, forward alone or with a backward pass, pack by pack.

    scope      log π of ...     the objective sees          then backward
    token      a chunk          the chunk                   from the very logits
    episode    a pack           the pack                    logits of each chunk once more
    minibatch  all rows         all rows                    everything once more

So the logits of more than a chunk never exist. Where the rows of some episode lie in several packs, an objective that
sees episodes is treated as one that sees the minibatch. All ways give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_agents.algorithms.batch import Row
from areal_agents.algorithms.objective import Tokens, sources
from areal_agents.algorithms.scope import Scope
from areal_agents.learner.forward import Decoder, Scores
from areal_agents.learner.packing import Pack, pack_rows

Logprobs = list[NDArray[np.float32]]
"""For each row, [T]: log π where the row's mask is True, else 0."""


class Scored(NamedTuple):
    """What the model says of some sampled tokens, or the gradient of an objective to it."""

    logprobs_T: Tensor
    """log π, float [T], on the processor."""
    entropy_T: Tensor | None
    """Entropy of the distribution that each token was sampled from, float [T]. None where nobody asked for it."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Scored:
        return Scored(function(self.logprobs_T), None if self.entropy_T is None else function(self.entropy_T))


@dataclass(frozen=True, slots=True)
class Objective:
    """What a backward pass minimises."""

    value: Callable[[Scored, Tokens], Tensor]
    """A scalar, these tokens' part of the whole."""
    scope: Scope = "token"
    """Which tokens it has to be given at once."""
    entropy: bool = False
    """Whether it reads ``entropy_T``."""
    beside: Callable[[Tensor, Tokens], Tensor | None] | None = None
    """Is given the hidden states [T, D] before each pack's tokens, and returns what to add to their gradient."""

    def differentiate(self, scored: Scored, tokens: Tokens) -> tuple[float, Scored]:
        """Return its value for some tokens, and its gradient to what the model says of them.

        The objective of [T] numbers is no GPU's work.
        """
        leaves = scored.map(lambda x: x.detach().cpu().requires_grad_())
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            value = self.value(leaves, tokens)
            value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach()), leaves.map(lambda x: torch.zeros_like(x) if x.grad is None else x.grad)


class Passes:
    """The way of rows through one model, as far as the settings' limits on memory let it."""

    def __init__(
        self, decoder: Decoder, *, token_budget: int, chunk: int, before_pack: Callable[[], None] = lambda: None
    ) -> None:
        """Bind a model.

        Args:
            decoder: the model.
            token_budget: most tokens of a pack, padding included.
            chunk: sampled positions whose logits exist at once.
            before_pack: called before each pack.
        """
        self._decoder, self._budget, self._chunk, self._before = decoder, token_budget, chunk, before_pack

    def logprobs(self, rows: Sequence[Row], temperature: float) -> tuple[Logprobs, int]:
        """Compute log π of the rows' sampled tokens, and count the tokens that went through the model."""
        scored, forwarded = self._forward(rows, temperature, entropy=False)
        out: Logprobs = [np.zeros(len(r), np.float32) for r in rows]
        for row, values, found in zip(rows, out, scored, strict=True):
            values[row.mask] = found.logprobs_T.numpy()
        return out, forwarded

    def states(self, rows: Sequence[Row]) -> Iterator[tuple[Pack, Tensor]]:
        """Yield each pack of ``rows`` with the hidden states before its sampled tokens, [T, D].

        The caller opens the decoder's autocast around it.
        """
        for pack in self._packs(rows):
            self._before()
            yield pack, self._states(pack, [rows[i] for i in pack.rows])

    def backward(
        self,
        rows: Sequence[Row],
        proximal: Sequence[NDArray[np.float32]] | None,
        temperature: float,
        objective: Objective,
    ) -> tuple[float, int]:
        """Add the gradient of ``objective`` over ``rows`` to the parameters.

        Args:
            rows: all rows that can change the gradient.
            proximal: log p of each row, float [T], or None.
            temperature: that logits are divided by.
            objective: what is minimised.

        Returns:
            Its value, and the tokens that went through the model.
        """
        loss, forwarded, d = 0.0, 0, self._decoder
        packs = self._packs(rows)
        ahead: list[Scored] | None = None
        if objective.scope == "minibatch" or (objective.scope == "episode" and not _whole_episodes(rows, packs)):
            scored, forwarded = self._forward(rows, temperature, entropy=objective.entropy)
            loss, whole = objective.differentiate(_joined(scored), Tokens.of(rows, proximal))
            ahead = _parted(whole, [int(r.mask.sum()) for r in rows])
        # One autocast for all packs: it casts each weight once. It must end before the weights change.
        with d.autocast():
            weight = d.head.weight.detach().to(d.dtype)
            for pack in packs:
                self._before()
                chosen = [rows[i] for i in pack.rows]
                tokens = Tokens.of(chosen, None if proximal is None else [proximal[i] for i in pack.rows])
                states = self._states(pack, chosen)
                given = None if ahead is None else _joined([ahead[i] for i in pack.rows])
                if given is None and objective.scope != "token":
                    found = self._scored(states.detach(), tokens.ids, temperature, weight, objective.entropy)
                    value, given = objective.differentiate(found, tokens)
                    loss += value
                grad = torch.empty_like(states)  # filled by chunks: the logits of all tokens would be too large
                for part in _chunks(len(tokens), self._chunk):
                    ids = tokens.ids[part].to(d.device)
                    scores = Scores(states[part], d.head, ids, temperature, d.dtype, weight, entropy=objective.entropy)
                    if given is None:
                        value, to = objective.differentiate(Scored(scores.logprobs_T, scores.entropy_T), tokens[part])
                        loss += value
                    else:
                        to = given.map(itemgetter(part))
                    grad[part] = scores.backward(*to.map(lambda x: x.to(d.device)))
                    del scores  # before the next chunk's logits
                if objective.beside is not None and (more := objective.beside(states.detach(), tokens)) is not None:
                    grad += more
                with d.autocast(False):
                    states.backward(grad)  # type: ignore[no-untyped-call]
        return loss, forwarded + sum(p.tokens for p in packs)

    @torch.no_grad()
    def _forward(self, rows: Sequence[Row], temperature: float, *, entropy: bool) -> tuple[list[Scored], int]:
        """Return what the model says of each row's sampled tokens, and the tokens that went through it."""
        d, packs = self._decoder, self._packs(rows)
        out: dict[int, Scored] = {}
        with d.autocast():  # its own context: weights cast without a graph must not serve a later backward
            weight = d.head.weight.to(d.dtype)
            for pack in packs:
                self._before()
                chosen = [rows[i] for i in pack.rows]
                ids = torch.from_numpy(np.concatenate([r.ids[r.mask] for r in chosen]))
                found = self._scored(self._states(pack, chosen), ids, temperature, weight, entropy)
                out |= zip(pack.rows, _parted(found, [int(r.mask.sum()) for r in chosen]), strict=True)
        return [out[i] for i in range(len(rows))], sum(p.tokens for p in packs)

    @torch.no_grad()
    def _scored(self, states: Tensor, ids: Tensor, temperature: float, weight: Tensor, entropy: bool) -> Scored:
        d = self._decoder
        logprobs: list[Tensor] = [torch.zeros(0)]
        entropies: list[Tensor] = [torch.zeros(0)]
        for part in _chunks(len(ids), self._chunk):
            scores = Scores(states[part], d.head, ids[part].to(d.device), temperature, d.dtype, weight, entropy=entropy)
            logprobs.append(scores.logprobs_T.cpu())
            if scores.entropy_T is not None:
                entropies.append(scores.entropy_T.cpu())
        return Scored(torch.cat(logprobs), torch.cat(entropies) if entropy else None)

    def _packs(self, rows: Sequence[Row]) -> list[Pack]:
        return pack_rows([r.ids for r in rows], token_budget=self._budget, shared=self._decoder.shared)

    def _states(self, pack: Pack, chosen: Sequence[Row]) -> Tensor:
        """Return the hidden states that predict the sampled tokens, [T, D]."""
        d = self._decoder
        return d.hidden(pack).index_select(0, sources(chosen, pack.at).to(d.device))


def _whole_episodes(rows: Sequence[Row], packs: Sequence[Pack]) -> bool:
    """Say whether the rows of each episode lie in one pack."""
    home: dict[int, int] = {}
    return all(home.setdefault(rows[i].episode, p) == p for p, pack in enumerate(packs) for i in pack.rows)


def _joined(parts: Sequence[Scored]) -> Scored:
    entropy = [p.entropy_T for p in parts if p.entropy_T is not None]
    return Scored(torch.cat([p.logprobs_T for p in parts]), torch.cat(entropy) if entropy else None)


def _parted(whole: Scored, sizes: Sequence[int]) -> list[Scored]:
    logprobs = torch.split(whole.logprobs_T, list(sizes))
    if whole.entropy_T is None:
        return [Scored(x, None) for x in logprobs]
    return [Scored(x, e) for x, e in zip(logprobs, torch.split(whole.entropy_T, list(sizes)), strict=True)]


def _chunks(n: int, size: int) -> list[slice]:
    return [slice(s, min(s + size, n)) for s in range(0, n, size)]
