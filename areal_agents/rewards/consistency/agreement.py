"""Group rewards of answers that agree, without a gold answer.

    agreement   the share of the group's other answers that equal an episode's own
    majority    1 for the answer that most episodes gave, as a pseudo-label (TTRL)

Both can be collected by a policy that always says the same: add them to a reward that knows the right answer, or watch
the held-out accuracy.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from itertools import combinations
from typing import Any, Literal

from areal_agents.errors import ConfigError, InfraError, RewardError
from areal_agents.reward import Episode, Verdict, VerdictStatus
from areal_agents.rewards.mathematics.extract import Slot, extract
from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.pool import MathPool, shared_pool
from areal_agents.rewards.mathematics.verdict import Status
from areal_agents.utils.short_text import short

ReadAnswer = Callable[[Episode], str | None]
"""Returns what an episode answered, or None where it answered nothing."""
Equal = Callable[[str, str], bool | Awaitable[bool]]
"""Says whether two answers are equal. It is asked once a pair, and must not depend on their order."""
_AT_ONCE = 16
_SLOTS = ("boxed", "final_line", "answer")


class _Answers:
    """The answers of one group, and which of them are equal."""

    def __init__(self, texts: Sequence[str | None], equal: set[tuple[str, str]], *, late: set[str]) -> None:
        self.texts, self._equal, self._late = texts, equal, late

    def same(self, a: str, b: str) -> bool:
        return a == b or (a, b) in self._equal or (b, a) in self._equal

    def status(self, i: int) -> VerdictStatus:
        """Return ``timeout`` where an answer could not be compared in time: its share lacks that vote."""
        return "timeout" if self.texts[i] in self._late else "ok"


class _Comparing:
    """The base of both rewards: it reads the answers and compares each pair once."""

    reads_others = True

    def __init__(
        self, read: ReadAnswer | Literal["boxed", "final_line", "answer"], equal: Literal["text", "math"] | Equal,
        *, adds: bool, weight: float, pool: MathPool | None, options: dict[str, Any],
    ) -> None:  # fmt: skip
        if not callable(read) and read not in _SLOTS:
            raise ConfigError(f"read = {short(read)}: it is one of {', '.join(_SLOTS)}, or a function of an Episode")
        if not callable(equal) and equal not in ("text", "math"):
            raise ConfigError(f"equal = {short(equal)}: it is 'text', 'math' or a function of two answers")
        if options and equal != "math":
            raise ConfigError(f"options {', '.join(options)} belong to equal = 'math'")
        if not math.isfinite(weight):
            raise ConfigError(f"weight = {weight} must be finite")
        try:
            self._options = Options.of(options)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._read, self._equal, self._pool, self._weight = read, equal, pool, float(weight)
        self.adds = adds
        self.__name__ = "agreement"

    async def _answers(self, episodes: Sequence[Episode]) -> _Answers:
        texts = [self._answer(episode) for episode in episodes]
        told, late = [*dict.fromkeys(t for t in texts if t is not None)], set[str]()
        if self._equal == "math":  # one that cannot be read, or in time, is not compared n times
            readable = await _at_once(self._readable, [(t, late) for t in told])
            told = [t for t, yes in zip(told, readable, strict=True) if yes]
        pairs = [*combinations(told, 2)]
        found = await _at_once(self._compare, [(a, b, late) for a, b in pairs])
        return _Answers(texts, {pair for pair, yes in zip(pairs, found, strict=True) if yes}, late=late)

    async def _readable(self, answer: str, late: set[str]) -> bool:
        return (await self._verify(answer, "0", {answer}, late)) in ("ok", "wrong")

    def _answer(self, episode: Episode) -> str | None:
        if callable(self._read):
            found: object = self._read(episode)
            if not isinstance(found, str | None):
                where = f"task {episode.task.id!r}: read"
                raise RewardError(f"{where} returned {short(found)}, which is no text nor None")
            return found
        slot: Slot = self._read
        return None if episode.answer is None else extract(episode.answer, slot)

    async def _compare(self, a: str, b: str, late: set[str]) -> bool:
        if self._equal == "text":
            return False  # they differ
        if callable(self._equal):
            yes: object = self._equal(a, b)
            if inspect.isawaitable(yes):
                yes = await yes
            if not isinstance(yes, bool):
                raise RewardError(f"equal({short(a)}, {short(b)}) returned {short(yes)}: return True or False")
            return yes
        # Both ways: a number without a unit may equal one with it as the gold answer, and not the other way round.
        return "ok" in (await self._verify(a, b, {a, b}, late), await self._verify(b, a, {a, b}, late))

    async def _verify(self, gold: str, answer: str, both: set[str], late: set[str]) -> Status:
        found = await (self._pool or shared_pool()).verify(gold, answer, options=self._options)
        if found.status == "infra_error":
            raise InfraError(f"the mathematics verifier failed: {found.detail}")
        if found.status == "timeout":
            late |= both
        return found.status


async def _at_once(ask: Callable[..., Awaitable[bool]], arguments: Sequence[tuple[Any, ...]]) -> list[bool]:
    """Await ``ask`` of each of ``arguments``, a few at once, and return the results in order."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(given: tuple[Any, ...]) -> bool:
        async with slots:
            return await ask(*given)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(given)) for given in arguments]
    except ExceptionGroup as errors:  # the rest were cancelled
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    return [task.result() for task in tasks]


