"""Games of the collection: their rules by hand, what each turn is paid, and that no way round them pays more."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from areal_agents.env import AgentEnv
from areal_agents.envs import blackjack, doors, hanoi, nim, sokoban, words
from areal_agents.envs.hidden_number import HiddenNumber
from areal_agents.errors import ConfigError
from areal_agents.tool import call_text
from areal_agents.types import AssistantMessage, Task


def played(env: AgentEnv, task: Task, texts: Sequence[str]) -> tuple[list[float], str, dict[str, Any]]:
    """Play an episode with these messages; return each turn's reward, the last words, and the last info."""
    env.reset(seed=0, options={"task": task})
    rewards, said, over, info = list[float](), "", False, dict[str, Any]()
    for text in texts:
        assert not over
        observation, reward, terminated, truncated, info = env.step(text)
        rewards.append(round(float(reward), 6))
        said, over = "\n".join(m.text for m in observation), terminated or truncated
    env.close()
    return rewards, said, info


def task_of(payload: dict[str, Any]) -> Task:
    return Task.make("t", split="test", seed=0, payload=payload)


def test_a_guess_is_paid_for_what_it_rules_out() -> None:
    task = task_of({"low": 1, "high": 8, "number": 6, "guesses": 4})

    def guesses(*numbers: int) -> list[str]:
        return [call_text("guess", number=n) for n in numbers]

    # 8 → 4 → 2 → 1: a third of 0.5 each, and 0.5 for the number
    rewards, said, info = played(HiddenNumber(sandbox=None), task, guesses(4, 7, 6))
    assert (rewards, said) == ([0.166667, 0.166667, 0.666667], "Found.")
    assert info["components"]["won"] == 1.0
    # at once: the whole 0.5; the same guess again, or one ruled out already: nothing, and a guess is gone
    assert played(HiddenNumber(sandbox=None), task, guesses(6))[0] == [1.0]
    rewards, said, info = played(HiddenNumber(sandbox=None), task, guesses(4, 4, 2, 8))
    assert rewards[1:3] == [0.0, 0.0]
    assert said == "lower, 0 left"
    assert info["components"]["won"] == 0.0
    refused = played(HiddenNumber(sandbox=None), task, guesses(9))
    assert (refused[0], refused[1]) == ([0.0], "the number is from 1 to 8")


def distance(on: tuple[str, ...], goal: str) -> int:
    """The least number of moves, by looking at every position."""
    seen, layer, steps = {on}, [on], 0
    while not any(set(at) == {goal} for at in layer):
        steps += 1
        found = []
        for at in layer:
            for start, end in itertools.permutations("ABC", 2):
                tower = hanoi.Tower(list(at), 0)
                disc, below = tower.top(start), tower.top(end)
                if disc is not None and (below is None or disc < below):
                    after = (*at[:disc], end, *at[disc + 1 :])
                    if after not in seen:
                        seen.add(after)
                        found.append(after)
        layer = found
    return steps


def test_the_moves_that_a_tower_needs_are_the_fewest() -> None:
    for on in itertools.product("ABC", repeat=4):
        for goal in "ABC":
            needed = hanoi.moves_needed(on, goal)
            assert needed == distance(on, goal)
            if needed:
                start, end = hanoi.next_move(on, goal)
                disc = hanoi.Tower(list(on), 0).top(start)
                assert disc is not None
                assert hanoi.moves_needed((*on[:disc], end, *on[disc + 1 :]), goal) == needed - 1


