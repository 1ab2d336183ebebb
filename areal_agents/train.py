"""Training, in one sitting.

    TaskStream ─▶ Rollouts ─▶ Buffer ─▶ next_batch ─▶ advantages ─▶ learner.step
                     ▲                                                   │ version v+1
                     └── engine ◀── update_weights ◀── publish ──────────┘

``learn`` waits for a batch (unblocked by finished groups), then for the learner's thread, then for the engine's
acknowledgement. Rollouts go on all the while, as far as the staleness bound lets them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from areal_agents import registry, settings
from areal_agents.advantages import ADVANTAGES, EpisodeRewards
from areal_agents.batch import Batch, Row, rows_of
from areal_agents.buffer import Buffer
from areal_agents.chat import ChatFormat
from areal_agents.config import AlgorithmConfig, TrainConfig
from areal_agents.cores import Cores, split_cores
from areal_agents.demonstrations import ExpertPolicy, demonstration_rows
from areal_agents.engine import Sampling
from areal_agents.engines.transformers import TransformersEngine
from areal_agents.episode import EnginePolicy, Limits, Policy
from areal_agents.errors import ConfigError
from areal_agents.evaluate import (
    EvalReport,
    Progress,
    Stopwatch,
    calls_of,
    compare_table,
    held_out,
    run_attempts,
    summarize,
)
from areal_agents.learner import TorchLearner
from areal_agents.models import resolve
from areal_agents.precision import resolve_precision
from areal_agents.rollout import EpisodeRunner, FailureBudget, Player, Rollouts, TaskStream, env_maker, prove_sandbox
from areal_agents.track import Tracker
from areal_agents.types import Group, Task


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run leaves behind."""

    out: Path
    model: Path
    """The trained model: a folder that transformers loads."""
    reports: dict[str, EvalReport]
    """Held-out evaluations: ``before``, ``warm_start`` (where there was one), ``after_rl``."""
    seconds: float

    def table(self) -> str:
        """The evaluations side by side, for people."""
        return compare_table(self.reports)


async def train(config: TrainConfig, *, console: bool = True) -> RunResult:
    """Run ``config`` from start to end. Raises ArealError subclasses; ``config.out`` keeps everything until then."""
    watch = Stopwatch()
    refuse_taken(config)
    async with open_run(config, console=console) as run:
        (config.out / "config.toml").write_text(settings.dump(config))
        await run.evaluate("before")
        if config.warm_start.demonstrations:
            await run.warm_start()
            await run.evaluate("warm_start")
        await run.learn()
        await run.evaluate("after_rl")
        await run.learner.export(config.out / "model")
        return RunResult(config.out, config.out / "model", dict(run.reports), watch.seconds)


def refuse_taken(config: TrainConfig) -> None:
    """Raise ConfigError where ``config.out`` holds another run: nothing of it may be overwritten or mixed up."""
    if (config.out / "config.toml").exists():
        raise ConfigError(f"{config.out} holds another run: choose another --out, or remove the folder")


