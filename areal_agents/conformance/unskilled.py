"""The policies without skill of the reward audit: none may earn more than chance.

empty, junk, long      say nothing, what reads oddly as a number or is none, many words
stopped                makes a call that cannot be read, and is ended by a limit
echo                   says what it was shown last
several                says other tasks' gold answers with the right one among them
constant               says the gold answer that is the commonest of other tasks
random                 calls tools at random, by what their schemas allow, and answers with a word that was shown
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from areal_agents.conformance.random_calls import random_call, words_of
from areal_agents.conformance.scripted_episode import MAX_TURNS, repeat
from areal_agents.env import Expert
from areal_agents.rollout.script import Script
from areal_agents.tool import ToolSpec
from areal_agents.types import Observation

RANDOM_EPISODES, RANDOM_TURNS = 64, 24
"""Of the random policy: so many at least, since each goes its own way."""
COSTLY_EPISODES, COSTLY_TURNS = 32, 3
"""Where each episode or call starts processes."""
STOPPED_EPISODES = 16
_LONG = " ".join(f"word{n}" for n in range(300))
_JUNK = (
    "asdf 7 ;; {} qwer", "nan", "inf", "-1e999", "1/0", "²", "٣", "9" * 5000, "\x00", "{" * 500, "null", "[[[]]]",
)  # fmt: skip
"""What a reward must not trip over, nor pay: NaN is not off by more than 0.1, int("²") raises though it is a digit."""


@dataclass(frozen=True, slots=True)
class Unskilled:
    """A policy without skill."""

    script: Callable[[int, int], Script]
    """Makes the script of an episode, by its task's position and its own number."""
    turns: int = MAX_TURNS
    """Most turns of an episode."""
    episodes: int | None = None
    """None: one a task."""
    one_may_fit: bool = False
    """Whether one task of few may be answered rightly by chance."""
    random: bool = False
    """Whether it calls tools at random, so that a call shows nobody that a tool works."""


def unskilled(
    gold: Sequence[str | None], tools: Sequence[ToolSpec], *, costly: bool, elsewhere: Sequence[str] = ()
) -> dict[str, Unskilled]:
    """Return the policies, by name.

    Args:
        gold: the gold answer of each task, as far as there is one.
        tools: what the random policy calls.
        costly: whether each episode starts processes, so that fewer are played at random.
        elsewhere: gold answers of another split, from which a constant one is learned. Empty takes the other tasks'.
    """
    known = [g for g in gold if g is not None]
    learned = Counter(elsewhere).most_common(1)

    def several(i: int, n: int) -> Script:
        own = gold[i]
        if own is None or len(known) < 3:
            return repeat(" ".join(rf"\boxed{{{n}}}" for n in range(10)))
        # In the middle: first and last must not be what counts either.
        others = [g for g in (*gold[i + 1 :], *gold[:i]) if g is not None and g != own]
        return repeat("\n".join([others[0], own, others[-1]]) if others else "")

    def constant(i: int, n: int) -> Script:
        others = learned or Counter(g for g in (*gold[i + 1 :], *gold[:i]) if g is not None).most_common(1)
        return repeat(others[0][0] if others else r"\boxed{0}")

    boxed = not known or all(r"\boxed" in g for g in known)
    return {
        "empty": Unskilled(lambda i, n: repeat("")),
        "junk": Unskilled(lambda i, n: repeat(_junk(n, boxed))),
        "long": Unskilled(lambda i, n: repeat(_LONG)),
        "stopped": Unskilled(lambda i, n: repeat("<tool_call>{"), 1, min(len(gold), STOPPED_EPISODES)),
        "echo": Unskilled(lambda i, n: _echo),
        "several": Unskilled(several),
        "constant": Unskilled(constant, one_may_fit=True),
        "random": Unskilled(
            lambda i, n: _acting(tools, boxed, n),
            COSTLY_TURNS if costly else RANDOM_TURNS,
            COSTLY_EPISODES if costly else max(len(gold), RANDOM_EPISODES),
            random=True,
        ),
    }


def _junk(number: int, boxed: bool) -> str:
    """Return an odd text, in a box where answers are boxed. The first one is bare."""
    text = _JUNK[number % len(_JUNK)]
    return rf"\boxed{{{text}}}" if boxed and text != _JUNK[0] else text


def _echo(shown: Observation) -> Expert:
    """Say what was shown last."""
    while True:
        shown = (yield "\n".join(m.text for m in shown)) or shown


def _acting(tools: Sequence[ToolSpec], boxed: bool, number: int) -> Script:
    """Return a script of random calls: of every second episode for ever, of the others before a random answer."""

    def play(shown: Observation) -> Expert:
        rng, seen = Random(f"random {number}"), [m.text for m in shown]
        calls = itertools.count() if number % 2 == 0 else range(rng.randint(0, 3))
        for _ in calls if tools else ():
            shown = yield random_call(tools, words_of(seen), rng)
            seen = [*seen[:1], *seen[-3:], *(m.text for m in shown)]
        while True:
            word = rng.choice(words_of(seen) or ["0"])
            shown = yield rf"\boxed{{{word}}}" if boxed else word

    return play
