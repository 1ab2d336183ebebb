"""The sampling seeds of requests, which follow from what is asked and never from when.

Two runs of one seed ask for the same noise, whichever request reaches the engine first.
"""

from __future__ import annotations

import random

from areal_agents.rollout.episode import EpisodeDriver


def request_seed(episode: EpisodeDriver) -> int:
    """Return the sampling seed of the episode's next turn, in [0, 2^31).

    It is a hash of the episode's seed, its task, its place among the episodes of that task (the last part of its id,
    which tells retries apart too) and the turn. So it is the same for every model, for every label of an evaluation,
    and whatever other tasks there are.

    Episodes that shared a seed would draw the same noise, and would succeed and fail together, whatever their tasks.
    """
    place = episode.id.rpartition("/")[2]
    return random.Random(
        f"{episode.seed}/{episode.task.split}/{episode.task.id}/{place}/{len(episode.turns)}"
    ).getrandbits(31)