def test_a_disc_is_paid_for_the_way_it_makes_and_charged_for_going_back() -> None:
    task = task_of({"on": ["A", "A"], "goal": "C", "moves": 6})

    def moves(*pairs: str) -> list[str]:
        return [call_text("move", start=pair[0], end=pair[1]) for pair in pairs]

    rewards, said, info = played(hanoi.Hanoi(sandbox=None), task, moves("AB", "AC", "BC"))
    assert rewards == [0.166667, 0.166667, 0.666667]
    assert (said, info["components"]["won"]) == ("A: empty; B: empty; C: 2 1. 3 moves left.", 1.0)
    # A→B and back is 1/6 and its charge; the small disc to C needs a move more than A→B: no way made
    rewards, said, info = played(hanoi.Hanoi(sandbox=None), task, moves("AB", "BA", "AC", "CA", "AB", "BA"))
    assert sum(rewards) == pytest.approx(0.0, abs=1e-5)
    assert said.endswith("0 moves left.")
    for pair, why in (("BA", "B is empty"), ("AA", "the disc is on A already")):
        assert why in played(hanoi.Hanoi(sandbox=None), task, moves(pair))[1]
    assert "disc 2 is larger than disc 1 on B" in played(hanoi.Hanoi(sandbox=None), task, moves("AB", "AB"))[1]


def test_the_values_of_blackjack_are_those_of_play() -> None:
    # the well-known table of the house's ends from an ace, with an endless deck: 21 in 36.16 %, bust in 11.53 %
    ends = blackjack.house(*blackjack.total([1]))
    assert {end: round(p, 4) for end, p in ends.items()} == {
        17: 0.1308, 18: 0.1308, 19: 0.1308, 20: 0.1308, 21: 0.3616, 22: 0.1153,
    }  # fmt: skip
    basic: tuple[tuple[blackjack.Move, list[int], int], ...] = (
        ("hit", [10, 2], 3), ("stand", [10, 2], 4), ("stand", [10, 3], 2), ("hit", [10, 6], 7), ("hit", [1, 6], 6),
        ("stand", [1, 7], 8), ("hit", [1, 7], 9), ("stand", [10, 7], 1), ("hit", [5, 6], 6),
    )  # fmt: skip
    for best, hand, shown in basic:
        assert blackjack.gap(hand, shown, best) == 0.0, (hand, shown)  # the published basic strategy
    # against dealt hands: the mean outcome of standing on 18 against a 9
    rng, outcomes = Random(0), []
    for _ in range(20_000):
        cards = [9]
        while blackjack.total(cards)[0] < 17:
            cards.append(rng.choice(blackjack.CARDS))
        theirs = blackjack.total(cards)[0]
        outcomes.append(1.0 if theirs > 21 or theirs < 18 else 0.0 if theirs == 18 else -1.0)
    assert sum(outcomes) / len(outcomes) == pytest.approx(blackjack.value("stand", 18, False, 9), abs=0.02)


def test_a_mistake_is_charged_once_at_its_turn_whatever_the_outcome() -> None:
    task = task_of({"cards": [10, 9], "shown": 10, "coming": [2, 7]})
    hit, stand = call_text("hit"), call_text("stand")
    rewards, said, info = played(blackjack.Blackjack(sandbox=None), task, [stand])
    assert rewards == [1.0]  # 19 against 10, 2 and 7: drawn, and rightly played
    assert said == "The house holds 10, 2, 7 (19): drawn."
    assert info["components"]["outcome"] == 0.0
    rewards, said, info = played(blackjack.Blackjack(sandbox=None), task, [hit, stand])
    assert rewards == [-1.0, 1.0]  # 21 by luck
    assert said == "The house holds 10, 7 (17): won."
    assert (info["components"]["won"], info["components"]["outcome"]) == (1.0, 1.0)
    rewards, said, _ = played(blackjack.Blackjack(sandbox=None), task, [hit, hit])
    assert (rewards, said) == ([-1.0, 1.0], "You hold 10, 9, 2, 7 (28): bust.")


