"""The held-out evaluations of a training, on its own engines.

    play ──▶ OUT/trajectories/eval-LABEL/step-000010.jsonl ──▶ step-000010.parquet, report

Every episode is on the disk as it ends. A run that was stopped or killed meanwhile goes on with those of the weights
that it goes on with: each line says of what weights and settings it is (``measured``).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from areal_agents.evaluation.attempts import Place, run_attempts
from areal_agents.evaluation.held_out import held_out
from areal_agents.evaluation.progress import Progress, Stopwatch
from areal_agents.evaluation.report import EvalReport, Lost, summarize
from areal_agents.evaluation.unfinished import MUST_STAY, fingerprint, read_episodes
from areal_agents.rollout.group_judge import group_reward_of
from areal_agents.rollout.tasks import require_few_bad
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.differences import plain_key, values
from areal_agents.tracking.journal import Journal
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import Record, shard_path
from areal_agents.trainer.parts import Part, mean_numbers, means_text, split_label
from areal_agents.trainer.resume import MAY_CHANGE
from areal_agents.trainer.run_folder import Commit
from areal_agents.types import Task, Trajectory

if TYPE_CHECKING:
    from areal_agents.trainer.run import Run


def weights_of(commit: Commit) -> str:
    """Return the name of a commit's weights."""
    # Commits of earlier versions name none. Theirs are like no others, but for the base model's.
    return commit.weights or ("" if commit.checkpoint is None else uuid.uuid4().hex)


def measured(config: TrainConfig, weights: str, model: Path) -> str:
    """Return a text that is the same for two evaluations of the same weights with the same settings.

    Args:
        config: the run's settings. Those that a resumed run may always change leave the text as it is.
        weights: their name.
        model: the folder of the base model.
    """
    plain = {k: plain_key(k) for k in values(config)}
    kept = {k: v for k, v in values(config).items() if plain[k] in MUST_STAY or not plain[k].startswith(MAY_CHANGE)}
    said = json.dumps([weights, fingerprint(model), kept], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


async def evaluate_weights(run: Run, part: Part, label: str, *, step: int) -> EvalReport:
    """Evaluate the weights that the engine serves, and record the report and every episode.

    Args:
        run: the run, which updates no weights meanwhile.
        part: the environment to evaluate on.
        label: the evaluation's name.
        step: the learner steps that are done, for the records.
    """
    config, e, kind = part.settings(run.config), run.config.eval, f"eval-{label}"
    bad: dict[str, str] = {}
    tasks, sample = held_out(part.spec, e, difficulty=config.env.difficulty, tell=bad.__setitem__)
    require_few_bad(bad, tried=e.n, share=config.rollout.max_bad_tasks)
    of = measured(run.config, run.weights, run.model)
    journal = Journal(shard_path(config.out, kind, step).with_suffix(".jsonl"))
    try:
        saved, before = _earlier(run, journal, tasks, label=label, step=step)
        watch = Stopwatch(before=before)

        def scored(trajectory: Trajectory) -> None:
            record = Record(kind, step, trajectory)
            run.tracker.trajectories.append(journal, record, elapsed=watch.seconds, of=of)

        runner = run.runner_of(part, run.engine_player(part, e.temperature), group_reward=group_reward_of(part.spec))
        try:
            for id, reason in (bad | run.held_out_bad.get(part.label, {})).items():
                runner.leave_out(id, reason)
            results = await run_attempts(
                runner, tasks, k=e.k, concurrency=config.engine.max_batch * config.engine.replicas, seed=config.seed,
                label=kind, saved=saved, scored=scored, max_bad=config.rollout.max_bad_tasks,
                progress=Progress(run.tracker.message, label=f"evaluating ({label})", before=len(saved)),
            )  # fmt: skip
        finally:
            await runner.close()
        report = summarize(
            results, env=config.env.id, split=e.split, model=config.model.path, version=run.learner.version,
            temperature=e.temperature, seed=config.seed, seconds=watch.seconds, k=e.k, sample=sample,
            lost=Lost(runner.first_given_up, runner.own_failures, runner.left_out),
        )  # fmt: skip
        episodes = [t for _, tries in results for t in tries if t is not None]
        run.tracker.trajectories.write(episodes, step=step, kind=kind)
    finally:
        run.tracker.trajectories.end(journal)
    run.tracker.log(step, numbers(report), kind=f"eval/{label}", show=False)
    run.tracker.message(report.line(label))
    return report


def _earlier(
    run: Run, journal: Journal, tasks: Sequence[Task], *, label: str, step: int
) -> tuple[Mapping[Place, Trajectory], float]:
    """Return the episodes that were played before the run was stopped, and the seconds that they took.

    There are none where the environment has other tasks now: all are then played again.
    """
    episodes, seconds, _ = read_episodes(run.config.out, f"eval-{label}", step)
    if not episodes:
        return {}, 0.0
    planned = len(tasks) * run.config.eval.k
    same = all(
        index < len(tasks) and (t.task.id, t.task.content_hash) == (tasks[index].id, tasks[index].content_hash)
        for (index, _), t in episodes.items()
    )
    run.tracker.event("evaluation_resumed", label=label, episodes=len(episodes) if same else 0, of=planned)
    if not same:
        journal.empty()
        run.tracker.message(f"evaluating ({label}): its tasks have changed, so that all attempts are played again")
        return {}, 0.0
    run.tracker.message(f"evaluating ({label}): {len(episodes)} of {planned} attempts are played already")
    return episodes, seconds


def log_kept(run: Run) -> None:
    """Log the numbers of evaluations that the commit has and metrics.jsonl lacks.

    Of a finished run that goes on, that is the one that was the last, which has another name now.
    """
    run.tracker.flush()
    path = run.config.out / "metrics.jsonl"
    there = {row["kind"] for row in read_metrics(run.config.out)} if path.exists() else set()
    for label, report in run.commit.reports.items():
        if label.startswith("step_") and f"eval/{label}" not in there:
            step = int(split_label(label)[0].removeprefix("step_"))
            run.tracker.log(step, numbers(report), kind=f"eval/{label}", show=False)
            run.tracker.event("evaluation_kept", label=label, step=step)
            run.tracker.message(f"the evaluation after step {step}, which was the last, is kept as {label}")
    for what in dict.fromkeys(split_label(label)[0] for label in run.commit.reports if label.startswith("step_")):
        if f"eval/{what}" not in there:
            log_means(run, what, step=int(what.removeprefix("step_")))


def log_means(run: Run, label: str, *, step: int) -> None:
    """Log the means over the environments of a mixture, of the evaluation ``label`` of each."""
    reports = [run.reports.get(part.evaluation(label)) for part in run.parts]
    if run.parts[0].label and None not in reports:
        found = mean_numbers(run.parts, [report for report in reports if report is not None])
        run.tracker.log(step, found, kind=f"eval/{label}", show=False)
        run.tracker.message(f"held-out, {label}, mean: {means_text(found)}")


def numbers(report: EvalReport) -> dict[str, float]:
    """Return the report's scalars, for metrics.jsonl and TensorBoard."""
    row = {k: float(v) for k, v in report.to_json().items() if isinstance(v, int | float) and k != "unplayed"}
    intervals = {
        "ci95": report.ci95, "pass_at_k_ci95": report.pass_at_k_ci95, "pass_hat_k_ci95": report.pass_hat_k_ci95
    }  # fmt: skip
    for name, interval in intervals.items():
        if interval is not None:
            row |= {f"{name}_low": interval[0], f"{name}_high": interval[1]}
    return row | {"tasks_left_out": float(len(report.left_out))}
