"""Evaluation on a held-out split.

It plays n tasks × k attempts, reports the statistics that people trust, and saves every trajectory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from areal_agents import registry
from areal_agents.chat_model import remote_name
from areal_agents.errors import ConfigError
from areal_agents.evaluation.endings import count_endings, count_finishes, count_oddities, noted
from areal_agents.evaluation.players import Served, Server, on_engines, on_server
from areal_agents.evaluation.statistics import PASS, clustered_interval, pass_at_k, pass_hat_k
from areal_agents.registry import EnvSpec
from areal_agents.rollout.player import prove_sandbox
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.settings.config import EngineConfig, EnvConfig, EvalConfig, ModelConfig, RolloutConfig, TrainConfig
from areal_agents.settings.evaluation import eval_folder, training_only
from areal_agents.settings.writing import dump
from areal_agents.tracking.console import clock
from areal_agents.tracking.tracker import Tracker
from areal_agents.types import Task, Trajectory


@dataclass(frozen=True, slots=True)
class EvalReport:
    """The report of one evaluation.

    Rates are over scored attempts, but ``infra_rate`` is over all of them.
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
    served: str = ""
    """Of a model behind a chat server: the name that the server gives itself for it, and the server's URL."""
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
        return (
            f"held-out, {label}: pass@1 {self.pass_at_1:.3f} ({low:.3f}–{high:.3f}), valid calls "
            f"{self.valid_call_rate:.2f}, n = {self.n}, {self.seconds:.0f} s"
        )

    def table(self) -> str:
        """Return the report as text for people."""
        return compare_table({f"{self.env}:{self.split}": self})


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

    Raises:
        ConfigError: no attempt was scored.
    """
    scored = [(task, [t for t in tries if t is not None]) for task, tries in results]
    scored = [(task, tries) for task, tries in scored if tries]
    if not scored:
        raise ConfigError(f"evaluation of {env}: every attempt failed; events.jsonl holds the errors")
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
        endings=count_endings(everything),
        finishes=count_finishes(everything),
        **dict[str, Any](count_oddities(everything)),
    )  # fmt: skip


async def run_attempts(
    runner: EpisodeRunner,
    tasks: Sequence[Task],
    *,
    k: int,
    concurrency: int,
    seed: int,
    label: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Task, list[Trajectory | None]]]:
    """Play every task ``k`` times and return each task with its attempts.

    An attempt is None where infrastructure failed it. The attempts at a task differ in their seed.

    Args:
        runner: plays an episode, and counts and retries what fails.
        tasks: what to play.
        k: attempts a task.
        concurrency: most episodes at once.
        seed: see ``attempt_seed``.
        label: first part of the episodes' ids.
        progress: is called with the number of episodes that are done, and of all.

    Raises:
        ArealError: what ``runner`` raises first. The other attempts are then cancelled.
    """
    slots = asyncio.Semaphore(concurrency)
    done = 0

    async def attempt(index: int, i: int) -> Trajectory | None:
        nonlocal done
        async with slots:
            task = tasks[index]
            result = await runner.run(
                task, id=f"{label}/{index}/{i}", group=f"{label}/{index}", seed=attempt_seed(seed, i)
            )
        done += 1
        progress(done, len(tasks) * k)
        return result

    try:
        async with asyncio.TaskGroup() as group:
            running = [[group.create_task(attempt(i, j)) for j in range(k)] for i in range(len(tasks))]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    return [(task, [r.result() for r in row]) for task, row in zip(tasks, running, strict=True)]


def attempt_seed(seed: int, attempt: int) -> int:
    """Return the seed that attempt ``attempt`` at any task resets its environment with."""
    return seed + attempt


def compare_table(reports: dict[str, EvalReport]) -> str:
    """Lay out named reports side by side, for people."""
    head = ("", "pass@1", "95 % CI", "valid calls", "pass | valid", "truncated", "infra")
    rows = [head]
    for name, r in reports.items():
        given = "–" if r.accuracy_given_valid is None else f"{r.accuracy_given_valid:.3f}"
        rows.append((
            name, f"{r.pass_at_1:.3f}", f"{r.ci95[0]:.3f}–{r.ci95[1]:.3f}", f"{r.valid_call_rate:.3f}", given,
            f"{r.truncation_rate:.3f}", f"{r.infra_rate:.3f}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    below = [f"{name}: {n}" for name, r in reports.items() if (n := noted(r.endings, r.finishes, r.to_json()))]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:], *below])


def held_out(spec: EnvSpec, split: str, n: int, *, difficulty: float | None) -> list[Task]:
    """Return the first ``n`` tasks of a split.

    Args:
        spec: the environment.
        split: name of the split.
        n: number of tasks.
        difficulty: in [0, 1]. None is the environment's default.

    Raises:
        ConfigError: the split has fewer tasks.
    """
    tasks = spec.tasks(split, difficulty=difficulty)
    if len(tasks) < n:
        raise ConfigError(f"{spec.id}:{split} has {len(tasks)} tasks, but n = {n}: lower it")
    return [tasks[i] for i in range(n)]


def refuse_used(out: Path) -> None:
    """Raise ConfigError where ``out`` holds an evaluation or a run.

    Two of them in one folder cannot be told apart.
    """
    for name in ("report.json", "trajectories", "metrics.jsonl"):
        if (out / name).exists():
            raise ConfigError(
                f"{out} already holds an evaluation or a run ({name}): choose another --out, or remove that folder"
            )


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
) -> EvalReport:
    """Evaluate a model on an environment.

        report = await areal_agents.evaluate("areal/Arithmetic-v0", model="smollm2", n=32)
        print(report.table())

    report.json, config.toml and every trajectory go to the folder ``out``.

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

    Returns:
        The report, with rates in [0, 1].

    Raises:
        ArealError: an ``out`` that is used already, an unknown environment or split, a missing model, an unavailable
            sandbox, a server that refuses, too many failures, no scored attempt.
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
    return await _evaluate(config, server)


