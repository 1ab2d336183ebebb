"""``areal/Booking-v0``: book a table for a user who says what they want only when asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Literal

from areal_agents.engine import Sampling
from areal_agents.env import Expert
from areal_agents.envs.procedural import by_level, drawn_tasks
from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, Verdict
from areal_agents.served_model import ModelLike
from areal_agents.tool import ToolError, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.ask_user import ask_user
from areal_agents.types import AssistantMessage, Message, Task, system, user

DEFAULT_DIFFICULTY = 0.5
WISHES: Final[Mapping[str, tuple[str, ...]]] = {
    "food": ("italian", "thai", "indian", "greek", "mexican"),
    "area": ("north", "south", "harbour", "centre"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"),
    "people": ("2", "3", "4", "5", "6"),
    "garden": ("yes", "no"),
}
"""What a user may care about, and the values. The first four are always among it."""
ASKED_FOR: Final[Mapping[str, str]] = {
    "food": r"food|cuisine|kitchen|\beat|dish",
    "area": r"area|where|part of town|district|location|\bplace",
    "day": r"day|when|\bdate",
    "people": r"people|persons?\b|guests|how many|party|seats",
    "garden": r"garden|outside|outdoors?|terrace",
}
"""The words of a question that the scripted user answers with a wish."""
SAID: Final[Mapping[str, str]] = {
    "food": "I would like {} food.",
    "area": "In the {}, please.",
    "day": "On {}.",
    "people": "We are {}.",
    "garden": "A table in the garden: {}.",
}
_MOST = 2
"""Wishes that the scripted user says in one answer."""
Food = Literal["italian", "thai", "indian", "greek", "mexican"]
Area = Literal["north", "south", "harbour", "centre"]
Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]


@dataclass
class Talk:
    """What the user has said, and what was booked."""

    said: list[Message | AssistantMessage] = field(default_factory=list)
    """The talk as the model that plays the user sees it: its own words are the assistant's."""
    questions: int = 0
    booked: dict[str, Any] | None = None


def booked_right(episode: Episode) -> Verdict:
    """Pay 1 for the table that the user wanted."""
    talk, wanted = episode.state, episode.task.payload["booking"]
    correct = float(talk.booked == wanted)
    same = sum(talk.booked[k] == v for k, v in wanted.items()) / len(wanted) if talk.booked else 0.0
    return Verdict(correct, {"correct": correct, "fields": same, "questions": float(talk.questions)})


