from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest

from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import AgentEnv
from areal_agents.errors import EnvError
from areal_agents.process_env import TextProcessEnv
from areal_agents.rollout.env_faults import located
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver, Policy, Said
from areal_agents.spaces import TextSpace
from areal_agents.types import Finish, StopReason, Trajectory, system, user
from tests.processes import wait_gone


class Guess(gymnasium.Env[Any, Any]):
    """A synchronous game: guess the number; some words make it misbehave."""

    def __init__(self, top: int = 10) -> None:
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self.top = top

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.secret = int(self.np_random.integers(1, self.top + 1))
        print("noise on stdout")
        return f"1 to {self.top}", {}

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        match action:
            case "raise":
                raise KeyError("lost")
            case "hang":
                time.sleep(3600)
            case "die":
                os.write(2, b"last words")
                os._exit(7)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)  # as a machine without memory does
            case "flood":
                return "é" * (3 << 20), 0.0, False, False, {}  # six bytes each, as JSON
            case "quits":
                raise GeneratorExit
            case "nan":
                return "", float("nan"), False, False, {}
            case "list":
                return [1], 0.0, False, False, {}
            case "fork":
                return str(subprocess.Popen(["sleep", "600"]).pid), 0.0, False, False, {}
            case "late":
                return "", 0.0, False, True, {}
            case "exact":
                return "", Decimal("0.25"), False, False, {}
            case "numpy":
                return np.str_("so"), np.bool_(True), np.bool_(False), False, {}  # type: ignore[return-value]
            case "zero-d":
                return "", np.array(0.5), False, False, {}
            case "old gym":
                return "", 0.0, False, {}  # type: ignore[return-value]
            case "no info":
                return "", 0.0, False, False, None  # type: ignore[return-value]
            case "no flag":
                return "", 0.0, None, False, {}  # type: ignore[return-value]
            case "a text":
                return "", "1.0", False, False, {}
            case "axes":
                return "", np.array([1.0]), False, False, {}
            case "input":
                return input(), 0.0, False, False, {}
            case "refused":
                raise RuntimeError("cannot ask") from ConnectionRefusedError(111, "refused")
        hit = int(action) == self.secret
        over: Any = np.bool_(hit)
        return ("yes" if hit else "no"), np.float32(hit), over, False, {}


class OldGym(Guess):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return "hello"


class Game(TextProcessEnv):
    entry_point = "tests.test_process_env:Guess"
    env_kwargs: ClassVar[Mapping[str, Any]] = {"top": 3}
    system_prompt = "Guess."


def play(*texts: str, env: AgentEnv | None = None) -> list[tuple[Any, ...]]:
    async def main() -> list[tuple[Any, ...]]:
        game = env or Game(step_timeout=120)
        try:
            steps: list[tuple[Any, ...]] = [await game.areset(options={"task": Game.tasks("train")[0]})]
            return steps + [await game.astep(parse_text(text)) for text in texts]
        finally:
            await game.aclose()
            await game.aclose()

    return asyncio.run(main())


def test_an_episode() -> None:
    secret = int(np.random.default_rng(0).integers(1, 4))  # what reset(seed=0) draws
    wrong = secret % 3 + 1
    first, missed, hit = play(f"{wrong}", f"<think>{wrong}?</think>{secret}")
    assert first == ((system("Guess."), user("1 to 3")), {})
    assert missed == ((user("no"),), 0.0, False, False, {})
    assert hit == ((user("yes"),), 1.0, True, False, {"stop_reason": "answer"})
    assert play("late")[1][2:] == (False, True, {"stop_reason": "max_turns"})


@pytest.mark.parametrize(
    ("text", "finish", "in_thought", "expected"),
    [
        ("{secret}", "stop", False, (True, False, "answer", 1.0)),
        ("{secret}", "length", False, (False, True, "length", 0.0)),  # the wrapped game took it, nobody pays for it
        ("<think>2</think>{secret}", "content_filter", False, (False, True, "content_filter", 0.0)),
        ("2?</think>{secret}", "stop", True, (True, False, "answer", 1.0)),
        ("late", "length", False, (False, True, "max_turns", 0.0)),  # its own limit
    ],
)
def test_a_cut_message_is_no_answer_to_a_foreign_environment_either(
    text: str, finish: Finish, in_thought: bool, expected: tuple[bool, bool, StopReason, float]
) -> None:
    said = text.format(secret=int(np.random.default_rng(0).integers(1, 4)))

    class Says(Policy):
        async def say(self, episode: EpisodeDriver) -> Said:
            return Said.as_text(replace(parse_text(said, finish), in_thought=in_thought), 0)

    async def main() -> Trajectory:
        host = EnvHost()
        try:
            task = Game.tasks("train")[0]
            episode = EpisodeDriver(lambda: Game(step_timeout=120), task, Says(), host, "e", 0, 120.0)
            await episode.play()
            return episode.trajectory("g")
        finally:
            await host.close()

    t = asyncio.run(main())
    assert (t.terminated, t.truncated, t.stop_reason, t.reward) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", "Guess failed: KeyError: 'lost'"),
        ("seven", r"Guess failed: ValueError"),
        ("die", r"Guess ended with status 7.*last words"),
        (
            "flood",
            r"failed: ValueError: its reply has 18\.0 MiB as JSON, and at most 16 MiB are read "
            r"\(observation 'é+…*.*: return a shorter observation",
        ),
        ("quits", r"Guess ended with status 1.*GeneratorExit"),
        ("input", "Guess failed: EOFError"),  # and does not wait for the next request
        ("nan", "reward nan, which is not finite"),
        ("list", r"the observation \[1\], which is not a text"),
        ("old gym", r"step returned \('', 0.0, False, {}\), not \(observation, reward, terminated, truncated, info\)"),
        ("no info", "step returned info None, which is not a dict"),
        ("no flag", "step returned terminated = None, which is not a bool"),
        ("a text", "the reward '1.0', which is not a number"),
        ("axes", "the reward array.*, which is not a number"),
    ],
)
def test_what_the_environment_does_wrong_is_an_env_error(text: str, message: str) -> None:
    with pytest.raises(EnvError, match=f"(?s){message}") as caught:
        play(text)
    assert caught.value.blame == "environment"
    located(caught.value, "astep", "t")  # as a run asks once more
    assert caught.value.blame == "environment"


