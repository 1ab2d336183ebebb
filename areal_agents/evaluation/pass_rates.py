"""The pass rates of tasks, measured before a training, and what they leave of its tasks.

    areal-agents eval ENV:train --n 512 --k 8 --temperature 1 --save-pass-rates rates.jsonl      writes
    [curriculum] pass_rates = "rates.jsonl"                                                      reads

One JSON object a line, of one task: the environment with its arguments, its split and difficulty, the task's place in
the split, its id and content hash, the attempts that were scored, those that passed, the reward from which on one has
passed, the model and how it sampled.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.evaluation.held_out import as_begun, chosen_indices
from areal_agents.evaluation.unfinished import read_episodes
from areal_agents.registry import EnvSpec
from areal_agents.rollout.task_lists import some
from areal_agents.rollout.tasks import task_at
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.types import Task, Trajectory
from areal_agents.utils.files import save_whole
from areal_agents.utils.tolerance import reaches

PASSES = 1.0
"""The reward from which on an attempt of an evaluation has passed."""


@dataclass(frozen=True, slots=True)
class PassRate:
    """How often one task was passed."""

    env: str
    split: str
    difficulty: float | None
    """None is the environment's default."""
    place: int
    """Of the task in its split."""
    task: str
    """Its id."""
    content_hash: str
    attempts: int
    passes: int
    passes_at: float
    """The reward from which on an attempt has passed."""
    model: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the environment."""
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.passes / self.attempts

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> PassRate:
        """Read what was written. Raises TypeError or ValueError for anything else."""
        found = cls(**row)
        whole = (found.place, found.attempts, found.passes)
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in whole):
            raise TypeError("place, attempts and passes are whole numbers")
        if found.place < 0 or not 0 <= found.passes <= found.attempts or found.attempts < 1:
            raise ValueError(f"{found.passes} passes of {found.attempts} attempts at place {found.place}")
        if not all(isinstance(x, str) for x in (found.env, found.split, found.task, found.content_hash, found.model)):
            raise TypeError("env, split, task, content_hash and model are texts")
        return found


def pass_rates_of(
    episodes: Iterable[Trajectory], config: TrainConfig, places: Mapping[str, int], *, env: str
) -> list[PassRate]:
    """Count the attempts of an evaluation by task.

    Args:
        episodes: all that were scored.
        config: the evaluation's settings.
        places: by content hash, where each evaluated task is in its split.
        env: the environment's id.

    Returns:
        A row a task with a scored attempt, in the order of the split.
    """
    attempts: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    tasks: dict[str, Task] = {}
    for episode in episodes:
        tasks.setdefault(hash := episode.task.content_hash, episode.task)
        attempts[hash] += 1
        passes[hash] += reaches(episode.reward, PASSES)
    r = config.rollout
    sampling = {
        "temperature": config.eval.temperature, "seed": config.seed, "max_turn_tokens": r.max_turn_tokens,
        "max_episode_tokens": r.episode_tokens, "max_turns": r.max_turns, "max_context": config.model.max_context,
    }  # fmt: skip
    rows = [
        PassRate(
            env, config.eval.split, config.env.difficulty, places[hash], task.id, hash, attempts[hash], passes[hash],
            PASSES, config.model.path, plain_arguments(config.env.kwargs), sampling,
        )
        for hash, task in tasks.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row.place)


def plain_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of an environment as JSON has them. What JSON lacks is its text."""
    found: dict[str, Any] = json.loads(json.dumps(dict(kwargs), default=str))
    return found


