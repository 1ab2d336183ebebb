"""Evaluation on a held-out split.

It plays n tasks × k attempts, reports the statistics that people trust, and saves every trajectory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from areal_agents import registry
from areal_agents.chat_model import remote_name
from areal_agents.errors import ArealError, ConfigError, InfraError, Interrupted
from areal_agents.evaluation.attempts import FINISH_SECONDS, run_attempts, same_attempts, saved_rows
from areal_agents.evaluation.endings import count_endings, count_finishes, count_oddities, noted
from areal_agents.evaluation.players import Opener, Served, Server, on_engines, on_server
from areal_agents.evaluation.progress import Progress, Stopwatch
from areal_agents.evaluation.statistics import clustered_interval, pass_at_k, pass_hat_k
from areal_agents.evaluation.unfinished import (
    KIND,
    STEP,
    Earlier,
    EvaluationInterrupted,
    Sitting,
    count_saved,
    fingerprint,
    how_to_go_on,
    open_journal,
    read_earlier,
    refuse_used,
    tell,
)
from areal_agents.models import resolve
from areal_agents.registry import EnvSpec, require_distinct
from areal_agents.rollout.player import prove_sandbox
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.task_faults import footer, reasons
from areal_agents.rollout.tasks import first_tasks
from areal_agents.settings.config import EngineConfig, EnvConfig, EvalConfig, ModelConfig, RolloutConfig, TrainConfig
from areal_agents.settings.evaluation import eval_folder, training_only
from areal_agents.settings.writing import dump
from areal_agents.tracking.tracker import Tracker
from areal_agents.tracking.trajectories import Record
from areal_agents.types import Task, Trajectory
from areal_agents.utils.files import save_whole
from areal_agents.utils.short_text import text_of
from areal_agents.utils.signals import Stop, stop_on_signals
from areal_agents.utils.system import require_linux
from areal_agents.utils.tolerance import PASS


@dataclass(frozen=True, slots=True)
class EvalReport:
    """The report of one evaluation.

    Rates are over scored attempts, but ``infra_rate`` is over all attempts at tasks that can be played.
    """

    env: str
    split: str
    model: str
    version: int
    """The policy version that every attempt was sampled from."""
    temperature: float
    seed: int
    n: int
    """Tasks with at least one scored attempt."""
    k: int
    attempts: int
    pass_at_1: float
    ci95: tuple[float, float]
    """Clustered by task."""
    pass_at_k: float | None
    """Over the tasks whose k attempts were all scored; None where there are none."""
    pass_hat_k: float | None
    reward: float
    valid_call_rate: float
    """Attempts with at least one tool call, all of whose calls were valid."""
    accuracy_given_valid: float | None
    """pass@1 among those; None where there are none."""
    malformed_call_rate: float
    """Share of all tool calls that were not valid."""
    truncation_rate: float
    infra_rate: float
    turns: float
    tokens: float
    """Sampled tokens an attempt."""
    seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tasks that cannot be played or scored, each with the reason. Their attempts are in no rate."""
    served: str = ""
    """Of a model behind a chat server: the name that the server gives itself for it, and the server's URL."""
    unplayed: int = 0
    """Attempts that were asked for and not played, because the evaluation was interrupted."""
    endings: dict[str, int] = field(default_factory=dict)
    finishes: dict[str, int] = field(default_factory=dict)
    """Attempts by stop reason, and turns by how they ended: ``stop``, or early (``cut_turns``)."""
    cut_turns: int = 0
    unverifiable: int = 0
    verdict_timeouts: int = 0
    """Attempts with such a verdict. They count with its score."""
    sandbox_replays: int = 0
    withheld: int = 0
    """Lost sandboxes whose calls were run again; attempts with a reward that a cut message earned and did not get."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def line(self, label: str) -> str:
        """Return the report as one line for a log."""
        low, high = self.ci95
        out = f" (left out: {len(self.left_out)})" if self.left_out else ""
        return (
            f"held-out, {label}: pass@1 {self.pass_at_1:.3f} ({low:.3f}–{high:.3f}), valid calls "
            f"{self.valid_call_rate:.2f}, n = {self.n}{out}, {self.seconds:.0f} s"
        )

    def table(self) -> str:
        """Return the report as text for people."""
        return compare_table({f"{self.env}:{self.split}": self})

    def notes(self) -> list[str]:
        """Say what makes the numbers less than they look."""
        notes = []
        if self.unplayed:
            made = round(self.attempts / (1.0 - self.infra_rate))
            notes.append(
                f"partial: {made} of {made + self.unplayed} attempts were played, at {self.n} tasks with a score"
            )
        if self.k > 1 and self.temperature == 0.0:
            notes.append(same_attempts(self.k))
        return notes


def calls_of(trajectory: Trajectory) -> tuple[int, int]:
    """Count the tool calls that an episode made, and those of them that were valid."""
    calls = [call for turn in trajectory.turns for call in turn.message.tool_calls]
    return len(calls), sum(call.status == "ok" for call in calls)


def summarize(
    results: Sequence[tuple[Task, Sequence[Trajectory | None]]],
    *,
    env: str,
    split: str,
    model: str,
    version: int,
    temperature: float,
    seed: int,
    seconds: float,
    planned: int | None = None,
    first_failure: BaseException | None = None,
    left_out: Mapping[str, str] = MappingProxyType({}),
) -> EvalReport:
    """Report what ``results`` show.

    pass@k and pass^k are averaged over the tasks whose k attempts were all scored.

    Args:
        results: each task with its attempts, which are None where infrastructure failed them.
        env: the environment's id.
        split: of the tasks.
        model: the model's name.
        version: of the weights that every attempt was sampled from.
        temperature: of sampling.
        seed: of environments and sampling.
        seconds: that the evaluation took.
        planned: attempts that were asked for; None means those that there are.
        first_failure: why the first attempt was given up, of those that were.
        left_out: tasks that cannot be played or scored, each with the reason. Their attempts count nowhere.

    Raises:
        InfraError: no attempt was scored.
    """
    results = [(task, tries) for task, tries in results if task.id not in left_out]
    scored = [(task, kept) for task, tries in results if (kept := [t for t in tries if t is not None])]
    if not scored:
        if not results:
            raise ConfigError(f"evaluation of {env}: no task can be played or scored:{reasons(left_out)}")
        said = f" First failure: {text_of(first_failure)}" if first_failure is not None else ""
        raise InfraError(
            f"evaluation of {env}: infrastructure failed every attempt, so that there is nothing to score.{said}"
            f"{reasons(left_out)}"
        ) from first_failure
    k = max(len(tries) for _, tries in results)
    everything = [t for _, tries in scored for t in tries]
    total = len(everything)
    wins = [sum(t.reward >= PASS for t in tries) for _, tries in scored]
    counts = [len(tries) for _, tries in scored]
    full = [(c, w) for c, w in zip(counts, wins, strict=True) if c == k]
    calls = [calls_of(t) for t in everything]
    valid = [t for t, (made, ok) in zip(everything, calls, strict=True) if made and made == ok]
    made = sum(m for m, _ in calls)
    return EvalReport(
        env, split, model, version, temperature, seed, len(scored), k, total,
        pass_at_1=sum(wins) / total,
        ci95=clustered_interval(wins, counts),
        pass_at_k=sum(pass_at_k(c, w, k) for c, w in full) / len(full) if full else None,
        pass_hat_k=sum(pass_hat_k(c, w, k) for c, w in full) / len(full) if full else None,
        reward=sum(t.reward for t in everything) / total,
        valid_call_rate=len(valid) / total,
        accuracy_given_valid=sum(t.reward >= PASS for t in valid) / len(valid) if valid else None,
        malformed_call_rate=sum(m - ok for m, ok in calls) / made if made else 0.0,
        truncation_rate=sum(t.truncated for t in everything) / total,
        infra_rate=1.0 - total / sum(len(tries) for _, tries in results),
        turns=sum(len(t.turns) for t in everything) / total,
        tokens=sum(t.sampled_tokens for t in everything) / total,
        seconds=seconds,
        left_out=dict(left_out),
        unplayed=0 if planned is None else planned - sum(len(tries) for _, tries in results),
        endings=count_endings(everything),
        finishes=count_finishes(everything),
        **dict[str, Any](count_oddities(everything)),
    )  # fmt: skip


def compare_table(reports: dict[str, EvalReport]) -> str:
    """Lay out named reports side by side, for people."""
    ks = {r.k for r in reports.values()}
    k = str(max(ks)) if len(ks) == 1 else "k"
    several = (f"pass@{k}", f"pass^{k}") if max(ks, default=1) > 1 else ()
    head = ("", "pass@1", "95 % CI", *several, "n", "valid calls", "pass | valid", "truncated", "infra")
    rows = [head]
    for name, r in reports.items():
        of_k = (_rate(r.pass_at_k), _rate(r.pass_hat_k)) if several else ()
        rows.append((
            name, f"{r.pass_at_1:.3f}", f"{r.ci95[0]:.3f}–{r.ci95[1]:.3f}", *of_k, str(r.n),
            f"{r.valid_call_rate:.3f}", _rate(r.accuracy_given_valid), f"{r.truncation_rate:.3f}",
            f"{r.infra_rate:.3f}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = dict.fromkeys(note for r in reports.values() for note in r.notes())
    noticed = {name: noted(r.endings, r.finishes, r.to_json()) for name, r in reports.items()}
    below = [f"{name}: {said}" for name, said in noticed.items() if said]
    named = {id: why for r in reports.values() for id, why in r.left_out.items()}
    under = [*below, *(f"note: {note}" for note in notes)]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:], *under]) + footer(named)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def held_out(
    spec: EnvSpec, split: str, n: int, *, difficulty: float | None, tell: Callable[[str, str], None]
) -> list[Task]:
    """Return the first ``n`` tasks of a split, without those that cannot be made.

    Args:
        spec: the environment.
        split: name of the split.
        n: number of tasks.
        difficulty: in [0, 1]. None is the environment's default.
        tell: is given name and reason of a task that cannot be made.

    Raises:
        ConfigError: the split has fewer tasks, or two of them have one id.
    """
    tasks = spec.tasks(split, difficulty=difficulty)
    if len(tasks) < n:
        raise ConfigError(f"{spec.id}:{split} has {len(tasks)} tasks, but eval.n = {n}: lower it")
    chosen = first_tasks(tasks, n, tell)
    require_distinct(chosen, f"{spec.id}:{split}")
    return chosen


async def evaluate(
    env: str | EnvConfig,
    *,
    model: str | Path | ModelConfig,
    split: str = "test",
    n: int = 128,
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
    ends: what was interrupted or killed goes on with ``resume``.

    After one SIGINT or SIGTERM running episodes have a minute, and the error has a report. After two it ends at once.

    The sections are those of ``TrainConfig``, so a run is evaluated as it was trained with ``engine=config.engine,
    rollout=config.rollout``. What they say of training alone (batches, staleness, how weights travel) is not used.

    Args:
        env: a registered id or ``module:Class``. As a section it has difficulty, kwargs, sandbox and step_timeout too.
        model: ``smollm2``, a folder, a hub id, or ``openai:MODEL``, which ``server`` serves. As a section it has
            max_context too.
        split: the environment's split to take tasks from.
        n: tasks.
        k: attempts a task.
        temperature: of sampling. 0 is greedy.
        seed: of environments and sampling.
        out: the folder. It is runs/eval-TIME where none is given.
        engine: which engine, how many, and its timeouts. Of a served model, request_timeout alone is used.
        rollout: limits of an episode, retries and the failure budget.
        server: of a model called ``openai:MODEL``. Its episodes have no token ids, and their limits on tokens are kept
            as far as the server reports what it sampled.
        resume: go on with the evaluation in ``out``, if there is one, with the same settings and the same model.

    Returns:
        The report, with rates in [0, 1].

    Raises:
        ArealError: an ``out`` that is used already, or holds another evaluation than the one to go on with, an unknown
            environment or split, a missing model, an unavailable sandbox, a server that refuses, too many failures.
        InfraError: no attempt was scored, because infrastructure failed all of them.
        Interrupted: by a signal, with what was scored on the disk.
        ValueError: a setting out of range (pydantic's ValidationError).
    """
    config = TrainConfig(
        seed=seed,
        out=Path(out) if out is not None else eval_folder(),
        model=model if isinstance(model, ModelConfig) else ModelConfig(path=str(model)),
        env=env if isinstance(env, EnvConfig) else EnvConfig(id=env),
        engine=(engine or EngineConfig()).model_copy(update={"transport": "auto"}),  # no weights travel
        rollout=rollout or RolloutConfig(),
        eval=EvalConfig(split=split, n=n, k=k, temperature=temperature),
    )
    with stop_on_signals(print, doing=f"finishing the episodes that run, for at most {FINISH_SECONDS:g} s") as stop:
        stop.at_once = True  # until there are episodes
        try:
            return await _evaluate(config, server, stop, resume=resume)
        except asyncio.CancelledError as error:
            if not stop.requested:
                raise
            saved, planned = count_saved(config.out), config.eval.n * config.eval.k
            left = how_to_go_on(config.out, saved, planned) if saved else "before an attempt was scored"
            raise Interrupted(f"stopped by {stop.name}; {left}") from error