class agreement(_Comparing):
    """A group reward: the share of the group's *other* answers that equal an episode's own.

        R_i = Σ_{j≠i} e_ij / (n − 1),  e_ij = 1 where the answers i and j are equal

        group_rubric = agreement(equal="math", adds=True, weight=0.2)

    Soft self-consistency (2203.11171 votes so at decoding) with leave-one-out votes: no episode votes for itself. An
    episode without an answer has 0, and equals no other. The same text is always equal, also where mathematics cannot
    read it, as the verifier has it. A group of one has 0: there is nobody to agree with.

    With a leave-one-out baseline b_i = mean of R_j over j ≠ i, and e symmetric, R_i stands in b_i with the factor
    1/(n − 1), and the rest of b_i does not depend on episode i. So R_i − b_i is (n − 2)/(n − 1) · R_i minus a baseline
    without i: the gradient keeps its direction, and what is added to it (``adds``) its full size. In groups of two the
    votes have no gradient, and training refuses them.

    ``turn_return`` takes the baseline of a turn from the m others that have this turn. Of these each vote then counts
    (1 − 1/m), and of shorter episodes in full: with episodes of different lengths it is biased. ``grpo`` compares whole
    episodes, and its factor without ``normalize`` is always (n − 2)/n.
    """

    leave_one_out = True

    def __init__(
        self,
        read: ReadAnswer | Literal["boxed", "final_line", "answer"] = "boxed",
        *,
        equal: Literal["text", "math"] | Equal = "text",
        adds: bool = False,
        weight: float = 1.0,
        pool: MathPool | None = None,
        **options: Any,
    ) -> None:
        """Choose the answers and what makes two of them equal.

        Args:
            read: where the answer stands: in the box, on the final line, or the whole answer. Or a function.
            equal: the same text, the same mathematics, or a function of two answers.
            adds: the reward is added to the episodes' own, and does not replace it.
            weight: times the share.
            pool: the mathematics verifier's processes. None shares those of this host.
            options: of the mathematics verifier, such as ``precision=2``.

        Raises:
            ConfigError: a choice that does not exist.
        """
        super().__init__(read, equal, adds=adds, weight=weight, pool=pool, options=options)

    async def __call__(self, episodes: Sequence[Episode]) -> list[Verdict]:
        answers, n = await self._answers(episodes), len(episodes)
        verdicts = []
        for i, mine in enumerate(answers.texts):
            others = [t for j, t in enumerate(answers.texts) if j != i and t is not None]
            votes = 0 if mine is None else sum(answers.same(mine, t) for t in others)
            share = votes / (n - 1) if n > 1 else 0.0
            verdicts.append(Verdict(self._weight * share, {"agreement": share}, status=answers.status(i)))
        return verdicts


class majority(_Comparing):
    """A group reward: 1 for an episode whose answer is the one that most episodes of its group gave, else 0.

    The majority's answer is a pseudo-label, and the answers are rewarded as if it were the gold one: TTRL (2504.16084).
    An episode votes for its own answer, so the reward is no leave-one-out vote: an estimator whose baseline must not
    depend on the episode is refused, and ``grpo``, as in the paper, is not.

    Episodes without an answer do not vote and have 0. Where several answers have the most votes, fewer than two
    episodes or a smaller share than ``at_least`` of the whole group gave it, there is no label: every episode has 0,
    and so the group no gradient. The component ``labelled`` says so. Where equality is not transitive (a tolerance),
    an answer counts for the first different one that it equals.
    """

    def __init__(
        self,
        read: ReadAnswer | Literal["boxed", "final_line", "answer"] = "boxed",
        *,
        equal: Literal["text", "math"] | Equal = "text",
        at_least: float = 0.0,
        adds: bool = False,
        weight: float = 1.0,
        pool: MathPool | None = None,
        **options: Any,
    ) -> None:
        """Choose the answers, what makes two of them equal, and when there is a label.

        Args:
            read: as of ``agreement``.
            equal: as of ``agreement``.
            at_least: the smallest share of the group's episodes that makes a label, in [0, 1].
            adds: as of ``agreement``.
            weight: the reward of the majority's answer.
            pool: as of ``agreement``.
            options: as of ``agreement``.

        Raises:
            ConfigError: a choice that does not exist.
        """
        super().__init__(read, equal, adds=adds, weight=weight, pool=pool, options=options)
        if not 0.0 <= at_least <= 1.0:
            raise ConfigError(f"at_least = {at_least} is a share of the group: it must be between 0 and 1")
        self._at_least = at_least
        self.__name__ = "majority"

    async def __call__(self, episodes: Sequence[Episode]) -> list[Verdict]:
        answers = await self._answers(episodes)
        classes: list[list[int]] = []  # of episodes, by the first answer of each
        for i, text in enumerate(answers.texts):
            if text is None:
                continue
            home = next((c for c in classes if answers.same(answers.texts[c[0]] or "", text)), None)
            if home is None:
                classes.append([i])
            else:
                home.append(i)
        most = max((len(c) for c in classes), default=0)
        winners = [c for c in classes if len(c) == most]
        labelled = len(winners) == 1 and most >= 2 and most >= self._at_least * len(episodes)
        right = set(winners[0]) if labelled else set()
        return [
            Verdict(
                self._weight * (i in right), {"majority": float(i in right), "labelled": float(labelled)},
                status=answers.status(i),
            )
            for i in range(len(episodes))
        ]  # fmt: skip
