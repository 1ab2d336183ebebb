"""The episodes of a saved run that somebody wants to see, and the advantages that they trained with.

    SavedRun ─▶ kind ─▶ listed / worst (no turns are read) ─▶ find ─▶ Record ─▶ advantages_of (a group's, or a step's)

Advantages are computed again from what was saved, with the run's own estimator, as in ``evaluation/reward_shift.py``:
of the whole batch where the estimator or a normalisation looks at it. Those from a critic's values cannot be, because
no values are saved.
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from areal_agents.errors import ArealError
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.tracking.one_episode import Earned, Summary, read_earned, read_episode, read_summaries
from areal_agents.tracking.trajectories import Record, shards, step_of

_FIRST = ("train", "eval")

Place = tuple[Path, Summary]
"""A shard, and one of its episodes."""


def kinds_of(run: SavedRun) -> list[str]:
    """Return the kinds of episodes that a run has, those that people ask for first in front.

    Raises ArealError where it has none.
    """
    found = {path.parent.name for path in shards(run.out)}
    if not found:
        raise ArealError(f"{run.out} has no episodes yet: a training saves them at the end of each step")
    return [*(kind for kind in _FIRST if kind in found), *sorted(found.difference(_FIRST))]


def listed(run: SavedRun, kind: str, step: int | None) -> list[Place]:
    """Return the episodes of one step in the order of the files; the last step where ``step`` is None.

    Raises ArealError where there are none.
    """
    paths = run.shards(kind) if step is None else run.shards(kind, first=step, last=step)
    return [(paths[-1], summary) for summary in read_summaries(paths[-1])]


def worst(run: SavedRun, kind: str, step: int | None, n: int) -> list[Place]:
    """Return the ``n`` episodes with the lowest rewards, lowest first; of equal ones the latest steps' first.

    ``step`` chooses one step, None all of them. Raises ArealError where there are none.
    """
    paths = run.shards(kind) if step is None else run.shards(kind, first=step, last=step)
    found = [(path, summary) for path in paths for summary in read_summaries(path)]
    order = sorted(found, key=lambda f: (-math.inf if math.isnan(f[1].reward) else f[1].reward, -f[1].step))
    return order[:n]


def find(run: SavedRun, id: str, kinds: Sequence[str]) -> Record:
    """Read the episode called ``id``, of the first of the kinds that has it.

    Raises ArealError, with near ids, where there is none.
    """
    seen: list[str] = []
    for kind in kinds:
        for path in run.shards(kind):
            if (record := read_episode(path, id)) is not None:
                return record
            seen += [summary.id for summary in read_summaries(path)]
    near = difflib.get_close_matches(id, dict.fromkeys(seen), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"`areal-agents show {run.out} --list` lists them"
    raise ArealError(f"{run.out} has no episode {id!r} among the {len(seen)} of {', '.join(kinds)}: {hint}")


def read(place: Place) -> Record:
    """Read a listed episode. Raises ArealError where it is no longer there."""
    path, summary = place
    if (record := read_episode(path, summary.id)) is None:
        raise ArealError(f"{path} no longer holds episode {summary.id!r}: the run is being resumed or replaced")
    return record


def advantages_of(run: SavedRun, record: Record) -> tuple[list[float] | None, str]:
    """Return the advantage of each turn, or None and why there are none.

    The reason is empty where nothing trains on such an episode.
    """
    t = record.trajectory
    if record.kind != "train" or run.algorithm is None or not t.turns:
        return None, ""
    try:
        return _computed_again(run, run.algorithm, record), ""
    except (ArealError, ValueError) as error:  # a group of one, or a package of the run that is not here
        return None, f"advantages cannot be computed again: {error}"


def _computed_again(run: SavedRun, algorithm: AlgorithmConfig, record: Record) -> list[float]:
    from areal_agents.algorithms.episode_view import EpisodeView
    from areal_agents.algorithms.estimator import Estimator, per_turn  # torch: a second, for training runs alone
    from areal_agents.algorithms.refinement import refined

    t, estimator = record.trajectory, Estimator(algorithm.advantage)
    if estimator.reads_values:
        raise ArealError(f"{algorithm.advantage.kind!r} reads a critic's values, which are not saved")
    if estimator.reads_ratios:
        raise ArealError(f"{algorithm.advantage.kind!r} reads the log-probabilities of its step, which are not saved")
    if algorithm.unsaved:
        raise ArealError(f"they depend on what {algorithm.unsaved} says of each token, which is not saved")
    whole = estimator.over_batch or algorithm.normalize == "batch"
    path = run.shards("train", first=record.step, last=record.step)[0]
    groups: dict[str, dict[str, Earned]] = defaultdict(dict)
    own = run.env_of(record.kind, t.group)  # each environment of a mixture is a batch of its own
    for e in read_earned(path, None if whole else t.group):
        if e.rewards_K and run.env_of(record.kind, e.group) == own:
            groups[e.group][e.id] = e
    greedy: dict[str, float] = {}
    if estimator.baseline == "greedy":
        path = run.shards("greedy", first=record.step, last=record.step)[0]
        greedy = {e.group: math.fsum(e.rewards_K) for e in read_earned(path)}
    views = [
        [
            EpisodeView(
                e.rewards_K, e.tokens_K, e.state_keys_K, e.terminated, e.stop_reason, greedy_return=greedy.get(e.group)
            )
            for e in group.values()
        ]
        for group in groups.values()
    ]
    found = refined(estimator.of_batch(views), views, overlong=algorithm.overlong, normalize=algorithm.normalize)
    return per_turn(found[list(groups).index(t.group)][list(groups[t.group]).index(t.id)])


def steps_text(run: SavedRun, kind: str) -> str:
    """Say which steps a kind has, such as ``steps 1 to 16``."""
    steps = [step_of(path) for path in run.shards(kind)]
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
