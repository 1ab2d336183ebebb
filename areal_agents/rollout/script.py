"""The policy that reads its turns from a script, which is an environment's expert or fixed texts."""

from __future__ import annotations

from collections.abc import Callable

from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import Expert
from areal_agents.errors import EnvError
from areal_agents.rollout.episode import EpisodeDriver, Policy, Said
from areal_agents.types import Observation, Task

Script = Callable[[Observation], Expert]
"""Makes the speaker of one episode from its first observation. The speaker is then sent each new one."""


class ScriptPolicy(Policy):
    """A policy that says a script's texts, without token ids."""

    def __init__(self, script: Script, task: Task) -> None:
        self._script, self._task = script, task
        self._speaker: Expert | None = None

    async def say(self, episode: EpisodeDriver) -> Said:
        return Said.as_text(parse_text(self.text(episode.observation)), len(episode.turns))

    def text(self, shown: Observation) -> str:
        """Answer ``shown``.

        Raises EnvError where the script stops or fails, because an expert is a part of the environment.
        """
        try:
            if self._speaker is None:
                self._speaker = self._script(shown)
                return next(self._speaker)
            return self._speaker.send(shown)
        except StopIteration as error:
            raise EnvError(f"the expert of task {self._task.id} stopped before the episode ended") from error
        except Exception as error:  # the author's own code
            raise EnvError(f"the expert of task {self._task.id} raised {type(error).__name__}: {error}") from error

    async def close(self, episode: EpisodeDriver) -> None:
        if self._speaker is not None:
            self._speaker.close()
