"""A fine-tuning, from its data to the trained model.

    sources ─▶ Data ─▶ (DPO: log π_ref, once) ─▶ epochs of batches ─▶ FinetuneLearner ─▶ OUT/model
                                                     │
                                                     └─▶ held-out loss, checkpoints

A signal is looked at between two steps. Which examples a step sees follows from the seed and the step's number alone,
so a training that goes on is the uninterrupted one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from areal_agents.engines.local import threads_of
from areal_agents.errors import ConfigError, Interrupted
from areal_agents.evaluation.progress import Progress, Stopwatch
from areal_agents.finetune.config import DpoConfig, SftConfig
from areal_agents.finetune.data import Data, load_examples, load_pairs
from areal_agents.finetune.examples import Item, Sequences
from areal_agents.finetune.folder import (
    begin,
    how_to_go_on,
    read_reference,
    require_same_data,
    save_reference,
    write_settings,
)
from areal_agents.finetune.learner import FinetuneLearner, preference, preference_metrics
from areal_agents.learner.checkpoint import count_adapters, count_parameters
from areal_agents.learner.contract import Metrics
from areal_agents.models import resolve
from areal_agents.tracking.tracker import RESERVED, Tracker, read_metrics
from areal_agents.trainer.run_folder import Commit, RunFolder
from areal_agents.utils.openmp import warn_where_threads_spin
from areal_agents.utils.precision import is_slow, resolve_device, slow_format_note
from areal_agents.utils.signals import Stop, StopRequested, stop_on_signals

_AT_ONCE = 32
"""Examples whose log-probabilities are computed between two looks at the signals."""
_SHOW_EVERY = 5.0
"""Seconds."""
HOLDOUT = "holdout"
"""The kind of a held-out measurement in metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """The result of a finished fine-tuning."""

    out: Path
    model: Path
    """The folder of the trained model, which transformers loads."""
    steps: int
    holdout: tuple[tuple[int, dict[str, float]], ...]
    """Held-out measurements, each with its step."""
    seconds: float

    def table(self) -> str:
        """Return the held-out measurements as text for people."""
        if not self.holdout:
            return f"{self.steps} steps; nothing was held out"
        names = list(self.holdout[0][1])
        rows = [["step", *(f"held-out {name}" for name in names)]]
        rows += [[str(step), *(f"{values[name]:.4f}" for name in names)] for step, values in self.holdout]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


async def finetune(config: SftConfig | DpoConfig, *, resume: bool = False, console: bool = True) -> FinetuneResult:
    """Run ``config`` to its end.

    On the first SIGINT or SIGTERM the step is finished and saved, then Interrupted is raised.

    Args:
        config: the settings.
        resume: go on from the last commit in ``config.out``, if there is one.
        console: show progress.

    Raises:
        ArealError: anything failed. What was committed is whole, and can be gone on with.
    """
    watch = Stopwatch()
    with (
        RunFolder(config.out) as folder,
        stop_on_signals(print) as stop,
    ):
        stop.at_once = True  # until everything is open
        stop.farewell = lambda: _farewell(config, folder, stop)
        try:
            return await _begun(config, folder, stop, watch, resume=resume, console=console)
        except (StopRequested, asyncio.CancelledError) as error:
            if not stop.requested:
                raise
            raise Interrupted(_farewell(config, folder, stop)) from error


async def _begun(
    config: SftConfig | DpoConfig, folder: RunFolder, stop: Stop, watch: Stopwatch, *, resume: bool, console: bool
) -> FinetuneResult:
    commit = begin(folder, config, resume=resume)
    if commit is None or not commit.complete:
        model = resolve(config.model)
        data = await _read(config, model, stop, show=console)
        if commit is not None:
            require_same_data(config.out, config, data)
        total = config.epochs * math.ceil(len(data.train) / config.batch)
        _require(config, folder, model, total)
        async with _open(config, folder, stop, data, commit, total, console=console) as run:
            await run.run()
    done = folder.read_commit() or Commit()
    rows = read_metrics(config.out, kind=HOLDOUT)
    measured = tuple((row["step"], {k: v for k, v in row.items() if k not in RESERVED}) for row in rows)
    return FinetuneResult(config.out, config.out / "model", done.step, measured, watch.seconds)


