"""Tools that act on the episode: methods, ``env`` and ``state``, rewards of turns, and the end of a game."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from areal_agents.chat.toolcalls import parse_text
from areal_agents.env import AgentEnv
from areal_agents.errors import EnvError, RewardError
from areal_agents.evaluation.rescore import with_verdict
from areal_agents.reward import Episode, Verdict
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.rebuilt import NotSaved, rebuilt
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.tool import ToolError, ToolSpec, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task, Trajectory

TASK = Task.make("t", split="train", seed=0, payload={"doors": ["hall", "cellar"], "coins": 3})


@dataclass
class World:
    doors: list[str]
    coins: int
    log: list[str] = field(default_factory=list)
    won: bool = False


@tool()
async def look(far: bool = False, *, state: World) -> str:
    """Look around."""
    return f"{state.coins} coins, {'far' if far else 'near'}"


@tool()
async def rest(hours: int, *, env: Cave) -> str:
    """Rest."""
    env.state.log.append(f"rest {hours}")
    return f"rested on {env.task.id}"


def won(episode: Episode) -> float:
    return float(episode.state.won)


class Cave(ToolEnv):
    """Take coins, then leave."""

    system_prompt = "Play."
    tools: Sequence[ToolSpec] = (look, rest)
    max_turns = 4
    rubric = won

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [TASK]

    def prompt(self, task: Task) -> str:
        return f"{self.state.coins} coins lie here."

    def new_state(self, task: Task) -> World:
        return World(task.payload["doors"], task.payload["coins"])

    @tool()
    async def take(self, count: int, colour: Literal["gold", "brass"] = "gold") -> str:
        """Take coins.

        Args:
            count: how many
        """
        if count > self.state.coins:
            raise ToolError(f"there are only {self.state.coins}")
        self.state.coins -= count
        self.state.log.append(f"take {count} {colour}")
        self.reward_turn(0.1 * count, "coins")
        return f"{self.state.coins} left"

    @tool()
    async def leave(self, door: str) -> str:
        """Leave by a door."""
        self.state.doors.remove(door)
        self.state.won = self.state.coins == 0
        self.end_episode()
        return "You are out."


def call(name: str, /, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(env: ToolEnv, *texts: str) -> list[tuple[Any, ...]]:
    async def main() -> list[tuple[Any, ...]]:
        try:
            steps: list[tuple[Any, ...]] = [await env.areset(seed=0, options={"task": TASK})]
            return steps + [await env.astep(parse_text(text, tools=env.tools)) for text in texts]
        finally:
            await env.aclose()

    return asyncio.run(main())


def test_methods_are_tools_and_what_is_injected_is_in_no_schema() -> None:
    assert [t.name for t in Cave.tools] == ["look", "rest", "take", "leave"]
    assert Cave.take.parameters == {
        "type": "object",
        "properties": {
            "count": {"type": "integer", "description": "how many"},
            "colour": {"enum": ["gold", "brass"], "type": "string", "default": "gold"},
        },
        "required": ["count"],
    }
    assert look.signature() == "look(far?: boolean)"
    assert Cave.take.injected == {"self": "env"}
    assert (look.injected, rest.injected) == ({"state": "state"}, {"env": "env"})


def test_a_game_is_played_and_won() -> None:
    env = Cave(sandbox=None)
    first, one, two = play(
        env, call("take", count=2) + call("look") + call("rest", hours=1),
        call("take", count=1) + call("leave", door="hall") + call("take", count=0),
    )  # fmt: skip
    assert first[0][-1].text == "3 coins lie here."
    observation, reward, terminated, truncated, info = one
    assert [m.text for m in observation] == ["1 left", "1 coins, near", "rested on t"]
    assert (reward, terminated, truncated) == (pytest.approx(0.2), False, False)
    assert info["components"] == {"turn_reward": pytest.approx(0.2), "turn_reward.coins": pytest.approx(0.2)}
    observation, reward, terminated, truncated, info = two
    assert [m.text for m in observation] == [
        "0 left", "You are out.", "error: the episode had ended, so this call was not run",
    ]  # fmt: skip
    assert (reward, terminated, truncated, info["stop_reason"]) == (pytest.approx(1.1), True, False, "answer")
    assert info["components"] == {
        "won": 1.0, "turn_reward": pytest.approx(0.1), "turn_reward.coins": pytest.approx(0.1),
    }  # fmt: skip
    assert env.state.log == ["take 2 gold", "rest 1", "take 1 gold"]
    with pytest.raises(EnvError, match="no episode is running"):
        asyncio.run(env.astep(parse_text("more")))


def test_each_episode_has_a_state_of_its_own() -> None:
    one, two = Cave(sandbox=None), Cave(sandbox=None)
    play(one, call("leave", door="hall"))
    assert (one.state.doors, TASK.payload["doors"]) == (["cellar"], ["hall", "cellar"])
    play(one, call("take", count=3))
    assert (one.state.doors, one.state.coins) == (["hall", "cellar"], 0)
    play(two, call("look"))
    assert two.state.coins == 3


def test_a_tool_error_and_a_bad_call_change_nothing() -> None:
    env = Cave(sandbox=None)
    [_, (observation, reward, *_)] = play(
        env, call("take", count=9) + call("take", count="x") + call("take", count=1, self="me")
    )
    assert [m.text for m in observation] == [
        "there are only 3",
        "error: invalid arguments for 'take': 'count': Input should be a valid integer, unable to parse string as an "
        'integer. Expected: take(count: integer, colour?: "gold" | "brass")',
        "error: invalid arguments for 'take': 'self' is not a parameter. Expected: "
        'take(count: integer, colour?: "gold" | "brass")',
    ]
    assert (reward, env.state.coins) == (0.0, 3)


def test_the_limit_and_the_runner_end_a_game_with_what_was_paid() -> None:
    takes = [call("take", count=1), call("look"), call("look"), call("take", count=1)]
    *_, (_, reward, terminated, truncated, info) = play(Cave(sandbox=None), *takes)
    assert (reward, terminated, truncated, info["stop_reason"]) == (pytest.approx(0.1), False, True, "max_turns")

    async def stopped() -> EpisodeDriver:
        host = EnvHost()
        script = ScriptPolicy(lambda first: (text for text in takes), TASK)  # type: ignore[arg-type,return-value]
        episode = EpisodeDriver(lambda: Cave(sandbox=None), TASK, script, host, "e", 0, 60.0, max_turns=1)
        try:
            await episode.play()
        finally:
            await host.close()
        return episode

    turns = asyncio.run(stopped()).turns
    assert [t.reward for t in turns] == [pytest.approx(0.1)]  # not paid twice


def test_what_tools_pay_comes_to_a_rubrics_own_turn_rewards() -> None:
    def split(episode: Episode) -> Verdict:
        return Verdict(0.75, {"half": 0.5}, (0.25,) * (episode.turns - 1) + (0.5,))

    other = type("Other", (Cave,), {"rubric": split})
    *_, (_, reward, terminated, _, info) = play(other(sandbox=None), call("take", count=1), "I stop.")
    assert terminated
    assert info["turn_rewards"] == [pytest.approx(0.35), 0.5]
    assert reward == 0.5


@pytest.mark.parametrize("amount", [float("nan"), "much", None, float("inf")])
def test_a_turn_reward_is_a_finite_number(amount: Any) -> None:
    class Wrong(Cave):
        @tool()
        async def pay(self) -> None:
            self.reward_turn(amount)

    with pytest.raises(RewardError, match=r"task 't': reward_turn got .*, which is not (a number|finite)"):
        play(Wrong(sandbox=None), call("pay"))


def test_rewards_and_ends_belong_to_a_turn() -> None:
    env = Cave(sandbox=None)
    play(env, call("look"))
    with pytest.raises(EnvError, match="reward_turn: no turn is being taken; call it in a tool"):
        env.reward_turn(1.0)
    with pytest.raises(EnvError, match="end_episode: no turn is being taken"):
        env.end_episode()

    def clash(episode: Episode) -> Verdict:
        return Verdict(0.0, {"turn_reward": 1.0})

    with pytest.raises(RewardError, match="the component 'turn_reward' of the rubric is what tools pay"):
        play(type("Clash", (Cave,), {"rubric": clash})(sandbox=None), call("take", count=1), "done")


def test_a_state_that_cannot_be_copied_is_refused() -> None:
    bad = type("Bad", (Cave,), {"new_state": lambda self, task: (x for x in "ab")})
    with pytest.raises(EnvError, match=r"Bad.new_state: TypeError: cannot pickle 'generator' object \(the state is"):
        play(bad(sandbox=None))


def test_subclasses_inherit_replace_and_drop_methods() -> None:
    class Dark(Cave):
        tools = (look,)
        leave = None

        @tool()
        async def take(self, count: int) -> str:
            """Take coins in the dark."""
            return f"dark: {await super().take(count)}"

    assert [(t.name, t.description) for t in Dark.tools] == [
        ("look", "Look around."), ("take", "Take coins in the dark."),
    ]  # fmt: skip
    [_, (observation, reward, *_)] = play(Dark(sandbox=None), call("take", count=1))
    assert (observation[0].text, reward) == ("dark: 2 left", pytest.approx(0.1))

    class Plain(Dark): ...

    class Listed(Cave):
        tools = (Cave.leave, look)

    assert [t.name for t in Plain.tools] == ["look", "take"]
    assert [t.name for t in Listed.tools] == ["leave", "look", "take"]
    with pytest.raises(TypeError, match=r"Hidden.take hides a tool: put @tool\(\) on it, or set it to None"):
        type("Hidden", (Cave,), {"take": lambda self: ""})


@pytest.mark.parametrize("name", ["close", "step", "reset", "state", "task", "prompt", "answer", "np_random", "astep"])
def test_a_tool_does_not_hide_what_an_episode_needs(name: str) -> None:
    async def verb(self: Any) -> str:
        """Act."""
        return "done"

    says = rf"\w+\.{name} hides \w+\.{name}, which an episode needs: .* its own by @tool\(name='{name}'\)"
    verb.__name__, verb.__annotations__ = name, {}
    for bases in ((Cave,), (AgentEnv,)) if name not in ("prompt", "answer") else ((Cave,),):
        with pytest.raises(TypeError, match=says):
            type("Hides", bases, {name: tool(verb)})
    with pytest.raises(TypeError, match=says):
        type("Mixed", (type("Mixin", (), {name: tool(verb)}), Cave), {})
    named = type("Named", (Cave,), {f"{name}_verb": tool(name=name)(verb)})
    [_, (observation, *_)] = play(named(sandbox=None), call(name))
    assert observation[0].text == "done"


def test_a_tool_that_would_not_be_found_is_refused() -> None:
    async def free() -> str:
        return ""

    @functools.wraps(free)
    async def logged() -> object:
        return await tool(free)()

    logged.__wrapped__ = tool(free)  # type: ignore[assignment]  # as functools.wraps(spec) leaves it
    for value, what in (
        (staticmethod(tool(free)), "staticmethod"), (classmethod(tool(free)), "classmethod"),
        (property(tool(free)), "property"), (logged, "a decorator"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=f"Above.free: {what} stands above @tool: leave it out, or put it below"):
            type("Above", (Cave,), {"free": value})
    with pytest.raises(TypeError, match=r"Less\.look = None takes a method away, but 'look' is listed: set `tools`"):
        type("Less", (Cave,), {"look": None})


def test_a_mixin_brings_tools() -> None:
    class Counter:
        @tool()
        async def count(self, *, state: World) -> int:
            return state.coins

    class Mixed(Counter, Cave):
        pass

    assert [t.name for t in Mixed.tools] == ["look", "rest", "take", "leave", "count"]
    [_, (observation, *_)] = play(Mixed(sandbox=None), call("count"))
    assert observation[0].text == "3"


def test_methods_pickle_by_reference() -> None:
    assert pickle.loads(pickle.dumps(Cave.tools)) == Cave.tools
    assert pickle.loads(pickle.dumps(Cave.take)) is Cave.take


def test_calls_on_a_state_are_in_order_unless_declared() -> None:
    class Slow(Cave):
        @tool()
        async def walk(self, name: str) -> str:
            self.state.log.append(f"in {name}")
            await asyncio.sleep(0)
            self.state.log.append(f"out {name}")
            return name

        @tool(parallel=True)
        async def glance(self, name: str) -> str:
            self.state.log.append(f"in {name}")
            await asyncio.sleep(0)
            self.state.log.append(f"out {name}")
            return name

    env = Slow(sandbox=None)
    play(env, call("walk", name="a") + call("walk", name="b"))
    assert env.state.log == ["in a", "out a", "in b", "out b"]
    play(env, call("glance", name="a") + call("glance", name="b"))
    assert env.state.log == ["in a", "in b", "out a", "out b"]


def test_the_system_prompt_is_a_setting() -> None:
    [(shown, _)] = play(Cave(sandbox=None, system_prompt="Play well."))
    assert shown[0].text == "Play well."
    [(shown, _)] = play(Cave(sandbox=None, system_prompt=""))
    assert [m.role for m in shown] == ["user"]
    with pytest.raises(EnvError, match=r"Cave\.system_prompt returned 3, which is not a text"):
        Cave(sandbox=None, system_prompt=3)  # type: ignore[arg-type]


# --- saved episodes ------------------------------------------------------------------------------------


def trajectory(*texts: str) -> Trajectory:
    async def main() -> Trajectory:
        host = EnvHost()
        script = ScriptPolicy(lambda first: (text for text in texts), TASK)  # type: ignore[arg-type,return-value]
        episode = EpisodeDriver(lambda: Cave(sandbox=None), TASK, script, host, "e", 0, 60.0)
        try:
            await episode.play()
        finally:
            await host.close()
        return episode.trajectory("g")

    return asyncio.run(main())


def test_a_saved_game_is_rescored_with_what_its_tools_paid() -> None:
    saved = trajectory(call("take", count=2), call("take", count=1) + call("leave", door="hall"))
    assert [turn.reward for turn in saved.turns] == [pytest.approx(0.2), pytest.approx(1.1)]
    again = with_verdict(saved, Verdict(1.0, {"won": 1.0}))
    assert again.turns == saved.turns
    assert with_verdict(saved, Verdict(0.0, {})).reward == pytest.approx(0.3)
    episode = rebuilt(saved, lambda _: "the text of a message")
    assert (episode.answer, episode.stop_reason) == (None, "answer")  # a tool ended it
    with pytest.raises(RewardError, match="an episode that is rebuilt has no `state`: let tools pay as they act"):
        won(episode)
    for look_at in (bool, len, list, lambda state: state["won"], lambda state: state == 1):
        with pytest.raises(RewardError, match="no `state`"):
            look_at(episode.state)
    copied = pickle.loads(pickle.dumps(episode))
    assert type(copied.state) is type(copy.deepcopy(episode.state)) is NotSaved
