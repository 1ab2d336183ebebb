"""The learner, which turns batches of rows into new weights with PyTorch in one process, on its CPU or one GPU.

    Batch ─▶ rows with a gradient ─▶ (log p) ─▶ minibatches ─▶ packs ─▶ loss, backward ─▶ clip, AdamW
                                                                                              │ version + 1
                                          engines ◀─ WeightsRef ◀─ publish() ◀────────────────┘

All work runs in the learner's one worker thread. So the event loop goes on, and a cancelled caller leaves its step
running to the end. Each call waits for the calls before it. ``publish`` also waits for one of two buffers, which is
free again when an earlier ``publish`` context closes. Not covered: several processes or GPUs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_agents.algorithms.batch import Batch, Row
from areal_agents.algorithms.objective import (
    Denominators,
    PolicyObjective,
    Tokens,
    batch_counts,
    check_batch,
    live_rows,
    split_episodes,
)
from areal_agents.algorithms.offpolicy_stats import EffectiveSize, OffPolicyStats
from areal_agents.algorithms.regularizers import Regularizers, RegularizerStats
from areal_agents.engine import Transport, WeightsRef
from areal_agents.errors import ConfigError
from areal_agents.learner.contract import Metrics
from areal_agents.learner.critic import Critic, Values
from areal_agents.learner.engine_noise import EngineNoise
from areal_agents.learner.forward import Decoder
from areal_agents.learner.lora import Lora
from areal_agents.learner.optim import adamw, learning_rate
from areal_agents.learner.passes import Logprobs, Objective, Passes, Scored
from areal_agents.learner.probe import probe, probe_ids
from areal_agents.learner.proximal import Proximal
from areal_agents.learner.reference import COLUMN, KlToReference, Limits
from areal_agents.learner.step_figures import StepFigures
from areal_agents.learner.teacher import Teacher
from areal_agents.learner.trained import Trained, export_model, load_trained, read_checkpoint, save_checkpoint
from areal_agents.learner.warm_start import WarmStart
from areal_agents.settings.config import AlgorithmConfig, LearnerConfig
from areal_agents.utils.memory import peak_mib
from areal_agents.utils.precision import resolve_device, resolve_precision
from areal_agents.weights.publisher import Publisher
from areal_agents.weights.transports import WeightsBuffer, weights_buffers

T = TypeVar("T")


class TorchLearner:
    """The ``Learner`` of one process, which trains a transformers causal language model with PPO.

    Master weights, gradients and AdamW's moments are fp32. ``learner.precision`` is the format of matrix products.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        learner: LearnerConfig,
        algorithm: AlgorithmConfig,
        total_steps: int,
        seed: int = 0,
        publish_dtype: torch.dtype = torch.bfloat16,
        publish_adapters: bool = False,
        max_staleness: int | None = None,
        threads: int | None = None,
        transport: Transport = "shm",
        weights_dir: Path | None = None,
        weights_host: str = "127.0.0.1",
        receivers: Callable[[], int] | None = None,
    ) -> None:
        """Load a local model folder.

        Args:
            total_steps: batches of the whole run, for the schedule.
            publish_adapters: engines get the adapters of ``learner.lora`` alone, and not weights with them inside.
            max_staleness: tokens older than so many versions get no gradient (``on_exceed = "mask"``). None is any age.
            threads: cores to compute with. None leaves PyTorch's choice.
            transport: how ``publish`` reaches engines. ``weights_buffers`` explains the three that follow.
        Raises:
            ModelError: the folder is no causal language model that this learner can train, or not with these adapters.
            ConfigError: the transport cannot be had here.
        """
        self.source = Path(model)
        self.config, self.algorithm = learner, algorithm
        self.total_steps, self.seed, self.max_staleness = total_steps, seed, max_staleness
        self._policy = PolicyObjective(
            loss=algorithm.loss, correction=algorithm.correction, aggregation=algorithm.aggregation,
            mask=algorithm.mask, constant=algorithm.constant, max_staleness=max_staleness,
        )  # fmt: skip
        self._version, self._threads, self.publish_dtype = 0, threads, publish_dtype
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._decoder, self._trained = self._executor.submit(self._load, publish_adapters).result()
        self._model = self._decoder.model
        self._passes = Passes(
            self._decoder, token_budget=learner.token_budget, chunk=learner.logprob_chunk, before_pack=self._use_threads
        )
        self._proximal = Proximal(self._policy, self._decoder, self._passes)
        self._noise = EngineNoise(self._policy.needs_noise, self._passes)
        limits = Limits(learner.token_budget, learner.logprob_chunk)
        self._kl = KlToReference(algorithm.kl, self._decoder, limits, lora=self.lora)
        self._teacher = self._executor.submit(self._new_teacher, limits).result()
        self._asked = 0  # tokens that went through a model for a batch before its step
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = self._new_optimizer(learner.lr)
        self._warm = WarmStart(self._passes, self._new_optimizer, self._apply)
        self._critic_behind = False
        self._critic = self._executor.submit(self._new_critic).result()
        buffers = weights_buffers(
            transport, self._trained.published(), publish_dtype,
            weights_dir=weights_dir, host=weights_host, receivers=receivers,
        )  # fmt: skip
        self._publisher = Publisher(buffers, self._run)
        self._probe_ids = probe_ids(int(self._model.config.vocab_size), seed)

    @property
    def version(self) -> int:
        return self._version

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the fp32 weights by state-dict name, tied ones under their first name alone, adapters merged in."""
        return self._trained.tensors()

    @property
    def lora(self) -> Lora | None:
        """The adapters, which can be disabled to ask the base model. None where every weight trains."""
        return self._trained if isinstance(self._trained, Lora) else None

    async def step(self, batch: Batch) -> Metrics:
        """Take one optimizer step a minibatch, or none where its gradient is 0 or not finite.

        Returns:
            loss, grad_norm (before clipping), lr (scaled by ``ess_step``; 0 while the critic learns alone): means over
            ``minibatches``, which are fewer than ``learner.minibatches`` where there are fewer episodes.
            skipped, minibatches_empty: steps left out for a gradient that is not finite, and for one that is 0.
            tokens (sampled), rows, rows_skipped, episodes, over_age_share: of the batch.
            tokens_forward, tokens_per_second: through the model, shared prefixes once.
            seconds, memory_peak_mb (of the process), ``OffPolicyStats`` (``off_policy/``), ``Critic``'s (``critic/``).
        Rows with advantages of 0 alone or over-age tokens alone are skipped. They count in the denominators and in
        rows_skipped, and are missing from ``off_policy/``.
        Raises ValueError for a batch of another version, without episodes, or with a sampled token without context.
        """
        return await self._run(lambda: self._step(batch))

    async def logprobs(self, batch: Batch) -> Logprobs:
        """Compute log π of every sampled token at the batch's temperature, under the current weights."""
        return await self._run(lambda: self._counted(self._passes.logprobs(batch.rows, batch.temperature)))

    async def values(self, batch: Batch) -> Values:
        """Compute the critic's V before each sampled token. Raises ConfigError where there is no critic."""
        if (critic := self._critic) is None:
            raise ConfigError("there is no critic to ask for values: set algorithm.critic.kind = 'trunk' or 'own'")
        return await self._run(lambda: self._ready(critic).values(batch.rows))

    async def reference(self, batch: Batch) -> tuple[Logprobs, float]:
        """Compute log π of the reference policy, and return it with the KL term's coefficient as it is now."""
        return await self._run(lambda: (self._counted(self._kl.logprobs(batch)), self._kl.coef))

    async def teacher(self, batch: Batch) -> Logprobs:
        """Compute the teacher's log π, NaN where it cannot. Raises ConfigError where it is not in this process."""
        if (teacher := self._teacher) is None:
            raise ConfigError("the learner has no teacher to ask: set algorithm.teacher.model, without a url")
        return await self._run(lambda: self._counted(teacher.logprobs(batch.rows, batch.temperature)))

    async def sft_step(self, rows: Sequence[Row], *, lr: float) -> Metrics:
        """Take one optimizer step on the mean cross-entropy of the masked tokens (the warm start).

        It has an optimizer of its own, dropped at the first ``step``, as moments of imitation say nothing about
        rewards. The version stays the same. Publish afterwards to serve the weights.
        """
        return await self._run(lambda: self._sft_step(tuple(rows), lr))

    def publish(self) -> AbstractAsyncContextManager[WeightsRef]:
        """Hand out the current weights, cast and with their probe, in one of two buffers.

        It is not filled again while the context is open. Waits while both are out. Unblocked when a context closes.
        """
        return self._publisher.publish(self._fill)

    async def export(self, path: Path) -> None:
        """Write a transformers folder in ``publish_dtype``, atomically. It has adapters merged, and in ``adapter``."""
        await self._run(lambda: export_model(path, self._trained, self.source, self.publish_dtype))

    async def save(self, path: Path) -> None:
        """Write a checkpoint atomically: a transformers or peft folder in fp32 plus optimizer, version and seed."""
        await self._run(lambda: self._write(path))

    async def load(self, path: Path) -> None:
        """Go on from a checkpoint of ``save``. Raises ModelError where it is absent or of another model."""
        await self._run(lambda: self._read(path))

    async def close(self) -> None:
        """Finish the running call and free the published weights."""
        await asyncio.to_thread(self._executor.shutdown)
        await asyncio.to_thread(self._publisher.close)

    async def _run(self, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._finish, job)

    def _finish(self, job: Callable[[], T]) -> T:
        self._use_threads()
        try:
            return job()
        finally:  # of one that raised, out of memory perhaps: gradients are as large as the weights
            self._model.zero_grad(set_to_none=True)
            if self._critic is not None:
                self._critic.zero_grad()

    def _use_threads(self) -> None:
        # OpenMP counts threads per calling thread: it has to be said here. A CPU's backward runs in this thread too.
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _load(self, publish_adapters: bool) -> tuple[Decoder, Trained]:
        self._use_threads()
        device = resolve_device(self.config.device)
        dtype = resolve_precision(self.config.precision, gpu=device.type == "cuda")
        model, trained = load_trained(self.source, device, dtype, self.config.lora, self.seed, publish_adapters)
        decoder = Decoder(model, dtype)
        if self.config.gradient_checkpointing:
            decoder.checkpoint_layers()
        return decoder, trained

    def _new_teacher(self, limits: Limits) -> Teacher | None:
        return Teacher.of(self.algorithm.teacher, self._decoder, limits, before_pack=self._use_threads)

    def _counted(self, found: tuple[Logprobs, int]) -> Logprobs:
        self._asked += found[1]
        return found[0]

    def _new_critic(self) -> Critic | None:
        return Critic.of(self.algorithm.critic, self.config, self._decoder, self.source, before_pack=self._use_threads)

    def _ready(self, critic: Critic) -> Critic:
        """Return the critic, begun with the weights of the warm start where there was one."""
        if self._critic_behind:
            critic.begin_as(self._trained.tensors())
            self._critic_behind = False
        return critic

    def _new_optimizer(self, lr: float) -> torch.optim.AdamW:
        c = self.config
        return adamw(self._model, lr=lr, weight_decay=c.weight_decay, betas=c.betas, eps=c.eps)

    def _fill(self, buffer: WeightsBuffer) -> WeightsRef:
        with self._trained.as_published() as merges:
            found = probe(self._decoder, self._probe_ids, self.publish_dtype, merges)
        ref = buffer.fill(self._trained.published(), self._version)
        return replace(ref, probe=found, kind=self._trained.kind)

    def _step(self, batch: Batch) -> Metrics:
        start = time.perf_counter()
        check_batch(batch, self._version)
        self._warm.end()
        c, version, critic = self.config, self._version, self._critic
        alone = critic is not None and critic.alone(version)
        live = self._live(batch)
        if critic is not None:
            self._ready(critic).start(batch)
        parts = split_episodes(batch.episodes, c.minibatches, seed=self.seed, version=version)
        figures = StepFigures(minibatches=len(parts), forwarded=self._asked)
        self._asked = 0
        figures.forwarded += self._noise.measure([batch.rows[i] for i in live], batch.temperature, version)
        proximal: dict[int, NDArray[np.float32]] = {}
        if self._proximal.needed:
            found, more = self._proximal.logprobs([batch.rows[i] for i in live], batch.temperature)
            proximal, figures.forwarded = dict(zip(live, found, strict=True)), figures.forwarded + more
        batch, more = self._kl.with_column(batch, live)
        figures.forwarded += more
        lr = learning_rate(version, peak=c.lr, total=self.total_steps, warmup=c.warmup_steps, schedule=c.schedule)
        for part in parts:
            inside = set(part.tolist())
            rows = [i for i in live if batch.rows[i].episode in inside]
            every = [r for r in batch.rows if r.episode in inside]
            if critic is not None:
                figures.forwarded += critic.minibatch(every, inside=critic.shares and bool(rows))
            if not rows:  # no signal: AdamW would move by its momentum alone, as it would for a gradient of 0
                figures.empty += not alone
                continue
            counts = Denominators.of(every, total_episodes=batch.episodes, episodes=len(part))
            old = [proximal[i] for i in rows] if proximal else None
            self._minibatch([batch.rows[i] for i in rows], old, batch.temperature, counts, figures, lr)
        self._version += 1
        self._proximal.end_step()
        beside = figures.terms.result()
        beside |= self._kl.end_step(self._version, beside.get("kl_reference"), batch, moved=not alone)
        return {
            **figures.metrics(0.0 if alone else lr, time.perf_counter() - start),
            **batch_counts(batch, live, self.max_staleness),
            "memory_peak_mb": peak_mib(),
            **self._noise.metrics(),
            **beside,
            **({} if critic is None else critic.metrics()),
        }

    def _minibatch(
        self, rows: Sequence[Row], proximal: Sequence[NDArray[np.float32]] | None, temperature: float,
        counts: Denominators, figures: StepFigures, lr: float,
    ) -> None:  # fmt: skip
        """Take the optimizer step of one minibatch."""
        size = EffectiveSize(self.config.ess_step) if self.config.ess_step is not None else None
        objective = self._objective(counts, figures.off_policy, figures.terms, size)
        value, tokens = self._passes.backward(rows, proximal, temperature, objective)
        scale = 1.0 if size is None else math.sqrt(size.share())
        norm = self._apply(self._optimizer, lr * scale)
        if self._critic is not None and self._critic.shares:
            self._critic.apply()
        figures.add(value, norm, scale=scale, forwarded=tokens)

    def _live(self, batch: Batch) -> list[int]:
        """Return the rows that go through the policy: none while the critic alone learns, all where it learns there."""
        if self._critic is not None and (self._critic.alone(self._version) or self._critic.shares):
            return [] if self._critic.alone(self._version) else list(range(len(batch.rows)))
        return live_rows(
            batch, max_staleness=self.max_staleness, scope=self._policy.scope, always=self._regularizers.any
        )

    @property
    def _regularizers(self) -> Regularizers:
        a = self.algorithm
        return Regularizers(self._kl.in_loss, a.kl.estimator, a.entropy, a.kl.sampler)

    def _objective(
        self, counts: Denominators, stats: OffPolicyStats, terms: RegularizerStats, size: EffectiveSize | None
    ) -> Objective:
        version, beside, critic = self._version, self._regularizers, self._critic

        def value(scored: Scored, tokens: Tokens) -> Tensor:
            logprobs_T, extra_T = scored.logprobs_T, None
            if size is not None:
                size.add(logprobs_T, tokens.behaviour, tokens.episodes, tokens.turns)
            if beside.any:
                extra_T = beside(logprobs_T, scored.entropy_T, tokens.behaviour, tokens.columns.get(COLUMN), terms)
            return self._policy(
                logprobs_T, tokens, counts, stats, version=version, extra_T=extra_T, noise=self._noise.value
            )

        return Objective(
            value,
            scope=self._policy.scope,
            entropy=bool(beside.entropy),
            beside=critic.beside if critic is not None and critic.shares else None,
        )

    def _sft_step(self, rows: tuple[Row, ...], lr: float) -> Metrics:
        metrics = self._warm.step(rows, lr)
        self._kl.begin_here()
        self._critic_behind = not self._version
        return metrics

    def _apply(self, optimizer: torch.optim.AdamW, lr: float) -> float | None:
        """Clip, step unless they are 0, and free the gradients. Return their norm, or None where it is not finite."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip))
        if math.isfinite(norm) and norm > 0.0:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else None

    def _write(self, path: Path) -> None:
        critic = {} if self._critic is None else {"critic": self._ready(self._critic).state()}
        own = {"version": self._version, "seed": self.seed, "optimizer": self._optimizer.state_dict(), **critic}
        state = {**own, **self._kl.state(), **self._proximal.state(), **self._noise.state()}
        save_checkpoint(path, self._trained, state, source=self.source, also=(self._kl.save, self._proximal.save))

    def _read(self, path: Path) -> None:
        state = read_checkpoint(path, self._trained, first=(self._kl.load, self._proximal.load))
        self._optimizer.load_state_dict(state["optimizer"])
        self._noise.load(state)
        if self._critic is not None:
            self._critic.load(state.get("critic"), version=int(state["version"]))
        self._version, self.seed = int(state["version"]), int(state["seed"])
        self._critic_behind = not self._version  # no critic has learned anything then, and this one may be a new one
        self._warm.end()
