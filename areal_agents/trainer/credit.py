"""The credit that the episodes of a batch get, from their estimator to the numbers that train.

groups ─▶ views ─▶ estimator ─▶ refinement (``algorithms/refinement.py``) ─▶ rows

What a group's own rewards say of its signal decides whether dynamic sampling replaces it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, tensors_of
from areal_agents.algorithms.refinement import refined
from areal_agents.algorithms.turn_credit import anchor_sizes
from areal_agents.errors import ConfigError
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.types import Group, Trajectory


def views_of(group: Group) -> list[EpisodeView]:
    """Return what an estimator sees of a group."""
    greedy = None if group.greedy is None else group.greedy.reward
    return [EpisodeView.of(t, greedy_return=greedy) for t in group.trajectories]


def signal_of(algorithm: AlgorithmConfig) -> Callable[[Group], bool]:
    """Return the judge of whether a finished group would train anything by itself.

    It would where the estimator, called on the group alone, gives a number that is not 0 to an episode that trains.
    """
    estimator = Estimator(algorithm.advantage)

    def has_signal(group: Group) -> bool:
        views = views_of(group)
        if estimator.reads_ratios:  # they weigh returns, and make none of equal ones differ from their mean
            views = [replace(view, log_ratio=0.0) for view in views]
        (found,) = refined([estimator(views)], [views], overlong=algorithm.overlong, normalize="none")
        return any(bool(t.any()) for a in found for t in tensors_of(a))

    return has_signal


def require_state_keys(groups: Sequence[Group], estimator: Estimator) -> None:
    """Raise ConfigError where an estimator compares states, and the environment named none in a whole batch."""
    if estimator.reads_state_keys and all(t.state_key is None for e in _episodes(groups) for t in e.turns):
        raise ConfigError(
            f"algorithm.advantage.kind = {estimator.choice.kind!r} compares turns in equal states, and the environment "
            "named none in a whole batch: return info['state_key'] from areset and astep (docs/write-an-environment.md)"
        )


def credit_metrics(groups: Sequence[Group], algorithm: AlgorithmConfig) -> dict[str, float]:
    """Return the metrics of a batch's credit.

    ``groups_without_signal`` is a share; ``anchor_size`` and ``anchor_size/turn_K`` are means over turns, and
    ``anchors_shared`` is the share of turns whose state another turn of the group met. Where a critic, pay for a
    divergence or a teacher alone give every group a signal, or an estimator finds one in the batch that a group alone
    does not have, ``groups_without_signal`` is left out.
    """
    estimator = Estimator(algorithm.advantage)
    found: dict[str, float] = {}
    judged = not estimator.reads_values and estimator.judges_alone()
    if judged and not algorithm.kl.in_reward and not algorithm.teacher.alone:
        has_signal = signal_of(algorithm)
        found["groups_without_signal"] = sum(not has_signal(g) for g in groups) / len(groups)
    if algorithm.overlong == "mask":
        episodes = _episodes(groups)
        found["overlong_masked"] = sum(not t.terminated for t in episodes) / len(episodes)
    if estimator.reads_state_keys:
        by_turn: dict[int, list[int]] = defaultdict(list)
        for group in groups:
            for sizes in anchor_sizes(views_of(group)):
                for k, size in enumerate(sizes):
                    by_turn[k].append(size)
        every = [size for sizes in by_turn.values() for size in sizes]
        found["anchor_size"] = sum(every) / len(every)
        found["anchors_shared"] = sum(size > 1 for size in every) / len(every)
        found |= {f"anchor_size/turn_{k}": sum(sizes) / len(sizes) for k, sizes in sorted(by_turn.items())}
    greedy = [g.greedy for g in groups if g.greedy is not None]
    if greedy:
        found["greedy_reward"] = sum(t.reward for t in greedy) / len(greedy)
        found["greedy_tokens"] = float(sum(t.sampled_tokens for t in greedy))
    return found


def _episodes(groups: Sequence[Group]) -> list[Trajectory]:
    return [t for g in groups for t in g.trajectories]