@contextlib.asynccontextmanager
async def open_run(config: TrainConfig, *, console: bool = True) -> AsyncIterator[Run]:
    """Load the model twice (engine and learner), the environment and the trackers; close them in reverse."""
    spec = registry.spec(config.env.id)  # first: a typo must not wait for a model
    spec.tasks(config.env.split, difficulty=config.env.difficulty)
    await prove_sandbox(spec, config.env.sandbox)
    model = resolve(config.model.path)
    cores = split_cores(config.engine.threads, config.learner.threads)
    fmt = ChatFormat.load(model)
    async with contextlib.AsyncExitStack() as stack:
        tracker = stack.enter_context(Tracker(config.out, steps=config.steps, console=console))
        engine = await stack.enter_async_context(
            await TransformersEngine.start(
                model,
                precision=config.engine.precision,
                max_batch=config.engine.max_batch,
                kv_tokens=config.engine.kv_tokens,
                max_context=config.model.max_context,
                threads=cores.total,
                seed=config.seed,
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
        run = Run(config, spec, fmt, engine, learner, tracker, cores)
        stack.push_async_callback(run.runner.close)
        yield run


@dataclass
class Run:
    """The parts of one run and what it does with them."""

    config: TrainConfig
    spec: registry.EnvSpec
    fmt: ChatFormat
    engine: TransformersEngine
    learner: TorchLearner
    tracker: Tracker
    cores: Cores
    reports: dict[str, EvalReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        r = self.config.rollout
        self.budget = FailureBudget(window=r.failure_window, share=r.failure_budget)
        self.runner = self._runner(lambda task: self._policy(r.temperature))

    async def learn(self) -> None:
        """The RL phase: ``steps`` batches, rollouts alongside."""
        config, r = self.config, self.config.rollout
        Sampling(r.max_turn_tokens, r.temperature).require_trainable()
        buffer = Buffer(
            groups=r.groups, group_size=r.group_size, max_staleness=r.staleness, concurrency=r.concurrency,
            on_exceed=r.on_exceed, order=r.order, total_batches=config.steps,
        )  # fmt: skip
        tasks = TaskStream(self.spec.tasks(config.env.split, difficulty=config.env.difficulty), seed=config.seed)
        rollouts = Rollouts(buffer, tasks, self.runner, seed=config.seed, event=self.tracker.event)
        try:
            rollouts.start()
            self.tracker.start_clock()
            for step in range(1, config.steps + 1):
                await self._step(step, rollouts)
                if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                    await self.evaluate(f"step_{step}", step=step)
        finally:
            await rollouts.close()

    async def _step(self, step: int, rollouts: Rollouts) -> None:
        watch = Stopwatch()
        groups = await rollouts.next_batch()
        waited = watch.seconds
        batch = batch_of(groups, self.config.algorithm, self.learner.version, self.config.rollout.temperature)
        metrics = await self._update(batch, rollouts)
        update = await self._publish()
        await self.engine.set_threads(self.cores.total)
        rollouts.acknowledge(self.learner.version)
        metrics |= rollout_metrics(groups, batch.version) | {
            "wait_seconds": waited,
            "step_seconds": watch.seconds,
            "update_seconds": update,
            "queue": float(rollouts.buffer.buffered),
            "running": float(rollouts.buffer.running),
            "discarded": float(rollouts.buffer.discarded),
            "dropped": float(len(rollouts.buffer.dropped)),
            "failed_attempts": float(self.budget.kinds.total()),
        }
        metrics["tokens_per_second"] = metrics["sampled_tokens"] / watch.seconds
        self.tracker.trajectories.write([t for g in groups for t in g.trajectories], step=step, kind="train")
        self.tracker.log(step, metrics)

    async def _update(self, batch: Batch, rollouts: Rollouts) -> dict[str, float]:
        """The learner's step. It takes over the engine's cores once the engine has run out of admitted work."""
        self.learner.set_threads(self.cores.learner)
        await self.engine.set_threads(self.cores.engine)

        async def take_over() -> None:
            await rollouts.idle()
            self.learner.set_threads(self.cores.total)

        watcher = asyncio.create_task(take_over())
        try:
            return dict(await self.learner.step(batch))
        finally:
            watcher.cancel()

    async def _publish(self) -> float:
        """Hand the learner's weights to the engine; returns the seconds in which it could not sample."""
        async with self.learner.publish() as ref:
            report = await self.engine.update_weights(
                ref, mode=self.config.engine.update_mode, kv=self.config.engine.kv
            )
        return report.seconds

    async def warm_start(self) -> None:
        """Cross-entropy on scripted demonstrations, through the same learner."""
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
        await self._publish()
        await self.engine.set_threads(self.cores.total)

    async def evaluate(self, label: str, *, step: int = 0) -> EvalReport:
        """Evaluate on the held-out split; nothing updates the weights meanwhile, so one version is measured."""
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
        self.reports[label] = report
        saved = [t for _, tries in results for t in tries if t is not None]
        self.tracker.trajectories.write(saved, step=step or self.learner.version, kind=f"eval-{label}")
        self.tracker.log(step or self.learner.version, _numbers(report), kind=f"eval/{label}", show=False)
        self.tracker.message(report.line(label))
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


def batch_of(groups: list[Group], algorithm: AlgorithmConfig, version: int, temperature: float) -> Batch:
    """Groups to training rows: advantages per group, one number a turn."""
    rows: list[Row] = []
    episode = 0
    for group in groups:
        rewards = [EpisodeRewards(tuple(t.reward for t in e.turns)) for e in group.trajectories]
        if algorithm.advantage == "grpo":
            advantages = ADVANTAGES["grpo"](rewards, normalize=algorithm.normalize)
        else:
            advantages = ADVANTAGES["turn_return"](rewards, gamma=algorithm.gamma)
        for trajectory, advantage in zip(group.trajectories, advantages, strict=True):
            rows += rows_of(trajectory, advantage.tolist(), episode=episode)
            episode += 1
    return Batch(tuple(rows), episode, version, temperature)


def rollout_metrics(groups: list[Group], version: int) -> dict[str, float]:
    """Means over *episodes*, never over turns or rows (T6); ages are over tokens, ``version`` is the learner's."""
    episodes = [t for g in groups for t in g.trajectories]
    n = len(episodes)
    calls = [calls_of(t) for t in episodes]
    ages = [version - v for t in episodes for turn in t.turns for v in turn.completion.versions]
    rewards = [t.reward for t in episodes]
    means = [sum(t.reward for t in g.trajectories) / len(g.trajectories) for g in groups]
    return {
        "reward": sum(rewards) / n,
        "groups_with_signal": sum(
            len({t.reward for t in g.trajectories}) > 1 for g in groups
        ) / len(groups),
        "groups_solved": sum(m >= 1.0 for m in means) / len(groups),
        "valid_call_rate": sum(made > 0 and made == ok for made, ok in calls) / n,
        "truncation_rate": sum(t.truncated for t in episodes) / n,
        "turns": sum(len(t.turns) for t in episodes) / n,
        "age": sum(ages) / max(len(ages), 1),
        "age_max": float(max(ages, default=0)),
        "sampled_tokens": float(sum(t.sampled_tokens for t in episodes)),
        "episodes": float(n),
        "generate_seconds": sum(t.metrics.get("generate_seconds", 0.0) for t in episodes) / n,
        "env_seconds": sum(t.metrics.get("env_seconds", 0.0) for t in episodes) / n,
    }  # fmt: skip


def _numbers(report: EvalReport) -> dict[str, float]:
    """The report's scalars, for metrics.jsonl and TensorBoard."""
    row = {k: float(v) for k, v in report.to_json().items() if isinstance(v, int | float)}
    return row | {"ci95_low": report.ci95[0], "ci95_high": report.ci95[1]}


def run_training(config: TrainConfig, *, console: bool = True) -> RunResult:
    """``train`` for callers without an event loop (the command line)."""
    return asyncio.run(train(config, console=console))
