"""Scripted demonstrations: an environment's expert plays real episodes, and its turns become training rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from areal_agents.algorithms.batch import Row, rows_of
from areal_agents.chat.format import ChatFormat
from areal_agents.env import Expert
from areal_agents.errors import ConfigError, EnvError
from areal_agents.types import Completion, Observation, Prompt, Trajectory


@dataclass(slots=True)
class ExpertPolicy:
    """A policy that plays what ``AgentEnv.expert`` yields.

    Its tokens were never sampled, so they have log-probability 0 and version 0.
    """

    expert: Expert
    fmt: ChatFormat
    _started: bool = False
    _observation: Observation = field(default_factory=tuple)

    async def act(self, prompt: Prompt, *, max_tokens: int, session: str, deadline: float) -> Completion:
        """Play the expert's next turn.

        The arguments are those of every ``Policy``. An expert reads none of them: it answers the last observation.
        Raises EnvError where it stopped before the environment ended the episode.
        """
        try:
            text = self.expert.send(self._observation) if self._started else next(self.expert)
        except StopIteration as error:
            raise EnvError("the expert stopped before the environment ended the episode") from error
        self._started = True
        ids = self.fmt.encode_turn(text)
        return Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop")

    def observe(self, observation: Observation) -> None:
        self._observation = observation

    async def release(self, session: str) -> None:
        self.expert.close()


def demonstration_rows(trajectories: Sequence[Trajectory]) -> list[Row]:
    """Build rows whose mask covers the expert's tokens.

    Raises ConfigError where a demonstration earned nothing.
    """
    failed = [t.task.id for t in trajectories if t.reward <= 0]
    if failed:
        raise ConfigError(
            f"{len(failed)} of {len(trajectories)} demonstrations earned no reward (first: task {failed[0]}): fix the "
            "environment's expert, or set warm_start.demonstrations = 0"
        )
    return [row for i, t in enumerate(trajectories) for row in rows_of(t, [1.0] * len(t.turns), episode=i)]
