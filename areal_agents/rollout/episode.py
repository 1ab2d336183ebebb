"""The driver of one episode, in which an environment and a policy take turns until one of them is done.

    areset ─▶ policy.say ─▶ astep ─▶ … ─▶ (terminated | truncated | afinish) ─▶ aclose

Training, evaluation, ``check`` and ``replay`` drive environments by this file alone. They differ in their policy: an
engine or an expert (``token_policy.py``), a chat model (``chat_policy.py``), a script (``script.py``), a saved episode
(``evaluation/replay.py``).

Whatever goes wrong is an InfraError, which ``retries.py`` retries, or a RewardError, which the environment's author has
to mend. A mistake of the *model* is no error: the environment answers it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

from areal_agents.context import Context
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError, EnvError, InfraError, RewardError
from areal_agents.rollout.cut_messages import after_cut, withheld
from areal_agents.rollout.env_faults import located, raised, says_whose
from areal_agents.rollout.env_host import Host
from areal_agents.rollout.env_results import (
    Call,
    Returned,
    read,
    read_context,
    read_scores_cut,
    read_seconds,
    read_tools,
)
from areal_agents.rollout.limits import Limits as Limits  # its place for those who drive episodes
from areal_agents.tool import ToolSpec
from areal_agents.tool_dispatch import seconds_of
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Ids,
    Info,
    Observation,
    Rewritten,
    StopReason,
    Tail,
    Task,
    Trajectory,
    Turn,
    steps_of,
)
from areal_agents.utils.exits import no_exit
from areal_agents.utils.outcomes import to_its_end
from areal_agents.utils.short_text import cut, described, short

F = TypeVar("F", bound=ArealError)


@dataclass(frozen=True, slots=True)
class Said:
    """One turn of a policy, as a message and as the tokens that it was sampled as."""

    message: AssistantMessage
    completion: Completion
    suffix: Ids
    """As ``Turn.prompt_suffix``."""
    parent: int | None
    """As ``Turn.parent``."""
    tokens: int
    """Sampled tokens, as far as anybody knows."""
    cut: StopReason | None = None
    """Which limit cut the message, where one did. None leaves that to ``message.finish``."""
    rewritten: Rewritten | None = None
    """As ``Turn.rewritten``."""
    request: Observation | None = None
    """What asked for a summary, where the message is one: the environment does not see it."""

    @classmethod
    def as_text(
        cls,
        message: AssistantMessage,
        turn: int,
        *,
        tokens: int = 0,
        cut: StopReason | None = None,
        rewritten: Rewritten | None = None,
        request: Observation | None = None,
    ) -> Said:
        """Make a turn of a policy that gives no token ids.

        Args:
            message: what it says.
            turn: one more than the index of the turn that it follows; 0 where it follows none.
            tokens: as the field of that name, and so are the others.
            cut: see there.
            rewritten: see there. Such a turn follows none.
            request: see there.
        """
        parent = turn - 1 if turn and rewritten is None else None
        return cls(message, Completion((), (), (), message.finish), (), parent, tokens, cut, rewritten, request)


class Policy:
    """The side of one episode that says the assistant's messages."""

    async def say(self, episode: EpisodeDriver) -> Said | StopReason:
        """Answer ``episode.observation``, which is new, or return why the runner must end the episode."""
        raise NotImplementedError

    def tail(self, episode: EpisodeDriver) -> Tail | None:
        """Return the prompt of the turn that a limit of the runner left out, as far as there is one in tokens."""
        return None

    async def close(self, episode: EpisodeDriver) -> None:
        """Free what the policy holds for the episode. It is called once or more, also where nothing was said."""