async def _read(config: SftConfig | DpoConfig, model: Path, stop: Stop, *, show: bool) -> Data[Any]:
    seen = _Reading(stop, show=show)
    if isinstance(config, SftConfig):
        return await asyncio.to_thread(load_examples, config, model, seen=seen)
    return await asyncio.to_thread(load_pairs, config, model, seen=seen)


def _require(config: SftConfig | DpoConfig, folder: RunFolder, model: Path, total: int) -> None:
    """Raise ConfigError for settings that do not fit the data, this machine or the disk."""
    if config.warmup_steps > total:
        raise ConfigError(
            f"--warmup-steps is {config.warmup_steps}, and the training has {total} steps: set it to {total} at most"
        )
    threads_of("--threads", config.threads)
    parameters = count_parameters(model)
    trained = min(parameters, count_adapters(model, config.lora_rank)) if config.lora_rank else parameters
    folder.require_room(parameters, trained=trained, checkpoint=True)


class _Reading:
    """A count of what is read, shown now and then. A stop ends the reading."""

    def __init__(self, stop: Stop, *, show: bool) -> None:
        self._stop, self._show, self._watch = stop, show, Stopwatch()
        self._count, self._last = 0, 0.0

    def __call__(self) -> None:
        if self._stop.requested:
            raise StopRequested
        self._count += 1
        if self._show and self._watch.seconds - self._last >= _SHOW_EVERY:
            self._last = self._watch.seconds
            print(f"reading: {self._count} lines and episodes", flush=True)


@contextlib.asynccontextmanager
async def _open(
    config: SftConfig | DpoConfig, folder: RunFolder, stop: Stop, data: Data[Any], commit: Commit | None, total: int,
    *, console: bool,
) -> AsyncIterator[_Run]:  # fmt: skip
    model, done = resolve(config.model), commit or Commit()
    warn_where_threads_spin()
    with Tracker(
        config.out, steps=total, first_step=done.step, tensorboard=config.tensorboard, wandb=config.wandb,
        config=config.model_dump(mode="json"), mark=None if commit is None else commit.mark, console=console,
    ) as tracker:  # fmt: skip
        for line in data.lines():
            tracker.message(line)
        if is_slow(config.precision, gpu=resolve_device(config.device).type == "cuda"):
            tracker.event("slow_format", settings=["--precision"])
            tracker.message(slow_format_note(["--precision"]))
        learner = await asyncio.to_thread(
            FinetuneLearner,
            model,
            learner=config.learner,
            total_steps=total,
            seed=config.seed,
            threads=threads_of("--threads", config.threads),
        )
        try:
            run = _Run(config, folder, stop, data, learner, tracker, done, total)
            write_settings(config.out, config, data)
            await run.find_reference(stored=commit is not None)  # before a checkpoint replaces the starting model
            if commit is None:
                await run.begin()
            if done.checkpoint is not None:
                await learner.load(folder.learner_folder(done))
                tracker.event("resumed", step=done.step, changed={})
                tracker.message(f"resumed at step {done.step} of {total}")
            stop.at_once = False
            yield run
        finally:
            await learner.close()