async def _evaluate(config: TrainConfig, server: Server | None, stop: Stop, *, resume: bool) -> EvalReport:
    out, e = config.out, config.eval
    if not resume:
        refuse_used(out)
    name = remote_name(config.model.path)
    if (name is None) != (server is None):
        raise ConfigError(
            f"model {config.model.path!r} and server {server!r}: a served model is called openai:MODEL and needs its "
            "server's URL (--url), other models have none"
        )
    if server is None:
        require_linux(f"an engine for {config.model.path}")
    bad = dict[str, str]()
    spec = registry.spec(config.env.id)
    spec.require_arguments(config.env.kwargs)
    tasks = held_out(spec, e.split, e.n, difficulty=config.env.difficulty, tell=bad.__setitem__)
    earlier = read_earlier(config) if resume else Earlier()
    earlier.require_tasks(tasks, out=out)
    await prove_sandbox(spec, config.env.sandbox)
    served, model = Served(before=earlier.served), ""
    if server is not None and name is not None:
        opener, concurrency = on_server(config, spec, name, server, served), server.concurrency
    else:
        opener, concurrency = on_engines(config, spec), config.engine.max_batch * config.engine.replicas
        model = fingerprint(resolve(config.model.path))
    earlier.require_model(model, out=out, path=config.model.path)
    sitting = Sitting(model, None if server is None else dataclasses.asdict(server))
    try:
        return await _play(config, tasks, earlier, sitting, opener, concurrency, served, stop, bad)
    except Interrupted:
        raise
    except ArealError as error:
        if saved := count_saved(out):
            error.add_note(how_to_go_on(out, saved, len(tasks) * e.k))
        raise


