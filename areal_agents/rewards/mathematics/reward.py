"""Rewards for mathematical answers, verified with SymPy in processes that a deadline ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from areal_agents.errors import ConfigError, InfraError, TaskError
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards.mathematics.extract import REWARD_SLOTS, Slot
from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.pool import MathPool, shared_pool
from areal_agents.rewards.submitted import submitted
from areal_agents.types import Task


class math:
    r"""A reward of 1 where the answer equals ``task.payload[key]``, which is one gold answer or a list of them.

        rubric = Gate({"correct": math(slot="boxed"), "brief": (brief, 0.1)}, on="correct")

    An answer that was not verified in time scores 0 with the status ``timeout``, one that cannot be read scores 0 with
    the status ``unverifiable``, as has one that SymPy fails at. Both are counted.
    """

    def __init__(
        self, *, slot: Slot = "boxed", key: str = "answer", tool: str = "answer", argument: str = "",
        choices_key: str = "", pool: MathPool | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """Choose the slot and what counts as equal.

        Args:
            slot: where the answer stands: ``boxed``, ``final_line``, or ``tool``, the last call of an answer tool.
            key: of the gold answer in the task's payload.
            tool: the answer tool's name.
            argument: the name of its argument that is the answer. Empty is its only text or number.
            choices_key: of a question's choices in the payload, as ``Options.choices`` has them. Empty: it has none.
            pool: the verifier's processes. None shares those of this host.
            options: fields of ``Options``, such as ``precision=2``.

        Raises:
            ConfigError: the slot is none that a reward may read, or an option is unknown.
        """
        if slot not in REWARD_SLOTS:
            raise ConfigError(f"a reward reads its answer from {', '.join(REWARD_SLOTS)}, not from the slot {slot!r}")
        try:
            self._options = Options.of(options)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if argument and slot != "tool":
            raise ConfigError(f"argument = {argument!r} is one of a tool, and the slot is {slot!r}")
        self._slot, self._key, self._choices, self._pool = slot, key, choices_key, pool
        self._tool, self._argument = tool, argument
        self.__name__ = f"math({slot})"

    async def __call__(self, episode: Episode) -> Verdict:
        gold = self.gold(episode.task)
        text = episode.answer
        if self._slot == "tool":
            text = submitted(episode, self._tool, self._argument, (str, int, float))
        if text is None:
            return Verdict(0.0, {self.__name__: 0.0})
        pool = self._pool or shared_pool()
        found = await pool.verify(gold, text, slot=self._slot, options=self._options_of(episode.task))
        if found.status == "infra_error":
            raise InfraError(f"the mathematics verifier failed: {found.detail}")
        if found.status == "gold_error":
            raise TaskError(f"task {episode.task.id!r}: {found.detail}")
        status = {"timeout": "timeout", "parse_error": "unverifiable"}.get(found.status, "ok")
        score = float(found.score)
        return Verdict(score, {self.__name__: score}, status=status)  # type: ignore[arg-type]

    async def require_scorable(self, task: Task) -> None:
        """Raise TaskError where the task has no gold answer, or none that can be read."""
        pool = self._pool or shared_pool()
        found = await pool.look(self.gold(task), options=self._options_of(task))
        if found.status == "infra_error":
            raise InfraError(f"the mathematics verifier failed: {found.detail}")
        if found.status != "ok":
            raise TaskError(f"task {task.id!r}: {found.detail}")

    def gold(self, task: Task) -> str | Sequence[str]:
        """Return the task's gold answers. Raises TaskError where it has none."""
        value = task.payload.get(self._key)
        values = value if isinstance(value, list | tuple) else [value]
        texts = [str(v) for v in values if isinstance(v, str | int | float) and not isinstance(v, bool)]
        if not texts or len(texts) != len(values):
            raise TaskError(f"task {task.id!r}: payload[{self._key!r}] = {value!r:.200} is no gold answer")
        return texts

    def _options_of(self, task: Task) -> Options:
        if not self._choices:
            return self._options
        try:
            return replace(self._options, choices=task.payload[self._choices])
        except (KeyError, ValueError) as error:
            raise TaskError(f"task {task.id!r} has no choices in payload[{self._choices!r}]: {error}") from error


def boxed_math(key: str = "answer", **options: Any) -> math:
    r"""Make a reward that compares the answer's last ``\boxed{…}`` with ``task.payload[key]``, verified with SymPy."""
    return math(slot="boxed", key=key, **options)
