"""The metrics of a batch's episodes: of all, and of each environment of a mixture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from areal_agents.evaluation.endings import context_means, count_oddities
from areal_agents.evaluation.report import calls_of
from areal_agents.rollout.producer import Rollouts
from areal_agents.trainer.parts import Part
from areal_agents.trainer.reward_watch import component_means, same_answers
from areal_agents.types import Group
from areal_agents.utils.tolerance import all_same, reaches


def rollout_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Return means over *episodes*, never over turns or rows (T6).

    Ages are over tokens. ``version`` is the learner's.
    """
    episodes = [t for g in groups for t in g.trajectories]
    n = len(episodes)
    calls = [calls_of(t) for t in episodes]
    ages = [version - v for t in episodes for turn in t.turns for v in turn.completion.versions]
    rewards, alike = [t.reward for t in episodes], same_answers(groups)
    means = [sum(t.reward for t in g.trajectories) / len(g.trajectories) for g in groups]
    return {
        "reward": sum(rewards) / n,
        "groups_with_signal": sum(not all_same([t.reward for t in g.trajectories]) for g in groups) / len(groups),
        "groups_solved": sum(reaches(m) for m in means) / len(groups),
        "valid_call_rate": sum(made > 0 and made == ok for made, ok in calls) / n,
        "truncation_rate": sum(t.truncated for t in episodes) / n,
        "turns": sum(len(t.turns) for t in episodes) / n,
        "age": sum(ages) / max(len(ages), 1),
        "age_max": float(max(ages, default=0)),
        "sampled_tokens": float(sum(t.sampled_tokens for t in episodes)),
        "episodes": float(n),
        "generate_seconds": sum(t.metrics.get("generate_seconds", 0.0) for t in episodes) / n,
        "env_seconds": sum(t.metrics.get("env_seconds", 0.0) for t in episodes) / n,
        "same_answer_share": alike.share,
        "same_answer_tasks": float(alike.tasks),
        **{name: float(count) for name, count in count_oddities(episodes).items()},
        **context_means(episodes),
        **component_means(episodes),
    }  # fmt: skip


def env_metrics(
    parts: Sequence[Part], groups: Sequence[Group], version: int, rollouts: Rollouts, *, passes: float
) -> dict[str, float]:
    """Return the metrics of each environment of a mixture, as ``env/LABEL/NAME``, and what the curricula know.

    An environment without a group in the batch has those of its groups so far alone.

    Args:
        parts: the run's environments.
        groups: of one batch.
        version: the learner's.
        rollouts: count what was begun and dropped.
        passes: the reward from which on an episode has passed.
    """
    found: dict[str, float] = {}
    begun, known = rollouts.tasks.begun(rollouts.buffer.admitted), rollouts.tasks.metrics()
    for part in parts:
        own = [group for group in groups if group.env == part.label]
        if part.label in known:
            more = {"pass_rate": _pass_rate(own, passes)} if own else {}
            found |= {f"{part.prefix}curriculum/{name}": x for name, x in (known[part.label] | more).items()}
        if not part.label:
            continue
        dropped = rollouts.buffer.dropped_of[part.label]
        values = {
            "groups": float(len(own)),
            "groups_begun": float(begun[part.label]),
            "dropped_share": dropped / max(begun[part.label], 1),
        }
        if own:
            values |= rollout_metrics(own, version)
            values |= _of_mixture(own, version, passes=passes)
        found |= {part.prefix + name: x for name, x in values.items()}
    return found


def _of_mixture(groups: Sequence[Group], version: int, *, passes: float) -> dict[str, float]:
    """Return the pass rate, the length of an episode, and the histogram of the tokens' ages."""
    episodes = [t for g in groups for t in g.trajectories]
    ages = Counter(version - v for t in episodes for turn in t.turns for v in turn.completion.versions)
    shares = {f"age_share/{age}": n / ages.total() for age, n in sorted(ages.items())}
    return {
        "pass_rate": _pass_rate(groups, passes),
        "episode_tokens": sum(t.sampled_tokens for t in episodes) / len(episodes),
        **shares,
    }


def _pass_rate(groups: Sequence[Group], passes: float) -> float:
    rewards = [t.reward for g in groups for t in g.trajectories]
    return sum(reaches(reward, passes) for reward in rewards) / len(rewards)
