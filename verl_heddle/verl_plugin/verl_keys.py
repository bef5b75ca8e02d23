"""Keys of verl's trainer configuration that are gone, and the release from which they are: what an older script may still set.

From `verl/trainer/config/_generated_ppo_trainer.yaml` and `_generated_ppo_megatron_trainer.yaml` of verl's releases 0.3.0 to 0.9.1 (for the
first two, which have no generated files, from the files themselves). A key stands for everything under it.
"""

from __future__ import annotations

from collections.abc import Iterable

GONE = {
    "0.4.0": "actor_rollout_ref.ref.param_offload reward_model.param_offload trainer.val_generations_to_log_to_wandb",
    "0.4.1": "actor_rollout_ref.actor.checkpoint.contents actor_rollout_ref.rollout.chat_scheduler "
    "actor_rollout_ref.rollout.multi_turn.max_turns critic.checkpoint.contents",
    "0.5.0": "actor_rollout_ref.actor.profiler.discrete actor_rollout_ref.model.gradient_checkpointing_kwargs "
    "actor_rollout_ref.ref.profiler.discrete actor_rollout_ref.rollout.profiler.discrete actor_rollout_ref.rollout.use_fire_sampling "
    "critic.kl_ctrl critic.model.gradient_checkpointing_kwargs",
    "0.6.0": "actor_rollout_ref.actor.profile actor_rollout_ref.profiler actor_rollout_ref.ref.profile "
    "actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend "
    "actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache actor_rollout_ref.rollout.engine_kwargs.vllm.swap_space "
    "actor_rollout_ref.rollout.multi_turn.completion_callback algorithm.pf_ppo._target_ critic.profiler.discrete ray_init "
    "trainer.controller_nsight_options trainer.npu_profile trainer.profile_steps trainer.worker_nsight_options",
    "0.6.1": "algorithm.rollout_is algorithm.rollout_is_level algorithm.rollout_is_mode algorithm.rollout_is_threshold "
    "algorithm.rollout_is_threshold_lower algorithm.rollout_is_veto_threshold",
    "0.7.0": "actor_rollout_ref.ref.model algorithm.rollout_correction.use_policy_gradient",
    "0.7.1": "actor_rollout_ref.actor.profiler.tool_config.torch.step_end actor_rollout_ref.actor.profiler.tool_config.torch.step_start "
    "actor_rollout_ref.ref.profiler.tool_config.torch.step_end actor_rollout_ref.ref.profiler.tool_config.torch.step_start "
    "actor_rollout_ref.rollout.update_weights_bucket_megabytes algorithm.rollout_correction.rollout_rs_threshold_lower "
    "algorithm.rollout_correction.rollout_token_veto_threshold critic.profiler.tool_config.torch.step_end "
    "critic.profiler.tool_config.torch.step_start reward_manager reward_model.forward_max_token_len_per_gpu "
    "reward_model.launch_reward_fn_async reward_model.load_weight reward_model.max_length reward_model.megatron "
    "reward_model.micro_batch_size reward_model.micro_batch_size_per_gpu reward_model.model.fsdp_config reward_model.model.input_tokenizer "
    "reward_model.model.override_config reward_model.model.use_fused_kernels reward_model.model.use_remove_padding "
    "reward_model.model.use_shm reward_model.nccl_timeout reward_model.profiler reward_model.rollout._target_ reward_model.sandbox_fusion "
    "reward_model.strategy reward_model.ulysses_sequence_parallel_size reward_model.use_dynamic_bsz reward_model.use_reward_loop",
    "0.8.0": "actor_rollout_ref.actor.sum_pi_squared_checkpointing actor_rollout_ref.model.override_config.model_config "
    "actor_rollout_ref.model.override_config.moe_config actor_rollout_ref.rollout.layer_name_map "
    "actor_rollout_ref.rollout.multi_turn.interaction_config_path actor_rollout_ref.rollout.skip_dump_dir "
    "actor_rollout_ref.rollout.skip_rollout critic.model.fsdp_config critic.model.override_config.model_config "
    "critic.model.override_config.moe_config data.datagen data.sampler trainer.use_legacy_worker_impl",
    "0.9.0": "actor_rollout_ref.actor.load_weight actor_rollout_ref.ref.load_weight actor_rollout_ref.rollout.skip critic.load_weight",
    "0.9.1": "actor_rollout_ref.actor.megatron.grad_offload actor_rollout_ref.actor.router_replay "
    "actor_rollout_ref.ref.megatron.grad_offload actor_rollout_ref.ref.router_replay critic.megatron.grad_offload data.continuous_token",
}
"""Release -> the keys it was the first to be without."""

MOVED = {
    "ray_init": "ray_kwargs.ray_init",
    "actor_rollout_ref.rollout.multi_turn.max_turns": "actor_rollout_ref.rollout.multi_turn.max_assistant_turns",
    "actor_rollout_ref.rollout.update_weights_bucket_megabytes": (
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
    ),
    "actor_rollout_ref.actor.checkpoint.contents": "actor_rollout_ref.actor.checkpoint.save_contents",
    "critic.checkpoint.contents": "critic.checkpoint.save_contents",
    "trainer.val_generations_to_log_to_wandb": "trainer.log_val_generations",
    "trainer.profile_steps": "global_profiler.steps",
    "reward_model.sandbox_fusion": "sandbox_fusion",
}
"""Gone key -> where its work is done; only where that is plain."""


def gone(overrides: Iterable[str]) -> list[str]:
    """One plain line for each override of a key that has left verl."""
    left = {key: release for release, keys in GONE.items() for key in keys.split()}
    lines = []
    for word in overrides:
        key = word.partition("=")[0]
        if key.startswith(("+", "~")):  # added or taken away on purpose
            continue
        parts = key.split(".")
        known = next((name for i in range(1, len(parts) + 1) if (name := ".".join(parts[:i])) in left), None)
        if known is not None:
            instead = f"; {MOVED[known]} has taken its place" if known in MOVED else ""
            lines.append(f"{known} left verl in {left[known]}{instead}: this command was made for an older verl")
    return lines
