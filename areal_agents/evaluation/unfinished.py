"""An evaluation's folder while it is played, and what a later sitting may add to it.

    OUT/config.toml           the settings
    OUT/evaluation.json       the model's fingerprint, its server, and what the numbers of an earlier sitting lack
    OUT/trajectories/eval/    every scored episode, on the disk as soon as it ends (``tracking/journal.py``)

An episode is known by its place, which its id says: (index of the task, attempt).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError, ConfigError, Interrupted
from areal_agents.evaluation.attempts import Place, same_attempts
from areal_agents.evaluation.held_out import settings_of
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.differences import differences
from areal_agents.settings.evaluation import training_only
from areal_agents.tracking.journal import Journal
from areal_agents.tracking.tracker import Tracker
from areal_agents.tracking.trajectories import read_lines, read_shard, shard_path, shards
from areal_agents.types import Task, Trajectory
from areal_agents.utils.files import save_whole

KIND, STEP = "eval", 0
MAY_CHANGE = (
    "model.path", "engine.", "env.sandbox", "env.step_timeout", "rollout.max_retries", "rollout.failure_window",
    "rollout.failure_budget", "rollout.max_bad_tasks",
)  # fmt: skip
"""Settings, or sections, that a later sitting may have otherwise. The model itself is compared by its fingerprint."""
MUST_STAY = ("engine.kind", "engine.precision")
_ID = re.compile(r".*/(\d+)/(\d+)(?:~\d+)?", re.DOTALL)
_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".gguf"})
_BESIDE = ("config.json", "generation_config", "tokenizer", "chat_template", "vocab", "merges", "special_tokens", "add")
_OF_A_START = ("config.toml", "evaluation.json", "events.jsonl")
_BLOCK, _BLOCKS = 4096, 256


class EvaluationInterrupted(Interrupted):
    """A signal stopped the evaluation.

    ``report`` is about what was scored until then.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


def how_to_go_on(out: Path, saved: int, planned: int, when: str = "Go on with") -> str:
    """Say what is saved, and the command that plays the rest."""
    return f"{saved} of {planned} attempts are saved. {when}:\n  areal-agents eval --resume {shlex.quote(str(out))}"


def count_saved(out: Path) -> int:
    """Count the episodes that are on the disk.

    Raises ArealError where they cannot be read.
    """
    return len(read_episodes(out)[0])