def test_numbers_of_every_kind_arrive_as_floats() -> None:
    _, exact, numpy, zero_d = play("exact", "numpy", "zero-d")
    assert exact[1:4] == (0.25, False, False)
    assert numpy == ((user("so"),), 1.0, False, False, {})
    assert zero_d[1] == 0.5
    assert all(type(step[1]) is float for step in (exact, numpy, zero_d))


def test_a_child_that_somebody_kills_is_not_the_environments() -> None:
    with pytest.raises(EnvError, match="ended with status -9") as caught:
        play("killed")
    assert caught.value.blame == "outside"


def test_a_refused_connection_in_the_child_is_not_the_environments() -> None:
    with pytest.raises(EnvError, match="RuntimeError: cannot ask") as caught:
        play("refused")
    assert caught.value.blame == "outside"


def test_a_reset_of_the_old_gym_is_refused() -> None:
    class Old(TextProcessEnv):
        entry_point = "tests.test_process_env:OldGym"

    with pytest.raises(EnvError, match=r"reset returned 'hello', not \(observation, info\)"):
        play(env=Old(step_timeout=120))


def test_a_step_that_hangs_is_killed() -> None:
    async def main() -> None:
        game = Game()
        await game.areset(options={"task": Game.tasks("train")[0]})
        child = game._child
        assert child is not None
        game._step_timeout = 0.2
        with pytest.raises(EnvError, match=r"did not answer within 0.2 s and was killed"):
            await game.astep(parse_text("hang"))
        assert child.returncode == -9
        with pytest.raises(EnvError, match="no episode is running; call reset first"):
            await game.astep(parse_text("1"))
        game._step_timeout = 20
        await game.areset(options={"task": Game.tasks("train")[0]})  # a new child
        await game.aclose()

    asyncio.run(main())


def test_cancelling_a_step_ends_the_child() -> None:
    async def main() -> None:
        game = Game()
        await game.areset(options={"task": Game.tasks("train")[0]})
        child = game._child
        assert child is not None
        step = asyncio.create_task(game.astep(parse_text("hang")))
        await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert child.returncode == -9

    asyncio.run(main())


def test_a_dead_childs_group_is_ended_at_once_and_gets_no_signal_later(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []

    async def work() -> None:
        env = Game()
        await env.areset(seed=0)
        observation, *_ = await env.astep(parse_text("fork"))
        child, group = env._child, env._group
        assert child is not None
        assert group is not None
        os.kill(child.pid, signal.SIGKILL)
        await asyncio.wait_for(group, 60)
        assert not wait_gone([int(observation[0].text)], 60)
        monkeypatch.setattr(os, "killpg", lambda *signal: sent.append(signal))
        await env.aclose()

    asyncio.run(work())
    assert sent == []


def test_an_environment_that_cannot_be_made_says_why() -> None:
    class Missing(TextProcessEnv):
        entry_point = "no_such_module:Env"

    with pytest.raises(EnvError, match="no_such_module:Env failed: ModuleNotFoundError"):
        play(env=Missing())
    with pytest.raises(EnvError, match="TextProcessEnv has no `entry_point`"):
        TextProcessEnv()


def test_splits_share_no_seed() -> None:
    train, test = (Game.tasks(split) for split in Game.splits)
    assert (len(train), len(test)) == (4096, 512)
    assert not {t.seed for t in train} & {t.seed for t in test}
    assert train[1].payload == {"seed": 1}


def test_the_facade_works() -> None:
    env = Game()
    observation, _ = env.reset(seed=3)
    assert observation == (system("Guess."), user("1 to 3"))
    assert env.step("0")[0] == (user("no"),)
    env.close()