def save_pass_rates(path: Path, config: TrainConfig, spec: EnvSpec) -> str:
    """Write the pass rates of the finished evaluation in ``config.out``, and return a line that says what is there.

    Raises ArealError where the file cannot be written.
    """
    config = as_begun(config, config.out)
    e = config.eval
    tasks = spec.tasks(e.split, difficulty=config.env.difficulty)
    found = ((i, task_at(tasks, i)) for i in chosen_indices(len(tasks), e.n, seed=e.task_seed))
    places: dict[str, int] = {}
    for i, task in found:
        if isinstance(task, Task):
            places.setdefault(task.content_hash, i)
    episodes, _, _ = read_episodes(config.out)
    rows = pass_rates_of(episodes.values(), config, places, env=spec.id)
    save_whole(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
    without = f", {len(places) - len(rows)} tasks without a scored attempt" if len(rows) < len(places) else ""
    return f"pass rates: {path} ({len(rows)} tasks, reward of at least {PASSES:g} passes{without})"


def read_pass_rates(path: Path) -> list[PassRate]:
    """Read a file of pass rates.

    Raises ConfigError where there is none, or it is something else.
    """
    where = f"curriculum.pass_rates = {str(path)!r}"
    rows: list[PassRate] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(PassRate.from_json(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{where}, line {number} is no pass rate: {error}") from error
    if not rows:
        raise ConfigError(f"{where} is empty: `areal-agents eval … --save-pass-rates FILE` writes one")
    return rows


@dataclass(frozen=True, slots=True)
class Filtered:
    """What a file of pass rates leaves of the tasks of a training."""

    tasks: Sequence[Task]
    of: int = 0
    """Tasks that there were. 0 where nothing was filtered."""
    too_hard: int = 0
    too_easy: int = 0
    missing: int = 0
    """Tasks that the file does not have."""
    models: tuple[str, ...] = ()
    """Whose pass rates they are."""
    other_arguments: int = 0
    """Of these tasks, those with a row that was measured with other ``env.kwargs``."""
    chosen: str = ""
    """A hash of the places of the tasks that are left. Empty where nothing was filtered."""

    def text(self, settings: CurriculumConfig) -> str:
        """Say what is left, for people."""
        bounds = f"{settings.min:g} to {settings.max:g}"
        gone = f"{self.too_hard} too hard, {self.too_easy} too easy"
        beside = ""
        if self.missing:
            done = "kept" if settings.missing == "keep" else "left out"
            beside = f"; {self.missing} that the file does not have are {done}"
        if self.other_arguments:
            beside += f"; {self.other_arguments} were measured with other env.kwargs than these"
        return (
            f"{len(self.tasks)} of {self.of} training tasks are kept, with pass rates of {bounds} by "
            f"{settings.pass_rates}, of {', '.join(self.models)} ({gone}{beside})"
        )


def filtered(
    tasks: Sequence[Task],
    settings: CurriculumConfig,
    *,
    env: str,
    split: str,
    difficulty: float | None,
    kwargs: Mapping[str, Any],
) -> Filtered:
    """Leave out the tasks whose pass rate is under ``min`` or over ``max``.

    Several rows of one task are added up.

    Args:
        tasks: all of the split.
        settings: file and bounds.
        env: the environment's id.
        split: the name of the split.
        difficulty: as the settings say it.
        kwargs: arguments of the environment. Rows of others may be of other tasks.

    Raises:
        ConfigError: the file is not of these tasks, it lacks some and ``missing`` is ``refuse``, or none is left.
    """
    path = Path(settings.pass_rates)
    where = f"curriculum.pass_rates = {settings.pass_rates!r}"
    rows = read_pass_rates(path)
    own = [row for row in rows if (row.env, row.split, row.difficulty) == (env, split, difficulty)]
    if not own:
        there = sorted({f"{row.env}:{row.split} (difficulty {_level(row.difficulty)})" for row in rows})
        raise ConfigError(
            f"{where} has no task of {env}:{split} (difficulty {_level(difficulty)}); it is of {', '.join(there)}"
        )
    places = _places(tasks, own, everywhere=settings.missing != "leave_out")
    gone = [r for r in own if r.content_hash not in places and dict(r.kwargs) == plain_arguments(kwargs)]
    if gone or not any(row.content_hash in places for row in own):
        raise ConfigError(
            f"{where}: {len(gone or own)} of its {len(own)} tasks of {env}:{split} are not in the split (first: "
            f"{(gone or own)[0].task!r}): its tasks are others now, so measure them again"
        )
    counts = _by_place(own, places)
    missing = len(tasks) - len(counts)
    if missing and settings.missing == "refuse":
        raise ConfigError(
            f"{where} lacks {missing} of the {len(tasks)} tasks of {env}:{split}: set curriculum.missing = 'leave_out' "
            f"or 'keep', or measure all of them (--n {len(tasks)})"
        )
    rates = {place: passes / attempts for place, (passes, attempts) in counts.items()}
    hard = {place for place, rate in rates.items() if rate < settings.min}
    easy = {place for place, rate in rates.items() if rate > settings.max}
    kept = [i for i in range(len(tasks)) if (i in rates or settings.missing == "keep") and i not in hard | easy]
    models = tuple(dict.fromkeys(row.model for row in own))
    used = [row for row in own if row.content_hash in places]
    others = {row.content_hash for row in used if dict(row.kwargs) != plain_arguments(kwargs)}
    key = sha256(repr(kept).encode()).hexdigest()
    found = Filtered(some(tasks, kept), len(tasks), len(hard), len(easy), missing, models, len(others), key)
    if not kept:
        raise ConfigError(f"{where}: no task is left. {found.text(settings)}: widen curriculum.min and curriculum.max")
    return found


def _level(difficulty: float | None) -> str:
    return "by default" if difficulty is None else f"{difficulty:g}"


def _places(tasks: Sequence[Task], rows: Sequence[PassRate], *, everywhere: bool) -> dict[str, list[int]]:
    """Return where in the split the tasks of the rows are, by content hash.

    A row's own place says where to look first. All tasks are made where another one is there now, or where
    ``everywhere`` asks for every task of the same content.
    """
    made = {row.place: task_at(tasks, row.place) for row in rows if row.place < len(tasks)}
    there = {i: task.content_hash for i, task in made.items() if isinstance(task, Task)}
    if everywhere or any(there.get(row.place) != row.content_hash for row in rows):
        made |= {i: task_at(tasks, i) for i in range(len(tasks)) if i not in made}
    wanted = {row.content_hash for row in rows}
    found: dict[str, list[int]] = {}
    for place, task in made.items():
        if isinstance(task, Task) and task.content_hash in wanted:
            found.setdefault(task.content_hash, []).append(place)
    return found


def _by_place(rows: Sequence[PassRate], places: Mapping[str, Sequence[int]]) -> dict[int, tuple[int, int]]:
    """Return passes and attempts of each task by its place, of all rows with its content."""
    counts: dict[int, tuple[int, int]] = {}
    for row in rows:
        for place in places.get(row.content_hash, ()):
            passes, attempts = counts.get(place, (0, 0))
            counts[place] = passes + row.passes, attempts + row.attempts
    return counts