@dataclass(frozen=True, slots=True)
class Sitting:
    """The content of ``evaluation.json``."""

    model: str = ""
    """The fingerprint of the model's folder; empty for a model behind a server."""
    server: Mapping[str, Any] | None = None
    """Where that is, as the fields of ``Server``."""
    served: tuple[str, ...] = ()
    """The names by which the server called the model that answered."""
    seconds: float = 0.0

    @classmethod
    def read(cls, out: Path) -> Sitting | None:
        """Read the file, or return None where there is none.

        Raises ConfigError for one that cannot be understood.
        """
        path = out / "evaluation.json"
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**row, "served": tuple(row["served"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}: {error}): choose another --out"
            ) from error

    def write(self, out: Path) -> None:
        """Write the file.

        Raises ArealError where it cannot be written.
        """
        save_whole(out / "evaluation.json", json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Earlier:
    """The earlier sittings of an evaluation."""

    sitting: Sitting | None = None
    episodes: Mapping[Place, Trajectory] = field(default_factory=dict)
    seconds: float = 0.0
    served: tuple[str, ...] = ()

    def require_tasks(self, tasks: Sequence[Task], *, out: Path) -> None:
        """Raise ConfigError where a task is another one now than when its episode was played."""
        for (index, _), episode in sorted(self.episodes.items()):
            old, new = episode.task, tasks[index] if index < len(tasks) else None
            if new is None or (old.id, old.content_hash) != (new.id, new.content_hash):
                now = "there is none" if new is None else f"it is {new.id!r} with another content"
                raise ConfigError(
                    f"{out}: task {index} was {old.id!r} when it was played, and now {now}: the environment has "
                    "changed. Evaluate anew in another folder"
                )

    def require_model(self, model: str, *, out: Path, path: str) -> None:
        """Raise ConfigError where the model is another one, by its fingerprint."""
        if self.sitting is not None and self.episodes and self.sitting.model != model:
            raise ConfigError(
                f"{out} was begun with another model than {path} is now (its weights, tokenizer or template differ): "
                "evaluate anew in another folder"
            )


def refuse_used(out: Path) -> None:
    """Raise ConfigError where ``out`` holds an evaluation or a run.

    Two of them in one folder cannot be told apart.
    """
    for name in ("report.json", "trajectories", "metrics.jsonl"):
        path = out / name
        if path.is_file() or any(p.is_file() and p.stat().st_size for p in path.rglob("*")):
            said = f"{out} already holds an evaluation or a run ({name}): choose another --out, or remove that folder"
            if all((out / part).is_file() for part in ("config.toml", "evaluation.json")) and _has_episodes(out):
                said += f". The evaluation goes on with `areal-agents eval --resume {shlex.quote(str(out))}`"
            raise ConfigError(said)


def _has_episodes(out: Path) -> bool:
    path = shard_path(out, KIND, STEP)
    return any(p.is_file() and p.stat().st_size for p in (path, path.with_suffix(".jsonl")))


def refuse_training(out: Path) -> None:
    """Raise ConfigError where ``out`` holds a training run."""
    trained = any((out / name).exists() for name in ("commit.json", "metrics.jsonl"))
    if trained or ((out / "lock").exists() and not (out / "evaluation.json").exists()):
        raise ConfigError(f"{out} holds a training run: choose another folder for an evaluation")


@contextlib.contextmanager
def leaving_nothing(out: Path) -> Iterator[None]:
    """Remove the settings that a sitting has written to ``out``, where it fails before an episode is on the disk.

    The folder is then nobody's, whatever the next command is. Its journal must be open.
    """
    written = [path for name in _OF_A_START if not (path := out / name).exists()]
    try:
        yield
    except BaseException:
        if not _has_episodes(out):
            for path in written:
                with contextlib.suppress(OSError):  # the error that is raised matters more
                    path.unlink(missing_ok=True)
        raise


def read_earlier(config: TrainConfig) -> Earlier:
    """Read what earlier sittings left in ``config.out``, which is nothing where there were none.

    Its journal must be open, so that nobody adds to it meanwhile.

    Raises:
        ConfigError: the folder holds something else, or an evaluation with other settings.
        ArealError: an episode cannot be read.
    """
    out = config.out
    if not (out / "config.toml").is_file():
        refuse_used(out)
        return Earlier()
    episodes, seconds, served = read_episodes(out)
    if not episodes:
        refuse_used(out)  # a report without its episodes
        return Earlier()
    if changed := _changed(settings_of(out), config):
        raise ConfigError(
            f"{out} was begun with other settings:\n" + "\n".join(changed) + "\n"
            f"leave them out (areal-agents eval --resume {shlex.quote(str(out))}), or evaluate anew in another folder"
        )
    sitting = Sitting.read(out)
    if sitting is None:
        raise ConfigError(f"{out} lacks evaluation.json, which says what model was evaluated: evaluate anew elsewhere")
    return Earlier(sitting, episodes, max(seconds, sitting.seconds), tuple(sorted({*served, *sitting.served})))


def _changed(old: TrainConfig, new: TrainConfig) -> list[str]:
    remote = [c.model.path.startswith("openai:") for c in (old, new)]
    kept = [k for k in MAY_CHANGE if k != "model.path" or not any(remote)]
    return [
        f"  {key} was {was!r} and is {now!r} now"
        for key, (was, now) in differences(old, new).items()
        if training_only(key) is None and (key in MUST_STAY or not key.startswith(tuple(kept)))
    ]


def read_episodes(out: Path, kind: str = KIND, step: int = STEP) -> tuple[dict[Place, Trajectory], float, set[str]]:
    """Return the episodes by their places, the seconds that they took, and the names that the model had."""
    path, seconds, served = shard_path(out, kind, step), 0.0, set[str]()
    if path.exists():
        return {place_of(r.trajectory): r.trajectory for r in read_shard(path)}, seconds, served
    lines = path.with_suffix(".jsonl")
    found = read_lines(lines) if lines.exists() else []
    for _, row in found:
        seconds = max(seconds, float(row.get("elapsed", 0.0)))
        served |= set(row.get("served", ()))
    return {place_of(record.trajectory): record.trajectory for record, _ in found}, seconds, served


def place_of(trajectory: Trajectory) -> Place:
    """Read the place of an episode from its id.

    Raises ArealError for an id that an evaluation does not give.
    """
    if (found := _ID.fullmatch(trajectory.id)) is None:
        raise ArealError(f"{trajectory.id!r} is no episode of an evaluation: its id does not say which attempt it is")
    return int(found[1]), int(found[2])


def open_journal(out: Path) -> Journal:
    """Open the file that the coming episodes are added to, which nobody else then does.

    Raises ArealError where it cannot be written, and ConfigError while another process writes it.
    """
    return Journal(shard_path(out, KIND, STEP).with_suffix(".jsonl"))


def reopen(out: Path, journal: Journal) -> None:
    """Make lines again of a shard that is whole, because there is more to come.

    Raises ArealError where they cannot be written.
    """
    path = shard_path(out, KIND, STEP)
    if path.exists():
        journal.take_over(path)


def partial_note(out: Path, label: str = "") -> str | None:
    """Say that the evaluation in ``out`` is not complete, or return None where it is, or is none.

    ``label`` names one of a training's own.
    """
    if label:
        begun = [path for path in shards(out, f"eval-{label}") if path.suffix == ".jsonl"]
        return f"the evaluation {label!r} of {out} is not complete: `train --resume` plays the rest" if begun else None
    path = shard_path(out, KIND, STEP)
    if path.exists() or not path.with_suffix(".jsonl").exists() or not (out / "config.toml").is_file():
        return None
    e = settings_of(out).eval
    return f"{out} is not complete: {how_to_go_on(out, count_saved(out), e.n * e.k)}"


def fingerprint(folder: Path) -> str:
    """Return a hash that tells a model's folder from another model's, and from another training's.

    It covers names, sizes and a sample of the content: all of what is up to a megabyte, and blocks spread over longer
    files. Every weight of a trained model moves, so that blocks are enough.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not (path.suffix in _WEIGHTS or path.name.startswith(_BESIDE)):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _BLOCK * _BLOCKS:
                digest.update(file.read())
                continue
            for i in range(_BLOCKS):
                file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def tell(tracker: Tracker, config: TrainConfig, *, had: int, planned: int, torn: bool) -> None:
    """Say what there is to know before the first episode."""
    if torn:
        tracker.event("torn_line_cut")
        tracker.message("the last line was cut short when the evaluation was killed: its episode is played again")
    if had:
        tracker.event("resumed", episodes=had, of=planned)
        tracker.message(f"{had} of {planned} attempts are played already")
    if config.eval.k > 1 and config.eval.temperature == 0.0:
        tracker.message(f"note: {same_attempts(config.eval.k)}")
