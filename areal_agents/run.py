"""The parts of one run, and what it does besides learning: warm start, evaluation, checkpoints.

``open_run`` loads the model twice (engine and learner), the environment and the trackers, puts a resumed run back to
its commit, and closes everything in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from areal_agents import registry
from areal_agents.chat import ChatFormat
from areal_agents.config import TrainConfig
from areal_agents.cores import Cores, split_cores
from areal_agents.demonstrations import ExpertPolicy, demonstration_rows
from areal_agents.engine import Sampling
from areal_agents.engines.supervised import SupervisedEngine
from areal_agents.engines.transformers import TransformersEngine
from areal_agents.episode import EnginePolicy, Limits, Policy
from areal_agents.errors import ConfigError
from areal_agents.evaluate import EvalReport, Progress, Stopwatch, held_out, run_attempts, summarize
from areal_agents.interrupt import Stop
from areal_agents.learner import TorchLearner
from areal_agents.lineage import Commit, RunFolder
from areal_agents.models import resolve
from areal_agents.precision import resolve_precision
from areal_agents.rollout import EpisodeRunner, FailureBudget, Player, Rollouts, TaskStream, env_maker, prove_sandbox
from areal_agents.track import Tracker
from areal_agents.types import Task


@contextlib.asynccontextmanager
async def open_run(
    config: TrainConfig, folder: RunFolder, stop: Stop, *, commit: Commit | None = None, console: bool = True
) -> AsyncIterator[Run]:
    """Everything a run needs. ``commit``: where a resumed run goes on; None for a new one."""
    spec = registry.spec(config.env.id)
    await prove_sandbox(spec, config.env.sandbox)
    model = resolve(config.model.path)
    cores = split_cores(config.engine.threads, config.learner.threads)
    fmt = ChatFormat.load(model)
    async with contextlib.AsyncExitStack() as stack:
        tracker = stack.enter_context(_tracker(config, commit, console=console))
        engine = await stack.enter_async_context(
            SupervisedEngine(
                _engine_starter(config, model, cores, commit),
                event=tracker.event,
                hang_seconds=config.engine.hang_timeout,
            )
        )
        learner = TorchLearner(
            model,
            learner=config.learner,
            algorithm=config.algorithm,
            total_steps=config.steps,
            seed=config.seed,
            publish_dtype=resolve_precision(config.engine.precision),
            max_staleness=config.rollout.staleness if config.rollout.on_exceed == "mask" else None,
            threads=cores.learner,
        )
        stack.push_async_callback(learner.close)
        run = Run(config, spec, fmt, engine, learner, tracker, cores, folder, stop, commit or Commit())
        stack.push_async_callback(run.runner.close)
        if run.commit.checkpoint is not None:
            await learner.load(folder.learner_folder(run.commit))
            await run.publish()
        yield run


def _tracker(config: TrainConfig, commit: Commit | None, *, console: bool) -> Tracker:
    return Tracker(
        config.out,
        steps=config.steps,
        first_step=commit.step if commit else 0,
        tensorboard=config.track.tensorboard,
        wandb=config.track.wandb,
        config=config.model_dump(mode="json"),
        mark=None if commit is None else commit.mark,
        console=console,
    )


def _engine_starter(
    config: TrainConfig, model: Path, cores: Cores, commit: Commit | None
) -> Callable[[], Awaitable[TransformersEngine]]:
    """Starts the engine's process: each with a seed of its own, for none may draw an earlier one's random numbers."""
    resumed_at = commit.step if commit else 0
    processes = itertools.count()

    async def start() -> TransformersEngine:
        nth = next(processes)
        fresh = not nth and not resumed_at
        return await TransformersEngine.start(
            model,
            precision=config.engine.precision,
            max_batch=config.engine.max_batch,
            kv_tokens=config.engine.kv_tokens,
            max_context=config.model.max_context,
            threads=cores.total,
            seed=config.seed if fresh else random.Random(f"{config.seed}/{resumed_at}/{nth}").getrandbits(31),
        )

    return start


@dataclass
class Run:
    """The parts of one run and what it does with them."""

    config: TrainConfig
    spec: registry.EnvSpec
    fmt: ChatFormat
    engine: SupervisedEngine
    learner: TorchLearner
    tracker: Tracker
    cores: Cores
    folder: RunFolder
    stop: Stop
    commit: Commit
    """What of this run is on the disk for good."""

    def __post_init__(self) -> None:
        r = self.config.rollout
        self.reports: dict[str, EvalReport] = dict(self.commit.reports)
        self.warm_started = self.commit.warm_started
        self.budget = FailureBudget(window=r.failure_window, share=r.failure_budget)
        self.budget.kinds.update(self.commit.failures)
        self.runner = self._runner(lambda task: self._policy(r.temperature))

    async def publish(self) -> float:
        """Hand the learner's weights to the engine; returns the seconds in which it could not sample."""
        async with self.learner.publish() as ref:
            report = await self.engine.update_weights(
                ref, mode=self.config.engine.update_mode, kv=self.config.engine.kv
            )
        return report.seconds

    async def warm_start(self) -> None:
        """Cross-entropy on scripted demonstrations, through the same learner. The caller saves it."""
        config, w = self.config, self.config.warm_start
        tasks = TaskStream(self.spec.tasks(config.env.split, difficulty=config.env.difficulty), seed=config.seed + 1)
        runner = self._runner(self._expert)
        try:
            played = await run_attempts(
                runner, [tasks.next() for _ in range(w.demonstrations)], k=1, concurrency=16, seed=config.seed,
                label="demonstration",
            )  # fmt: skip
        finally:
            await runner.close()
        trajectories = [t for _, tries in played for t in tries if t is not None]
        rows = demonstration_rows(trajectories)
        self.tracker.trajectories.write(trajectories, step=0, kind="demonstration")
        self.learner.set_threads(self.cores.total)
        await self.engine.set_threads(1)  # idle threads of another OpenMP pool would still cost a core
        progress = Progress(self.tracker.message, label="warm start", what="demonstrations")
        for epoch in range(w.epochs):
            for start in range(0, len(rows), w.batch):
                metrics = await self.learner.sft_step(rows[start : start + w.batch], lr=w.lr)
                done = min(epoch * len(rows) + start + w.batch, w.epochs * len(rows))
                self.tracker.log(done, metrics, kind="warm_start", show=False)
                progress(done, w.epochs * len(rows))
        await self.publish()
        await self.engine.set_threads(self.cores.total)
        self.warm_started = True

    async def save(self, rollouts: Rollouts | None) -> None:
        """Checkpoint and commit the state between two steps. Rollouts go on meanwhile."""
        watch, step = Stopwatch(), self.learner.version
        if self.commit.checkpoint is not None and self.commit.step == step:
            return
        state = rollouts.state() if rollouts is not None else None
        mark = await asyncio.to_thread(self.tracker.mark)
        name = await self.folder.save(step, self.learner, state)
        self._commit(Commit(step, name, self.warm_started, mark, dict(self.reports), dict(self.budget.kinds)))
        self.tracker.event("checkpoint", step=step, path=str(self.folder.checkpoints / name), seconds=watch.seconds)

    def _commit(self, commit: Commit) -> None:
        self.folder.commit(commit)
        self.commit = commit

    async def finish(self) -> None:
        """Commit that nothing is left to do. The mark stays before the last evaluation: more steps may follow."""
        await asyncio.to_thread(self.tracker.mark)  # for what it raises and syncs: that evaluation's files
        self._commit(replace(self.commit, reports=dict(self.reports), complete=True))

    async def evaluate(self, label: str, *, step: int = 0) -> EvalReport:
        """Evaluate on the held-out split, or return the committed report of ``label``.

        Nothing updates the weights meanwhile, so one version is measured.
        """
        if label in self.reports:
            return self.reports[label]
        config, e = self.config, self.config.eval
        tasks = held_out(self.spec, e.split, e.n, difficulty=config.env.difficulty)
        watch = Stopwatch()
        runner = self._runner(lambda task: self._policy(e.temperature))
        try:
            results = await run_attempts(
                runner,
                tasks,
                k=e.k,
                concurrency=config.engine.max_batch,
                seed=config.seed,
                label=f"eval-{label}",
                progress=Progress(self.tracker.message, label=f"evaluating ({label})"),
            )
        finally:
            await runner.close()
        report = summarize(
            results, env=config.env.id, split=e.split, model=config.model.path, version=self.learner.version,
            temperature=e.temperature, seed=config.seed, seconds=watch.seconds,
        )  # fmt: skip
        saved = [t for _, tries in results for t in tries if t is not None]
        self.tracker.trajectories.write(saved, step=step, kind=f"eval-{label}")
        self.tracker.log(step, _numbers(report), kind=f"eval/{label}", show=False)
        self.tracker.message(report.line(label))
        self.reports[label] = report
        if self.commit.step == self.learner.version and label != "after_rl":
            mark = await asyncio.to_thread(self.tracker.mark)
            self._commit(replace(self.commit, mark=mark, reports=dict(self.reports)))
        return report

    def _runner(self, policy: Callable[[Task], Policy]) -> EpisodeRunner:
        r, e = self.config.rollout, self.config.env
        limits = Limits(
            max_context=self.config.model.max_context,
            max_turn_tokens=r.max_turn_tokens,
            max_episode_tokens=r.max_episode_tokens,
            max_turns=r.max_turns,
            step_timeout=e.step_timeout,
            request_timeout=self.config.engine.request_timeout,
        )
        player = Player(
            env_maker(self.spec, sandbox=e.sandbox, kwargs=e.kwargs), policy, self.fmt, limits, r.max_retries
        )
        return EpisodeRunner(player, self.budget, event=self.tracker.event)

    def _policy(self, temperature: float) -> Policy:
        sampling = Sampling(self.config.rollout.max_turn_tokens, temperature=temperature, stop_ids=self.fmt.stop_ids)
        return EnginePolicy(self.engine, sampling)

    def _expert(self, task: Task) -> Policy:
        expert = self.spec.expert(task)
        if expert is None:
            raise ConfigError(f"{self.spec.id} has no expert: set warm_start.demonstrations = 0")
        return ExpertPolicy(expert, self.fmt)


def _numbers(report: EvalReport) -> dict[str, float]:
    """The report's scalars, for metrics.jsonl and TensorBoard."""
    row = {k: float(v) for k, v in report.to_json().items() if isinstance(v, int | float)}
    return row | {"ci95_low": report.ci95[0], "ci95_high": report.ci95[1]}
