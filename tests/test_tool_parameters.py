"""Parameters that a tool cannot have: what is said of them, by tool and name."""

from __future__ import annotations

import enum
from typing import Any, Literal

import pytest

from areal_agents.sandbox import Sandbox
from areal_agents.tool import ToolSpec, tool
from areal_agents.toolenv import ToolEnv


class Way(enum.Enum):
    NORTH = "north"
    SOUTH = "south"


class Engine:
    """What no JSON value can be."""


def refusals() -> list[tuple[Any, str]]:
    async def state_of(state: dict[str, int]) -> str: ...  # type: ignore[empty-body]

    async def env_of(x: int, env: ToolEnv) -> str: ...  # type: ignore[empty-body]

    async def box_of(box: Sandbox) -> str: ...  # type: ignore[empty-body]

    async def untyped(state) -> str: ...  # type: ignore[no-untyped-def,empty-body]

    async def scalar(*, state: str) -> str: ...  # type: ignore[empty-body]

    async def unknown(x: int, engine: Engine) -> str: ...  # type: ignore[empty-body]

    async def unseen(x: int, *, cave: Nowhere) -> str: ...  # type: ignore[name-defined,empty-body]  # noqa: F821

    async def this(this, x: int) -> str: ...  # type: ignore[no-untyped-def,empty-body]

    async def of_class(cls, x: int) -> str: ...  # type: ignore[no-untyped-def,empty-body]

    keyword = "is what the environment passes, so it must be keyword-only: write `*, "
    return [
        (state_of, f"tool 'state_of': parameter 'state' {keyword}state`"),
        (env_of, f"tool 'env_of': parameter 'env' {keyword}env`"),
        (box_of, f"tool 'box_of': parameter 'box' {keyword}box`"),
        (untyped, f"tool 'untyped': parameter 'state' {keyword}state`"),
        (scalar, "tool 'scalar': parameter 'state' is keyword-only, so the environment would pass its state"),
        (unknown, "tool 'unknown': parameter 'engine' is a Engine, which no JSON value of a model can be"),
        (unseen, "tool 'unseen': parameter 'cave' has the type hint 'Nowhere', which names nothing"),
        (this, "tool 'this': parameter 'this' needs a type hint"),
        (of_class, "tool 'of_class': a tool acts on an episode: write `self`, and leave @classmethod out"),
        (classmethod(this), "tool 'this' is a classmethod: leave that decorator out"),
        (staticmethod(this), "tool 'this' is a staticmethod: leave that decorator out"),
    ]


@pytest.mark.parametrize(("function", "says"), refusals(), ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_be_injected_names_tool_and_parameter(function: Any, says: str) -> None:
    with pytest.raises(TypeError) as refused:
        tool()(function)
    assert says in str(refused.value)


def test_names_that_a_model_gives_by_nature_are_its_own() -> None:
    @tool()
    async def vote(state: str, models: list[str], env: Literal["a", "b"] | None = None) -> str:
        return state

    assert isinstance(vote, ToolSpec)
    assert (vote.injected, list(vote.parameters["properties"])) == ({}, ["state", "models", "env"])


def test_acting_in_the_sandbox_is_not_parallel() -> None:
    async def both(*, state: object, sandbox: Sandbox) -> str: ...  # type: ignore[empty-body]

    with pytest.raises(TypeError, match="tool 'both' acts on the episode and in its sandbox, so it cannot be parallel"):
        tool(parallel=True)(both)


def test_the_model_is_told_the_choices_and_the_items() -> None:
    @tool
    async def walk(
        way: Way, far: Literal["a", 2] | None = None, by: list[Way] | None = None, rest: dict[str, int] | None = None
    ) -> str:
        return str(way)

    @tool
    async def dial(digits: list[list[int]], code: Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]) -> str:
        return str(digits)

    way = '"north" | "south"'
    assert walk.signature() == (
        f'walk(way: {way}, far?: "a" | 2 | null, by?: array of ({way}) | null, rest?: object | null)'
    )
    assert dial.signature() == (
        "dial(digits: array of array of integer, code: 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 | 10 | 11 | …)"
    )


def test_the_decorator_needs_no_parentheses() -> None:
    @tool
    async def look() -> str:
        """Look."""
        return "a room"

    assert isinstance(look, ToolSpec)
    assert (look.name, look.description, look.timeout) == ("look", "Look.", 5.0)
    with pytest.raises(TypeError, match=r"tool\('see'\): write @tool\(name=…, timeout=…\)"):
        tool("see")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="tool 'look' is a staticmethod: leave that decorator out"):
        tool(staticmethod(look.function))  # type: ignore[arg-type]
