"""The policy that reads its turns from a script, which is an environment's expert or fixed texts."""

from __future__ import annotations

from collections.abc import Callable, Generator

from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import Expert
from areal_agents.errors import ArealError, EnvError
from areal_agents.registry import EnvSpec
from areal_agents.rollout.episode import EpisodeDriver, Policy, Said
from areal_agents.types import Observation, Task
from areal_agents.utils.exits import no_exit
from areal_agents.utils.short_text import cut, described, short

Script = Callable[[Observation], Expert]
"""Makes the speaker of one episode from its first observation. The speaker is then sent each new one."""


def expert_of(spec: EnvSpec, task: Task) -> Expert | None:
    """Return the environment's expert for ``task``, or None where it has none.

    Raises a final EnvError where ``expert`` raises, or returns anything but a generator.
    """
    try:
        with no_exit():
            expert = spec.expert(task)
    except ArealError:  # the registry's, about the class
        raise
    except Exception as error:  # the author's own code
        raise _failure(task, f"raised {described(error)}") from error
    if expert is not None and not isinstance(expert, Generator):
        raise _failure(task, f"is {short(expert)}, which is not a generator: let expert() yield texts")
    return expert


class ScriptPolicy(Policy):
    """A policy that says a script's texts, without token ids."""

    def __init__(self, script: Script, task: Task) -> None:
        self._script, self._task = script, task
        self._speaker: Expert | None = None

    async def say(self, episode: EpisodeDriver) -> Said:
        return Said.as_text(parse_text(self.text(episode.observation), tools=episode.tools), len(episode.turns))

    def text(self, shown: Observation) -> str:
        """Answer ``shown``.

        Raises a final EnvError where the script stops or fails, because an expert is a part of the environment.
        """
        try:
            with no_exit():
                if self._speaker is None:
                    self._speaker = self._script(shown)
                    said: object = next(self._speaker)
                else:
                    said = self._speaker.send(shown)
        except StopIteration as error:
            raise _failure(self._task, "stopped before the episode ended") from error
        except Exception as error:  # the author's own code
            raise _failure(self._task, f"raised {described(error)}") from error
        if not isinstance(said, str):
            raise _failure(self._task, f"yielded {short(said)}, which is not a text")
        return said

    async def close(self, episode: EpisodeDriver) -> None:
        if self._speaker is None:
            return
        try:
            with no_exit():
                self._speaker.close()
        except Exception as error:  # the author's own code
            raise _failure(self._task, f"raised {described(error)} when it was closed") from error


def _failure(task: Task, what: str) -> EnvError:
    """Return the error of an expert, which says the same at every attempt."""
    error = EnvError(f"the expert of task {cut(task.id, 120)} {what}")
    error.final = True
    return error
