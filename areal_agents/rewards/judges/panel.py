"""The judges of a reward: asked at once, each with a deadline, and counted where they fail.

    form, texts ─▶ cache? ─▶ budget ─▶ a free place ─▶ prompt with a fresh tag ─▶ judge ─▶ read ─▶ Poll
                                                                   │ cannot be read: asked once more
                                                                   └ late, lost, refused, unreadable: a failure

Waits for / unblocked by: ``poll`` waits for a place among ``concurrency`` requests, and is unblocked by the judges'
replies or their deadline. Cancelling it cancels its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from areal_agents.chat_model import REMOTE, reply_of
from areal_agents.engine import ChatModel, Sampling
from areal_agents.errors import ConfigError, InfraError
from areal_agents.rewards.judges.aggregate import Aggregation, aggregated, agreement, require_aggregation
from areal_agents.rewards.judges.slot import Content, draw_tag
from areal_agents.rewards.judges.spending import Budget, Spending
from areal_agents.served_model import ModelLike, ServedModel, chat_model
from areal_agents.types import user
from areal_agents.utils.short_text import cut, text_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
JudgeLike: TypeAlias = "ModelLike"
"""As ``ModelLike``, or the name of one of the models that the environment was made with."""
_SHOWN = 200


class Unreadable(Exception):
    """A judge's reply has no score where it must stand."""


class Form(Protocol[T_co]):
    """A question to judges: how it is put, and how the reply is read."""

    @property
    def key(self) -> Hashable:
        """Whatever a reply depends on beside the texts: criteria, scale, the version of the wording."""
        ...

    def prompt(self, texts: Mapping[str, Content], tag: str, *, again: bool) -> str:
        """Write the prompt. ``again`` says that the judge's first reply could not be read."""
        ...

    def read(self, reply: str, tag: str) -> T_co:
        """Read the reply by a strict grammar. Raises Unreadable."""
        ...


@dataclass(frozen=True, slots=True)
class Poll(Generic[T]):
    """What the judges said, by their labels."""

    answers: Mapping[str, T] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why a judge has no answer."""


class _OfLoop:
    """What belongs to one event loop."""

    def __init__(self, concurrency: int) -> None:
        self.places = asyncio.Semaphore(concurrency)
        self.asking: WeakValueDictionary[Hashable, _Asking] = WeakValueDictionary()


class _Asking:
    """A question that a judge is being asked, so that equal ones wait for its end and are not asked beside it."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.failure = ""
        """Why it had no answer, for those who have waited."""