@dataclass(eq=False)
class EpisodeDriver:
    """The driver of one episode, call by call or as a whole (``play``).

    Every call into the environment goes through ``call``. The policy runs on the caller's event loop, the environment
    on ``host``.
    """

    make_env: Callable[[], AgentEnv]
    task: Task
    policy: Policy
    host: Host
    id: str
    seed: int
    """The environment is reset with it."""
    step_timeout: float
    """Seconds for one call into the environment, beside what ``seconds_for`` adds."""
    max_turns: int | None = None
    """After so many turns the episode is finished. None leaves that to environment and policy."""
    saw: Callable[[Call, object], None] = lambda call, result: None
    """Is given each call and what it returned, before anything reads it, on the host. It gets the very object."""

    observation: Observation = field(default=(), init=False)
    """The messages that were shown last."""
    tools: tuple[ToolSpec, ...] = field(default=(), init=False)
    """The environment's, as it had them once it was open."""
    state_key: str | None = field(default=None, init=False)
    """Of the state that ``observation`` shows."""
    scores_cut: bool = field(default=False, init=False)
    """The environment's ``scores_cut_messages``."""
    step_seconds: float = field(default=0.0, init=False)
    """As the environment declares it."""
    context: Context | None = field(default=None, init=False)
    """The environment's: what happens to a history that comes near the model's context."""
    turns: list[Turn] = field(default_factory=list, init=False)
    tokens: int = field(default=0, init=False)
    """Sampled in ``turns``, as far as anybody knows."""
    metrics: dict[str, float] = field(default_factory=dict, init=False)
    terminated: bool = field(default=False, init=False)
    truncated: bool = field(default=False, init=False)
    stop_reason: StopReason = field(default="answer", init=False)
    tail: Tail | None = field(default=None, init=False)
    """Of the episode that a limit cut, as the policy has it."""
    outcome: Any = field(default=None, init=False)
    """What the environment found at the end, as JSON has it."""
    credited: bool = field(default=False, init=False)
    """Whether the end replaced the rewards of all turns."""
    faults: dict[ArealError, int] = field(default_factory=dict, init=False)
    """What the environment's own code did wrong (it raised, or broke the contract), and at which turn."""
    close_error: ArealError | None = field(default=None, init=False)
    _env: AgentEnv | None = field(default=None, init=False)
    _cut_open: bool = field(default=False, init=False)

    @property
    def ended(self) -> bool:
        return self.terminated or self.truncated

    @property
    def steps(self) -> tuple[int, ...]:
        """The indices of the turns that the environment saw."""
        return steps_of(self.turns)

    async def play(self) -> None:
        """Play the whole episode and close it, however it ends.

        Raises:
            InfraError: the engine, the sandbox or the environment failed. Another attempt may succeed.
            RewardError: a reward is no finite number, or ``turn_rewards`` has not one entry a turn. Another attempt is
                useless.
            TaskError: the task cannot be played or scored, whoever plays it.
        """
        try:
            await self.open()
            while not self.ended:
                await self.turn()
        except BaseException as error:
            if isinstance(error, InfraError):
                error.turns, error.tokens = len(self.turns), self.tokens
            try:
                await self.close()
            except Exception as second:  # noqa: BLE001  noted: it must not hide why the episode ended
                error.add_note(f"and closing it raised {described(second)}")
            raise
        await self.close()

    async def open(self) -> None:
        """Make and reset the environment."""

        async def create() -> tuple[Observation, Info]:
            self._env = self.make_env()
            return await self._env.areset(seed=self.seed, options={"task": self.task})

        try:
            got = await self.call("areset", create)
        except asyncio.CancelledError:
            self._cut_open = True  # the environment may still be made
            raise
        self.observation, self.state_key = got.observation, got.state_key

    async def turn(self) -> None:
        """Take one turn, and finish the episode after the last one that a limit allows."""
        said = await self.policy.say(self)
        if not isinstance(said, Said):
            if said not in get_args(StopReason):
                raise TypeError(f"{type(self.policy).__name__}.say returned {short(said)}: no Said, no stop reason")
            await self.finish(said)
        elif said.request is not None:
            self._keep_summary(said, said.request)
        else:
            await self._step(said)
            if not self.ended and len(self.steps) == self.max_turns:
                await self.finish("max_turns")
        if self.truncated and not self.terminated:
            self.tail = self.policy.tail(self)

    async def _step(self, said: Said) -> None:
        env, shown = self._opened(), self.observation
        with self.timed("env_seconds"):
            got = await self.call("astep", lambda: env.astep(said.message), self.seconds_for(said.message))
        if cut := said.message.cut({t.name for t in self.tools}):
            got = self._after_cut(got, said.cut or cut)
        self.turns.append(
            Turn(
                said.suffix, said.completion, got.marked(said.message), got.reward, got.components, said.parent, shown,
                self.state_key, got.tool_results, rewritten=said.rewritten,
            )
        )  # fmt: skip
        self.tokens += said.tokens
        self.observation, self.terminated, self.truncated = got.observation, got.terminated, got.truncated
        self.state_key = got.state_key
        self.metrics |= got.metrics
        if self.ended:
            self.stop_reason, self.outcome = got.ending, got.outcome
            self._credit(got)

    def _keep_summary(self, said: Said, request: Observation) -> None:
        """Add a turn that the environment does not see. What it showed last is still to be answered."""
        self.turns.append(
            Turn(
                said.suffix, said.completion, said.message, parent=said.parent, observation=request, kind="summary"
            )
        )  # fmt: skip
        self.tokens += said.tokens

    def _after_cut(self, got: Returned, reason: StopReason) -> Returned:
        paid = after_cut(got, reason, [self.turns[k].reward for k in self.steps], scored=self.scores_cut)
        if amount := withheld(got, paid):
            self.count("reward_withheld", amount)
        return paid

    async def finish(self, reason: StopReason) -> None:
        """End the episode for ``reason`` and let the environment score what exists.

        The score is added to the last step's reward. Raises InfraError where there is none.
        """
        if not self.turns:
            raise InfraError(f"task {cut(self.task.id, 120)}: the policy stopped before its first turn ({reason})")
        env = self._opened()
        got = await self.call("afinish", lambda: env.afinish(reason), self.step_seconds)
        self.truncated, self.stop_reason, self.outcome = True, reason, got.outcome
        self.metrics |= got.metrics
        k = self.steps[-1]
        last = self.turns[k]
        self.turns[k] = replace(last, reward=last.reward + got.reward, components={**last.components, **got.components})
        self._credit(got)

    def _credit(self, got: Returned) -> None:
        """Give every turn the reward that the environment assigns to it now that the episode is over."""
        if got.turn_rewards is None:
            return
        for k, reward in zip(self.steps, got.turn_rewards, strict=True):
            self.turns[k] = replace(self.turns[k], reward=reward)
        self.credited = True

    async def close(self) -> None:
        """Close the policy, and the environment where there is one, also where the caller is cancelled meanwhile.

        A failing ``aclose`` is counted and kept in ``close_error``. It is not raised: why the episode ended counts.
        """
        try:
            await to_its_end(lambda: self.policy.close(self))
        finally:
            if self._env is not None or self._cut_open:
                await to_its_end(self._close_env)

    async def _close_env(self) -> None:
        async def aclose() -> None:
            if self._env is not None:  # asked on the host, where it may have been made after ``open`` was cancelled
                await self._env.aclose()

        try:
            await self.call("aclose", aclose)
        except ArealError as error:
            self.close_error = error
            self.count("close_errors")

    def trajectory(self, group: str) -> Trajectory:
        """Return the episode as it is now."""
        return Trajectory(
            self.id, self.task, group, tuple(self.turns), self.terminated, self.truncated, self.stop_reason,
            self.observation, dict(self.metrics), tail=self.tail, outcome=self.outcome,
        )  # fmt: skip

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a metric of the episode."""
        self.metrics[name] = self.metrics.get(name, 0.0) + amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to a metric of the episode."""
        start = time.perf_counter()
        yield
        self.count(name, time.perf_counter() - start)

    async def call(self, call: Call, make: Callable[[], Awaitable[object]], extra: float = 0.0) -> Returned:
        """Call into the environment, check what it returns and copy what counts.

        It may take ``extra`` seconds more than ``step_timeout``.

        This is the boundary at which an exception of the environment's author becomes a fault and an EnvError. What was
        returned is read on the host too, because reading it may run the author's code.
        """
        at_end = call in ("afinish", "aclose")  # which belong to the last turn
        turn = max(0, len(self.turns) - at_end)
        where = f"{call} (task {cut(self.task.id, 120)}, turn {turn})"
        steps = len(self.steps) + (call == "astep")

        async def guarded() -> Returned | EnvError | RewardError:
            with no_exit():  # which would end the event loop, and with it every other episode
                result = await make()
                self.saw(call, result)
                try:
                    got = read(call, result, where, steps)
                    if call == "areset":
                        self.tools = read_tools(self._opened(), where)
                        self.scores_cut = read_scores_cut(self._opened(), where)
                        self.step_seconds = read_seconds(self._opened(), where)
                        self.context = read_context(self._opened(), where)
                except (EnvError, RewardError) as error:  # returned, so that the host does not take it for one it met
                    return error
                return got

        try:
            got = await self.host.call(guarded, timeout=self.step_timeout + extra, what=where)
        except Exception as error:  # third-party code: recorded, attached, counted
            if isinstance(error, ArealError) and says_whose(error):
                raise located(error, call, where)  # noqa: B904  the same error
            raise self.fault(raised(error, where), turn) from error
        if isinstance(got, Returned):
            return got
        raise self.fault(got, turn)

    async def ask(self, make: Callable[[], Awaitable[object]], where: str) -> object:
        """Call a function of the environment's author that is none of the contract's calls, as ``call`` does."""

        async def guarded() -> object:
            with no_exit():
                return await make()

        try:
            return await self.host.call(guarded, timeout=self.step_timeout + self.step_seconds, what=where)
        except Exception as error:  # third-party code, as in ``call``
            if isinstance(error, ArealError) and says_whose(error):
                raise located(error, "astep", where)  # noqa: B904  the same error
            raise self.fault(raised(error, where), len(self.turns)) from error

    def fault(self, error: F, turn: int) -> F:
        """Note what the environment's own code did wrong at a turn, and return it."""
        self.faults[error] = turn
        return error

    def seconds_for(self, message: AssistantMessage) -> float:
        """Return the seconds beyond ``step_timeout`` that a step may take: its own, and those of its tool calls."""
        return self.step_seconds + seconds_of(message.tool_calls, self.tools)

    def _opened(self) -> AgentEnv:
        assert self._env is not None
        return self._env