def test_a_box_is_paid_when_it_comes_onto_a_goal_and_charged_when_it_leaves() -> None:
    task = task_of({"map": ["@$. ", "    ", " $ ."], "steps": 30})

    def walks(*steps: str) -> list[str]:
        return [call_text("walk", steps=s) for s in steps]

    rewards, said, info = played(sokoban.Sokoban(sandbox=None), task, walks("R", "R", "DDLLLDR"))
    assert rewards[:2] == [0.25, -0.25]
    rewards, said, info = played(sokoban.Sokoban(sandbox=None), task, walks("R", "LDDRR"))
    assert rewards == [0.25, 0.75]
    assert said == "######\n#  * #\n#    #\n#  @*#\n######\n24 steps left."
    assert info["components"]["won"] == 1.0
    rewards, said, _ = played(sokoban.Sokoban(sandbox=None), task, walks("UR"))
    assert (rewards, said.splitlines()[0]) == ([0.0], "Step 1 (U) is blocked.")
    assert "29 steps left." in said
    assert "steps are 1 to 12" in played(sokoban.Sokoban(sandbox=None), task, walks("UX"))[1]


def test_rooms_can_be_solved_in_their_steps_and_not_by_walking_at_random() -> None:
    for level, size, count in ((0.0, 4, 40), (0.5, 5, 40), (1.0, 6, 10)):
        solved, rng = 0, Random(0)
        for task in sokoban.Sokoban.tasks("test", difficulty=level)[:count]:
            room, steps = sokoban.room_of(task), task.payload["steps"]
            assert room.placed() == 0
            least = len(sokoban.shortest(room))
            assert (least >= size, steps) == (True, 2 * least + 4)
            for _ in range(5):
                room = sokoban.room_of(task)
                solved += any(room.step(rng.choice("UDLR")) and not room.boxes - room.goals for _ in range(steps))
        assert solved <= 0.15 * 5 * count


def test_no_room_of_the_test_is_one_of_the_training_turned_or_mirrored() -> None:
    def turned(rows: list[str]) -> list[str]:
        return ["".join(rows[-1 - x][y] for x in range(len(rows))) for y in range(len(rows[0]))]

    def least(rows: list[str]) -> str:
        found = []
        for _ in range(4):
            rows = turned(rows)
            found += ["/".join(rows), "/".join(row[::-1] for row in rows)]
        return min(found)

    assert least(["@$.", "   "]) == least([" @", " $", " ."])
    rooms = {s: {least(t.payload["map"]) for t in sokoban.Sokoban.tasks(s, difficulty=0.0)} for s in ("train", "test")}
    assert not rooms["train"] & rooms["test"]


def test_letters_are_marked_as_often_as_they_are_in_the_word() -> None:
    assert words.marks("eerie", "geese") == ("elsewhere", "right", "no", "no", "right")
    assert words.marks("allow", "level") == ("no", "elsewhere", "elsewhere", "no", "no")
    assert words.marks("zebra", "zebra") == ("right",) * 5


def test_letters_are_paid_once() -> None:
    task = task_of({"word": "apple"})

    def guesses(*said: str) -> list[str]:
        return [call_text("guess", word=w) for w in said]

    rewards, said, info = played(words.Words(sandbox=None), task, guesses("angle", "angle", "AMPLE ", "apple"))
    assert rewards == [0.3, 0.0, 0.1, 0.6]  # a..le, the same, a.ple
    assert said == "a: right, p: right, p: right, l: right, e: right. 2 left."
    assert info["components"]["guesses"] == 4.0
    rewards, said, info = played(words.Words(sandbox=None), task, guesses(*["angle"] * 6))
    assert sum(rewards) == pytest.approx(0.3)
    assert info["components"]["won"] == 0.0
    assert "a guess has 5 letters" in played(words.Words(sandbox=None), task, guesses("appl"))[1]


def test_every_word_is_found_by_the_expert() -> None:
    assert len(set(words.WORDS)) == len(words.WORDS)
    for word in words.WORDS:
        said = list(words.Words.expert(task_of({"word": word})))
        assert len(said) <= words.GUESSES, word