class _Asked:
    """A model in a key: equal to itself, and where it is a ServedModel to equal ones. A name may mean another one."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Asked):
            return False
        return self._model is other._model or (isinstance(self._model, ServedModel) and self._model == other._model)

    def __hash__(self) -> int:
        return hash(self._model) if isinstance(self._model, ServedModel) else id(self._model)


class Panel:
    """Several judges and how their scores become one. Its counts are those of this process."""

    def __init__(
        self,
        judges: Sequence[JudgeLike] | Mapping[str, JudgeLike],
        *,
        quorum: int | None = None,
        aggregate: Aggregation = "median",
        passes: float = 0.5,
        deadline: float = 25.0,
        concurrency: int = 16,
        budget: Budget | None = None,
        cached: int = 4096,
        sampling: Sampling | None = None,
    ) -> None:
        """Name the judges. None is asked or opened yet.

        Args:
            judges: each ``openai:MODEL@URL``, a table of ``ServedModel``, a ChatModel, or the name of one of the
                environment's ``models``. A mapping gives them labels of its own.
            quorum: fewest judges that must answer. None is all but one, and at least one.
            aggregate: ``median``, ``mean`` or ``vote`` of their scores.
            passes: the score, from 0 to 1, from which on a judge's vote is for the answer.
            deadline: seconds for one reply. A judge whose reply cannot be read is asked once more.
            concurrency: most requests at once.
            budget: what the judges may cost. None sets no bound.
            cached: replies that are kept, so that equal answers are judged once.
            sampling: of the judges. None is greedy with 1024 tokens.

        Raises:
            ConfigError: no judges, two of one name, or a setting out of range.
        """
        self._given: tuple[Any, dict[str, Any]] = (
            judges,
            {"quorum": quorum, "aggregate": aggregate, "passes": passes, "deadline": deadline,
             "concurrency": concurrency, "budget": budget, "cached": cached, "sampling": sampling},
        )  # fmt: skip
        self._judges = _labelled(judges)
        n = len(self._judges)
        self.quorum = max(1, n - 1) if quorum is None else quorum
        if not 1 <= self.quorum <= n:
            raise ConfigError(f"quorum = {self.quorum} of {n} judges: it must be from 1 to {n}")
        require_aggregation(aggregate)
        if not 0 < passes <= 1 or not deadline > 0 or concurrency < 1 or cached < 0:
            raise ConfigError(
                f"passes = {passes} must be over 0 and at most 1, deadline = {deadline} over 0 seconds, concurrency = "
                f"{concurrency} at least 1 and cached = {cached} at least 0"
            )
        self.aggregate, self.deadline, self._passes = aggregate, deadline, passes
        self._concurrency, self._cached = concurrency, cached
        self.spent = Spending(budget or Budget())
        self.failed: Counter[str] = Counter()
        """How often each judge had no answer."""
        self._sampling = sampling or Sampling(1024, temperature=0.0)
        self._cache: OrderedDict[Hashable, Any] = OrderedDict()
        self._guard = threading.Lock()
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, self._given

    @property
    def labels(self) -> tuple[str, ...]:
        """What components and messages call the judges."""
        return tuple(self._judges)

    def aggregated(self, scores: Mapping[str, float], *, compared: bool = False) -> float:
        """Return one score for those of the judges. ``compared`` says that 0.5 is a tie."""
        return aggregated(list(scores.values()), self.aggregate, passes=None if compared else self._passes)

    def components(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return what explains the aggregated score: each judge's, how far they agree, and how many failed."""
        counts = {"judges": float(len(scores)), "judges_failed": float(len(self._judges) - len(scores))}
        by_judge = {f"judge.{label}": score for label, score in scores.items()}
        return by_judge | {"agreement": agreement(list(scores.values()))} | counts

    def require_quorum(self, poll: Poll[Any]) -> None:
        """Raise InfraError where fewer judges than the quorum have answered."""
        if len(poll.answers) < self.quorum:
            why = "; ".join(f"{label}: {reason}" for label, reason in poll.failures.items())
            raise InfraError(
                f"{len(poll.answers)} of {len(self._judges)} judges answered, the quorum is {self.quorum}: {why}"
            )

    async def poll(self, form: Form[T], texts: Mapping[str, Content], models: Mapping[str, ChatModel]) -> Poll[T]:
        """Ask every judge.

        Args:
            form: how the question is put, and the reply read.
            texts: what stands in its slots.
            models: of the environment, for judges that are named.

        Returns:
            The answers of those who have one, and why the others have none.

        Raises:
            ConfigError: the budget is spent, or a judge is set up wrongly (its name, its key).
            ModelError: a server does not know its model.
        """
        chosen = {label: self._model(label, judge, models) for label, judge in self._judges.items()}
        tasks: dict[str, asyncio.Task[tuple[T] | str]] = {}
        with first_error():
            async with asyncio.TaskGroup() as group:
                for label, model in chosen.items():
                    tasks[label] = group.create_task(self._one(label, model, form, texts))
        said = {label: task.result() for label, task in tasks.items()}
        failures = {label: why for label, why in said.items() if isinstance(why, str)}
        self.failed.update(failures.keys())
        return Poll({label: a[0] for label, a in said.items() if not isinstance(a, str)}, failures)

    async def _one(self, label: str, model: ChatModel, form: Form[T], texts: Mapping[str, Content]) -> tuple[T] | str:
        """Return one judge's answer, or why it has none."""
        key = (label, _Asked(model), form.key, tuple(sorted((name, c.text, c.left_out) for name, c in texts.items())))
        here = self._loops.setdefault(asyncio.get_running_loop(), _OfLoop(self._concurrency))
        asking = here.asking.setdefault(key, _Asking())
        async with asking.lock:
            with self._guard:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    return (cast(T, self._cache[key]),)
            if asking.failure:
                return asking.failure
            found = await self._answered(label, model, form, texts, here.places)
            if isinstance(found, str):
                asking.failure = found
            else:
                self._keep(key, found[0])
            return found

    async def _answered(
        self, label: str, model: ChatModel, form: Form[T], texts: Mapping[str, Content], places: asyncio.Semaphore
    ) -> tuple[T] | str:
        why = ""
        for again in (False, True):
            try:
                async with places:
                    return (await self._ask(label, model, form, texts, again),)
            except Unreadable as error:
                why = f"its reply cannot be read: {error}"
            except TimeoutError:
                return f"no reply within {self.deadline:g} s"
            except (InfraError, OSError) as error:
                return cut(text_of(error), _SHOWN)
        return why

    async def _ask(self, label: str, model: ChatModel, form: Form[T], texts: Mapping[str, Content], again: bool) -> T:
        tag = draw_tag(texts)
        self.spent.begin()
        async with asyncio.timeout(self.deadline):
            reply = await reply_of(model, (user(form.prompt(texts, tag, again=again)),), (), self._sampling)
        self.spent.end(label, reply)
        if reply.message.finish != "stop":
            raise Unreadable(f"it was cut ({reply.message.finish})")
        return form.read(reply.message.spoken, tag)

    def _keep(self, key: Hashable, answer: object) -> None:
        with self._guard:
            self._cache[key] = answer
            while len(self._cache) > self._cached:
                self._cache.popitem(last=False)

    def _model(self, label: str, judge: str | ChatModel, models: Mapping[str, ChatModel]) -> ChatModel:
        if not isinstance(judge, str):
            return judge
        if judge not in models:
            there = ", ".join(map(repr, models)) or "none"
            raise ConfigError(
                f"judge {label!r} is the model {judge!r} of the environment, which was made with {there}: give it as "
                f"`models`, or name a server: {REMOTE}MODEL@http://HOST:PORT/v1"
            )
        return models[judge]


