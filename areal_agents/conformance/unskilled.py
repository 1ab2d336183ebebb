"""The policies without skill of the reward audit: none may earn more than chance.

empty, junk, long      say nothing, a few letters, many words
echo                   says what it was shown last
several, constant      say other tasks' gold answers
random                 calls tools at random, by what their schemas allow, and answers with a word that was shown
"""

from __future__ import annotations

import itertools
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
_LONG = " ".join(f"word{n}" for n in range(300))


@dataclass(frozen=True, slots=True)
class Unskilled:
    """A policy without skill."""

    script: Callable[[int, int], Script]
    """Makes the script of an episode, by its task's position and its own number."""
    turns: int = MAX_TURNS
    """Most turns of an episode."""
    episodes: int | None = None
    """None: one a task."""
    random: bool = False
    """Whether it calls tools at random, so that a call shows nobody that a tool works."""


def unskilled(gold: Sequence[str | None], tools: Sequence[ToolSpec], *, costly: bool) -> dict[str, Unskilled]:
    """Return the policies, by name.

    Args:
        gold: the gold answer of each task, as far as there is one.
        tools: what the random policy calls.
        costly: whether each episode starts processes, so that fewer are played at random.
    """
    known = [g for g in gold if g is not None]

    def several(i: int, n: int) -> Script:
        own = gold[i]
        if own is None or len(known) < 3:
            return repeat(" ".join(rf"\boxed{{{n}}}" for n in range(10)))
        # In the middle: first and last must not be what counts either.
        others = [g for g in (gold[i - 1], gold[(i + 1) % len(gold)]) if g is not None and g != own]
        return repeat("\n".join([*others[:1], own, *others[1:]]) if len(others) == 2 else "")

    def constant(i: int, n: int) -> Script:
        other = next((g for g in known if g != gold[i]), r"\boxed{0}")
        return repeat(other)

    boxed = not known or all(r"\boxed" in g for g in known)
    return {
        "empty": Unskilled(lambda i, n: repeat("")),
        "junk": Unskilled(lambda i, n: repeat("asdf 7 ;; {} qwer")),
        "long": Unskilled(lambda i, n: repeat(_LONG)),
        "echo": Unskilled(lambda i, n: _echo),
        "several": Unskilled(several),
        "constant": Unskilled(constant),
        "random": Unskilled(
            lambda i, n: _acting(tools, boxed, n),
            COSTLY_TURNS if costly else RANDOM_TURNS,
            COSTLY_EPISODES if costly else max(len(gold), RANDOM_EPISODES),
            random=True,
        ),
    }


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
