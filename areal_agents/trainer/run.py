"""The parts of one run, and what it does besides learning.

That is warm start, evaluation and checkpoints. ``open_run`` loads the model twice (engine and learner), the environment
and the trackers, puts a resumed run back to its commit, and closes everything in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from areal_agents.algorithms.estimator import Estimator
from areal_agents.algorithms.registry import kept_decay
from areal_agents.chat.format import ChatFormat
from areal_agents.engine import Sampling
from areal_agents.engines.openai.teacher import ServedTeacher
from areal_agents.errors import LearnerLost
from areal_agents.evaluation.attempts import run_attempts
from areal_agents.evaluation.progress import Progress, Stopwatch
from areal_agents.evaluation.report import EvalReport
from areal_agents.learner.checkpoint import count_adapters, count_parameters
from areal_agents.models import resolve
from areal_agents.reward import correct_part
from areal_agents.rollout.demonstrations import demonstration_rows, require_all
from areal_agents.rollout.group_judge import NamedGroupReward, group_reward_of, open_judge
from areal_agents.rollout.player import EpisodePlayer, PlayerSpec, limits_of, prove_sandbox, require_prompts
from areal_agents.rollout.producer import Rollouts
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.rollout.task_looks import Look
from areal_agents.rollout.tasks import TaskStream
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import Tracker, read_metrics
from areal_agents.trainer.backend import Backend, OpenBackend
from areal_agents.trainer.evaluation import evaluate_weights, log_means, measured, weights_of
from areal_agents.trainer.parts import Part, parts_of, shares_of
from areal_agents.trainer.reward_watch import RewardWatch, tell_signs, without_prefix
from areal_agents.trainer.run_folder import Commit, RunFolder
from areal_agents.trainer.telling import Telling
from areal_agents.types import Group, Task, Trajectory
from areal_agents.utils.signals import Stop


@contextlib.asynccontextmanager
async def open_run(
    config: TrainConfig, folder: RunFolder, stop: Stop, *, commit: Commit | None = None, console: bool = True
) -> AsyncIterator[Run]:
    """Open everything that a run needs, and close it in reverse.

    Args:
        config: the settings.
        folder: the run's folder, whose lock is held.
        stop: the request to stop, which signals make.
        commit: where a resumed run goes on. None for a new one.
        console: show progress.
    """
    parts = parts_of(config)
    if config.cluster.backend == "local":  # a cluster's workers prove theirs
        for part in parts:
            await prove_sandbox(part.spec, part.env.sandbox)
    model = resolve(config.model.path)
    _require_room(config, folder, model, commit or Commit())
    fmt = ChatFormat.load(model, config.model.chat)
    for part in parts:
        require_prompts(part.spec, fmt, limits_of(part.settings(config)))
    async with contextlib.AsyncExitStack() as stack:
        tracker = stack.enter_context(_tracker(config, commit, model, console=console))
        telling = Telling(tracker)
        stack.enter_context(_noting_a_lost_learner(telling))
        done = commit or Commit()
        async with telling.start():
            backend = await stack.enter_async_context(
                _backend_of(config)(config, parts[0].spec, model, event=telling.event, resumed_at=done.step)
            )
        run = Run(config, parts, fmt, backend, tracker, folder, stop, done, model)
        for runner in run.runners.values():  # pushed after the backend: players end before their engine does
            stack.push_async_callback(runner.close)
        if done.checkpoint is not None:
            await run.learner.load(folder.learner_folder(done))
            await run.publish()
        yield run


def _require_room(config: TrainConfig, folder: RunFolder, model: Path, commit: Commit) -> None:
    """Raise ConfigError where the disk has no room for the checkpoint and the model that the run will end with."""
    done = commit.step >= config.steps and commit.checkpoint is not None
    parameters, rank = count_parameters(model), config.learner.lora.rank
    trained = min(parameters, count_adapters(model, rank)) if rank else parameters
    critic = parameters if config.algorithm.critic.kind == "own" else 0
    kept = 0 if kept_decay(config.algorithm.correction) is None else trained // 3  # weights without moments
    folder.require_room(parameters, trained=trained + critic + kept, checkpoint=not done)


_BACKENDS = {"local": "areal_agents.trainer.local:open_local", "ray": "areal_agents.cluster.backend:open_ray"}
"""By the name in ``cluster.backend``; imported when opened, so that a run without Ray needs none."""


def _backend_of(config: TrainConfig) -> OpenBackend:
    module, _, name = _BACKENDS[config.cluster.backend].partition(":")
    found: OpenBackend = getattr(importlib.import_module(module), name)
    return found


@contextlib.contextmanager
def _noting_a_lost_learner(telling: Telling) -> Iterator[None]:
    """Note the loss of a learner in the event log, whether or not another one follows."""
    try:
        yield
    except LearnerLost as error:
        telling.event("learner_lost", reason=str(error))
        raise


def _tracker(config: TrainConfig, commit: Commit | None, model: Path, *, console: bool) -> Tracker:
    return Tracker(
        config.out,
        steps=config.steps,
        first_step=commit.step if commit else 0,
        tensorboard=config.track.tensorboard,
        wandb=config.track.wandb,
        config=config.model_dump(mode="json"),
        mark=None if commit is None else commit.mark,
        of="" if commit is None else measured(config, weights_of(commit), model),
        console=console,
    )


@dataclass
class Run:
    """The parts of one run and what it does with them."""

    config: TrainConfig
    parts: Sequence[Part]
    """Its environments."""
    fmt: ChatFormat
    backend: Backend
    tracker: Tracker
    folder: RunFolder
    stop: Stop
    commit: Commit
    """What of this run is on the disk for good."""
    model: Path
    """The folder that the run started from."""

    def __post_init__(self) -> None:
        r = self.config.rollout
        self.engine, self.learner = self.backend.engine, self.backend.learner
        self.reports: dict[str, EvalReport] = dict(self.commit.reports)
        self.warm_started = self.commit.warm_started
        self.weights = weights_of(self.commit)
        """A name for the weights that the engine serves, which no others have."""
        self.budget = FailureBudget(window=r.failure_window, share=r.failure_budget)
        self.budget.kinds.update(self.commit.failures)
        compares = Estimator(self.config.algorithm.advantage).baseline == "greedy"
        self.runners = {
            part.label: self.runner_of(
                part,
                self.engine_player(part, r.temperature),
                group_reward=group_reward_of(part.spec, r.group_reward),
                greedy=self.engine_player(part, 0.0) if compares else None,
            )
            for part in self.parts
        }
        """Of the training's episodes, by the labels of their environments."""
        t = self.config.algorithm.teacher
        self.teacher = ServedTeacher(t, known=len(self.fmt.tokenizer)) if t.url else None
        """The teacher that a server has, if that is where it is."""
        self.left_out: dict[str, dict[str, str]] = {part.label: {} for part in self.parts}
        """Training tasks that cannot be scored or that the warm start could not play, each with the reason."""
        self.held_out_bad: dict[str, dict[str, str]] = {}
        """Held-out tasks that cannot be scored, each with the reason."""
        self.rollouts: Rollouts | None = None
        """While it learns."""
        self.watches: dict[str, RewardWatch] = {}

    def leave_out(self, part: Part, train: Look, held_out: Look, *, tell: bool) -> None:
        """Leave out the tasks that looks found bad. ``tell`` names those of the training split now."""
        self.held_out_bad[part.label] = dict(held_out.bad)
        if tell and train.seen < train.total and train.seen:
            self.tracker.message(f"looked at {train} training tasks: {len(train.bad)} cannot be scored")
        for id, reason in train.bad.items():
            self.left_out[part.label][id] = reason
            if tell:
                self.runners[part.label].leave_out(id, reason)

    async def publish(self) -> float:
        """Hand the learner's weights to the engine, and return the seconds in which it could not sample."""
        async with self.learner.publish() as ref:
            report = await self.engine.update_weights(
                ref, mode=self.config.engine.update_mode, kv=self.config.engine.kv
            )
        return report.seconds

    async def warm_start(self) -> None:
        """Train by cross-entropy on scripted demonstrations, through the same learner.

        The caller saves the result. Raises ConfigError where a demonstration failed or earned nothing.
        """
        w = self.config.warm_start
        trajectories = await self._demonstrations()
        rows = demonstration_rows(trajectories)
        self.tracker.trajectories.write(trajectories, step=0, kind="demonstration")
        progress = Progress(self.tracker.message, label="warm start", what="demonstrations")
        for epoch in range(w.epochs):
            for start in range(0, len(rows), w.batch):
                metrics = await self.learner.sft_step(rows[start : start + w.batch], lr=w.lr)
                done = min(epoch * len(rows) + start + w.batch, w.epochs * len(rows))
                self.tracker.log(done, metrics, kind="warm_start", show=False)
                progress(done, w.epochs * len(rows))
        await self.publish()
        self.renew_weights()
        self.warm_started = True

    async def _demonstrations(self) -> list[Trajectory]:
        """Have the experts play, of each environment its share, in the order in which groups would."""
        count = self.config.warm_start.demonstrations
        places = [shares_of(self.config, self.parts).at(i) for i in range(count)]
        played = [iter(await self._demonstrated(part, places.count(i))) for i, part in enumerate(self.parts)]
        return [next(played[i]) for i in places]

    async def _demonstrated(self, part: Part, count: int) -> list[Trajectory]:
        """Have the expert play. A task that cannot be played is left out, and another one takes its place."""
        config, label = self.config, part.label
        if not count:
            return []
        runner = self.runner_of(part, replace(self.engine_player(part, 1.0), policy="expert"))
        tasks = TaskStream(
            part.spec.tasks(part.env.split, difficulty=part.env.difficulty), seed=config.seed + 1,
            max_bad=config.rollout.max_bad_tasks, left_out=self.left_out[label], tell=runner.leave_out,
        )  # fmt: skip
        found: list[Trajectory | None] = []
        try:
            for turn in itertools.count():
                played = await run_attempts(
                    runner, [tasks.next() for _ in range(count - len(found))], k=1, concurrency=16, seed=config.seed,
                    label=part.evaluation(f"demonstration{turn or ''}"),
                )  # fmt: skip
                for task, tries in played:
                    if task.id in runner.left_out:
                        tasks.leave_out(task.id, runner.left_out[task.id])
                    else:
                        found += tries
                if len(found) == count:
                    break
        finally:
            await runner.close()
        self.left_out[label] |= tasks.left_out
        return require_all(found, runner.first_given_up)

    def watch_rewards(self) -> None:
        """Begin the watch for rewards that are earned without the task, with the steps that are behind the run."""
        track = self.config.track
        if not track.watch:
            return
        self.tracker.flush()
        rows = read_metrics(self.config.out, kind="train") if (self.config.out / "metrics.jsonl").exists() else []
        for part in self.parts:
            correct = track.watch_correct or correct_part(getattr(part.spec.env_class(), "rubric", None)) or "correct"
            watch = self.watches[part.label] = RewardWatch(correct, track.watch_window, track.watch_same_answers)
            for row in rows:
                numbers = {k: x for k, x in row.items() if isinstance(x, int | float)}
                if (of_part := without_prefix(numbers, part.prefix)) or not part.prefix:
                    watch.look(row["step"], of_part)

    def look_at_rewards(self, step: int, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Tell of the signs that begin with this step, and once where nothing says which answers are right."""
        for part in self.parts:
            own = [group for group in groups if group.env == part.label]
            if part.label in self.watches and own:
                of_part = without_prefix(metrics, part.prefix)
                tell_signs(self.watches[part.label], step, of_part, own, self.tracker, env=part.label)

    async def save(self, rollouts: Rollouts | None) -> None:
        """Checkpoint and commit the state between two steps.

        Rollouts go on meanwhile. Does nothing where this step is committed with a checkpoint already.
        """
        watch, step = Stopwatch(), self.learner.version
        if self.commit.checkpoint is not None and self.commit.step == step:
            return
        state = rollouts.state() if rollouts is not None else None
        mark = await asyncio.to_thread(self.tracker.mark)
        name = await self.folder.save(step, self.learner, state)
        reports, failures = dict(self.reports), dict(self.budget.kinds)
        self._commit(Commit(step, name, self.warm_started, mark, reports, failures, weights=self.weights))
        self.tracker.event("checkpoint", step=step, path=str(self.folder.checkpoints / name), seconds=watch.seconds)

    def _commit(self, commit: Commit) -> None:
        self.folder.commit(commit)
        self.commit = commit

    async def finish(self) -> None:
        """Commit that nothing is left to do.

        The mark stays before the last evaluation, since more steps may follow.
        """
        await asyncio.to_thread(self.tracker.mark)  # for what it raises and syncs: that evaluation's files
        self._commit(replace(self.commit, reports=dict(self.reports), complete=True))

    async def evaluate(self, label: str, *, step: int = 0) -> None:
        """Evaluate on the held-out split of each environment, except where the committed reports have ``label``.

        Nothing updates the weights meanwhile, so one version is measured.
        """
        for part in self.parts:
            name = part.evaluation(label)
            if name in self.reports:
                continue
            self.reports[name] = await evaluate_weights(self, part, name, step=step)
            if part is self.parts[-1]:
                log_means(self, label, step=step)
            # A report waits for the commit of the weights that it measured, since a resumed run trains and measures
            # them again. The last report is committed by ``finish``, which keeps the mark before it.
            if self.commit.step == self.learner.version and label != "after_rl":
                mark = await asyncio.to_thread(self.tracker.mark)
                self._commit(replace(self.commit, mark=mark, reports=dict(self.reports)))

    def renew_weights(self) -> None:
        """Note that the engine serves other weights now than all before."""
        self.weights = uuid.uuid4().hex

    def runner_of(
        self,
        part: Part,
        spec: PlayerSpec,
        *,
        group_reward: NamedGroupReward | None = None,
        greedy: PlayerSpec | None = None,
    ) -> EpisodeRunner:
        """Make a runner that counts and retries what a new player of ``spec`` plays, in the environment of ``part``.

        The player is here or on the cluster's workers, and so is that of the greedy episodes. The group reward is asked
        here.
        """
        make = self.backend.players or self._local_player
        return EpisodeRunner(
            make(spec), self.budget, max_retries=self.config.rollout.max_retries, event=self.tracker.event,
            say=self.tracker.message,
            group_judge=open_judge(group_reward, part.spec, part.settings(self.config), self.tracker.event),
            greedy=None if greedy is None else make(greedy),
        )  # fmt: skip

    def _local_player(self, spec: PlayerSpec) -> EpisodePlayer:
        return spec.build(self.engine, fmt=self.fmt, event=self.tracker.event)

    def engine_player(self, part: Part, temperature: float) -> PlayerSpec:
        limits = limits_of(part.settings(self.config))
        return PlayerSpec(
            env=part.spec,
            model=self.model,
            limits=limits,
            sampling=Sampling(limits.max_turn_tokens, temperature=temperature, stop_ids=self.fmt.stop_ids),
            sandbox=part.env.sandbox,
            kwargs=part.env.kwargs,
            chat=self.config.model.chat,
        )


def demonstrated(tasks: Sequence[Task], config: TrainConfig, count: int | None = None) -> list[Task]:
    """Return those of ``tasks``, the training split's, that the warm start draws, before it replaces bad ones.

    ``count`` are those of one environment of several. None is all that the settings ask for.
    """
    stream = TaskStream(tasks, seed=config.seed + 1)
    return [stream.next() for _ in range(config.warm_start.demonstrations if count is None else count)]
