"""Episodes that a chat server's model played, which have messages and no tokens, rendered for the model that learns.

So a larger model's episodes can be imitated. The tools are those of the run's environment, made once. Calls are saved
as Hermes blocks, and are written as the learning model writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from areal_agents.algorithms.batch import Row
from areal_agents.chat.format import ChatFormat
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError, ConfigError
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.finetune.messages import RowRefused, Said, Spoken
from areal_agents.finetune.render import render
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Task, Trajectory

_HERMES = ("hermes", "api")
"""Formats whose calls stand in a saved text as Hermes blocks."""


class ServedEpisodes:
    """The episodes of one run that have no tokens."""

    def __init__(self, run: SavedRun, fmt: ChatFormat) -> None:
        self._run, self._fmt = run, fmt
        self.rendered = 0

    @cached_property
    def _env(self) -> AgentEnv:
        make: Callable[[], AgentEnv] = self._run.make_env
        try:
            return make()
        except ArealError as error:
            raise ConfigError(
                f"{self._run.out} was played by a chat server's model, and its environment, which has the tools, "
                f"cannot be made: {error}"
            ) from error

    def tools_of(self, task: Task) -> tuple[ToolSpec, ...]:
        """Return what the model was shown. Raises ConfigError where the run's environment cannot be made."""
        return tuple(self._env.tools_of(task))

    def rows(self, t: Trajectory) -> list[Row]:
        """Render an episode. Raises RowRefused."""
        rows = render(self._fmt, self._spoken(t), self.tools_of(t.task))
        self.rendered += 1
        return rows

    def _spoken(self, t: Trajectory) -> Sequence[Spoken]:
        found: list[Spoken] = []
        for turn in t.turns:
            found += [*turn.observation, self._said(turn.message)]
        return found

    def _said(self, message: AssistantMessage) -> Said:
        own = (*_HERMES, self._fmt.tool_format.name)
        if foreign := next((call.format for call in message.tool_calls if call.format not in own), None):
            raise RowRefused(f"its calls are written in the tool format {foreign}, and the model's is {own[-1]}")
        # The end of a cut message was never said.
        whole = message.finish == "stop" and bool(message.text.strip())
        return Said(message.text, message.reasoning or None, trains=whole, hermes=True)
