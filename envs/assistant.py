"""``areal/Assistant-v0``: errands on a calendar and a phone by calls of their interfaces, graded by the end state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field

from areal_agents.env import Expert
from areal_agents.envs.procedural import drawn_tasks
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import ToolError, call_text, tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
Hour = Annotated[int, Field(ge=9, le=17)]
NAMES = ("Ana", "Ben", "Eva", "Leo", "Mia", "Tom", "Kim", "Ida", "Max", "Noa")
TITLES = (
    "budget", "design", "hiring", "launch", "legal", "planning", "pricing", "release", "review", "sales", "support",
    "testing", "training", "travel",
)  # fmt: skip
_TEXTS = ("I am late.", "Please call me.", "The draft is ready.", "We meet in room 4.", "Thank you for the notes.")


@dataclass
class Phone:
    """What the calls act on."""

    events: dict[str, dict[str, Any]]
    """Id → title, day, hour and guests."""
    contacts: dict[str, str]
    """Name → number."""
    sent: list[list[str]] = field(default_factory=list)
    """Number and text of each message."""

    def at(self, day: str, hour: int) -> str | None:
        """Return the id of the event at that time, or None."""
        return next((i for i, e in self.events.items() if (e["day"], e["hour"]) == (day, hour)), None)

    def titled(self, title: str) -> str:
        return next(i for i, e in self.events.items() if e["title"] == title)

    def free_hour(self, day: str) -> int:
        return next(hour for hour in range(9, 18) if self.at(day, hour) is None)


@dataclass(frozen=True)
class Errand:
    """One thing to do: what the user says, and the calls that do it."""

    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...]


def left(episode: Episode) -> Verdict:
    """Pay 1 for the right end, where the agent said that it is done."""
    wanted = _after(episode.task)
    same = [_facts(phone) for phone in (episode.state, wanted, phone_of(episode.task))]
    asked = same[1] ^ same[2]
    done = len(asked & (same[0] ^ same[2])) / len(asked)
    right = float(same[0] == same[1] and episode.answer is not None)
    return Verdict(right, {"correct": right, "changes": done, "others": float(len((same[0] ^ same[2]) - asked))})


class Assistant(ToolEnv):
    """Run errands: move, cancel and arrange meetings, send messages.

    An agent must learn to look up ids before it acts, to carry a result of one call into the next, and to do no more
    than it was asked. The reward is 1 where the phone is in the end exactly as the errands leave it, whatever the way.
    The share of the errands' changes that are there is a component. ``difficulty``: one errand at 0, two at 0.5 (the
    default), four at 1.
    """

    system_prompt = (
        "You run errands on the user's phone. Do all of them in their order, nothing else, then say that it is done."
    )
    rubric = left
    max_turns = 16
    state: Phone

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Assistant-v0", split, level, lambda rng: _drawn(rng, round(4**level)))

    def new_state(self, task: Task) -> Phone:
        return phone_of(task)

    def prompt(self, task: Task) -> str:
        return " ".join(task.payload["errands"])

    @tool()
    async def list_events(self, day: Day) -> list[dict[str, Any]]:
        """See the events of a day with their ids."""
        found = [{"id": i} | e for i, e in self.state.events.items() if e["day"] == day]
        return sorted(found, key=lambda e: int(e["hour"]))

    @tool()
    async def find_event(self, title: str) -> dict[str, Any]:
        """Find an event by its title."""
        found = next(({"id": i} | e for i, e in self.state.events.items() if e["title"] == title.lower()), None)
        if found is None:
            raise ToolError(f"there is no event {title!r}")
        return found

    @tool()
    async def move_event(self, id: str, day: Day, hour: Hour) -> str:
        """Move an event to a free hour."""
        event = self._event(id)
        self._require_free(day, hour)
        event |= {"day": day, "hour": hour}
        return "moved"

    @tool()
    async def cancel_event(self, id: str) -> str:
        """Cancel an event."""
        self._event(id)
        del self.state.events[id]
        return "cancelled"

    @tool()
    async def create_event(self, title: str, day: Day, hour: Hour, guests: list[str]) -> str:
        """Create an event.

        Args:
            guests: names
        """
        self._require_free(day, hour)
        if unknown := [name for name in guests if name not in self.state.contacts]:
            raise ToolError(f"there is no contact {unknown[0]!r}")
        if any(e["title"] == title.lower() for e in self.state.events.values()):
            raise ToolError(f"there is an event {title!r} already")
        new = f"e{1 + max((int(i[1:]) for i in self.state.events), default=0)}"
        event = {"title": title.lower(), "day": day, "hour": hour, "guests": sorted(set(guests))}
        self.state.events[new] = event
        return new

    @tool()
    async def invite(self, id: str, name: str) -> str:
        """Invite a contact to an event."""
        event = self._event(id)
        if name not in self.state.contacts:
            raise ToolError(f"there is no contact {name!r}")
        event["guests"] = sorted({*event["guests"], name})
        return f"guests: {', '.join(event['guests'])}"

    @tool()
    async def find_contact(self, name: str) -> str:
        """Find a contact's number."""
        if name not in self.state.contacts:
            raise ToolError(f"there is no contact {name!r}")
        return self.state.contacts[name]

    @tool()
    async def send_message(self, number: str, text: str) -> str:
        """Send a message to a number."""
        if number not in self.state.contacts.values():
            raise ToolError(f"no contact has the number {number!r}")
        self.state.sent.append([number, text])
        return "sent"

    def _event(self, id: str) -> dict[str, Any]:
        if id not in self.state.events:
            raise ToolError(f"there is no event with the id {id!r}")
        return self.state.events[id]

    def _require_free(self, day: str, hour: int) -> None:
        if (taken := self.state.at(day, hour)) is not None:
            raise ToolError(f"{day} {hour} is taken by {self.state.events[taken]['title']}")

    @classmethod
    def expert(cls, task: Task) -> Expert:
        for name, arguments in task.payload["calls"]:
            yield call_text(name, **arguments)
        yield "It is done."


