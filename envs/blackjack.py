"""``areal/Blackjack-v0``: a hand of blackjack against the house, paid by its decisions, not by luck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Final, Literal

from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
MISTAKE = 0.02
"""Of the expected outcome. What gives away less is none."""
CARDS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10)
"""What a card counts; an ace counts 1, or 11 where that is no bust. Cards are drawn with replacement."""
_NAMES: Final = {1: "ace"}
"""Others are called by their number."""
Move = Literal["hit", "stand"]


def total(cards: Sequence[int]) -> tuple[int, bool]:
    """Return the best total of a hand, and whether an ace counts 11 in it (a soft total)."""
    hard = sum(cards)
    soft = 1 in cards and hard <= 11
    return hard + 10 * soft, soft


def _with(total: int, soft: bool, card: int) -> tuple[int, bool]:
    """Return the total and its softness with one more card."""
    total += card
    if card == 1 and total <= 11:
        return total + 10, True
    if soft and total > 21:
        return total - 10, False
    return total, soft


@cache
def house(total: int, soft: bool) -> Mapping[int, float]:
    """Return how likely each end of the house is, 22 being a bust. It stands on every 17."""
    if total > 21:
        return {22: 1.0}
    if total >= 17:
        return {total: 1.0}
    found: dict[int, float] = {}
    for card in CARDS:
        for end, p in house(*_with(total, soft, card)).items():
            found[end] = found.get(end, 0.0) + p / len(CARDS)
    return found


@cache
def value(move: Move, total: int, soft: bool, shown: int) -> float:
    """Return the expected outcome of a move with the best play after it: 1 won, 0 drawn, -1 lost."""
    if move == "stand":
        ends = house(*_with(0, False, shown)).items()
        return sum(p * (1.0 if end > 21 or end < total else 0.0 if end == total else -1.0) for end, p in ends)
    found = 0.0
    for card in CARDS:
        after, is_soft = _with(total, soft, card)
        best = -1.0 if after > 21 else max(value(move, after, is_soft, shown) for move in ("hit", "stand"))
        found += best / len(CARDS)
    return found


def gap(cards: Sequence[int], shown: int, move: Move) -> float:
    """Return what a move gives away: how much more the better one is expected to bring."""
    hit, stand = (value(other, *total(cards), shown) for other in ("hit", "stand"))
    return max(hit, stand) - (hit if move == "hit" else stand)


@dataclass
class Hand:
    """The hand of the player, and the cards that come next."""

    cards: list[int]
    coming: list[int]
    mistaken: bool = False
    outcome: float = 0.0
    """1 won, 0 drawn, -1 lost; of a hand that was not ended, 0."""
    ended: bool = False


def decided(episode: Episode) -> Verdict:
    """Pay 1 for a hand that was ended. A mistake has taken it back at its own turn."""
    hand = episode.state
    return Verdict(float(hand.ended), {"won": float(hand.outcome > 0), "outcome": hand.outcome})


class Blackjack(ToolEnv):
    """Play a hand: hit or stand. An agent must learn the better move for each total and card of the house.

    The reward is not luck's: 1 for a hand without a mistake, and the first mistake takes 1 at its turn. A mistake gives
    away more than 0.02 of the expected outcome (1 won, 0 drawn, -1 lost; the better play follows; by enumeration). The
    outcome itself is a component. Half of the hands ask for a card at first, the others for none. ``difficulty``:
    the first decision gives away 0.3 or more where it is wrong at 0, 0.15 at 0.5 (the default), anything at 1.
    """

    system_prompt = (
        "Blackjack: come closer to 21 than the house without going over. Aces count 1 or 11. "
        "The house draws to 17. Hit to take a card, stand to end."
    )
    rubric = decided
    max_turns = 12
    chance = by_level(0.45, 0.42, 0.53)
    state: Hand

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        least = max(MISTAKE, 0.3 * (1 - level))
        return drawn_tasks("areal/Blackjack-v0", split, level, lambda rng: _deal(rng, least))

    def new_state(self, task: Task) -> Hand:
        return Hand(task.payload["cards"], task.payload["coming"])

    def prompt(self, task: Task) -> str:
        return f"You hold {_spoken(task.payload['cards'])}. The house shows {_spoken([task.payload['shown']])}."

    def _decide(self, move: Move) -> None:
        hand, shown = self.state, self.task.payload["shown"]
        if not hand.mistaken and gap(hand.cards, shown, move) > MISTAKE:
            hand.mistaken = True
            self.reward_turn(-1.0, "mistake")

    @tool()
    async def hit(self) -> str:
        """Take a card."""
        self._decide("hit")
        hand = self.state
        hand.cards.append(hand.coming.pop(0))
        if total(hand.cards)[0] > 21:
            hand.outcome, hand.ended = -1.0, True
            self.end_episode()
            return f"You hold {_spoken(hand.cards)}: bust."
        return f"You hold {_spoken(hand.cards)}."

    @tool()
    async def stand(self) -> str:
        """Take no more cards; the house plays."""
        self._decide("stand")
        hand, house_cards = self.state, [self.task.payload["shown"]]
        while total(house_cards)[0] < 17:
            house_cards.append(hand.coming.pop(0))
        ours, theirs = total(hand.cards)[0], total(house_cards)[0]
        hand.outcome = 1.0 if theirs > 21 or ours > theirs else 0.0 if ours == theirs else -1.0
        hand.ended = True
        self.end_episode()
        said = {1.0: "won", 0.0: "drawn", -1.0: "lost"}[hand.outcome]
        return f"The house holds {_spoken(house_cards)}: {said}."

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Make the best move each time."""
        cards, coming = list(task.payload["cards"]), list(task.payload["coming"])
        while total(cards)[0] <= 21:
            if not gap(cards, task.payload["shown"], "stand"):
                yield call_text("stand")
                return
            yield call_text("hit")
            cards.append(coming.pop(0))


def _spoken(cards: Sequence[int]) -> str:
    count, _ = total(cards)
    names = ", ".join(_NAMES.get(card, str(card)) for card in cards)
    return names if len(cards) == 1 else f"{names} ({count})"


def _deal(rng: Random, least: float) -> dict[str, Any]:
    """Deal a hand whose worse move gives away ``least``. Which move that is, is drawn first."""
    worse: Move = rng.choice(("hit", "stand"))
    while True:
        cards, shown = [rng.choice(CARDS), rng.choice(CARDS)], rng.choice(CARDS)
        if total(cards)[0] < 21 and gap(cards, shown, worse) >= least:
            coming = [rng.choice(CARDS) for _ in range(40)]  # no hand and house take more
            return {"cards": cards, "shown": shown, "coming": coming}
