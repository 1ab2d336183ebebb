"""What is known of TextArena's games (version 0.7.4): which are played, and which are left out and why.

A game is named without its variants: ``Sudoku`` stands for ``Sudoku-v0`` and ``Sudoku-v0-hard``. One that is not named
here is refused: nobody has looked at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

SINGLE: Final = (
    "2048", "Bandit", "Crosswords", "FrozenLake", "GuessTheNumber", "LightsOut", "LogicPuzzle", "Mastermind",
    "Minesweeper", "RushHour", "Secretary", "Sokoban", "Sudoku",
)  # fmt: skip
"""Games of one player."""

SHOWN: Final = frozenset({"FrozenLake", "LightsOut", "LogicPuzzle", "Sokoban"})
"""Those among them that show the whole puzzle at once and have so few that another seed may draw the same one.

What they show decides the split. ``Crosswords``, ``RushHour`` and ``Sudoku`` have too many to meet one again. The
others hide what must be found, or go on by chance: nothing in their first observation can be learned by heart.
"""

TWO: Final = (
    "ConnectFour", "IteratedMatchingPennies", "IteratedRockPaperScissors", "KuhnPoker", "Nim", "PigDice", "TicTacToe",
)  # fmt: skip
"""Games of two players, for which there is a script that plays the other side at random (``textarena_game.py``)."""

_WORDS = "it needs word lists of nltk, which it downloads"
_SERVER = "another model on a server of OpenRouter plays in it or judges it"
_ONE = "there is one position to begin with: what is held out would be trained on"
_MANY = "it has more than two players, or teams"
_TEXT = "an illegal move ends it with a text for a reward"
_UNSEEN = "it has two players, and no script here plays the other side"


def _all(reason: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


EXCLUDED: Final[Mapping[str, str]] = MappingProxyType(
    _all(_WORDS, "Codenames DontSayIt Hangman LetterAuction SpellingBee WordChains WordLadder WordSearch Wordle")
    | _all(_SERVER, "Debate GuessWho ScenarioPlanning TwentyQuestions")
    | _all(_ONE, "Countdown Cryptarithm PegJump TowerOfHanoi")
    | _all(
        _MANY,
        "BabyAiText BlindAuction CharacterConclave Coup Diplomacy Hanabi ImTheBoss LiarsDice MarketEntryGame "
        "Negotiation Poker PublicGoodsGame SantoriniBaseFixed ScorableGames SecretMafia SettlersOfCatan Snake Surround "
        "Taboo ThreePlayerGOPS ThreePlayerIPD ThreePlayerTicTacToe TwoRoomsAndABoom",
    )
    | _all(
        _UNSEEN,
        "Alquerque Battleship Breakthrough Briscola Checkers Chess Chopsticks ColonelBlotto Crusade GameOfPureStrategy "
        "GermanWhist Golf HighSociety IndianPoker IteratedPrisonersDilemma IteratedStagHunt IteratedTwoThirdsAverage "
        "IteratedUltimatumGame LinesOfAction MemoryGame NewRecruit Othello QuantumTicTacToe SimpleBlindAuction "
        "SimpleNegotiation SimpleTak SpiteAndMalice Stratego Tak TruthAndDeception TwoDollar UltimateTicTacToe UsedCar "
        "UsedCarNegotiation WildTicTacToe",
    )
    | {
        "Blackjack": "it pays the share of hands that were won, so that full reward is luck",
        "FifteenPuzzle": "it raises AttributeError when the puzzle is solved (set_winners of a single player's state)",
        "Klondike": "it pays by cards moved, and most deals cannot be known to be solvable",
        "ReverseTicTacToe": "its module is a syntax error before Python 3.12",
        "Set": "it pays the number of sets that were found, which has no full score",
        "Slitherlink": _TEXT,
        "ThreeCardMonte": _TEXT,
        "UltimateTexasHoldem": "it pays 1 for every player who is not out of chips, so folding is enough",
    }
)
"""Games that are never played, each with the reason."""
