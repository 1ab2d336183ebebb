"""``areal/Nim-v0``: the game of Nim against an opponent: a script, or a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import xor
from random import Random
from typing import Any, Literal

from areal_agents.engine import Sampling
from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, Verdict
from areal_agents.served_model import ModelLike
from areal_agents.tool import ToolError, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.ask_user import answered
from areal_agents.types import Task, system, user

DEFAULT_DIFFICULTY = 0.5
RULES = "Nim: in turns, take one or more objects from one heap. Who takes the last object wins."
Side = Literal["agent", "opponent"]


@dataclass
class Board:
    """The heaps, and who took the last object."""

    heaps: list[int]
    opponents: Random
    """Draws what the scripted opponent does."""
    winner: Side | None = None
    slips: int = 0
    """Answers of a model that plays the opponent that were no legal move."""

    def take(self, heap: int, count: int, side: Side) -> None:
        self.heaps[heap] -= count
        if not any(self.heaps):
            self.winner = side

    def view(self) -> str:
        return ", ".join(f"heap {i}: {n}" for i, n in enumerate(self.heaps, 1))


def best_move(heaps: Sequence[int]) -> tuple[int, int] | None:
    """Return a heap and a count that leave a nim-sum of 0, from where the other side loses; None where none does.

    A position whose heap sizes have the exclusive-or 0 is lost for the side to move (Bouton 1901).
    """
    total = reduce(xor, heaps, 0)
    for heap, n in enumerate(heaps):
        if n ^ total < n:
            return heap, n - (n ^ total)
    return None


def random_move(heaps: Sequence[int], rng: Random) -> tuple[int, int]:
    heap = rng.choice([i for i, n in enumerate(heaps) if n])
    return heap, rng.randint(1, heaps[heap])


def won(episode: Episode) -> Verdict:
    board = episode.state
    return Verdict(float(board.winner == "agent"), {"won": float(board.winner == "agent"), "slips": float(board.slips)})


class Nim(ToolEnv):
    """Win at Nim from a position that can be won. An agent must learn to leave the opponent a lost position each time.

    The reward is 1 for the game. The opponent plays well with a probability of ``difficulty`` at each move, else at
    random; there are 3 heaps of up to 4 at 0, up to 7 at 1. ``opponent = "model"`` asks the model
    ``models["opponent"]`` instead: one of another team, or an older self behind ``areal-agents serve``. An answer of it
    that is no legal move is counted (``slips``), and a move at random takes its place.
    """

    system_prompt = RULES
    rubric = won
    max_turns = 24
    chance = by_level(0.63, 0.41, 0.09)
    state: Board

    def __init__(
        self,
        *,
        opponent: Literal["script", "model"] = "script",
        models: Mapping[str, ModelLike] | None = None,
        **more: Any,
    ) -> None:
        """Make a game.

        Args:
            opponent: ``script``, or ``model`` for ``models["opponent"]``.
            models: by name, as ``ToolEnv`` has them.
            more: of ``ToolEnv``.

        Raises:
            ConfigError: an opponent that is neither, or a model that is not given.
        """
        super().__init__(models=models, **more)
        if opponent not in ("script", "model"):
            raise ConfigError(f"opponent {opponent!r}: there are 'script' and 'model'")
        if opponent == "model" and "opponent" not in self._models:
            raise ConfigError("opponent 'model' needs a model of that name: models = { opponent = 'openai:NAME@URL' }")
        self._opponent = opponent

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Nim-v0", split, level, lambda rng: _heaps(rng, level))

    def new_state(self, task: Task) -> Board:
        return Board(task.payload["heaps"], Random(task.payload["opponent"]))

    def prompt(self, task: Task) -> str:
        return f"{Board(task.payload['heaps'], Random()).view()}. You begin."

    @tool(timeout=120)
    async def take(self, heap: int, count: int) -> str:
        """Take objects from a heap; the opponent moves next."""
        board = self.state
        if not 1 <= heap <= len(board.heaps):
            raise ToolError(f"heaps are 1 to {len(board.heaps)}. {board.view()}")
        if not 1 <= count <= board.heaps[heap - 1]:
            raise ToolError(f"heap {heap} has {board.heaps[heap - 1]} objects. {board.view()}")
        # The answer first: where asking for it fails, nothing has been taken.
        left = [n - count * (i == heap - 1) for i, n in enumerate(board.heaps)]
        answer = await self._answer(left) if any(left) else None
        board.take(heap - 1, count, "agent")
        if answer is not None:
            board.take(*answer, "opponent")
        if board.winner is not None:
            self.end_episode()
        taken = "" if answer is None else f"The opponent takes {answer[1]} from heap {answer[0] + 1}. "
        end = {"agent": "You won.", "opponent": "You lost.", None: board.view()}[board.winner]
        return taken + end

    async def _answer(self, heaps: Sequence[int]) -> tuple[int, int]:
        """Return the opponent's move."""
        board, p = self.state, self.task.payload
        if self._opponent == "model":
            rules = system(f"{RULES} Answer with your move alone: HEAP COUNT.")
            sampling = Sampling(max_tokens=32, temperature=1.0, seed=board.opponents.getrandbits(31))
            shown = user(Board(list(heaps), Random()).view())
            reply = await answered(self._models["opponent"].chat((rules, shown), (), sampling), "the opponent")
            found = re.fullmatch(r"\s*(\d{1,3})\s+(\d{1,3})\s*", reply.spoken, re.ASCII)
            move = (int(found[1]) - 1, int(found[2])) if found else (-1, 0)
            if 0 <= move[0] < len(heaps) and 1 <= move[1] <= heaps[move[0]]:
                return move
            board.slips += 1
            return random_move(heaps, board.opponents)
        good = best_move(heaps) if board.opponents.random() < p["skill"] else None
        return random_move(heaps, board.opponents) if good is None else good

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Leave a nim-sum of 0 each time. Against whatever opponent that wins."""
        heaps = list(task.payload["heaps"])
        while (move := best_move(heaps)) is not None:
            observation = yield call_text("take", heap=move[0] + 1, count=move[1])
            told = re.findall(r"heap \d+: (\d+)", observation[-1].text)
            if not told:
                return
            heaps = [int(n) for n in told]


def _heaps(rng: Random, difficulty: float) -> dict[str, Any]:
    while True:
        heaps = [rng.randint(1, 4 + round(3 * difficulty)) for _ in range(3)]
        if best_move(heaps) is not None:
            return {"heaps": heaps, "skill": difficulty, "opponent": rng.getrandbits(32)}
