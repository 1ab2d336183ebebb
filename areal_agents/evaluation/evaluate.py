"""Evaluation on a held-out split.

It plays n tasks × k attempts, reports the statistics that people trust, and saves every trajectory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from areal_agents import registry
from areal_agents.chat_model import remote_name
from areal_agents.engines.local import require_startable
from areal_agents.errors import ArealError, ConfigError, Interrupted
from areal_agents.evaluation.attempts import FINISH_SECONDS, is_judged, run_attempts, saved_rows
from areal_agents.evaluation.held_out import Sample, as_begun, held_out
from areal_agents.evaluation.players import KeptEngines, Opener, Served, Server, on_engines, on_server
from areal_agents.evaluation.progress import Progress, Stopwatch
from areal_agents.evaluation.report import EvalReport, Lost, summarize
from areal_agents.evaluation.unfinished import (
    KIND,
    STEP,
    Earlier,
    EvaluationInterrupted,
    Sitting,
    count_saved,
    fingerprint,
    how_to_go_on,
    leaving_nothing,
    open_journal,
    read_earlier,
    refuse_training,
    refuse_used,
    reopen,
    tell,
)
from areal_agents.models import resolve
from areal_agents.rollout.group_judge import GroupJudge, group_reward_of, open_judge, require_attempts
from areal_agents.rollout.player import EventSink, prove_sandbox
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.task_looks import look_at
from areal_agents.rollout.tasks import require_few_bad
from areal_agents.settings.config import EngineConfig, EnvConfig, EvalConfig, ModelConfig, RolloutConfig, TrainConfig
from areal_agents.settings.evaluation import eval_folder, training_only
from areal_agents.settings.writing import dump
from areal_agents.tracking.journal import Journal
from areal_agents.tracking.tracker import Tracker
from areal_agents.tracking.trajectories import Record
from areal_agents.types import Task, Trajectory
from areal_agents.utils.files import save_whole
from areal_agents.utils.precision import slow_format_note
from areal_agents.utils.signals import Stop, stop_on_signals
from areal_agents.utils.system import require_linux


async def evaluate(
    env: str | EnvConfig,
    *,
    model: str | Path | ModelConfig,
    split: str = "test",
    n: int = 128,
    task_seed: int | None = 0,
    k: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    out: str | Path | None = None,
    engine: EngineConfig | None = None,
    rollout: RolloutConfig | None = None,
    server: Server | None = None,
    resume: bool = False,
) -> EvalReport:
    """Evaluate a model on an environment.

        report = await areal_agents.evaluate("areal/Arithmetic-v0", model="smollm2", n=32)
        print(report.table())

    report.json, config.toml and every trajectory go to the folder ``out``. An episode is there for good as soon as it
    ends: what was interrupted or killed goes on with ``resume``. After one SIGINT or SIGTERM running episodes have a
    minute, and the error has a report. After two it ends at once.

    The sections are those of ``TrainConfig``, so a run is evaluated as it was trained with ``engine=config.engine,
    rollout=config.rollout``. What they say of training alone (batches, staleness, how weights travel) is not used.

    Args:
        env: a registered id or ``module:Class``. As a section it has difficulty, kwargs, sandbox and step_timeout too.
        model: ``smollm2``, a folder, a hub id, or ``openai:MODEL`` of ``server``. As a section it has max_context too.
        split: the environment's split to take tasks from.
        n: tasks.
        task_seed: of which tasks, a sample that is the same for every model and ``seed``. None takes the first ones.
        k: attempts a task.
        temperature: of sampling. 0 is greedy.
        seed: of environments and sampling.
        out: the folder. It is runs/eval-TIME where none is given.
        engine: which engine, how many, and its timeouts. Of a served model, request_timeout alone is used.
        rollout: limits of an episode, retries, the failure budget and the share of bad tasks.
        server: of ``openai:MODEL``. Its episodes have no token ids, and keep limits on tokens where it reports them.
        resume: go on with the evaluation in ``out``, if there is one, with the same settings and the same model.

    Returns:
        The report, with rates in [0, 1].

    Raises:
        ArealError: an ``out`` that is used already, or holds another evaluation than the one to go on with, an unknown
            environment or split, a missing model, an unavailable sandbox, a server that refuses, too many failures.
        TaskError: more than ``rollout.max_bad_tasks`` of the tasks tried cannot be played or scored.
        InfraError: no attempt was scored, because infrastructure failed all of them.
        Interrupted: by a signal, with what was scored on the disk.
        ValueError: a setting out of range (pydantic's ValidationError).
    """
    e = EvalConfig(split=split, n=n, task_seed=task_seed, k=k, temperature=temperature)
    config = evaluation_config(env, model, e, seed=seed, out=out, engine=engine, rollout=rollout)
    if resume:
        config = as_begun(config, config.out)
    return await until_stopped(config, server, resume=resume)


def evaluation_config(
    env: str | EnvConfig,
    model: str | Path | ModelConfig,
    evaluation: EvalConfig,
    *,
    seed: int,
    out: str | Path | None,
    engine: EngineConfig | None,
    rollout: RolloutConfig | None,
) -> TrainConfig:
    """Return the settings that ``evaluate`` was given, with the defaults of those it was not."""
    return TrainConfig(
        seed=seed,
        out=Path(out) if out is not None else eval_folder(),
        model=model if isinstance(model, ModelConfig) else ModelConfig(path=str(model)),
        env=env if isinstance(env, EnvConfig) else EnvConfig(id=env),
        engine=(engine or EngineConfig()).model_copy(update={"transport": "auto"}),  # no weights travel
        rollout=rollout or RolloutConfig(),
        eval=evaluation,
    )


async def until_stopped(
    config: TrainConfig, server: Server | None, *, resume: bool, kept: KeptEngines | None = None
) -> EvalReport:
    """Evaluate, until signals stop it.

    Args:
        config: the settings.
        server: of a served model.
        resume: go on with what ``config.out`` holds.
        kept: the engines to play on, which outlive the evaluation. None opens engines for it alone.

    Returns:
        The report.

    Raises:
        ArealError: as ``evaluate``.
    """
    with stop_on_signals(print, doing=f"finishing the episodes that run, for at most {FINISH_SECONDS:g} s") as stop:
        stop.at_once = True  # until there are episodes
        try:
            return await _evaluate(config, server, stop, resume=resume, kept=kept)
        except asyncio.CancelledError as error:
            if not stop.requested:
                raise
            saved, planned = count_saved(config.out), config.eval.n * config.eval.k
            left = how_to_go_on(config.out, saved, planned) if saved else "before an attempt was scored"
            raise Interrupted(f"stopped by {stop.name}; {left}") from error


async def _evaluate(
    config: TrainConfig, server: Server | None, stop: Stop, *, resume: bool, kept: KeptEngines | None
) -> EvalReport:
    out, e = config.out, config.eval
    refuse = refuse_training if resume else refuse_used
    refuse(out)
    name = remote_name(config.model.path)
    if (name is None) != (server is None):
        raise ConfigError(
            f"model {config.model.path!r} and server {server!r}: a served model is called openai:MODEL and needs its "
            "server's URL (--url), other models have none"
        )
    if server is None:
        require_linux(f"an engine for {config.model.path}")
        require_startable(config.engine)
    bad = dict[str, str]()
    spec = registry.spec(config.env.id).with_kwargs(config.env.kwargs)
    spec.require_arguments({})
    require_attempts(group_reward_of(spec), e.k)
    tasks, sample = held_out(spec, e, difficulty=config.env.difficulty, tell=bad.__setitem__)
    where = f"{spec.id}:{e.split}"
    look = await look_at(tasks, spec.env_class().task_checks(), where=where, seed=config.seed)
    look.require_enough(where, max_bad=config.rollout.max_bad_tasks)
    bad |= look.bad
    with open_journal(out) as journal:  # before anything is read: another process may be adding to it
        refuse(out)
        earlier = read_earlier(config) if resume else Earlier()
        earlier.require_tasks(tasks, out=out)
        await prove_sandbox(spec, config.env.sandbox, tasks)
        served, model = Served(before=earlier.served), ""
        if server is not None and name is not None:
            opener, concurrency = on_server(config, spec, name, server, served), server.concurrency
        else:
            opener, concurrency = on_engines(config, spec, kept), config.engine.max_batch * config.engine.replicas
            model = fingerprint(resolve(config.model.path))
        earlier.require_model(model, out=out, path=config.model.path)
        sitting = Sitting(model, None if server is None else dataclasses.asdict(server))
        try:
            with leaving_nothing(out):
                return await _Play(
                    config, tasks, journal, earlier, sitting, opener, concurrency, served, stop, bad, sample
                ).report()
        except (Interrupted, ConfigError):  # of settings, which going on with the same ones would not mend
            raise
        except ArealError as error:
            if saved := count_saved(out):
                error.add_note(how_to_go_on(out, saved, len(tasks) * e.k, "Once its cause is mended, go on with"))
            raise


@dataclass(frozen=True, slots=True)
class _Play:
    """One sitting of an evaluation."""

    config: TrainConfig
    tasks: Sequence[Task]
    journal: Journal
    earlier: Earlier
    sitting: Sitting
    opener: Opener
    concurrency: int
    served: Served
    stop: Stop
    bad: Mapping[str, str]
    sample: Sample

    async def report(self) -> EvalReport:
        """Play what no earlier sitting played, with each episode on the disk as it ends, and write the report."""
        config, out, e, watch = self.config, self.config.out, self.config.eval, Stopwatch(before=self.earlier.seconds)
        planned = e.k * sum(task.id not in self.bad for task in self.tasks)
        had = sum(self.tasks[index].id not in self.bad for index, _ in self.earlier.episodes)
        reopen(out, self.journal)  # before the tracker, which writes no shard that is there already
        with Tracker(out, tensorboard=False) as tracker:
            save_whole(out / "config.toml", dump(config, leave_out=training_only))
            replace(self.sitting, served=self.earlier.served, seconds=self.earlier.seconds).write(out)
            tell(tracker, config, had=had, planned=planned, torn=self.journal.torn)
            spec = registry.spec(config.env.id)
            judge = open_judge(group_reward_of(spec), spec, config, tracker.event)
            results, lost = saved_rows(self.tasks, self.earlier.episodes, k=e.k), Lost(left_out=self.bad)
            if had < planned or (judge is not None and not all(map(is_judged, self.earlier.episodes.values()))):
                results, lost = await self._rest(tracker, judge, watch, had)
            episodes = [t for _, tries in results for t in tries if t is not None]
            if self.stop.requested and not episodes:
                raise Interrupted(f"stopped by {self.stop.name} before an attempt was scored")
            shown = summarize(
                results, env=config.env.id, split=e.split, model=config.model.path, version=0,
                temperature=e.temperature, seed=config.seed, seconds=watch.seconds, k=e.k, lost=lost,
                planned=e.k * sum(task.id not in lost.left_out for task in self.tasks), sample=self.sample,
            )  # fmt: skip
            if not shown.unplayed:
                tracker.trajectories.write(episodes, step=STEP, kind=KIND)
                tracker.flush()
        report = replace(shown, served=self.served.text())
        _save(report, replace(self.sitting, served=tuple(sorted(self.served.names)), seconds=watch.seconds), out)
        if report.unplayed:
            left = how_to_go_on(out, len(episodes), planned)
            raise EvaluationInterrupted(f"stopped by {self.stop.name}; {left}", report)
        return report

    async def _rest(
        self, tracker: Tracker, judge: GroupJudge | None, watch: Stopwatch, had: int
    ) -> tuple[list[tuple[Task, list[Trajectory | None]]], Lost]:
        """Play the attempts beside the ``had`` ones that are there, and return all of them."""
        e, r = self.config.eval, self.config.rollout

        def scored(trajectory: Trajectory) -> None:
            record = Record(KIND, STEP, trajectory)
            told = {"elapsed": watch.seconds, "served": sorted(self.served.names)}
            tracker.trajectories.append(self.journal, record, **told)

        budget = FailureBudget(window=r.failure_window, share=r.failure_budget)
        async with self.opener(_telling(tracker)) as player:
            runner = EpisodeRunner(
                player, budget, max_retries=r.max_retries, event=tracker.event, say=tracker.message, group_judge=judge
            )
            _leave_out(runner, self.bad, tried=e.n, share=r.max_bad_tasks)
            self.stop.at_once = False
            try:
                results = await run_attempts(
                    runner, self.tasks, k=e.k, concurrency=self.concurrency, seed=self.config.seed, label=e.split,
                    progress=Progress(tracker.message, before=had), saved=self.earlier.episodes, scored=scored,
                    max_bad=r.max_bad_tasks, stop=self.stop,
                )  # fmt: skip
            finally:
                await runner.close()
        return results, Lost(runner.first_given_up, runner.own_failures, runner.left_out)


def _telling(tracker: Tracker) -> EventSink:
    """Return what records an event, and shows the one that people should know of before they wait."""

    def event(kind: str, **fields: Any) -> None:
        tracker.event(kind, **fields)
        if kind == "slow_format":
            tracker.message(slow_format_note(fields["settings"]))

    return event


def _leave_out(runner: EpisodeRunner, bad: Mapping[str, str], *, tried: int, share: float) -> None:
    """Leave out the tasks that cannot even be made, or raise TaskError where they are too many."""
    for id, reason in bad.items():
        runner.leave_out(id, reason)
    require_few_bad(bad, tried=tried, share=share)


def _save(report: EvalReport, sitting: Sitting, out: Path) -> None:
    """Write the report, and what the next sitting has to know."""
    sitting.write(out)
    save_whole(out / "report.json", json.dumps(report.to_json(), indent=2) + "\n")