class Booking(ToolEnv):
    """Find out what a user wants, find the restaurant that has it, and book.

    An agent must learn to ask before it acts, to ask for everything that a booking needs, and to keep the answers. The
    reward is 1 for the right restaurant, day and number of people. The scripted user understands the words of a
    question and says at most two wishes in one answer. With ``user = "model"`` the model ``models["user"]`` plays the
    user, who knows the same. ``difficulty``: the user says all but one wish at the start at 0, two of four at 0.5 (the
    default), none of five at 1.
    """

    system_prompt = (
        "You book tables for users. Ask for what you need: food, area, day, number of people, wishes. Then book."
    )
    tools = (ask_user,)
    rubric = booked_right
    max_turns = 12
    chance = by_level(0.36, 0.13, 0.0)
    state: Talk

    def __init__(
        self, *, user: Literal["script", "model"] = "script", models: Mapping[str, ModelLike] | None = None, **more: Any
    ) -> None:
        """Make a desk.

        Args:
            user: ``script``, or ``model`` for ``models["user"]``.
            models: by name, as ``ToolEnv`` has them.
            more: of ``ToolEnv``.

        Raises:
            ConfigError: a user that is neither, or a model that is not given.
        """
        super().__init__(models=models, **more)
        if user not in ("script", "model"):
            raise ConfigError(f"user {user!r}: there are 'script' and 'model'")
        if user == "model" and "user" not in self._models:
            raise ConfigError("user 'model' needs a model of that name: models = { user = 'openai:NAME@URL' }")
        self._user = user

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Booking-v0", split, level, lambda rng: _drawn(rng, level))

    def new_state(self, task: Task) -> Talk:
        return Talk([user(self.prompt(task))])

    def prompt(self, task: Task) -> str:
        wishes = task.payload["wishes"]
        return " ".join(["I want to book a table.", *(SAID[w].format(wishes[w]) for w in task.payload["opening"])])

    async def answer_user(self, question: str) -> str:
        """Answer as the user."""
        self.state.questions += 1
        wishes = self.task.payload["wishes"]
        if self._user == "script":
            asked = [w for w, words in ASKED_FOR.items() if re.search(words, question, re.IGNORECASE)]
            known = [SAID[w].format(wishes[w]) if w in wishes else f"The {w} does not matter." for w in asked]
            return " ".join(known[:_MOST]) or "I do not understand. What do you need to know?"
        wanted = "; ".join(f"{w}: {value}" for w, value in wishes.items())
        role = system(
            f"You are a guest who wants to book a table. Your wishes: {wanted}. Nothing else matters to you. Answer "
            "the question shortly, and say no more than it asks for."
        )
        talk = [*self.state.said, user(question)]
        seed = (self.task.seed + self.state.questions) % 2**31  # what every server takes
        sampling = Sampling(max_tokens=64, temperature=1.0, seed=seed)
        reply = await self._models["user"].chat([role, *talk], (), sampling)
        self.state.said = [*talk, reply]
        return reply.spoken

    @tool()
    async def find_restaurants(self, food: Food, area: Area) -> list[dict[str, str]]:
        """Find restaurants."""
        found = [r for r in self.task.payload["restaurants"] if (r["food"], r["area"]) == (food, area)]
        return [{"name": r["name"], "garden": r["garden"]} for r in found]

    @tool()
    async def book(self, restaurant: str, day: Day, people: int) -> str:
        """Book a table, which ends the task."""
        if restaurant not in {r["name"] for r in self.task.payload["restaurants"]}:
            raise ToolError(f"there is no restaurant {restaurant!r}")
        self.state.booked = {"restaurant": restaurant, "day": day, "people": people}
        self.end_episode()
        return "booked"

    @classmethod
    def expert(cls, task: Task) -> Expert:
        wishes, opening = task.payload["wishes"], task.payload["opening"]
        questions = {
            "food": "What food would you like?", "area": "In which area?", "day": "On which day?",
            "people": "For how many people?", "garden": "Do you want to sit in the garden?",
        }  # fmt: skip
        for wish, question in questions.items():
            if wish in wishes and wish not in opening:
                yield call_text("ask_user", question=question)
        yield call_text("find_restaurants", food=wishes["food"], area=wishes["area"])
        booking = task.payload["booking"]
        yield call_text("book", restaurant=booking["restaurant"], day=booking["day"], people=booking["people"])


_NAMES: Final = (
    "Alba",
    "Birch",
    "Cedar",
    "Delta",
    "Ember",
    "Fable",
    "Grove",
    "Heron",
    "Iris",
    "Juniper",
    "Kestrel",
    "Lark",
)


def _drawn(rng: Random, difficulty: float) -> dict[str, Any]:
    """Draw a user, and restaurants of which one alone has all that the user wants."""
    cares = [w for w in WISHES if w != "garden" or difficulty > 0.75]
    wishes = {w: rng.choice(WISHES[w]) for w in cares}
    opening = rng.sample(cares, max(0, round((1 - difficulty) * (len(cares) - 1))) if difficulty else len(cares) - 1)
    first = {
        "food": wishes["food"],
        "area": wishes["area"],
        "garden": wishes.get("garden", rng.choice(WISHES["garden"])),
    }
    restaurants = [first]
    while len(restaurants) < 8:
        other = {w: rng.choice(WISHES[w]) for w in ("food", "area", "garden")}
        if any(other[w] != wishes[w] for w in ("food", "area", "garden") if w in wishes):
            restaurants.append(other)
    names = rng.sample(_NAMES, len(restaurants))
    listed = [{"name": name} | r for name, r in zip(names, restaurants, strict=True)]
    booking = {"restaurant": names[0], "day": wishes["day"], "people": int(wishes["people"])}
    rng.shuffle(listed)
    return {"wishes": wishes, "opening": sorted(opening), "restaurants": listed, "booking": booking}
