"""The adapter to text environments of other packages: what they say is passed on, and what they do is their own."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import gymnasium
import pytest

from areal_agents import registry
from areal_agents.chat.toolcalls import parse_text
from areal_agents.context import Fold
from areal_agents.env import AgentEnv
from areal_agents.envs.gymnasium_text import GymnasiumText
from areal_agents.errors import ConfigError, EnvError, TaskError
from areal_agents.rollout.env_faults import located
from areal_agents.rollout.player import require_prompts
from areal_agents.types import Task, system, user
from tests.processes import wait_gone
from tests.scripted import FMT, LIMITS

GAMES = "tests.text_games"


def play(env: AgentEnv, *texts: str, task: int | Task = 0) -> list[tuple[Any, ...]]:
    async def main() -> list[tuple[Any, ...]]:
        chosen = task if isinstance(task, Task) else env.training_tasks()[task]
        try:
            steps: list[tuple[Any, ...]] = [await env.areset(options={"task": chosen})]
            return steps + [await env.astep(parse_text(text)) for text in texts]
        finally:
            await env.aclose()
            await env.aclose()

    return asyncio.run(main())


def dice(**more: Any) -> GymnasiumText:
    return GymnasiumText(env=f"{GAMES}:Dice", **more)


def test_flags_rewards_and_the_last_observation_are_passed_on() -> None:
    random.seed(0)
    thrown = random.randint(1, 6)  # what the global generator draws, seeded with the task's seed
    first, wrong, right = play(dice(system_prompt="Guess."), "0", f"<think>0?</think>{thrown}")
    assert first == ((system("Guess."), user("1 to 6?")), {})
    assert wrong == ((user(f"it was {thrown}"),), 0.0, False, False, {})
    assert right == ((user(f"it was {thrown}"),), 1.0, True, False, {"stop_reason": "answer"})
    assert play(dice(), "limit")[1] == ((user("too long"),), 0.25, False, True, {"stop_reason": "max_turns"})
    assert play(dice(), "both")[1][2:] == (True, True, {"stop_reason": "answer"})
    assert play(dice(), "print")[1][0] == (user("quiet"),)


def test_a_game_takes_a_rule_for_long_histories() -> None:
    boards = {"kind": "fold", "roles": ["user"]}
    assert dice(context=boards).context == Fold(roles=("user",))
    assert dice(context={"kind": "none"}).context is dice().context is None
    given = {"env": f"{GAMES}:Dice", "context": {**boards, "at": 0.01}}
    spec = registry.spec("areal/GymnasiumText-v0").with_kwargs(given)
    spec.require_arguments({})
    with pytest.raises(ConfigError, match=r"Fold\(at=0\.01\) .* every history would be rewritten"):
        require_prompts(spec, FMT, LIMITS)


def test_an_own_limit_truncates_what_has_not_ended() -> None:
    assert [step[2:4] for step in play(dice(max_turns=2), "0", "0")[1:]] == [(False, False), (False, True)]
    random.seed(0)
    assert play(dice(max_turns=1), str(random.randint(1, 6)))[1][2:4] == (True, False)
    with pytest.raises(ConfigError, match="max_turns = 0 must be at least 1"):
        dice(max_turns=0)


@pytest.mark.parametrize(
    ("text", "said", "blame"),
    [
        ("done", r"step returned \('', 0.0, True, \{\}\), not \(observation, reward, terminated", "environment"),
        ("raise", "KeyError: 'lost'", "environment"),
        ("die", "its process ended with status 3", "environment"),
        ("exit", "SystemExit: enough", "environment"),
        ("killed", "its process ended with status -9", "outside"),
        ("hang up", "its process hung up", "environment"),
        ("input", "EOFError", "environment"),
        ("hang", "did not answer within 1 s and was ended", "hang"),
    ],
)
def test_a_failure_ends_its_episode_alone_and_says_why(text: str, said: str, blame: str) -> None:
    env = dice(step_timeout=1.0 if text == "hang" else 60.0)
    with pytest.raises(EnvError, match=said) as raised:
        play(env, text)
    assert raised.value.blame == blame
    located(raised.value, "astep", "t")  # as a run asks once more
    assert raised.value.blame == blame
    with pytest.raises(EnvError, match="no episode is running"):
        asyncio.run(env.astep(parse_text("0")))
    assert play(env, "print")[1][0] == (user("quiet"),)  # it begins again


def test_what_an_environment_starts_ends_with_its_episode() -> None:
    started = int(play(dice(), "spawn")[1][0][0].text)
    assert wait_gone([started], 60) == []


def test_what_it_starts_reads_nothing() -> None:
    """Least of all the messages of the process that forks the episodes."""
    assert play(dice(step_timeout=60.0), "cat")[1][0] == (user(""),)


def test_what_is_drawn_where_a_game_is_made_goes_by_the_seed_too() -> None:
    for seed in range(3):
        random.seed(seed)
        colour = random.choice(["red", "green", "blue", "black", "white"])
        assert play(dice(), "colour", task=seed)[1][0] == (user(colour),)


def test_texts_hash_alike_in_every_episode_and_the_host_draws_what_it_would() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    assert play(dice(), "hash")[1] == play(dice(), "hash")[1]
    assert random.random() == expected


def test_functions_and_gymnasium_ids_are_named_too() -> None:
    made = GymnasiumText(env=f"{GAMES}:make_dice", env_kwargs={"sides": 2})
    assert play(made)[0][0] == (user("1 to 2?"),)
    number = str(gymnasium.utils.seeding.np_random(3)[0].integers(1000))
    # As gymnasium.make has it, an id may name the module that registers it.
    for env in (f"{GAMES}:Registered", f"{GAMES}:tests/Registered-v0"):
        assert play(GymnasiumText(env=env), task=3)[0][0] == (user(number),)
    with pytest.raises(EnvError, match="NamespaceNotFound"):
        play(GymnasiumText(env="nobody/Registered-v0"))
    with pytest.raises(EnvError, match="has no attribute 'Nothing'"):
        play(GymnasiumText(env=f"{GAMES}:Nothing"))


def test_tasks_are_seeds_that_no_two_splits_share() -> None:
    source = {"env": f"{GAMES}:Dice", "env_kwargs": {"sides": 2}}
    train, test = (registry.spec("areal/GymnasiumText-v0").with_kwargs(source).tasks(s) for s in ("train", "test"))
    assert (len(train), len(test)) == (4096, 512)
    assert train[1].payload == {**source, "seed": 1}
    assert test[0].payload["seed"] == 1 << 30
    with pytest.raises(ConfigError, match="has no split 'dev'"):
        GymnasiumText.tasks("dev")
    with pytest.raises(ConfigError, match="are no JSON"):
        GymnasiumText(env_kwargs={"x": object()})


def test_a_task_of_another_game_or_of_other_arguments_is_refused() -> None:
    two = GymnasiumText.tasks("train", env=f"{GAMES}:make_dice", env_kwargs={"sides": 2})[0]
    with pytest.raises(TaskError, match=r"task 'train-0' belongs to '.*:make_dice' with .*'sides': 2.* plays '.*Dice'"):
        play(dice(), task=two)
    with pytest.raises(TaskError, match=r"'sides': 2}, and this environment plays '.*:make_dice' with {'sides': 3}"):
        play(GymnasiumText(env=f"{GAMES}:make_dice", env_kwargs={"sides": 3}), task=two)
    assert play(GymnasiumText(env=f"{GAMES}:make_dice", env_kwargs={"sides": 2}), task=two)[0][0] == (user("1 to 2?"),)
    unnamed = Task.make("mine", split="train", seed=0, payload={"seed": 0})
    assert play(dice(), task=unnamed)[0][0]  # one that names no game is of no other


def test_the_gold_of_the_sample_is_right_and_of_others_nobody_knows_one() -> None:
    task = GymnasiumText.tasks("test")[0]
    gold = GymnasiumText.gold(task)
    assert gold is not None
    assert play(GymnasiumText(), gold, task=task)[1][1:3] == (1.0, True)
    assert GymnasiumText.gold(GymnasiumText.tasks("test", env=f"{GAMES}:Dice")[0]) is None
