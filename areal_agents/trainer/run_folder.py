"""The surviving lineage of a run, which is what is committed and what a run goes on from.

    OUT/lock                            held by the process that writes this folder
    OUT/commit.json                     which checkpoint, how much of the logs, which evaluations belong to the run
    OUT/checkpoints/step-000010/        learner/ (weights, optimizer), rollouts.json, groups.parquet
    OUT/reports.json                    the held-out evaluations, for people

``commit.json`` is the commit point. It is replaced by one rename, after everything that it names is on the disk. What
is not in it did not happen. On resume the logs are cut back to it, and what it does not name is removed. So a kill at
any moment costs the steps since the last commit and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from areal_agents.errors import CheckpointError, ConfigError
from areal_agents.evaluation.report import EvalReport
from areal_agents.learner.contract import Learner
from areal_agents.rollout.producer import RolloutState
from areal_agents.tracking.trajectories import read_shard
from areal_agents.trainer.rollout_state import rollouts_from_json, write_rollouts
from areal_agents.utils.files import atomic_folder, is_full, room_to_make, size_text, unwritable, write_atomically

COMMIT_VERSION = 1
_CHECKPOINT_BYTES = 12
"""Of one parameter that trains: the weight and two moments, in fp32."""
_MODEL_BYTES = 2
"""Of one parameter of the trained model, at least."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The content of ``commit.json``."""

    step: int = 0
    """Learner steps done."""
    checkpoint: str | None = None
    """Name of the folder in ``checkpoints/``. With None the base model is still untouched."""
    warm_started: bool = False
    mark: Mapping[str, Any] = field(default_factory=dict)
    """``Tracker.mark()``: how much of the logs belongs to the lineage."""
    reports: Mapping[str, EvalReport] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failed attempts so far, by kind."""
    complete: bool = False
    weights: str = ""
    """A name for the checkpoint's weights, which no others have. Empty for the base model's."""

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": COMMIT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Commit:
        """Read the content of ``commit.json``.

        Raises CheckpointError for another schema version.
        """
        values = dict(row)
        if (version := values.pop("schema_version", None)) != COMMIT_VERSION:
            raise CheckpointError(f"commit.json has schema_version {version}, this package reads {COMMIT_VERSION}")
        reports = {label: EvalReport.from_json(report) for label, report in values.pop("reports").items()}
        return cls(**values, reports=reports)


class NotShared(CheckpointError):
    """The learner wrote where this process cannot see it."""


def require_shared(folder: Path) -> None:
    """Raise NotShared where ``folder``, which the learner has just written on its node, is not here."""
    if not folder.is_dir():
        raise NotShared(
            f"the learner wrote {folder} on its own node, and here it is not: `out` must lie on a file system that is "
            "shared with the learner's node. Set it there and begin anew, or run the learner on this node"
        )


_OF_A_RUN = ("config.toml", "commit.json")
_OF_A_START = frozenset({"lock", "events.jsonl", "metrics.jsonl", "tensorboard", "weights", "control", "wandb.json"})
"""What a run may have written before its ``config.toml``."""


class RunFolder:
    """``config.out`` as the run's owner sees it, with a lock, the commit point and the checkpoints.

    It is a context manager, which holds the lock.

    Args:
        out: the folder.
        keep: how many of the newest checkpoints to keep.
        keep_every: a checkpoint whose step is a multiple of this is kept for ever. 0 means none is.
    """

    def __init__(self, out: Path, *, keep: int = 1, keep_every: int = 0) -> None:
        self.out, self.keep, self.keep_every = out, keep, keep_every
        self.checkpoint_bytes = 0
        """About what a checkpoint takes on the disk, once the model is known."""
        self._lock: BinaryIO | None = None
        self._made: list[Path] = []
        """The folders that the lock's taking made, the innermost first."""
        self._had: frozenset[str] = frozenset()
        """What was in the folder before."""

    @property
    def was_locked(self) -> bool:
        """Whether a run had its lock here before this one."""
        return "lock" in self._had

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def __enter__(self) -> Self:
        """Take the lock.

        Raises ConfigError while another process holds it, or where nothing can be written there. The kernel frees the
        lock of a dead one.
        """
        try:
            self._made = [f for f in (self.out, *self.out.parents) if not f.exists()]
            self.out.mkdir(parents=True, exist_ok=True)
            self._had = frozenset(path.name for path in self.out.iterdir())
            self._lock = self._take()
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n".encode())
        except OSError as error:
            room = f"{room_to_make(self.out)}, or " if is_full(error) else ""
            self._lose()
            if self._lock is not None:
                self._lock.close()
            raise ConfigError(
                f"out = {self.out}: this folder cannot be written ({error.strerror}): {room}choose another --out"
            ) from error
        return self

    def require_room(self, parameters: int, *, trained: int | None = None, checkpoint: bool) -> None:
        """Raise ConfigError where the disk has no room for what the run will write for certain.

        That is the model of all ``parameters``, and where ``checkpoint`` is true a checkpoint of those that are
        ``trained``. None means all.
        """
        trained = parameters if trained is None else trained
        self.checkpoint_bytes = trained * _CHECKPOINT_BYTES
        need = parameters * _MODEL_BYTES + (self.checkpoint_bytes if checkpoint else 0)
        if (free := shutil.disk_usage(self.out).free) < need:
            what = "a checkpoint and the trained model" if checkpoint else "the trained model"
            raise ConfigError(
                f"out = {self.out}: {size_text(free)} are free there, and {what} take about {size_text(need)}: free "
                "some space on that disk, or choose another --out"
            )

    def _take(self) -> BinaryIO:
        import fcntl  # not on every system, and only a training needs it

        path = self.out / "lock"
        while True:
            lock = path.open("a+b", buffering=0)  # unbuffered: no later close writes what a full disk refused
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                    return lock
                lock.close()  # a start that failed has removed this file meanwhile
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().decode(errors="replace").strip() or "unknown"
                lock.close()
                raise ConfigError(
                    f"{self.out} is in use by process {holder}: wait for it, or choose another --out"
                ) from error
            except OSError as error:
                lock.close()
                text = f"the file system of {self.out} has no locks ({error}): choose another --out"
                raise ConfigError(text) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and not any((self.out / name).exists() for name in _OF_A_RUN):
            self._lose()
        if self._lock is not None:
            self._lock.close()

    def _lose(self) -> None:
        """Remove what a start that failed has left, and nothing that was there before."""
        for path in (self.out / name for name in _OF_A_START - self._had if self._lock is not None):  # else another's
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody has put something there meanwhile
            for folder in self._made:
                folder.rmdir()

    # --- reading ---------------------------------------------------------------------------------------------------

    def read_commit(self) -> Commit | None:
        """Read what is committed, or None where nothing is.

        Raises CheckpointError for a file that cannot be understood.
        """
        path = self.out / "commit.json"
        try:
            return Commit.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if self.checkpoints.is_dir() and any(_step_of(f.name) is not None for f in self.checkpoints.iterdir()):
                # No moment of a run leaves this: the first commit comes before the first checkpoint.
                raise CheckpointError(
                    f"{self.out} holds checkpoints but no commit.json, without which nothing says what belongs to the "
                    "run: put the file back, or start a new run in another folder"
                ) from None
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}: {error}): put a copy back, or start a new run"
            ) from error

    def write_settings(self, toml: str) -> None:
        """Replace ``config.toml``.

        Raises CheckpointError where it cannot be written, and then the old one stays.
        """
        try:
            write_atomically(self.out / "config.toml", toml)
        except OSError as error:
            raise CheckpointError(str(unwritable(self.out / "config.toml", error))) from error

    def clean(self, commit: Commit) -> None:
        """Remove checkpoints that were never committed, and the remains of half-written folders."""
        for folder in self.out.glob(".model.*"):
            shutil.rmtree(folder, ignore_errors=True)
        if not self.checkpoints.is_dir():
            return
        for folder in self.checkpoints.iterdir():
            step = _step_of(folder.name)
            if step is None or step > commit.step or (step == commit.step and folder.name != commit.checkpoint):
                shutil.rmtree(folder, ignore_errors=True)

    def read_rollouts(self, commit: Commit) -> RolloutState | None:
        """Read the rollout state of the committed checkpoint.

        It is None for a checkpoint from before the first RL step began.
        """
        assert commit.checkpoint is not None
        folder = self.checkpoints / commit.checkpoint
        try:
            row = json.loads((folder / "rollouts.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} is incomplete: {error}") from error
        return None if row is None else rollouts_from_json(row, read_shard(folder / "groups.parquet"))

    def learner_folder(self, commit: Commit) -> Path:
        assert commit.checkpoint is not None
        return self.checkpoints / commit.checkpoint / "learner"

    def set_model_aside(self, step: int) -> None:
        """Rename ``OUT/model`` to ``OUT/model-step-N``, where a run goes on that was finished at step N.

        Raises CheckpointError.
        """
        model, aside = self.out / "model", self.out / f"model-step-{step}"
        try:
            if model.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(model, aside)
        except OSError as error:
            raise CheckpointError(f"{model} cannot be renamed to {aside}: {error}") from error

    # --- writing ---------------------------------------------------------------------------------------------------

    async def save(self, step: int, learner: Learner, rollouts: RolloutState | None) -> str:
        """Write the checkpoint of ``step``, complete or not at all, and return its name.

        It counts once it is committed. Raises CheckpointError where it cannot be written, and then the committed one is
        untouched.
        """
        name = f"step-{step:06d}"
        try:
            with atomic_folder(self.checkpoints / name) as folder:
                await learner.save(folder / "learner")
                require_shared(folder / "learner")
                await asyncio.to_thread(write_rollouts, folder, rollouts)
        except NotShared:  # space would not help, and its own message says what does
            raise
        except (OSError, RuntimeError, CheckpointError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be saved: {self._refused(self.checkpoints, error)}"
            ) from error
        return name

    def commit(self, commit: Commit) -> None:
        """Make ``commit`` the state of the run, then remove the checkpoints that the policy does not keep."""
        try:
            reports = {label: r.to_json() for label, r in commit.reports.items()}
            write_atomically(self.out / "reports.json", json.dumps(reports, indent=2) + "\n")
            # The commit point comes after everything that belongs to it.
            write_atomically(self.out / "commit.json", json.dumps(commit.to_json(), indent=1) + "\n")
        except OSError as error:
            raise CheckpointError(self._refused(self.out / "commit.json", error)) from error
        self._prune(commit)

    def _refused(self, path: Path, error: Exception) -> str:
        """Say that ``path`` cannot be written, and that nothing is lost."""
        if isinstance(error, CheckpointError) and not is_full(error):  # the learner's, which names file and action
            return f"{error}. What was committed before is whole"
        need = self.checkpoint_bytes if path == self.checkpoints else 0
        return f"{unwritable(path, error, need=need)}. What was committed before is whole"

    def _prune(self, commit: Commit) -> None:
        if not self.checkpoints.is_dir():
            return
        found = {step: f for f in self.checkpoints.iterdir() if (step := _step_of(f.name)) is not None}
        newest = sorted((s for s in found if s <= commit.step), reverse=True)[: self.keep]
        for step, folder in found.items():
            forever = self.keep_every and step and step % self.keep_every == 0
            if step not in newest and not forever and folder.name != commit.checkpoint:
                shutil.rmtree(folder, ignore_errors=True)


def _step_of(name: str) -> int | None:
    digits = name.removeprefix("step-")
    return int(digits) if name.startswith("step-") and digits.isdecimal() else None
