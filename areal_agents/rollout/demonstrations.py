"""Scripted demonstrations: an environment's expert plays real episodes, and its turns become training rows."""

from __future__ import annotations

from collections.abc import Sequence

from areal_agents.algorithms.batch import Row, rows_of
from areal_agents.chat.format import ChatFormat
from areal_agents.context import Summary
from areal_agents.env import Expert
from areal_agents.errors import ArealError, ConfigError, EnvError
from areal_agents.rollout.episode import EpisodeDriver, Limits
from areal_agents.rollout.history import Next
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.rollout.token_policy import TokenPolicy
from areal_agents.types import Completion, Finish, Prompt, Task, Trajectory
from areal_agents.utils.short_text import cut, short, text_of
from areal_agents.utils.tolerance import rounding_of


class ExpertPolicy(TokenPolicy):
    """A policy that says what ``AgentEnv.expert`` yields, as tokens.

    They were never sampled, so they have log-probability 0 and version 0.
    """

    def __init__(self, expert: Expert, task: Task, fmt: ChatFormat, limits: Limits) -> None:
        super().__init__(fmt, limits)
        self._script = ScriptPolicy(lambda shown: expert, task)

    async def sample(self, prompt: Prompt, max_tokens: int, episode: EpisodeDriver) -> Completion:
        ids = self.fmt.encode_turn(self._script.text(episode.observation), episode.tools, prompt.ids)
        return Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop")

    async def sample_summary(self, prompt: Prompt, max_tokens: int, asked: Next, episode: EpisodeDriver) -> Completion:
        """Say what the environment's ``Summary.scripted`` writes of the history. A longer text is cut."""
        rule = episode.context
        write = rule.scripted if isinstance(rule, Summary) else None
        where = f"Summary.scripted (task {cut(episode.task.id, 120)}, turn {len(episode.turns)})"
        if write is None:
            raise ConfigError(
                f"task {episode.task.id}: a demonstration comes near model.max_context, and its summary is the "
                "policy's to write: give the environment's Summary a `scripted` function, or raise model.max_context"
            )

        async def written() -> object:
            return write(asked.conversation.messages[:-1])

        text = await episode.ask(written, where)
        if not isinstance(text, str):
            raise episode.fault(EnvError(f"{where} returned {short(text)}, which is not a text"), len(episode.turns))
        ids = self.fmt.encode_said(text, prompt.ids)
        finish: Finish = "stop" if len(ids) <= max_tokens else "length"
        ids = ids[:max_tokens]
        return Completion(ids, (0.0,) * len(ids), (0,) * len(ids), finish)

    async def close(self, episode: EpisodeDriver) -> None:
        await self._script.close(episode)


def require_all(played: Sequence[Trajectory | None], error: ArealError | None) -> list[Trajectory]:
    """Return the demonstrations.

    Raises ConfigError where one of them is missing. ``error`` is why the first one is.
    """
    found = [t for t in played if t is not None]
    if len(found) < len(played):
        why = "" if error is None else f": {text_of(error)}"
        raise ConfigError(
            f"{len(played) - len(found)} of {len(played)} demonstrations failed{why}. Fix the environment or its "
            "expert (events.jsonl names the tasks), or set warm_start.demonstrations = 0"
        ) from error
    return found


def demonstration_rows(trajectories: Sequence[Trajectory]) -> list[Row]:
    """Build rows whose mask covers the expert's tokens.

    Raises ConfigError where a demonstration earned nothing.
    """
    failed = [t.task.id for t in trajectories if t.reward <= rounding_of(t.reward)]
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(trajectories)} demonstrations earned no reward (first: task {failed[0]}): fix the "
            "environment's expert, or set warm_start.demonstrations = 0"
        )
    return [row for i, t in enumerate(trajectories) for row in rows_of(t, [1.0] * len(t.turns), episode=i)]
