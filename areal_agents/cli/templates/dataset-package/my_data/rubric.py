"""The reward that an episode earns, and the components that explain it.

Change it here, then see what it would have done to a finished run before training again:

    areal-agents rescore runs/first --reward my_data.rubric:rubric
"""

from __future__ import annotations

from areal_agents import Episode, Verdict, boxed_number

correct = boxed_number("answer")


def rubric(episode: Episode) -> Verdict:
    r"""Return 1 for the right ``\boxed{number}``. Whether the table was asked is logged, and earns nothing."""
    solved = correct(episode)
    return Verdict(solved, {"correct": solved, "looked_up": looked_up(episode)})


def looked_up(episode: Episode) -> float:
    """Return 1 where the measure of the question was found in the table."""
    return float(any(result.status == "ok" for result in episode.tool_results))