@dataclass
class _Run:
    """The parts of one fine-tuning, and what it does with them."""

    config: SftConfig | DpoConfig
    folder: RunFolder
    stop: Stop
    data: Data[Any]
    learner: FinetuneLearner
    tracker: Tracker
    commit: Commit
    total: int
    reference: dict[int, NDArray[np.float64]] | None = None
    """log π_ref of a pair's sides, by the pair's identity. None where nothing needs it."""

    async def run(self) -> None:
        """Do the steps that are left, and export the model."""
        every = self.config.save_every
        if self.learner.version == 0 and self.commit.checkpoint is None:  # else it was measured before it was saved
            await self._measure()
        self.tracker.start_clock()
        while (step := self.learner.version) < self.total:
            if self.stop.requested:
                await self._save()
                raise StopRequested
            await self._step(step)
            if self._measures(step + 1):
                await self._measure()
            if every and (step + 1) % every == 0 and step + 1 < self.total:
                await self._save()
        await self._save()
        await self.learner.export(self.config.out / "model")
        mark = await asyncio.to_thread(self.tracker.mark)
        self._commit(Commit(self.total, self.commit.checkpoint, mark=mark, complete=True))

    async def begin(self) -> None:
        """Commit that nothing is done yet: from here on the folder is a training's."""
        self._commit(Commit(mark=await asyncio.to_thread(self.tracker.mark)))

    async def find_reference(self, *, stored: bool) -> None:
        """Compute log π of every sequence under the starting model, and store it. Where it is ``stored``, read it."""
        if not isinstance(self.config, DpoConfig):
            return
        items = [*self.data.train, *self.data.holdout]
        sides = [side for item in items for side in item.sides]
        sums = read_reference(self.config.out, len(sides), self.data.fingerprint) if stored else None
        if sums is None:
            sums = await self._sums(sides, Progress(self.tracker.message, label="reference", what="sequences"))
            save_reference(self.config.out, sums, self.data.fingerprint)
        self.reference = {id(item): sums[2 * i : 2 * i + 2] for i, item in enumerate(items)}

    async def _sums(self, sides: Sequence[Sequences], progress: Progress | None = None) -> NDArray[np.float64]:
        found: list[NDArray[np.float64]] = [np.zeros(0)]
        for start in range(0, len(sides), _AT_ONCE):
            found.append(await self.learner.sums(sides[start : start + _AT_ONCE]))
            if progress is not None:
                progress(min(start + _AT_ONCE, len(sides)), len(sides))
        return np.concatenate(found)

    async def _step(self, step: int) -> None:
        items = batch_of(self.data.train, step, batch=self.config.batch, seed=self.config.seed)
        sides = [side for item in items for side in item.sides]
        if isinstance(self.config, DpoConfig):
            metrics = await self.learner.prefer(
                sides, self._reference_of(items), beta=self.config.beta, label_smoothing=self.config.label_smoothing
            )
        else:
            metrics = await self.learner.imitate(sides)
        steps = self.total // self.config.epochs
        more = {"examples": float(len(items)), "epoch": (step + 1) / steps}
        self.tracker.log(step + 1, metrics | more, kind=self.config.method)

    def _reference_of(self, items: Sequence[Item]) -> NDArray[np.float64]:
        assert self.reference is not None
        return np.concatenate([self.reference[id(item)] for item in items])

    def _measures(self, step: int) -> bool:
        """Say whether the held-out loss is due after ``step``."""
        every = self.config.eval_every or self.total // self.config.epochs
        return step % every == 0 or step == self.total

    async def _measure(self) -> None:
        items = self.data.holdout
        if not items:
            return
        sides = [side for item in items for side in item.sides]
        sums = await self._sums(sides)
        if isinstance(self.config, DpoConfig):
            found: Metrics = preference_metrics(
                preference(
                    torch.from_numpy(sums), torch.from_numpy(self._reference_of(items)), beta=self.config.beta,
                    label_smoothing=self.config.label_smoothing,
                )
            )  # fmt: skip
        else:
            found = {"loss": -float(sums.sum()) / sum(side.tokens for side in sides)}
        self.tracker.log(self.learner.version, found, kind=HOLDOUT)

    async def _save(self) -> None:
        step = self.learner.version
        if self.commit.checkpoint is not None and self.commit.step == step:
            return
        watch = Stopwatch()
        mark = await asyncio.to_thread(self.tracker.mark)
        name = await self.folder.save(step, self.learner, None)
        self._commit(Commit(step, name, mark=mark))
        self.tracker.event("checkpoint", step=step, path=str(self.folder.checkpoints / name), seconds=watch.seconds)

    def _commit(self, commit: Commit) -> None:
        self.folder.commit(commit)
        self.commit = commit


def batch_of(items: Sequence[Any], step: int, *, batch: int, seed: int) -> list[Any]:
    """Return the items of one step.

    Each epoch visits all of them once, in an order of its own. Its last batch may be smaller.

    Args:
        items: all that train.
        step: from 0, over all epochs.
        batch: items a step.
        seed: the training's.
    """
    steps = math.ceil(len(items) / batch)
    epoch, place = divmod(step, steps)
    order = np.random.default_rng([seed, 4, epoch]).permutation(len(items))
    return [items[i] for i in order[place * batch : (place + 1) * batch]]


def _farewell(config: SftConfig | DpoConfig, folder: RunFolder, stop: Stop) -> str:
    commit = folder.read_commit()
    if commit is None:
        return f"stopped by {stop.name} before anything was saved"
    return f"stopped by {stop.name}; step {commit.step} is saved. Go on with:\n  {how_to_go_on(config)}"