def _labelled(judges: Sequence[JudgeLike] | Mapping[str, JudgeLike]) -> dict[str, str | ChatModel]:
    """Return every judge under its label. A text is the name of one of the environment's models."""
    if isinstance(judges, str) or not isinstance(judges, Mapping | Sequence) or not judges:
        raise ConfigError("a panel needs a list of judges, or a mapping of labels to judges")
    found: dict[str, str | ChatModel] = {}
    entries = judges.items() if isinstance(judges, Mapping) else ((None, judge) for judge in judges)
    for given, judge in entries:
        one = _resolved(judge)
        label = given or (one if isinstance(one, str) else one.model if isinstance(one, ServedModel) else "")
        label = label or f"judge{len(found) + 1}"
        if label in found:
            raise ConfigError(f'two judges are called {label!r}: give them labels, as in {{"a": …, "b": …}}')
        found[label] = one
    return found


def _resolved(judge: JudgeLike) -> str | ChatModel:
    if isinstance(judge, str) and not judge.startswith(REMOTE):
        if not judge or "://" in judge:
            raise ConfigError(f"judge {judge!r}: write {REMOTE}MODEL@URL, or the name of a model of the environment")
        return judge
    return chat_model(judge)


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Raise the first exception of a group in the group's place."""
    try:
        yield
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__


def _rebuilt(judges: Any, settings: dict[str, Any]) -> Panel:
    return Panel(judges, **settings)
