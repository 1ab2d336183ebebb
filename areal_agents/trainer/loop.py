"""Training, in one sitting.

    TaskStream ─▶ Rollouts ─▶ Buffer ─▶ next_batch ─▶ advantages ─▶ learner.step ─▶ (checkpoint, evaluation)
                     ▲                                                   │ version v+1
                     └── engine ◀── update_weights ◀── publish ──────────┘

``learn`` waits for a batch (unblocked by finished groups), then for the learner's thread, then for the engine's
acknowledgement. Rollouts go on all the while, as far as the staleness bound lets them. A signal is looked at between
two steps; what is on the disk then, and how a run goes on from it, is in ``trainer/run_folder.py``.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from areal_agents import settings
from areal_agents.algorithms.token_credit import teacher_metrics
from areal_agents.errors import Interrupted, LearnerLost
from areal_agents.evaluation.held_out import as_begun
from areal_agents.evaluation.progress import Stopwatch
from areal_agents.evaluation.report import EvalReport, compare_table
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.producer import Rollouts
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.backend import slow_formats
from areal_agents.trainer.batches import batch_for
from areal_agents.trainer.credit import credit_metrics, signal_of
from areal_agents.trainer.evaluation import log_kept
from areal_agents.trainer.parts import means_table, source_of
from areal_agents.trainer.preflight import Looks, look_at_tasks, require_runnable
from areal_agents.trainer.resize import answering
from areal_agents.trainer.resume import begin, rate_change, refuse_evaluation
from areal_agents.trainer.rollout_metrics import env_metrics, rollout_metrics
from areal_agents.trainer.run import Run, open_run
from areal_agents.trainer.run_folder import Commit, RunFolder, require_shared
from areal_agents.trainer.teacher import require_teacher
from areal_agents.types import Group
from areal_agents.utils.precision import slow_format_note
from areal_agents.utils.signals import Stop, StopRequested, stop_on_signals


@dataclass(frozen=True, slots=True)
class RunResult:
    """The result of a finished run."""

    out: Path
    model: Path
    """The folder of the trained model, which transformers loads."""
    reports: dict[str, EvalReport]
    """Held-out evaluations: ``before``, ``warm_start`` (where there was one), ``after_rl``, ``step_N``. Of several
    environments each has its own, ``before.LABEL``."""
    seconds: float
    means: str = ""
    """What the evaluations of several environments are in the mean, as text for people."""

    def table(self) -> str:
        """Return the evaluations side by side, as text for people."""
        return compare_table(self.reports) + self.means


async def train(config: TrainConfig, *, resume: bool = False, console: bool = True) -> RunResult:
    """Run ``config`` to its end.

        config = areal_agents.TrainConfig.model_validate({"steps": 20, "env": {"id": "my_envs:Scales"}})
        result = asyncio.run(areal_agents.train(config))  # in a notebook: await areal_agents.train(config)
        print(result.table())

    A learner that is lost (``cluster.backend = "ray"``) is replaced. The run then goes on from its last commit, at most
    ``cluster.learner_restarts`` times.

    On the first SIGINT or SIGTERM the step is finished and saved, then Interrupted is raised. On the second it is
    raised at once, and on the first too while engines and learner still start.

    Args:
        config: the settings.
        resume: go on from the last commit in ``config.out``, if there is one.
        console: show progress.

    Raises:
        ArealError: anything failed. ``config.out`` keeps everything until then, and a run that committed a step can be
            resumed.
    """
    watch = Stopwatch()
    refuse_evaluation(config.out)
    if resume:
        config = as_begun(config, config.out)
    require_runnable(config)  # before all else: a typo must not wait for a model, nor leave a folder
    await require_teacher(config)
    looks = await _looked(config)
    with RunFolder(config.out, keep=config.checkpoint.keep, keep_every=config.checkpoint.keep_every) as folder:
        commit, changes = begin(folder, config, resume=resume)
        lives = _Lives(config, looks)
        while commit is None or not commit.complete:
            with stop_on_signals(print) as stop:
                stop.farewell = partial(_how_to_go_on, lives.config, folder, stop)
                stop.at_once = True  # until everything is open
                try:
                    reports = await _run(lives, folder, commit, stop, changes=changes, console=console)
                    break
                except (StopRequested, asyncio.CancelledError) as error:
                    if not stop.requested:
                        raise
                    raise Interrupted(_how_to_go_on(config, folder, stop)) from error
                except LearnerLost as error:
                    lives.lost.append(str(error))
                    if stop.requested or len(lives.lost) > config.cluster.learner_restarts:
                        raise
            commit, changes = begin(folder, lives.config, resume=True)
        else:  # the commit says that nothing is left to do
            reports = dict(commit.reports)
    return RunResult(config.out, config.out / "model", reports, watch.seconds, means_table(config, reports))


@dataclass
class _Lives:
    """The state that a run carries from one learner to the next."""

    config: TrainConfig
    """As ``areal-agents resize`` has changed it."""
    looks: Looks
    lost: list[str] = field(default_factory=list)
    """Why the learners before this one ended."""


async def _looked(config: TrainConfig) -> Looks:
    with stop_on_signals(print, doing="stopping") as stop:
        try:
            return await stop.race(look_at_tasks(config))
        except StopRequested as error:
            raise Interrupted(f"stopped by {stop.name} before anything was begun") from error


async def _run(
    lives: _Lives,
    folder: RunFolder,
    commit: Commit | None,
    stop: Stop,
    *,
    changes: Mapping[str, tuple[object, object]],
    console: bool,
) -> dict[str, EvalReport]:
    """Run all phases, except those that the commit has already."""
    async with open_run(lives.config, folder, stop, commit=commit, console=console) as run, answering(run):
        stop.at_once = False
        try:
            folder.write_settings(settings.dump(run.config))  # a resize may have come while it was opened
            for part in run.parts:
                look = lives.looks.parts[part.label]
                run.leave_out(part, look.train, look.held_out, tell=commit is None)
            if not lives.lost and (slow := slow_formats(run.config)):  # once, and not for each learner
                run.tracker.event("slow_format", settings=slow)
                run.tracker.message(slow_format_note(slow))
            if commit is None:
                lives.looks.tell(run.tracker)
            if commit is not None:
                if lost := lives.lost:
                    run.tracker.event("learner_replaced", reason=lost[-1], times=len(lost))
                run.tracker.event("resumed", step=commit.step, changed={k: new for k, (_, new) in changes.items()})
                run.tracker.message(f"resumed at step {commit.step} of {run.config.steps}")
                log_kept(run)
                if rate := rate_change(run.config, changes, commit.step):
                    run.tracker.event("learning_rate_changed", step=rate.step, old=rate.old, new=rate.new)
                    run.tracker.message(rate.text)
            return await _phases(run)
        finally:  # also where the learner is lost: the next one keeps the sizes that a resize gave
            lives.config = run.config


async def _phases(run: Run) -> dict[str, EvalReport]:
    config, stop = run.config, run.stop
    if config.eval.baseline:
        await stop.race(run.evaluate("before"))
    if config.warm_start.demonstrations:
        if not run.warm_started:
            await stop.race(run.warm_start())
            await run.save(None)
        if config.eval.baseline:
            await stop.race(run.evaluate("warm_start"))
    await learn(run)
    await run.learner.export(config.out / "model")
    require_shared(config.out / "model")
    await stop.race(run.evaluate("after_rl", step=config.steps))  # last: what ends it for good is right behind
    await run.finish()
    return dict(run.reports)


def _how_to_go_on(config: TrainConfig, folder: RunFolder, stop: Stop) -> str:
    name = stop.name
    if not (config.out / "config.toml").exists():
        return f"stopped by {name} before anything was begun"
    commit = folder.read_commit() or Commit()
    saved = f"step {commit.step} of {config.steps} is saved" if commit.step else "no step was finished"
    file = shlex.quote(str(config.out / "config.toml"))
    return f"stopped by {name}; {saved}. Go on with:\n  areal-agents train {file} --resume"


async def learn(run: Run) -> None:
    """Run the RL phase, which learns from batches up to ``steps`` while rollouts go on."""
    config, r, every = run.config, run.config.rollout, run.config.checkpoint.every
    if run.learner.version >= config.steps:
        return
    compares = any(runner.has_greedy for runner in run.runners.values())
    buffer = Buffer(
        groups=r.groups, group_size=r.group_size + compares, max_staleness=r.staleness,
        concurrency=r.concurrency, on_exceed=r.on_exceed, order=r.order, total_batches=config.steps,
        max_refills=r.max_refills if r.dynamic_sampling else 0,
    )  # fmt: skip
    tell = {label: runner.leave_out for label, runner in run.runners.items()}
    rollouts = Rollouts(
        buffer,
        source_of(config, run.parts, left_out=run.left_out, tell=tell),
        run.runners,
        seed=config.seed,
        event=run.tracker.event,
        has_signal=signal_of(config.algorithm) if r.dynamic_sampling else None,
        say=run.tracker.message,
    )
    try:
        _restore(run, rollouts)
        run.watch_rewards()
        rollouts.start()
        run.rollouts = rollouts
        run.tracker.start_clock()
        for step in range(run.learner.version + 1, config.steps + 1):
            await run.stop.race(_evaluate_if_due(run, step - 1))
            watch = Stopwatch()
            groups = await run.stop.race(rollouts.next_batch())
            await _step(run, step, groups, rollouts, watch)
            if every and step % every == 0:
                await run.save(rollouts)
        await run.save(rollouts)
    except StopRequested:  # the one place that saves for a stop, wherever in a step it came
        await run.save(rollouts)
        raise
    finally:
        run.rollouts = None  # before the wait: a resize must not start episodes on rollouts that end
        await rollouts.close()


def _restore(run: Run, rollouts: Rollouts) -> None:
    state = run.folder.read_rollouts(run.commit) if run.commit.checkpoint is not None else None
    if state is None:
        return
    rollouts.restore(state)
    size = rollouts.buffer.group_size
    run.tracker.event(
        "rollouts_restored",
        buffered=len(state.buffer.buffered),
        open=len(state.open),
        finished=sum(len(g.finished) for g in state.open),
        restarted=sum(size - len(g.finished) for g in state.open),
        left_out=state.tasks.bad,
    )


async def _evaluate_if_due(run: Run, step: int) -> None:
    """Evaluate between two steps, every ``eval.every`` of them.

    The end is evaluated by ``_phases``.
    """
    every = run.config.eval.every
    if every and step and step % every == 0:
        await run.evaluate(f"step_{step}", step=step)


async def _step(run: Run, step: int, groups: list[Group], rollouts: Rollouts, watch: Stopwatch) -> None:
    waited = watch.seconds
    batch = await batch_for(
        run.learner, groups, run.config.algorithm, temperature=run.config.rollout.temperature, teacher=run.teacher
    )
    metrics = dict(await run.learner.step(batch))
    update = await run.publish()
    run.renew_weights()
    rollouts.consumed(groups)
    rollouts.acknowledge(run.learner.version)
    metrics |= (
        rollout_metrics(groups, batch.version)
        | credit_metrics(groups, run.config.algorithm)
        | teacher_metrics(batch)
        | {
            "wait_seconds": waited,
            "step_seconds": watch.seconds,
            "update_seconds": update,
            "queue": float(rollouts.buffer.buffered),
            "running": float(rollouts.buffer.running),
            "discarded": float(rollouts.buffer.discarded),
            "dropped": float(len(rollouts.buffer.dropped)),
            "refilled": float(rollouts.buffer.refilled),
            "failed_attempts": float(run.budget.kinds.total()),
            "tasks_left_out": float(rollouts.tasks.left_out),
        }
        | env_metrics(run.parts, groups, batch.version, rollouts, passes=run.config.curriculum.passes)
    )
    metrics["tokens_per_second"] = metrics["sampled_tokens"] / watch.seconds
    run.tracker.trajectories.write([t for g in groups for t in g.trajectories], step=step, kind="train")
    if greedy := [g.greedy for g in groups if g.greedy is not None]:
        run.tracker.trajectories.write(greedy, step=step, kind="greedy")
    run.tracker.log(step, metrics)
    run.look_at_rewards(step, metrics, groups)
