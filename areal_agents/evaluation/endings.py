"""The counts of how episodes and their turns ended, and of what else a mean of rewards would hide.

They stand in ``EvalReport``, in the training's rows of metrics (``count_oddities``) and below the table (``noted``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from areal_agents.rollout.history import COUNTED, REMOVED
from areal_agents.types import Trajectory

_ODD = {
    "unverifiable": ("unverifiable", "unverifiable"),
    "verdict_timeouts": ("verdict_timeout", "verdict timed out"),
    "sandbox_replays": ("sandbox_replays", "sandbox replays"),
    "withheld": ("reward_withheld", "not paid for a cut message"),
    "rewritten": (REMOVED, "histories rewritten"),
}
"""By name in reports and rows: the metric of an episode, and the words of the table."""


def count_endings(episodes: Sequence[Trajectory]) -> dict[str, int]:
    """Return how many episodes ended for which reason, the most frequent first."""
    return dict(Counter(t.stop_reason for t in episodes).most_common())


def count_finishes(episodes: Sequence[Trajectory]) -> dict[str, int]:
    """Return how many turns ended how (``types.Finish``), the most frequent first."""
    return dict(Counter(turn.message.finish for t in episodes for turn in t.turns).most_common())


def count_oddities(episodes: Sequence[Trajectory]) -> dict[str, int]:
    """Return the turns that ended early, sandbox replays, and the episodes with what else a mean would hide.

    That is an odd verdict, an unpaid reward, or a history that was rewritten.
    """
    counts = {"cut_turns": sum(turn.message.finish != "stop" for t in episodes for turn in t.turns)}
    for name, (metric, _) in _ODD.items():
        values = [t.metrics.get(metric, 0.0) for t in episodes]
        counts[name] = int(sum(values)) if name == "sandbox_replays" else sum(x != 0.0 for x in values)
    return counts


def context_means(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Return the means of what was rewritten (``rollout/history.py``), over the episodes whose environment has a rule.

    It is empty where none has.
    """
    found = [t.metrics for t in episodes if REMOVED in t.metrics]
    return {name: sum(m.get(name, 0.0) for m in found) / len(found) for name in COUNTED} if found else {}


def noted(endings: Mapping[str, int], finishes: Mapping[str, int], oddities: Mapping[str, int]) -> str:
    """Return one line for people, or an empty text where every episode ended by an answer and nothing was odd.

    Args:
        endings: of ``count_endings``.
        finishes: of ``count_finishes``.
        oddities: of ``count_oddities``.
    """
    early = {name: n for name, n in finishes.items() if name != "stop"}
    parts = [f"{oddities[name]} {words}" for name, (_, words) in _ODD.items() if oddities[name]]
    if not early and not parts and set(endings) <= {"answer"}:
        return ""
    head = [f"ended by {_listed(endings)}"] + ([f"turns cut by {_listed(early)}"] if early else [])
    return "; ".join([*head, *parts])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())
