"""What a simulation is made of: measured rates, a case, and the episodes of its groups.

Where the numbers of ``MEASURED`` come from (SmolLM2-135M, two CPU cores; ``--trace FILE`` replaces any of them):

* ``rates``: vLLM 0.32 on CPU, bf16, 128 new tokens: 56, 292, 489 and 574 tokens/s at 1, 8, 32 and 64 requests
  (contended, spread about 15 %). Between the points the total is linear, so the rate of one sequence falls with the
  batch; beyond the last point it stays.
* ``update_seconds``: 0.3 to 0.9 s for the same model through shared memory with the engine paused; the middle.
* ``tool_seconds``: the 0.1 to 0.5 s of the tool in ``async.py``, uniform.
* ``learner_rate``: ``results/trl_step.json``, tokens over ``learner_seconds``, 8.4 to 10.3 s for 1990 tokens.
* ``mean_tokens`` and ``turn_tokens`` are choices, not measurements: an agent's episode of 1024 sampled tokens, at most
  512 a turn. They set the unit of time; what is reported is a ratio of rates.

Not modelled: prefill, KV memory, failures, and the learner's skipping of rows that are masked altogether.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from areal_agents.rollout.buffer import OnExceed, Order

CAP = 8
"""An episode has at most this many times the mean tokens."""
OVERSUBSCRIPTION = 1.25
"""Episodes that may play over slots. At 1 slots stay empty: an episode in a tool needs none (1 to 3 % with 0.3 s beside
turns of 10 to 25 s), a group starts only when all of its episodes have room, and a session stays on its engine."""
_CHUNK = 1024
_TOOL_POOL = 1 << 16


@dataclass(frozen=True)
class Calibration:
    """Rates in tokens/s, times in seconds, lengths in sampled tokens."""

    rates: tuple[tuple[float, float], ...]
    """(running sequences, tokens/s of one engine), rising and concave."""
    update_seconds: float
    tool_seconds: tuple[float, float]
    learner_rate: float
    """Of one learner device."""
    mean_tokens: float = 1024.0
    turn_tokens: int = 512

    def __post_init__(self) -> None:
        points = [(0.0, 0.0), *self.rates]
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
        if not self.rates or any(s < 0 for s in slopes) or slopes != sorted(slopes, reverse=True):
            raise ValueError(f"rates {self.rates} must rise with ever smaller slopes: a batch must not speed one up")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """``MEASURED`` with the fields that a JSON object in ``path`` names. Raises ValueError for an unknown field."""
        given = json.loads(path.read_text())
        unknown = set(given) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown {sorted(unknown)}; a trace may hold {[f.name for f in fields(cls)]}")
        if "rates" in given:
            given["rates"] = tuple((float(n), float(rate)) for n, rate in given["rates"])
        if "tool_seconds" in given:
            given["tool_seconds"] = tuple(given["tool_seconds"])
        return replace(MEASURED, **given)

    def rate(self, running: float) -> float:
        """Tokens/s of one engine with ``running`` sequences, which may be a fraction (a mean over engines)."""
        before = (0.0, 0.0)
        for point in self.rates:
            if running <= point[0]:
                return before[1] + (point[1] - before[1]) * (running - before[0]) / (point[0] - before[0])
            before = point
        return before[1]


MEASURED = Calibration(
    rates=((1, 56.0), (8, 292.0), (32, 489.0), (64, 574.0)),
    update_seconds=0.6,
    tool_seconds=(0.1, 0.5),
    learner_rate=212.0,
)


@dataclass(frozen=True)
class Case:
    """One simulated run: ``updates`` batches, of which the first ``warmup`` are not measured."""

    engines: int
    slots: int
    """Sequences that one engine runs at once; more wait in its queue."""
    groups: int
    group_size: int
    sigma: float
    eta: int
    on_exceed: OnExceed
    updates: int
    warmup: int
    seed: int = 0
    balance: float = 1.0
    """The learner's capacity over the engines'."""
    oversubscription: float = OVERSUBSCRIPTION
    """``concurrency`` over slots."""
    order: Order = "completion"

    @property
    def concurrency(self) -> int:
        """What ``Buffer`` gets: episodes that may play."""
        return max(self.group_size, math.ceil(self.engines * self.slots * self.oversubscription))


def generation_capacity(case: Case, calibration: Calibration) -> float:
    """Tokens/s of all engines with every slot taken: nothing generates faster."""
    return case.engines * calibration.rate(case.slots)


def learner_capacity(case: Case, calibration: Calibration) -> float:
    """Tokens/s of the learner between updates."""
    return generation_capacity(case, calibration) * case.balance


class Workload:
    """The episodes of every group, a function of the seed and the group's place in the order of admission alone."""

    def __init__(self, case: Case, calibration: Calibration) -> None:
        self._case, self._calibration = case, calibration
        self._chunks: dict[int, list[list[int]]] = {}
        low, high = calibration.tool_seconds
        self._tools: list[float] = np.random.default_rng([case.seed, 1]).uniform(low, high, _TOOL_POOL).tolist()

    def lengths(self, order: int) -> list[int]:
        """Sampled tokens of each episode of a group: log-normal of mean ``mean_tokens``, capped at 8 times that."""
        chunk = self._chunks.get(order // _CHUNK)
        if chunk is None:
            chunk = self._chunks[order // _CHUNK] = self._draw(order // _CHUNK)
        return chunk[order % _CHUNK]

    def _draw(self, index: int) -> list[list[int]]:
        mean, sigma = self._calibration.mean_tokens, self._case.sigma
        rng = np.random.default_rng([self._case.seed, 0, index])
        drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, (_CHUNK, self._case.group_size))
        rows: list[list[int]] = np.ceil(np.minimum(drawn, CAP * mean)).astype(int).tolist()
        return rows

    def turns(self, tokens: int) -> int:
        """Turns of an episode of so many tokens."""
        return -(-tokens // self._calibration.turn_tokens)

    def tool(self, order: int, episode: int, turn: int) -> float:
        """Seconds that the tool takes after a turn; no tool follows the last one."""
        return self._tools[(order * 7919 + episode * 10477 + turn * 31) % _TOOL_POOL]
