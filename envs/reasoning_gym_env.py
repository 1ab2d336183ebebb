"""``areal/ReasoningGym-v0``: the generators of the reasoning-gym package (Apache-2.0), without those that must not be.

    pip install 'areal-agents[reasoning-gym]'
    areal-agents train --env.id areal/ReasoningGym-v0 --env.kwargs.generators chain_sum,spell_backward

Each task is drawn by its seed and scored by the generator's own scorer, in a process of its own
(``reasoning_gym_worker.py``). ``reasoning_gym_lists.py`` says what is left out, and why.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from areal_agents.env import LazyTasks
from areal_agents.envs.reasoning_gym_lists import EXCLUDED, INCLUDED
from areal_agents.envs.worker_pool import Late, WorkerPool, shared_pool
from areal_agents.errors import ConfigError, EnvError, RewardError, TaskError
from areal_agents.reward import Episode, Verdict
from areal_agents.toolenv import ToolEnv
from areal_agents.types import AssistantMessage, Task
from areal_agents.utils.packages import require_package
from areal_agents.utils.short_text import cut, short

ID: Final = "areal/ReasoningGym-v0"
SIZES: Final[Mapping[str, int]] = MappingProxyType({"train": 4096, "validation": 256, "test": 512})
MAX_CHARS: Final = 1 << 15
"""Of an answer. The longest right one is a grid of 20,000."""
MAKE_SECONDS: Final = 120.0
SCORE_SECONDS: Final = 20.0
"""For making the entry once more, and for its scorer."""
_TAG: Final = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def said(text: str) -> str | None:
    """Return what stands between <answer> and </answer>, or None where there is none or several differ."""
    found = {content.strip() for content in _TAG.findall(text)}
    return found.pop() if len(found) == 1 else None


class Solved:
    """1 where the generator's own scorer gives the full score to the answer, else 0.

    ``partial`` pays what it gives below that too. Most of that can be had without skill: a duration of ten minutes is
    nearly right for any two times, a board without life has most cells right.
    """

    __name__ = "correct"
    step_seconds = 3 * SCORE_SECONDS  # it may wait for a process first

    def __init__(self, *, partial: bool = False) -> None:
        self.partial = partial

    async def __call__(self, episode: Episode) -> Verdict:
        """Score the episode's answer.

        Raises:
            TaskError: the installed package does not make this task any more.
            RewardError: the scorer returned no finite number.
        """
        p, answer = episode.task.payload, said(episode.answer or "")
        if answer is None or len(answer) > MAX_CHARS:
            return Verdict(0.0, {"correct": 0.0})
        request = {key: p[key] for key in ("generator", "difficulty", "config", "seed", "question")}
        try:
            reply = await _pool().asked({"do": "score", "said": answer, **request}, SCORE_SECONDS)
        except Late:
            return Verdict(0.0, {"correct": 0.0}, status="timeout")
        if "unreadable" in reply:
            return Verdict(0.0, {"correct": 0.0}, status="unverifiable")
        if "score" not in reply:
            raise TaskError(f"task {episode.task.id!r}: {reply.get('refused') or reply['failed']}")
        score = float(reply["score"])
        if not math.isfinite(score):
            raise RewardError(f"task {episode.task.id!r}: the scorer of {p['generator']!r} returned {score}")
        correct = float(score >= 1.0)
        return Verdict(min(1.0, score) if self.partial else correct, {"correct": correct, "own_score": score})


class ReasoningGym(ToolEnv):
    """Solve puzzles and problems of about a hundred kinds in one's head.

    An agent must learn to follow a procedure in words, exactly and to its end, and to give the answer in the form that
    is asked for. The reward is 1 for an answer to which the generator's own scorer gives the full score.
    ``difficulty`` moves all levels of a generator's own curriculum together, from the lowest to the highest; by default
    there is the generator's own setting. A few have no levels, or none that can be used (``LEVELLESS``): they stay as
    they are.
    """

    system_prompt = (
        "Solve the task. At the end write the answer between <answer> and </answer>, once, in the form that the task "
        "asks for, and nothing else there."
    )
    rubric = Solved()
    splits = tuple(SIZES)

    def __init__(
        self,
        *,
        generators: str | Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        partial: bool = False,
        sandbox: Any = None,
        system_prompt: str | None = None,
    ) -> None:
        """Make an environment.

        Args:
            generators: names, as a list or parted by commas. None are all that are not excluded.
            config: settings of the generator, where there is one, over its own.
            partial: pay what the generators' scorers give to answers that are not right.
            sandbox: is not used.
            system_prompt: in place of the class's own.
        """
        super().__init__(sandbox=None, system_prompt=system_prompt)
        self._source: dict[str, Any] = {"generators": generators, "config": config}
        _chosen(generators, config)
        if partial:
            self._rubric = Solved(partial=True)

    @classmethod
    def tasks(
        cls,
        split: str,
        *,
        difficulty: float | None = None,
        generators: str | Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> Sequence[Task]:
        """Return the tasks of a split, one generator after the other.

        No question is in two splits, whatever its generator and difficulty. Raises ConfigError for a generator that is
        unknown or excluded, with the reason, and where the package is not installed.
        """
        if split not in SIZES:
            raise ConfigError(f"{ID} has no split {split!r}: its splits are {', '.join(SIZES)}")
        names, settings = _chosen(generators, config)
        return LazyTasks(SIZES[split], lambda i: _task(split, names[i % len(names)], i, difficulty, settings))

    def training_tasks(self) -> Sequence[Task]:
        return self.tasks("train", **self._source)

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    def is_final(self, action: AssistantMessage) -> bool:
        return True

    @classmethod
    def gold(cls, task: Task) -> str | None:
        answer = task.payload["answer"]
        return None if answer is None else f"<answer>{answer}</answer>"


def _pool() -> WorkerPool:
    return shared_pool("areal_agents.envs.reasoning_gym_worker", "reasoning-gym", {"PYTHONHASHSEED": "0"})


def _chosen(generators: str | Sequence[str], config: Mapping[str, Any] | None) -> tuple[tuple[str, ...], str]:
    """Return the generators' names, and their settings as JSON."""
    require_package("reasoning_gym", ID)
    listed = generators.split(",") if isinstance(generators, str) else list(generators)
    names = tuple(name.strip() for name in listed if name.strip()) or INCLUDED
    for name in names:
        if name in EXCLUDED:
            raise ConfigError(f"{ID} does not play reasoning-gym's {name!r}: {EXCLUDED[name]}")
        if name not in INCLUDED:
            raise ConfigError(f"{ID} knows no generator {short(name)}; there are {', '.join(INCLUDED)}")
    given = dict(config or {})
    if given and len(names) > 1:
        raise ConfigError(f"env.kwargs.config = {short(given)} is for one generator, and there are {len(names)}")
    if given.keys() & {"seed", "size"}:
        raise ConfigError("env.kwargs.config: seed and size are the tasks' own")
    try:
        return names, json.dumps(given, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"env.kwargs.config = {short(given)} is no JSON: {error}") from error


@functools.lru_cache(maxsize=4096)
def _task(split: str, name: str, index: int, difficulty: float | None, config: str) -> Task:
    level = "" if difficulty is None else f"-{difficulty:g}"
    request = {"do": "make", "generator": name, "difficulty": difficulty, "config": config, "split": split}
    try:
        made = _pool().ask({**request, "salt": f"{ID} {split} {name} {difficulty!r} {config} {index}"}, MAKE_SECONDS)
    except Late as late:
        raise EnvError(f"{name!r} at difficulty {difficulty}: {late}") from late
    if "refused" in made:
        raise ConfigError(f"{ID}: {made['refused']}")
    if "failed" in made:
        raise EnvError(f"{ID}: {name!r} raised {cut(made['failed'], 500)}")
    payload = {"generator": name, "difficulty": difficulty, "config": config, **made}
    return Task.make(f"{split}{level}-{name}-{index}", split=split, seed=made["seed"], payload=payload)