async def _evaluate(config: TrainConfig, server: Server | None) -> EvalReport:
    refuse_used(config.out)
    name = remote_name(config.model.path)
    if (name is None) != (server is None):
        raise ConfigError(
            f"model {config.model.path!r} and server {server!r}: a served model is called openai:MODEL and needs its "
            "server's URL (--url), other models have none"
        )
    e = config.eval
    spec = registry.spec(config.env.id)
    tasks = held_out(spec, e.split, e.n, difficulty=config.env.difficulty)
    await prove_sandbox(spec, config.env.sandbox)
    served = Served()
    if server is not None and name is not None:
        opener, concurrency = on_server(config, spec, name, server, served), server.concurrency
    else:
        opener, concurrency = on_engines(config, spec), config.engine.max_batch * config.engine.replicas
    budget = FailureBudget(window=config.rollout.failure_window, share=config.rollout.failure_budget)
    watch = Stopwatch()
    async with contextlib.AsyncExitStack() as stack:
        tracker = stack.enter_context(Tracker(config.out, tensorboard=False))
        (config.out / "config.toml").write_text(dump(config, leave_out=training_only))
        player = await stack.enter_async_context(opener(tracker.event))
        runner = EpisodeRunner(player, budget, max_retries=config.rollout.max_retries, event=tracker.event)
        try:
            results = await run_attempts(
                runner, tasks, k=e.k, concurrency=concurrency, seed=config.seed, label=e.split,
                progress=Progress(tracker.message),
            )  # fmt: skip
        finally:
            await runner.close()
        report = summarize(
            results, env=config.env.id, split=e.split, model=config.model.path, version=0,
            temperature=e.temperature, seed=config.seed, seconds=watch.seconds,
        )  # fmt: skip
        report = replace(report, served=served.text())
        tracker.trajectories.write([t for _, tries in results for t in tries if t is not None], step=0, kind="eval")
    (config.out / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
    return report


class Progress:
    """A progress display of lines such as ``64/128 episodes, ETA 0:21``.

    Args:
        show: is called with each line.
        label: first words of a line.
        what: the things that are counted.
        every: seconds between two lines, at least.
    """

    def __init__(
        self, show: Callable[[str], None], *, label: str = "evaluating", what: str = "episodes", every: float = 5.0
    ) -> None:
        self._show, self._label, self._what, self._every = show, label, what, every
        self._watch, self._last = Stopwatch(), 0.0

    def __call__(self, done: int, total: int) -> None:
        seconds = self._watch.seconds
        if seconds - self._last >= self._every and done < total:
            self._last = seconds
            self._show(f"{self._label}: {done}/{total} {self._what}, ETA {clock(seconds / done * (total - done))}")


class Stopwatch:
    """A clock that tells the seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
