"""The game's own tests: the game itself, an expert's episode through areal-agents, and the splits."""

from __future__ import annotations

import my_gym  # noqa: F401  registers the environment
from gymnasium.utils.env_checker import check_env
from my_gym.env import Guess
from my_gym.game import GUESSES, GuessGame

import areal_agents

ID = "my_gym/Guess-v0"


def test_the_game() -> None:
    check_env(GuessGame(), skip_render_check=True)
    game = GuessGame()
    shown, _ = game.reset(seed=3)
    assert shown.startswith("Find my number, from 1 to 100.")
    hidden = game.hidden
    assert game.step(str(hidden - 1)) == (f"{hidden - 1} is too low. 7 guesses left.", 0.0, False, False, {})
    assert game.step("it") == ("That is no number. 6 guesses left.", 0.0, False, False, {})
    assert game.step(f" {hidden} ") == ("Found.", 1.0, True, False, {})
    game.reset(seed=3)
    assert game.hidden == hidden
    assert [game.step("0")[2] for _ in range(GUESSES)] == [False] * 7 + [True]


def test_an_expert_wins() -> None:
    env = areal_agents.make(ID)
    try:
        for task in Guess.tasks("test")[:3]:
            shown, _ = env.reset(seed=0, options={"task": task})
            expert = Guess.expert(task)
            said, total, over = next(expert), 0.0, False
            while not over:
                shown, reward, terminated, truncated, _ = env.step(said)
                total, over = total + float(reward), terminated or truncated
                said = said if over else expert.send(shown)
            assert total == 1.0
    finally:
        env.close()


def test_training_and_test_share_no_seed() -> None:
    seeds = {split: {task.seed for task in Guess.tasks(split)} for split in ("train", "test")}
    assert (len(seeds["train"]), len(seeds["test"])) == (1000, 100)
    assert not seeds["train"] & seeds["test"]