def test_a_position_of_nim_is_lost_where_every_move_leads_to_a_won_one() -> None:
    wins: dict[tuple[int, ...], bool] = {}
    for heaps in itertools.product(range(5), repeat=3):  # in an order in which each position comes after those below
        after = [
            (*heaps[:i], n - k, *heaps[i + 1 :]) for i, n in enumerate(heaps) for k in range(1, n + 1)
        ]  # fmt: skip
        wins[heaps] = any(not wins[h] for h in after)
        move = nim.best_move(heaps)
        assert (move is not None) == wins[heaps]
        if move is not None:
            heap, count = move
            assert not wins[*heaps[:heap], heaps[heap] - count, *heaps[heap + 1 :]]


class Opponent:
    """Says what it was told to."""

    def __init__(self, *said: str) -> None:
        self.said, self.asked = list(said), list[str]()

    async def chat(self, messages: Any, tools: Any, sampling: Any) -> AssistantMessage:
        from areal_agents.types import Text

        self.asked.append(messages[-1].text)
        return AssistantMessage((Text(self.said.pop(0)),))


def test_a_model_plays_the_opponent_and_its_slips_are_counted() -> None:
    task = task_of({"heaps": [1, 2, 4], "skill": 1.0, "opponent": 5})
    model = Opponent("2 1", "take it all")
    env = nim.Nim(sandbox=None, opponent="model", models={"opponent": model})
    rewards, said, _ = played(env, task, [call_text("take", heap=3, count=1), call_text("take", heap=3, count=3)])
    assert model.asked == ["heap 1: 1, heap 2: 2, heap 3: 3", "heap 1: 1, heap 2: 1, heap 3: 0"]
    assert rewards == [0.0, 0.0]
    assert said.startswith("The opponent takes 1 from heap ")
    with pytest.raises(ConfigError, match="opponent 'model' needs a model of that name"):
        nim.Nim(sandbox=None, opponent="model")
    with pytest.raises(ConfigError, match="opponent 'nobody'"):
        nim.Nim(sandbox=None, opponent="nobody")  # type: ignore[arg-type]


def test_the_game_of_nim_is_paid_at_its_end() -> None:
    task = task_of({"heaps": [1, 2, 4], "skill": 1.0, "opponent": 5})
    texts, env = list[str](), nim.Nim(sandbox=None)
    env.reset(seed=0, options={"task": task})
    expert, observation, rewards = nim.Nim.expert(task), None, list[float]()
    over = False
    while not over:
        texts.append(next(expert) if observation is None else expert.send(observation))
        observation, reward, over, _, info = env.step(texts[-1])
        rewards.append(float(reward))
    assert (rewards[-1], set(rewards[:-1])) == (1.0, {0.0})
    assert info["components"] == {"won": 1.0, "slips": 0.0}
    assert "heap 3 has 4 objects" in played(nim.Nim(sandbox=None), task, [call_text("take", heap=3, count=5)])[1]
    asyncio.run(env.aclose())


def test_twins_have_the_same_returns_and_other_turns() -> None:
    payload = {"keys": {"red": "iron", "blue": "bone"}, "doors": ["red", "blue"], "tries": 3}
    keys = [call_text("open", key=k) for k in ("iron", "iron", "bone")]
    twins: tuple[tuple[doors.Pay, list[float]], ...] = (("turn", [0.5, 0.0, 0.5]), ("end", [0.0, 0.0, 1.0]))
    for pay, expected in twins:
        rewards, said, info = played(doors.Doors(sandbox=None, pay=pay), task_of(payload), keys)
        assert (rewards, said) == (expected, "The last door opens.")
        assert info["components"]["doors"] == 1.0
    rewards, said, _ = played(doors.Doors(sandbox=None, pay="end"), task_of(payload), [*keys[:2], keys[0]])
    assert rewards == [0.0, 0.0, 0.5]
    with pytest.raises(ConfigError, match="pay 'never'"):
        doors.Doors(sandbox=None, pay="never")  # type: ignore[arg-type]