def phone_of(task: Task) -> Phone:
    """Return a task's phone as it is at the start."""
    return Phone(copy.deepcopy(task.payload["events"]), dict(task.payload["contacts"]))


def _after(task: Task) -> Phone:
    phone = phone_of(task)
    for name, arguments in task.payload["calls"]:
        _act(phone, name, arguments)
    return phone


def _act(phone: Phone, name: str, arguments: dict[str, Any]) -> None:
    """Do what a call of an errand does."""
    if name == "move_event":
        phone.events[arguments["id"]] |= {"day": arguments["day"], "hour": arguments["hour"]}
    elif name == "cancel_event":
        del phone.events[arguments["id"]]
    elif name == "create_event":
        phone.events[f"e{1 + max((int(i[1:]) for i in phone.events), default=0)}"] = arguments | {}
    elif name == "invite":
        event = phone.events[arguments["id"]]
        event["guests"] = sorted({*event["guests"], arguments["name"]})
    elif name == "send_message":
        phone.sent.append([arguments["number"], arguments["text"]])
    elif name not in ("list_events", "find_event", "find_contact"):
        raise AssertionError(f"no errand calls {name}")


def _facts(phone: Phone) -> set[tuple[Any, ...]]:
    """Return what a phone says, without the ids of its events and the order of its messages."""
    events = {(e["title"], e["day"], e["hour"], tuple(e["guests"])) for e in phone.events.values()}
    numbered = [tuple(message) for message in phone.sent]
    return events | {(*message, numbered[:i].count(message)) for i, message in enumerate(numbered)}


def _move(rng: Random, phone: Phone, title: str) -> Errand:
    day = rng.choice(DAYS)
    hour = rng.choice([h for h in range(9, 18) if phone.at(day, h) is None])
    to = {"id": phone.titled(title), "day": day, "hour": hour}
    return Errand(f"Move {title} to {day} at {hour}.", (("find_event", {"title": title}), ("move_event", to)))


def _cancel(rng: Random, phone: Phone, title: str) -> Errand:
    event = phone.events[phone.titled(title)]
    text = f"Cancel what is on {event['day']} at {event['hour']}."
    return Errand(text, (("list_events", {"day": event["day"]}), ("cancel_event", {"id": phone.titled(title)})))


def _invite(rng: Random, phone: Phone, title: str) -> Errand:
    guests = phone.events[phone.titled(title)]["guests"]
    name = rng.choice([n for n in phone.contacts if n not in guests])
    call = ("invite", {"id": phone.titled(title), "name": name})
    return Errand(f"Invite {name} to {title}.", (("find_event", {"title": title}), call))


def _send(rng: Random, phone: Phone, title: str) -> Errand:
    name, text = rng.choice([*phone.contacts]), rng.choice(_TEXTS)
    call = ("send_message", {"number": phone.contacts[name], "text": text})
    return Errand(f'Send {name} this message: "{text}"', (("find_contact", {"name": name}), call))


def _create(rng: Random, phone: Phone, title: str) -> Errand:
    day, name = rng.choice(DAYS), rng.choice([*phone.contacts])
    new = rng.choice([t for t in TITLES if all(t != e["title"] for e in phone.events.values())])
    event = {"title": new, "day": day, "hour": phone.free_hour(day), "guests": [name]}
    text = f"Arrange {new} with {name} in the first free hour of {day}; hours are 9 to 17."
    return Errand(text, (("list_events", {"day": day}), ("create_event", event)))


ERRANDS: tuple[Callable[[Random, Phone, str], Errand], ...] = (_move, _cancel, _invite, _send, _create)


def _drawn(rng: Random, count: int) -> dict[str, Any]:
    """Draw a phone and errands on it, each on an event of its own, in the order in which they are said."""
    times = rng.sample([(day, hour) for day in DAYS for hour in range(9, 18)], 7)
    titles = rng.sample(TITLES, 7)
    contacts = {name: f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10000)}" for name in rng.sample(NAMES, 5)}
    events = {
        f"e{i}": {
            "title": title,
            "day": day,
            "hour": hour,
            "guests": sorted(rng.sample([*contacts], rng.randint(0, 2))),
        }
        for i, (title, (day, hour)) in enumerate(zip(titles, times, strict=True), 1)
    }
    phone, said, calls = Phone(copy.deepcopy(events), contacts), list[str](), list[list[Any]]()
    for title in rng.sample(titles, count):
        errand = rng.choice(ERRANDS)(rng, phone, title)
        said.append(errand.text)
        for name, arguments in errand.calls:
            _act(phone, name, arguments)
            calls.append([name, arguments])
    if _facts(phone) == _facts(Phone(events, contacts)):  # one errand cancelled what another arranged again
        return _drawn(rng, count)
    return {"errands": said, "events": events, "contacts": contacts, "calls": calls}
