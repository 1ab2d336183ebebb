"""The packing of rows into micro-batches, which go through the model together, and their layout in memory.

    rows ─▶ prefix tree ─▶ one flat sequence of segments          (``shared=True``)
    rows ─▶ sorted by length ─▶ a padded rectangle [B, L]         (``shared=False``)

Rows of one group start with the same prompt, and forked rows share whole turns. In the tree layout every distinct
(context, token) pair is computed once. A *segment* is a run of tokens with one context. Its tokens attend to the
segments on its path and to themselves. There is no padding. Hidden states depend on nothing but the path, so the
rows' log-probabilities and gradients are those of the plain layout.

Pure numpy; the attention that reads the layout is in ``learner/tree_attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MIN_SHARED = 16
"""Shorter common runs are computed again, because a segment of its own costs more than its tokens."""
PACK_COST = 64
"""What one more pack costs, in tokens: the gradients of all weights are cast and added once more."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens with one context, which are ``start:stop`` of the flat sequence.

    ``path`` are the indices of the segments before it, root first.
    """

    start: int
    stop: int
    path: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pack:
    """One micro-batch.

    ``shape`` is (1, N) in the tree layout. It is (B, L) in the padded one, where N = B·L.
    """

    rows: tuple[int, ...]
    """Indices of the rows inside the sequence that was packed."""
    shape: tuple[int, int]
    ids: Ints
    """[N], 0 where padded."""
    positions: Ints
    """[N]: each token's place in its row."""
    at: tuple[Ints, ...]
    """For each of ``rows``, [T]: where its tokens lie in the flat sequence."""
    segments: tuple[Segment, ...]
    """The tree. Empty in the padded layout."""

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return len(self.ids)


class _Tree:
    """The segments of a set of rows, which must be sorted lexicographically."""

    def __init__(self, rows: Sequence[Ints], min_shared: int) -> None:
        self.rows = rows
        self.min_shared = min_shared
        self.size = 0
        self.segments: list[Segment] = []
        self.pieces: list[Ints] = []
        self.offsets: list[int] = []
        self.paths: dict[int, tuple[int, ...]] = {}
        # A stack, and no recursion: rows that leave a common path one by one make a tree as deep as they are many.
        todo: list[tuple[list[int], int, tuple[int, ...]]] = [(list(range(len(rows))), 0, ())]
        while todo:
            todo += self._grow(*todo.pop())[::-1]

    def _emit(self, tokens: Ints, depth: int, path: tuple[int, ...]) -> tuple[int, ...]:
        self.segments.append(Segment(self.size, self.size + len(tokens), path))
        self.pieces.append(tokens)
        self.offsets.append(depth)
        self.size += len(tokens)
        return (*path, len(self.segments) - 1)

    def _grow(
        self, members: list[int], depth: int, path: tuple[int, ...]
    ) -> list[tuple[list[int], int, tuple[int, ...]]]:
        """Place what rows that agree on everything before ``depth`` have in common from it on.

        Returns the arguments of the calls that place the rest, in order.
        """
        first, last = self.rows[members[0]], self.rows[members[-1]]
        # They are sorted, so what the first and the last have in common, all have in common.
        common = len(first) if len(members) == 1 else _common(first, last)
        if common - depth >= self.min_shared or len(members) == 1:
            if common > depth:
                path = self._emit(first[depth:common], depth, path)
            depth = common
        children: dict[int, list[int]] = {}
        for m in members:
            if len(self.rows[m]) == depth:
                self.paths[m] = path
            elif len(self.rows[m]) == common:  # ends inside a run that is too short to share
                self.paths[m] = self._emit(self.rows[m][depth:], depth, path)
            else:
                children.setdefault(int(self.rows[m][common]), []).append(m)
        return [(group, depth, path) for group in children.values()]

    def at(self, member: int) -> Ints:
        parts = [np.arange(self.segments[s].start, self.segments[s].stop) for s in self.paths[member]]
        joined: Ints = np.concatenate(parts).astype(np.int64)  # numpy below 2.4 does not say its type
        return joined


def _common(a: Ints, b: Ints) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _tree_pack(rows: Sequence[Ints], chosen: Sequence[int], min_shared: int) -> Pack:
    tree = _Tree([rows[i] for i in chosen], min_shared)
    positions = [o + np.arange(len(p)) for o, p in zip(tree.offsets, tree.pieces, strict=True)]
    return Pack(
        rows=tuple(chosen),
        shape=(1, tree.size),
        ids=np.concatenate(tree.pieces).astype(np.int64),
        positions=np.concatenate(positions).astype(np.int64),
        at=tuple(tree.at(m) for m in range(len(chosen))),
        segments=tuple(tree.segments),
    )