async def _play(
    config: TrainConfig,
    tasks: Sequence[Task],
    earlier: Earlier,
    sitting: Sitting,
    opener: Opener,
    concurrency: int,
    served: Served,
    stop: Stop,
    bad: Mapping[str, str],
) -> EvalReport:
    """Play what no earlier sitting played, with each episode on the disk as it ends, and write the report."""
    out, e, watch = config.out, config.eval, Stopwatch(before=earlier.seconds)
    planned, had = len(tasks) * e.k, len(earlier.episodes)
    with open_journal(out) as journal, Tracker(out, tensorboard=False) as tracker:
        save_whole(out / "config.toml", dump(config, leave_out=training_only))
        replace(sitting, served=earlier.served, seconds=earlier.seconds).write(out)
        tell(tracker, config, had=had, planned=planned, torn=journal.torn)

        def scored(trajectory: Trajectory) -> None:
            record = Record(KIND, STEP, trajectory)
            tracker.trajectories.append(journal, record, elapsed=watch.seconds, served=sorted(served.names))

        results, failure, left_out = saved_rows(tasks, earlier.episodes, k=e.k), None, dict(bad)
        if had < planned:
            budget = FailureBudget(window=config.rollout.failure_window, share=config.rollout.failure_budget)
            async with opener(tracker.event) as player:
                runner = EpisodeRunner(
                    player, budget, max_retries=config.rollout.max_retries, event=tracker.event, say=tracker.message
                )
                for id, reason in bad.items():
                    runner.leave_out(id, reason)
                stop.at_once = False
                try:
                    results = await run_attempts(
                        runner, tasks, k=e.k, concurrency=concurrency, seed=config.seed, label=e.split,
                        progress=Progress(tracker.message, before=had), saved=earlier.episodes, scored=scored,
                        stop=stop,
                    )  # fmt: skip
                finally:
                    await runner.close()
                failure, left_out = runner.first_given_up, runner.left_out
        episodes = [t for _, tries in results for t in tries if t is not None]
        if stop.requested and not episodes:
            raise Interrupted(f"stopped by {stop.name} before an attempt was scored")
        report = summarize(
            results, env=config.env.id, split=e.split, model=config.model.path, version=0,
            temperature=e.temperature, seed=config.seed, seconds=watch.seconds,
            planned=e.k * sum(task.id not in left_out for task in tasks), first_failure=failure, left_out=left_out,
        )  # fmt: skip
        report = replace(report, served=served.text())
        if not report.unplayed:
            tracker.trajectories.write(episodes, step=STEP, kind=KIND)
            tracker.flush()
    replace(sitting, served=tuple(sorted(served.names)), seconds=watch.seconds).write(out)
    save_whole(out / "report.json", json.dumps(report.to_json(), indent=2) + "\n")
    if report.unplayed:
        said = f"stopped by {stop.name}; {how_to_go_on(out, len(episodes), planned)}"
        raise EvaluationInterrupted(said, report)
    return report
