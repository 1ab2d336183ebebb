"""The check of ``conformance.check`` that looks for tasks that no answer could score (no gold answer, say)."""

from __future__ import annotations

from collections.abc import Mapping

from areal_agents.conformance.contract import Skipped, Subject
from areal_agents.errors import CheckError, TaskError
from areal_agents.rollout.task_faults import reasons
from areal_agents.rollout.task_looks import MOST, SECONDS, Look, look_at
from areal_agents.utils.short_text import text_of


class BadTasks(CheckError):
    """Tasks that no answer could score."""

    def __init__(self, text: str, tasks: Mapping[str, str]) -> None:
        super().__init__(text)
        self.tasks = dict(tasks)


async def golds(subject: Subject) -> str:
    """Look at the tasks of every split, as a run does before its first episode.

    Raises:
        BadTasks: some cannot be scored, with their ids and reasons.
        CheckError: a check of tasks does not return.
        Skipped: neither environment nor rubric says what a task must have.
    """
    spec = subject.spec
    checks = spec.env_class().task_checks()
    if not checks:
        raise Skipped("neither the environment nor its rubric has a check of tasks (require_scorable)")
    looks: dict[str, Look] = {}
    share = len(spec.splits)
    for split in spec.splits:
        seconds = min(SECONDS, 4 * subject.timeout) / share
        where = f"{spec.id}:{split}"
        try:
            looks[split] = await look_at(spec.tasks(split), checks, where=where, seed=0, most=MOST, seconds=seconds)
        except TaskError as error:
            raise CheckError(text_of(error)) from error
    bad = {id: why for look in looks.values() for id, why in look.bad.items()}
    seen = ", ".join(f"{split} {look}" for split, look in looks.items())
    if bad:
        n = "1 task" if len(bad) == 1 else f"{len(bad)} tasks"
        raise BadTasks(f"{n} cannot be scored, looked at {seen}:{reasons(bad, rest=', which --json names')}", bad)
    return f"every task can be scored: {seen}"
