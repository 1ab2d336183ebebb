"""The names that other trainers' settings have, and what they are here.

    TRL (GRPOConfig, transformers' TrainingArguments) · veRL · OpenRLHF · PEFT       ─▶ a setting of ours, or none yet

A name of another trainer is no typo of ours: ``algorithm.kl`` has nothing to do with ``eval.k``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_KL = (
    "a KL divergence to the policy that training began with has the weight algorithm.kl.coef here, and is estimated as "
    "algorithm.kl.estimator says; the reference follows by algorithm.kl.refresh, the weight by algorithm.kl.target"
)
_DROPOUT = "there is no dropout: the policy that trains must be the one that sampled (docs/lora.md)"
_ENTROPY = "this is algorithm.entropy here"
_SHARD = "there is no sharding of the learner over GPUs yet: it computes on one device (docs/limits.md)"
_QUANT = "there is no quantisation yet: engine.precision and learner.precision are bf16 or fp32 (docs/limits.md)"
_FILTER = "there is no top-k, top-p or repetition penalty: tokens are drawn from the model's own distribution, at {0}"
_CLIP = "this is algorithm.loss.clip_low and algorithm.loss.clip_high here"

_MEANINGS: dict[str, tuple[str, ...]] = {
    _KL: ("kl_coef", "kl_coeff", "kl_beta", "beta", "init_kl_coef", "kl_loss_coef", "use_kl_loss", "kl_penalty",
          "kl_loss_type", "kl_ctrl", "kl_target", "target_kl", "kl_estimator", "kl_weight",
          "ref_model", "ref_update_steps", "sync_ref_model", "ref_path", "reference_model"),
    "this is algorithm.kl.place = 'reward' here, beside algorithm.kl.coef": ("use_kl_in_reward", "kl_in_reward"),
    "this is algorithm.teacher.model here (docs/distillation.md)": (
        "teacher", "teacher_model", "teacher_model_name_or_path", "teacher_path", "teacher_model_path"),
    "this is algorithm.teacher.url here (docs/distillation.md)": ("teacher_url", "teacher_model_server_url"),
    "this is algorithm.teacher.coef here (docs/distillation.md)": ("distill_coef", "kd_coef", "opd_kl_coef"),
    "this is learner.lora.rank here (docs/lora.md)": ("lora", "lora_r", "lora_rank", "use_peft", "peft_config"),
    "this is learner.lora.alpha here": ("lora_alpha",),
    "this is learner.lora.targets here": ("target_modules", "lora_target_modules"),
    _DROPOUT: ("lora_dropout",),
    "this is algorithm.critic.kind here, and an algorithm.advantage.kind that reads it, such as 'gae'": (
        "use_critic", "value_model", "critic_pretrain", "value_model_path", "critic_model"),
    "this is algorithm.critic.lr here": ("critic_lr", "critic_learning_rate", "value_lr"),
    "this is algorithm.critic.coefficient here, of kind = 'trunk'": ("value_loss_coef", "vf_coef"),
    "this is algorithm.critic.value_clip here": ("cliprange_value", "clip_value", "vf_clip"),
    "this is algorithm.critic.warmup_steps here": ("critic_warmup", "value_pretrain_steps", "num_critic_warmup_steps"),

    "this is algorithm.advantage.lam here, of 'gae', 'turn_gae' and 'bilevel_gae'": ("gae_lambda", "lambd", "gae_lam"),
    "this is algorithm.advantage.turn_gamma of algorithm.advantage.kind = 'bilevel_gae' here": ("high_level_gamma",),
    "rewards are not whitened: algorithm.normalize whitens advantages": ("whiten_rewards",),
    _ENTROPY: ("entropy_coef", "entropy_coeff", "ent_coef", "entropy_loss_coef"),
    _SHARD: ("zero_stage", "deepspeed", "fsdp", "fsdp_config", "fsdp_size", "strategy",
             "ulysses_sequence_parallel_size", "pipeline_parallel", "pipeline_model_parallel_size",
             "context_parallel_size"),
    _QUANT: ("load_in_4bit", "load_in_8bit", "quantization", "fp8"),
    _FILTER.format("rollout.temperature"): ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    _CLIP: ("epsilon", "clip_range", "cliprange", "clip_ratio", "eps_clip", "clip_eps", "clip"),
    "this is algorithm.loss.clip_high here": ("epsilon_high", "clip_ratio_high", "eps_clip_high"),
    "this is algorithm.loss.clip_low here": ("epsilon_low", "clip_ratio_low", "eps_clip_low"),
    "this is algorithm.loss.dual_clip here": ("clip_ratio_c", "eps_clip_c"),
    "this is algorithm.advantage.kind here": ("adv_estimator", "advantage_estimator"),
    "this is algorithm.advantage.normalize of algorithm.advantage.kind = 'grpo' here": (
        "scale_rewards", "norm_adv_by_std_in_grpo", "normalize_advantages", "normalize_advantage"),
    "this is algorithm.advantage.gamma here": ("discount", "discount_factor"),
    "this is algorithm.normalize here": ("whiten_advantages", "adv_norm", "advantage_norm", "normalize_adv"),
    "this is algorithm.overlong here": (
        "mask_truncated_completions", "overlong_filtering", "overlong_filter", "mask_truncated"),
    "this is rollout.dynamic_sampling here": ("filter_groups", "dynamic_filtering", "dynamic_filter"),
    "this is rollout.max_refills here": ("max_num_gen_batches",),
    "this is algorithm.loss.kind here": ("loss_type", "policy_loss"),
    "this is algorithm.aggregation here": ("loss_agg_mode", "loss_aggregation"),
    "this is algorithm.correction.truncate of algorithm.correction.kind = 'decoupled' here": (
        "tis", "tis_imp_ratio_cap", "importance_sampling_cap", "vllm_importance_sampling_cap"),
    "this is algorithm.correction.kind here": (
        "use_decoupled_loss", "prox_logp_method", "bypass_mode", "use_rollout_correction", "use_tis"),
    "this is algorithm.correction.scope here, of 'decoupled', 'kept', 'log_linear' and 'importance'": (
        "rollout_is", "importance_sampling_level", "rollout_is_level"),
    "this is algorithm.mask.kind here": ("rollout_rs", "use_opsm", "m2_threshold", "off_policy_mask_threshold"),
    "this is rollout.group_size here": (
        "num_generations", "n_samples_per_prompt", "rollout.n", "num_samples_per_prompt", "group_size_per_prompt"),
    "this is rollout.groups here, times rollout.group_size episodes each": (
        "train_batch_size", "rollout_batch_size", "batch_size", "generation_batch_size", "prompts_per_step"),
    "this is learner.token_budget here: a micro-batch is bounded by tokens, not by samples": (
        "per_device_train_batch_size", "micro_train_batch_size", "ppo_micro_batch_size",
        "ppo_micro_batch_size_per_gpu", "micro_batch_size", "max_tokens_per_mini_batch", "ppo_max_token_len_per_gpu"),
    "gradients of a batch accumulate by themselves: learner.token_budget bounds one pass, learner.minibatches says "
    "how many optimizer steps a batch makes": ("gradient_accumulation_steps",),
    "this is learner.minibatches here, and a batch trains once": (
        "ppo_mini_batch_size", "mini_batch_size", "num_mini_batches", "num_minibatches", "ppo_epochs", "num_iterations",
        "num_ppo_epochs"),
    "this is learner.lr here": ("learning_rate", "actor_learning_rate", "actor_lr"),
    "this is learner.schedule here": ("lr_scheduler_type", "lr_scheduler", "lr_schedule"),
    "this is learner.warmup_steps here, in steps": ("warmup_ratio", "lr_warmup_steps", "lr_warmup_ratio"),
    "this is learner.grad_clip here": ("max_grad_norm", "max_norm", "gradient_clipping", "clip_grad"),
    "this is learner.betas here": ("adam_beta1", "adam_beta2", "adam_betas", "beta1", "beta2"),
    "this is learner.eps here": ("adam_epsilon", "adam_eps"),
    "this is learner.precision here, and engine.precision": ("bf16", "fp16", "dtype", "torch_dtype", "mixed_precision"),
    "this is learner.gradient_checkpointing here": ("enable_gradient_checkpointing", "activation_checkpointing"),
    "this is rollout.max_turn_tokens here, a turn (rollout.max_episode_tokens: an episode)": (
        "max_completion_length", "max_new_tokens", "max_response_length", "generate_max_len", "max_tokens",
        "response_length"),
    "this is model.max_context here, prompt and turns together": (
        "max_prompt_length", "max_length", "max_model_len", "prompt_max_len", "max_seq_length",
        "vllm_max_model_length"),
    "this is rollout.max_staleness here": ("max_head_offpolicyness", "max_off_policy_steps", "staleness_threshold"),
    "this is steps here: learner steps, not passes over the data": (
        "max_steps", "total_training_steps", "num_train_epochs", "num_episodes", "total_epochs", "epochs",
        "max_epochs"),
    "this is model.path here": ("model_name_or_path", "pretrain", "model_name", "model_path"),
    "this is out here": ("output_dir", "save_path", "ckpt_path", "default_local_dir", "out_dir"),
    "this is checkpoint.every here": ("save_steps", "save_freq", "save_interval", "save_every"),
    "this is checkpoint.keep here": ("save_total_limit", "max_ckpt_num", "max_ckpt_to_keep"),
    "this is eval.every here": ("eval_steps", "test_freq", "eval_interval", "eval_freq"),
    "this is track.wandb here, the project's name": ("report_to", "use_wandb", "wandb_project", "project_name"),
    "this is engine.tensor_parallel here": (
        "tensor_model_parallel_size", "vllm_tensor_parallel_size", "tensor_parallel_size", "tp_size"),
    "this is engine.gpu_memory here": ("gpu_memory_utilization", "vllm_gpu_memory_utilization"),
    "this is engine.replicas here": ("vllm_num_engines", "data_parallel_size", "num_engines"),
    "this is engine.kind = 'vllm' here": ("use_vllm", "vllm_mode"),
    "rewards belong to the environment here: its rubric (docs/write-a-reward.md)": (
        "reward_funcs", "reward_model", "reward_pretrain", "reward_weights", "remote_rm_url", "custom_reward_function"),
    "tasks belong to the environment here: env.id names it (docs/write-an-environment.md)": (
        "dataset_name", "prompt_data", "train_files", "dataset", "train_file", "data_path"),
}  # fmt: skip
_BY_NAME = {name: meaning for meaning, names in _MEANINGS.items() for name in names}


_EVALUATED = {
    _FILTER.format("rollout.temperature"): _FILTER.format("eval.temperature"),
    _QUANT: _QUANT.replace("engine.precision and learner.precision are", "engine.precision is"),
    "this is learner.precision here, and engine.precision": "this is engine.precision here",
    "this is rollout.group_size here": "this is eval.k here",
}
"""What an evaluation has in place of a setting that only a training has."""
_NAMED = re.compile(r"\b[a-z_]+\.[a-z_]+(?:\.[a-z_]+)?|(?<=this is )\w+")


def meaning_of(key: str, *, without: Callable[[str], str | None] = lambda key: None) -> str | None:
    """Say what a name of another trainer is here, or that there is no such thing yet.

    The longest end of a dotted key counts: ``actor_rollout_ref.rollout.n`` is ``rollout.n``. None for other names.
    ``without`` says why a setting means nothing for an evaluation, whose settings are read.
    """
    parts = key.lower().replace("-", "_").split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    meaning = next((_BY_NAME[end] for end in ends if end in _BY_NAME), None)
    reasons = [why for name in _NAMED.findall(meaning or "") if (why := without(name)) is not None]
    if meaning is None or not reasons:
        return meaning
    return _EVALUATED.get(meaning, f"there is nothing like it in an evaluation: {reasons[0]}")
