"""``areal/TextArena-v0``: games of the textarena package (MIT), alone or against a script or a model.

    pip install 'areal-agents[textarena]'
    [env]
    id = "areal/TextArena-v0"
    kwargs = { game = "ConnectFour-v0", opponent = "model", models = { opponent = "openai:NAME@http://HOST/v1" } }

``textarena_lists.py`` says which games are left out, and why. Each episode plays in a process of its own, since
TextArena seeds the generator of the whole process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, Literal

from areal_agents.context import ContextLike
from areal_agents.engine import Sampling
from areal_agents.env import Expert, LazyTasks
from areal_agents.envs.forked_game import TEST_SEEDS_FROM, ForkedGame
from areal_agents.envs.textarena_lists import EXCLUDED, SINGLE, TWO
from areal_agents.errors import ConfigError, EnvError, TaskError
from areal_agents.served_model import ModelLike, chat_models
from areal_agents.tools.ask_user import ANSWER_SECONDS, answered
from areal_agents.types import AssistantMessage, Info, Message, Observation, Task, user
from areal_agents.utils.packages import require_package
from areal_agents.utils.short_text import short

ID = "areal/TextArena-v0"
DEFAULT = "Mastermind-v0"
MAX_REPLIES = 64
"""Turns of the other side between two of the agent. Some games let a player go on for long."""


class TextArena(ForkedGame):
    """Win a game of TextArena. What an agent must learn is the game's to say: its rules stand in its first message.

    The reward is 1 for a game that was won or solved, which is where TextArena gives 1, else 0. ``partial`` pays what
    it gives below that: often some for a position that took no skill, and -1 for what was lost. A game that the other
    side loses by illegal moves is not won.
    """

    def __init__(
        self,
        *,
        game: str = DEFAULT,
        opponent: Literal["script", "model"] = "script",
        models: Mapping[str, ModelLike] | None = None,
        partial: bool = False,
        system_prompt: str = "",
        max_turns: int | None = None,
        context: ContextLike | None = None,
    ) -> None:
        """Make a game.

        Args:
            game: TextArena's id of it, with its variant, such as ``Sudoku-v0-easy``.
            opponent: of a game of two players: ``script`` moves at random, ``model`` is ``models["opponent"]``.
            models: by name.
            partial: pay what TextArena gives to games that are not won.
            system_prompt: shown before the first observation. Empty is none.
            max_turns: after which an episode is truncated, besides the game's own limit.
            context: as ``ForkedGame`` has it.

        Raises:
            ConfigError: the game is unknown or excluded, the package is not installed, or the model is not given.
        """
        players = _players(game)
        if opponent not in ("script", "model"):
            raise ConfigError(f"opponent {opponent!r}: there are 'script' and 'model'")
        if opponent == "model" and players == 1:
            raise ConfigError(f"{game} has one player: leave opponent = 'model' out")
        script = opponent == "script"
        arguments = {"game": game, "players": players, "script": script, "test_from": TEST_SEEDS_FROM}
        entry = "areal_agents.envs.textarena_game:TextArenaGame"
        super().__init__(entry, arguments, system_prompt=system_prompt, max_turns=max_turns, context=context)
        self._models = chat_models(models or {})
        if opponent == "model" and "opponent" not in self._models:
            raise ConfigError("opponent 'model' needs a model of that name: models = { opponent = 'openai:NAME@URL' }")
        if opponent == "model":
            self.step_seconds = self._step_timeout + ANSWER_SECONDS
        self._partial, self._game = partial, game
        self._asks = opponent == "model"
        self._other: list[Message | AssistantMessage] = []

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None, game: str = DEFAULT) -> Sequence[Task]:
        """Return the tasks of a split: seeds, which no two splits share.

        Nor do they share puzzles of the games of ``SHOWN``. The difficulty is that of the game's variant, whatever is
        asked for. Raises ConfigError for a game that is unknown or excluded, with the reason.
        """
        _players(game)
        if split not in cls.sizes:
            raise ConfigError(f"{ID} has no split {split!r}: its splits are {', '.join(cls.sizes)}")
        first = 0 if split == "train" else TEST_SEEDS_FROM

        def make(i: int) -> Task:
            return Task.make(f"{split}-{i}", split=split, seed=first + i, payload={"game": game, "seed": first + i})

        return LazyTasks(cls.sizes[split], make)

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", game=self._game)

    def require_own(self, task: Task) -> None:
        if (other := task.payload.get("game", self._game)) != self._game:
            raise TaskError(f"task {task.id!r} belongs to {short(other)}, and this environment plays {self._game!r}")

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        """Play the game that stands here by default. Of others there is none."""
        return _codebreaker() if task.payload["game"] == DEFAULT else None

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self._other = []
        return await super().areset(seed=seed, options=options)

    async def _settled(self, reply: dict[str, Any]) -> dict[str, Any]:
        """Let the model play the other side, until it is the agent's turn or the game is over."""
        seat = self.task.payload["seed"] % 2
        for _ in range(MAX_REPLIES):
            if not self._asks or reply.get("terminated") or reply["player"] == seat:
                return reply
            self._other.append(user(reply["observation"]))
            sampling = Sampling(max_tokens=1024, temperature=1.0, seed=self.np_random.integers(1 << 31).item())
            said = await answered(self._models["opponent"].chat(tuple(self._other), (), sampling), "the opponent")
            self._other.append(said)
            reply = await self._ask({"step": said.spoken}, self._step_timeout)
        raise EnvError(f"{ID}: the other side had {MAX_REPLIES} turns, and it is still its turn")

    def _stepped(self, reply: Mapping[str, Any]) -> tuple[Observation, float, bool, bool, Info]:
        observation, own, terminated, truncated, info = super()._stepped(reply)
        if self._partial:
            return observation, own, terminated, truncated, info
        given_away = info.get("components", {}).get("invalid_move/other", 0.0)
        return observation, float(own >= 1.0 and not given_away), terminated, truncated, info


def _codebreaker() -> Expert:
    """Guess a code of Mastermind that fits every answer so far."""
    left = list(permutations(range(1, 7), 4))
    while left:
        guess = left[0]
        shown = yield f"[{' '.join(map(str, guess))}]"
        told = re.search(r"(\d+) black peg\(s\), (\d+) white", shown[-1].text)
        if told is None:
            return
        left = [code for code in left if _pegs(code, guess) == (int(told[1]), int(told[2]))]


def _pegs(code: Sequence[int], guess: Sequence[int]) -> tuple[int, int]:
    black = sum(a == b for a, b in zip(code, guess, strict=True))
    return black, len(set(code) & set(guess)) - black


def _players(game: str) -> int:
    """Return how many players a game has. Raises ConfigError where it is not played here."""
    require_package("textarena", ID)
    base, dash, version = game.partition("-")
    if base in EXCLUDED:
        raise ConfigError(f"{ID} does not play TextArena's {base!r}: {EXCLUDED[base]}")
    if base not in SINGLE + TWO or not dash or not version.startswith("v0"):
        listed = ", ".join(f"{name}-v0" for name in SINGLE + TWO)
        raise ConfigError(f"{ID} knows no game {short(game)}; there are {listed}, and their variants")
    return 1 if base in SINGLE else 2