def _padded_pack(rows: Sequence[Ints], chosen: Sequence[int]) -> Pack:
    width = max(len(rows[i]) for i in chosen)
    ids = np.zeros((len(chosen), width), np.int64)
    for b, i in enumerate(chosen):
        ids[b, : len(rows[i])] = rows[i]
    return Pack(
        rows=tuple(chosen),
        shape=(len(chosen), width),
        ids=ids.reshape(-1),
        positions=np.tile(np.arange(width), len(chosen)),
        at=tuple(b * width + np.arange(len(rows[i])) for b, i in enumerate(chosen)),
        segments=(),
    )


def pack_rows(
    rows: Sequence[Ints], *, token_budget: int, shared: bool = True, min_shared: int = MIN_SHARED
) -> list[Pack]:
    """Split ``rows`` into micro-batches.

    Every row is in exactly one pack. With shared prefixes the packs are cut where the fewest tokens are computed twice.

    Args:
        rows: token ids, [T] of each row, with T at least 1.
        token_budget: the most tokens of a pack, padding included. A row longer than that is alone in its pack.
        shared: compute shared prefixes once (the tree layout), or pad rows to one length.
        min_shared: the fewest tokens of a common run that are computed once.

    Raises:
        ValueError: a row has no tokens.
    """
    if any(len(r) == 0 for r in rows):
        raise ValueError("a row without tokens cannot be packed")
    if shared:
        # Rows that share a prefix become neighbours: big-endian bytes of integers from 0 on sort as the integers do.
        order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">i8").tobytes())
        return [p for part in _parts(rows, order, token_budget, min_shared) for p in _filled(
            part, token_budget, lambda chosen: _tree_pack(rows, chosen, min_shared))]  # fmt: skip
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return _filled(order, token_budget, lambda chosen: _padded_pack(rows, chosen))


def _parts(rows: Sequence[Ints], order: Sequence[int], budget: int, min_shared: int) -> list[list[int]]:
    """Cut the sorted rows into runs for a pack each, so that the fewest tokens are computed more than once.

    A cut costs what the rows on both its sides have in common, and a pack ``PACK_COST``. Common runs inside common runs
    may be too short to be shared, so a run's pack can be larger than it is said to be here: ``_filled`` looks again.
    """
    lengths = [len(rows[i]) for i in order]
    common = [0, *(_common(rows[a], rows[b]) for a, b in pairwise(order))]
    shared = [c if c >= min_shared else 0 for c in common]
    cost, start = [0], [0]  # of the best way to cut the first n rows, and where its last run starts
    for end in range(1, len(order) + 1):
        tokens, found = 0, list[tuple[int, int]]()
        for first in range(end - 1, -1, -1):
            tokens += lengths[first] - (shared[first + 1] if first + 1 < end else 0)
            if tokens > budget and found:
                break
            found.append((cost[first] + tokens + PACK_COST, first))
        least, first = min(found, key=itemgetter(0))
        cost.append(least)
        start.append(first)
    parts, end = list[list[int]](), len(order)
    while end:
        parts.append(list(order[start[end] : end]))
        end = start[end]
    return parts[::-1]


def _filled(order: Sequence[int], budget: int, make: Callable[[Sequence[int]], Pack]) -> list[Pack]:
    """Make packs of as many of these rows, one after the other, as the budget takes."""
    if order and (whole := make(order)).tokens <= budget:
        return [whole]
    packs: list[Pack] = []
    done = 0
    while done < len(order):
        packs.append(_largest(order[done:], budget, make))
        done += len(packs[-1].rows)
    return packs


def _largest(order: Sequence[int], budget: int, make: Callable[[Sequence[int]], Pack]) -> Pack:
    """Make the pack of the most first rows that the budget takes, at least one.

    Their number is doubled, then bisected: a pack of n rows takes log n trials, for a trial's cost is that of its rows.
    """
    found, fits, over = make(order[:1]), 1, len(order) + 1
    while over - fits > 1:
        n = min(2 * fits, (fits + over) // 2)
        trial = make(order[:n])
        if trial.tokens <= budget:
            found, fits = trial, n
        else:
            over = n
    return found
