"""One game of TextArena as an environment over text, made in the process of its episode (``textarena_env.py``).

The messages that a player has not seen yet are its observation, without its own. TextArena's wrappers, which repeat
the whole game each turn, are not used. It says only that a game is over, which is ``terminated``, by its own turn limit
too.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import Any, Final

import textarena

from areal_agents.envs.textarena_lists import SHOWN

Move = Callable[[Any, Random], str]


def _empty_cell(state: Mapping[str, Any], rng: Random) -> str:
    cells = [3 * r + c for r, row in enumerate(state["board"]) for c, mark in enumerate(row) if not mark]
    return f"[{rng.choice(cells)}]"


def _column(state: Mapping[str, Any], rng: Random) -> str:
    return f"[col {rng.choice([c for c, top in enumerate(state['board'][0]) if top == '.'])}]"


def _pile(state: Mapping[str, Any], rng: Random) -> str:
    pile = rng.choice([i for i, n in enumerate(state["piles"]) if n])
    return f"[{pile} {rng.randint(1, state['piles'][pile])}]"


def _one_of(*moves: str) -> Move:
    return lambda state, rng: f"[{rng.choice(moves)}]"


MOVES: Final[Mapping[str, Move]] = MappingProxyType({
    "ConnectFour": _column,
    "IteratedMatchingPennies": _one_of("heads", "tails"),
    "IteratedRockPaperScissors": _one_of("rock", "paper", "scissors"),
    "KuhnPoker": lambda state, rng: f"[{rng.choice(sorted(state['current_legal_action_tree']))}]",
    "Nim": _pile,
    "PigDice": _one_of("roll", "hold"),
    "TicTacToe": _empty_cell,
})  # fmt: skip
"""A legal move at random, by game: the script of the other side."""
BUCKETS: Final = 4
"""Of first observations. One is the test split's."""
_TRIES: Final = 1000
_STRIDE: Final = 1 << 20
"""Between the seeds that are tried for one task: more than the tasks of a split."""


def is_held_out(shown: str) -> bool:
    """Say whether a puzzle that a game shows is one of the test split."""
    return hashlib.sha256(shown.encode()).digest()[0] % BUCKETS == 0


class TextArenaGame:
    """A game, seen from one seat."""

    tells = True
    """Its infos say whose turn it is (``player``), and at the end what the game gave (``components``)."""

    def __init__(self, game: str, players: int, script: bool, test_from: int) -> None:
        """Make a game.

        Args:
            game: TextArena's id, with its variant.
            players: 1 or 2.
            script: whether ``MOVES`` plays the other side. Else its turns are given to ``step`` too.
            test_from: the least seed of the test split.
        """
        sys.set_int_max_str_digits(0)  # some games read a number of any length, and would raise for a long one
        name = game.partition("-")[0]
        self._env = textarena.make(f"{game}-raw")
        self._actions = textarena.ObservationType.PLAYER_ACTION
        self._move = MOVES[name] if script and players == 2 else None
        self._by_puzzle, self._test_from = name in SHOWN, test_from
        self._players, self._seat, self._rng = players, 0, Random()

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """Begin a game. Of two players the seed chooses the seat.

        A game of ``SHOWN`` is begun again until its puzzle belongs to the split of the seed.
        """
        self._seat = seed % self._players
        self._rng = Random(seed)
        for i in range(_TRIES):
            self._env.reset(num_players=self._players, seed=seed + i * _STRIDE)
            self._let_script_play(False)
            shown = self._shown(self._player)
            if not self._by_puzzle or is_held_out(shown) == (seed >= self._test_from):
                return shown, {"player": self._player}
        raise RuntimeError(f"none of {_TRIES} puzzles belongs to the split of seed {seed}")

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the turn of the player whose turn it is. The reward is the seat's, at the end."""
        done = self._let_script_play(self._env.step(action=action)[0])
        if not done:
            return self._shown(self._player), 0.0, False, False, {"player": self._player}
        rewards, infos = self._env.close()
        own = float((rewards or {}).get(self._seat, 0.0))
        invalid = {f"invalid_move/{'own' if p == self._seat else 'other'}": float(i["invalid_move"])
                   for p, i in infos.items()}  # fmt: skip
        info = {"player": self._seat, "components": {"own_score": own, **invalid}}
        last = [self._shown(self._seat), str(infos[self._seat].get("reason") or "")]
        return "\n\n".join(filter(None, last)), own, True, False, info

    @property
    def _player(self) -> int:
        return int(self._env.state.current_player_id)

    def _let_script_play(self, done: bool) -> bool:
        while not done and self._move is not None and self._player != self._seat:
            done = self._env.step(action=self._move(self._env.state.game_state, self._rng))[0]
        return done

    def _shown(self, player: int) -> str:
        """Return what a player has not seen yet."""
        state = self._env.state
        new, state.observations[player] = state.observations[player], []
        own = (player, -1) if self._players == 1 else (player,)  # some games of one player say nobody's
        return "\n\n".join(
            text if sender == -1 else f"{state.role_mapping.get(sender, f'Player {sender}')}: {text}"
            for sender, text, kind in new
            if not (kind is self._actions and sender in own)
        )
