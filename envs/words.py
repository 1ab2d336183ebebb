"""``areal/Words-v0``: find a word of five letters from marks on guesses, as in Wordle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any, Final

from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import ToolError, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
SHAPED = 0.5
"""What the turns of a found word earn together. The rest is paid at the end."""
GUESSES = 6
LENGTH = 5
WORDS: Final = tuple(
    """
    about above actor adult after again agree ahead alarm album alive allow alone along angel anger angle angry apart
    apple apply arena argue arise aside asset audio avoid awake award aware badly basic beach begin being below bench
    birth black blade blame blank blind block blood board bonus brain brand brave bread break brick bride brief bring
    broad brown brush build cabin cable candy carry catch cause chain chair chalk charm chart chase cheap check chess
    chest chief child choir civil claim class clean clear clerk climb clock close cloth cloud coach coast color could
    count court cover craft crash cream crime cross crowd crown curve cycle daily dance death delay depth dirty doubt
    dozen draft drama dream dress drink drive eager early earth eight elect empty enemy enjoy enter equal error event
    exact extra faith false fault favor fence fever field fifth fight final first flame flash fleet floor fluid focus
    force forty frame fresh front fruit fully funny ghost giant given glass globe glory grace grade grain grand grant
    grass great green group guard guess guest guide happy heart heavy hello hobby honey honor horse hotel house human
    humor ideal image index inner input issue jeans jelly joint judge juice knife knock known label labor large laser
    later laugh layer learn lemon level light limit local loose lower lucky lunch magic major maker march match maybe
    mayor medal metal meter might minor mixed model money month moral motor mount mouse mouth movie music naval nerve
    never night noise north novel nurse ocean offer often olive onion opera orbit order other outer owner paint panel
    paper party patch peace phase phone photo piano piece pilot pitch pizza place plain plane plant plate point pound
    power press price pride prime print prize proof proud queen quick quiet quite radio raise range rapid ratio reach
    ready refer right rival river robot rough round route royal rural salad scale scene scope score sense serve seven
    shade shake shape share sharp sheep sheet shelf shell shift shine shirt shock shore short sight skill skirt sleep
    slice slide small smart smile smoke snake solid solve sound south space spare speak speed spend spice sport staff
    stage stair stand start state steam steel stick still stock stone store storm story style sugar sweet table taste
    teach tenth thank theme there thick thing third throw tiger tight title today topic total touch tough tower trace
    track trade train treat trend trial tribe trick truck trust truth twice uncle under union until upper upset urban
    usual valid value video virus visit vital voice waste watch water wheel where white whole woman world worry worth
    would write wrong young youth zebra
    """.split()  # noqa: SIM905
)
Marks = tuple[str, ...]


def marks(guess: str, word: str) -> Marks:
    """Mark each letter: ``right``, ``elsewhere``, or ``no``.

    A letter is found as often as it is in the word, right places first, then from the left.
    """
    spare = Counter(w for g, w in zip(guess, word, strict=True) if g != w)
    found = []
    for g, w in zip(guess, word, strict=True):
        if g == w:
            found.append("right")
        elif spare[g] > 0:
            spare[g] -= 1
            found.append("elsewhere")
        else:
            found.append("no")
    return tuple(found)


@dataclass
class Board:
    """The guesses so far, and the most letters that one of them had in the right place."""

    guesses: list[str] = field(default_factory=list)
    right: int = 0


def found(episode: Episode) -> Verdict:
    done = float(episode.state.right == LENGTH)
    return Verdict((1 - SHAPED) * done, {"won": done, "guesses": float(len(episode.state.guesses))})


class Words(ToolEnv):
    """Find a word in six guesses. An agent must learn to use all marks so far, and to guess what tells words apart.

    A guess with more letters in the right place than any before earns 0.1 for each of them, which makes 0.5 over a
    found word. The word pays the other half. Any five letters may be guessed. ``difficulty``: the word is one of the
    first 60 of the list at 0, of its first 252 at 0.5 (the default), of all 443 at 1.
    """

    system_prompt = "Find the hidden English word of five letters. Each guess is marked letter by letter."
    rubric = found
    max_turns = 10
    chance = by_level(0.2, 0.2, 0.21)
    state: Board

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        first = round(60 + level * (len(WORDS) - 60))
        sizes = {"train": 2048, "test": 256}
        return drawn_tasks("areal/Words-v0", split, level, lambda rng: _hidden(rng, first), sizes, buckets=2)

    def new_state(self, task: Task) -> Board:
        return Board()

    def prompt(self, task: Task) -> str:
        return f"The word begins with {task.payload['word'][0]}. You have {GUESSES} guesses."

    @tool()
    async def guess(self, word: str) -> str:
        """Guess a word."""
        said, board = word.strip().lower(), self.state
        if len(said) != LENGTH or not (said.isascii() and said.isalpha()):
            raise ToolError(f"a guess has {LENGTH} letters")
        found = marks(said, self.task.payload["word"])
        board.guesses.append(said)
        more = max(0, found.count("right") - board.right)
        board.right += more
        self.reward_turn(SHAPED * more / LENGTH, "letters")
        left = GUESSES - len(board.guesses)
        if board.right == LENGTH or not left:
            self.end_episode()
        told = ", ".join(f"{letter}: {mark}" for letter, mark in zip(said, found, strict=True))
        return f"{told}. {left} left."

    @classmethod
    def expert(cls, task: Task) -> Expert:
        """Guess the word that the marks leave the fewest others after, at worst; the first of equals."""
        hidden = task.payload["word"]
        left = tuple(w for w in WORDS if w[0] == hidden[0])
        while True:
            said = _telling(left)
            yield call_text("guess", word=said)
            if said == hidden:
                return
            left = tuple(w for w in left if marks(said, w) == marks(said, hidden))


@cache
def _telling(left: tuple[str, ...]) -> str:
    return min(left, key=lambda w: max(Counter(marks(w, other) for other in left).values()))


def _hidden(rng: Random, first: int) -> dict[str, Any]:
    """Draw a word. The split goes by it alone, so no word is in both."""
    return {"word": WORDS[rng.randrange(first)]}
