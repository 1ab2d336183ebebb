"""TextArena's games: each plays, by its seed alone, and what is left out is listed with its reason."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.chat.toolcalls import parse_text
from areal_agents.engine import Sampling
from areal_agents.envs.forked_game import TEST_SEEDS_FROM
from areal_agents.envs.textarena_env import TextArena
from areal_agents.envs.textarena_lists import EXCLUDED, SHOWN, SINGLE, TWO
from areal_agents.errors import ConfigError, TaskError
from areal_agents.types import AssistantMessage, Message, Text, user
from tests.conftest import require

Policy = Callable[[str, random.Random], str]


@pytest.fixture(scope="module", autouse=True)
def _package() -> None:
    require("module:textarena")


@pytest.fixture
def _a_process_of_its_own() -> Iterator[None]:
    """Restore what a game changes of the whole process, for tests that play one in this one."""
    digits, drawn = sys.get_int_max_str_digits(), random.getstate()
    yield
    sys.set_int_max_str_digits(digits)
    random.setstate(drawn)


def play(env: TextArena, policy: Policy, task: int = 0, split: str = "train") -> list[tuple[Any, ...]]:
    """What the agent saw and earned, turn by turn."""
    rng = random.Random(1)

    async def main() -> list[tuple[Any, ...]]:
        try:
            shown, info = await env.areset(options={"task": env.tasks(split, game=env._game)[task]}, seed=0)
            steps: list[tuple[Any, ...]] = [(shown, info)]
            for _ in range(300):
                steps.append(await env.astep(parse_text(policy(steps[-1][0][-1].text, rng))))
                if steps[-1][2] or steps[-1][3]:
                    return steps
            raise AssertionError("the game does not end")
        finally:
            await env.aclose()

    return asyncio.run(main())


def test_every_game_is_listed_once() -> None:
    from areal_agents.envs.textarena_game import MOVES

    code = (
        "import json, textarena, textarena.envs.registration as r; "
        "print(json.dumps(sorted({i.partition('-v0')[0].partition('-')[0] for i in r.ENV_REGISTRY})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    registered = json.loads(done.stdout.splitlines()[-1])
    assert set(registered) <= {*SINGLE, *TWO, *EXCLUDED}
    assert set(SINGLE) | set(TWO) <= set(registered)
    assert set(SINGLE) >= SHOWN
    assert not {*SINGLE, *TWO} & set(EXCLUDED)
    assert set(MOVES) == set(TWO)


SAID = {
    "2048": ["[up]", "[left]", "[down]", "[right]"],
    "Bandit": ["[red]", "[blue]", "[green]"],
    "Crosswords": ["[0 0 a]", "[1 1 b]"],
    "FrozenLake": ["[down]", "[right]"],
    "GuessTheNumber": [f"[{n}]" for n in range(1, 21)],
    "LightsOut": ["[0 0]", "[1 2]", "[2 1]"],
    "LogicPuzzle": ["[people mary places bakery X]"],
    "Mastermind": ["[1 2 3 4]", "[3 4 5 6]", "[6 1 5 2]", "[2 6 4 1]"],
    "Minesweeper": [f"[{r} {c}]" for r in range(8) for c in range(8)],
    "RushHour": ["[A+]", "[B-]", "[X+]"],
    "Secretary": ["[continue]"],
    "Sokoban": ["[up]", "[left]", "[down]", "[right]"],
    "Sudoku": ["[1 1 5]", "[5 5 3]"],
    "ConnectFour": [f"[col {i}]" for i in range(7)],
    "IteratedMatchingPennies": ["[heads]"],
    "IteratedRockPaperScissors": ["[rock]"],
    "KuhnPoker": ["[check]", "[call]"],
    "Nim": ["[0 1]", "[1 1]", "[2 1]"],
    "PigDice": ["[roll]", "[hold]"],
    "TicTacToe": [f"[{i}]" for i in range(9)],
}


def says(game: str) -> Policy:
    """Say something that the game understands."""
    return lambda shown, rng: rng.choice(SAID[game])


@pytest.mark.slow
@pytest.mark.parametrize("game", SINGLE + TWO)
def test_a_seed_alone_decides_a_game(game: str) -> None:
    first, again = (play(TextArena(game=f"{game}-v0", max_turns=6), says(game)) for _ in range(2))
    assert first == again
    assert all(isinstance(step[1], float) for step in first[1:])
    assert first[-1][1] in (0.0, 1.0)
    games = [play(TextArena(game=f"{game}-v0", max_turns=6), says(game), task) for task in range(2, 8, 2)]
    assert len({str([step[0] for step in steps]) for steps in [first, *games]}) > 1


@pytest.mark.parametrize(
    ("game", "count"), [("FrozenLake", 60), ("LightsOut", 20), ("LogicPuzzle", 40), ("Sokoban", 4)]
)
@pytest.mark.usefixtures("_a_process_of_its_own")
def test_no_puzzle_that_a_game_shows_is_in_two_splits(game: str, count: int) -> None:
    """Of FrozenLake there are about 330, and every one of the test split was trained on."""
    from areal_agents.envs.textarena_game import TextArenaGame

    assert game in SHOWN
    made = TextArenaGame(f"{game}-v0", 1, True, TEST_SEEDS_FROM)
    shown = [{made.reset(seed=first + i)[0] for i in range(count)} for first in (0, TEST_SEEDS_FROM)]
    assert shown[0] & shown[1] == set()
    assert all(len(puzzles) > count / 4 for puzzles in shown)


@pytest.mark.parametrize("game", ["TicTacToe", "GuessTheNumber", "ConnectFour"])
def test_a_number_of_any_length_is_an_illegal_move_and_no_fault_of_the_game(game: str) -> None:
    steps = play(TextArena(game=f"{game}-v0"), lambda shown, rng: f"[{'9' * 5000}]")
    assert (len(steps), steps[-1][1:3]) == (3, (0.0, True))  # one more try is given
    assert steps[-1][4]["components"]["invalid_move/own"] == 1.0


def test_a_game_that_is_solved_earns_1_and_shows_its_last_words() -> None:
    task = TextArena.tasks("train")[0]
    expert = TextArena.expert(task)
    assert expert is not None
    says = [next(expert)]

    def policy(shown: str, rng: random.Random) -> str:
        if "Feedback" in shown:
            says.append(expert.send((user(shown),)))
        return says[-1]

    steps = play(TextArena(), policy)
    assert "You are playing Mastermind" in steps[0][0][-1].text
    assert [step[1] for step in steps[1:]] == [0.0] * (len(steps) - 2) + [1.0]
    observation, _, terminated, truncated, info = steps[-1]
    assert "You have cracked the code" in observation[-1].text
    assert (terminated, truncated, info["stop_reason"]) == (True, False, "answer")
    assert info["components"] == {"own_score": 1.0, "invalid_move/own": 0.0}
    # What is new is shown, and not what the agent said itself.
    assert steps[1][0][-1].text == f"Submitted {says[0]}. Feedback: 0 black peg(s), 3 white peg(s)."
    assert TextArena.expert(TextArena.tasks("train", game="Nim-v0")[0]) is None


def test_what_is_not_solved_earns_nothing_but_where_partial_is_asked_for() -> None:
    def badly(shown: str, rng: random.Random) -> str:
        return "no guess"

    steps = play(TextArena(game="GuessTheNumber-v0"), lambda shown, rng: "[10]" if len(shown) > 200 else "twice")
    own = steps[-1][4]["components"]["own_score"]
    assert steps[-1][1] == 0.0
    assert 0.4 < own < 1.0  # a guess in the middle is near every number: TextArena pays for that
    env = TextArena(game="GuessTheNumber-v0", partial=True)
    assert play(env, lambda shown, rng: "[10]" if len(shown) > 200 else "twice")[-1][1] == own
    lost = play(TextArena(), badly)
    assert lost[-1][4]["components"]["invalid_move/own"] == 1.0


@pytest.mark.parametrize("game", TWO)
def test_the_script_plays_the_other_side_legally(game: str) -> None:
    for task in range(4):  # both seats
        env = TextArena(game=f"{game}-v0", max_turns=200)
        components = play(env, says(game), task)[-1][4].get("components", {})
        assert components.get("invalid_move/other", 0.0) == 0.0


class Columns:
    """A chat model that plays the first columns, or talks."""

    def __init__(self, *moves: str) -> None:
        self.moves, self.seen = list(moves), []  # type: ignore[var-annotated]

    async def chat(
        self, messages: Sequence[Message | AssistantMessage], tools: Sequence[Any], sampling: Sampling
    ) -> AssistantMessage:
        self.seen.append([m.text for m in messages])
        return AssistantMessage((Text(f"<think>[col 6]</think>{self.moves.pop(0)}"),))


def against(model: Columns, *, seat: int, columns: Sequence[int]) -> list[tuple[Any, ...]]:
    mine = list(columns)
    env = TextArena(game="ConnectFour-v0", opponent="model", models={"opponent": model})
    return play(env, lambda shown, rng: f"[col {mine.pop(0)}]", task=seat)


def test_a_model_may_play_the_other_side() -> None:
    model = Columns(*["[col 1]"] * 3)
    steps = against(model, seat=0, columns=[0, 0, 0, 0])  # the agent is first, and has four in a column first
    assert (steps[-1][1], steps[-1][4]["components"]["own_score"]) == (1.0, 1.0)
    assert "Player 1 dropped their disk (O) into column 1" in steps[1][0][-1].text
    assert model.seen[0][0].startswith("You are Player 1 in Connect Four")
    second = Columns(*["[col 1]"] * 4)
    steps = against(second, seat=1, columns=[0, 0, 0])
    assert "Player 0 dropped their disk (X) into column 1" in steps[0][0][-1].text
    assert (steps[-1][1], steps[-1][4]["components"]["own_score"]) == (0.0, -1.0)


def test_a_game_that_the_other_side_gives_away_is_not_won() -> None:
    steps = against(Columns("[col 9]", "hello"), seat=0, columns=[0])
    assert steps[-1][4]["components"] == {"own_score": 1.0, "invalid_move/own": 0.0, "invalid_move/other": 1.0}
    assert (steps[-1][1], steps[-1][2]) == (0.0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"game": "Wordle-v0"}, "does not play TextArena's 'Wordle': it needs word lists of nltk"),
        ({"game": "Chess-v0"}, "no script here plays the other side"),
        ({"game": "Sudoku"}, "knows no game 'Sudoku'; there are 2048-v0"),
        ({"game": "Nothing-v0"}, "knows no game 'Nothing-v0'"),
        ({"opponent": "model"}, "Mastermind-v0 has one player"),
        ({"game": "Nim-v0", "opponent": "model"}, "needs a model of that name"),
        ({"game": "Nim-v0", "opponent": "me"}, "there are 'script' and 'model'"),
    ],
)
def test_what_cannot_be_played_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TextArena(**arguments)


def test_a_task_of_another_game_is_refused() -> None:
    sudoku = TextArena.tasks("train", game="Sudoku-v0")[0]
    said = "task 'train-0' belongs to 'Sudoku-v0', and this environment plays 'Sudoku-v0-easy'"
    with pytest.raises(TaskError, match=said):
        TextArena(game="Sudoku-v0-easy").reset(options={"task": sudoku})


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.utils.packages.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'areal-agents\[textarena\]'"):
        registry.spec("areal/TextArena-v0").tasks("train")
