"""`verl-heddle doctor`: checks that heddle works in this environment and with a given command line.

`GONE` lists the keys that verl has removed from its trainer configuration, which older scripts may still set. Source: verl's
`_generated_ppo_trainer.yaml` and `_generated_ppo_megatron_trainer.yaml` (`verl/trainer/config/`), releases 0.3.0 to 0.9.1; the first two
releases have no generated files, so their keys come from the configuration files themselves. A key covers everything under it.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Sequence, Set
from importlib import metadata

from omegaconf import DictConfig

from verl_heddle.options import Options
from verl_heddle.verl_plugin import compat, lint, parts
from verl_heddle.verl_plugin.command_line import Command, read
from verl_heddle.verl_plugin.overrides import compose

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
"""Release -> the keys it removed, separated by spaces."""

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
"""Removed key -> its replacement, if it has an obvious one."""


def gone(overrides: Iterable[str]) -> list[str]:
    """One message for each override of a key that verl has removed."""
    removed = {key: release for release, keys in GONE.items() for key in keys.split()}
    lines = []
    for word in overrides:
        key = word.partition("=")[0]
        if key.startswith(("+", "~")):  # added or deleted on purpose
            continue
        path = key.split(".")
        known = next((name for i in range(1, len(path) + 1) if (name := ".".join(path[:i])) in removed), None)
        if known is not None:
            instead = f"; use {MOVED[known]} instead" if known in MOVED else ""
            lines.append(f"{known} was removed in verl {removed[known]}{instead}: this command was written for an older verl")
    return lines


OK, WORKS_LESS, BROKEN = 0, 1, 2
"""Exit codes. 1: the run starts, but something is off, untested or unchecked. 2: it does not start, heddle would do nothing, or nothing
could be checked."""


SWEPT = 8
"""Most jobs of a sweep (--multirun) to check."""


def doctor(words: Sequence[str]) -> int:
    """Print versions, seams and the problems of a verl command line, if one is given; returns the exit code."""
    _quiet()
    if not words:
        return max(_versions(), _seams())
    try:
        command = read(words)
    except ValueError as error:
        return max(_versions(), _seams(), _error(str(error)))
    before = os.environ.copy()
    os.environ |= command.environment  # verl reads some of these variables when it is imported
    try:
        return max(_versions(), _seams(), _command(command))
    finally:
        os.environ.clear()
        os.environ |= before


def _quiet() -> None:
    """Silence what verl and vLLM log on import."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VERL_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _versions() -> int:
    print("Environment")
    worst = OK
    print(f"  {'python':<14}{platform.python_version():<16}supported: 3.11, 3.12")
    for name in ("verl", "vllm", "torch", "ray", "TransferQueue", "transformers"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        supported = compat.SUPPORTED.get(name)
        if found == "missing":
            worst = max(worst, BROKEN)
            note = "install it"
        elif supported and found.split("+")[0] not in supported:
            worst = max(worst, WORKS_LESS)
            note = f"untested; supported: {', '.join(supported)}"
        else:
            note = f"supported: {', '.join(supported)}" if supported else ""
        print(f"  {name:<14}{found:<16}{note}".rstrip())
    for note in shared_files({name for found in metadata.distributions() if (name := found.metadata["Name"])}):
        worst = max(worst, WORKS_LESS)
        print(f"  {note}")
    return worst


ONE_OF = {"xgboost": "the module xgboost, which prediction needs", "nvidia-nccl-cu": "libnccl.so.2, which torch loads"}
"""Prefix of distribution names -> the file they all install: the last one installed overwrites the others' copy."""


def shared_files(installed: Set[str]) -> list[str]:
    """One line for each set of distributions that overwrite each other's files, and one if xgboost is missing."""
    notes = []
    for beginning, files in ONE_OF.items():
        found = sorted(name for name in installed if re.fullmatch(rf"{beginning}(-cpu|\d*)", name))
        if len(found) > 1:
            notes.append(f"{' and '.join(found)} both install {files}: uninstall both, then install the one you want")
        if not found and beginning == "xgboost":
            notes.append("xgboost is missing: no prediction; pip install xgboost-cpu")
    return notes


def _seams() -> int:
    print("Seams (importing verl and vLLM takes some seconds)", flush=True)
    worst = OK
    for result in compat.examine():
        if result.error is None:
            print(f"  OK       {result.seam.name}")
            continue
        worst = max(worst, BROKEN if result.seam.needed else WORKS_LESS)
        print(f"  MISSING  {result.seam.name}: {result.error}\n           consequence: {result.seam.consequence}")
    return worst


def _command(command: Command) -> int:
    print("Command line")
    worst = OK
    for why in command.unread:
        print(f"  not checked: {why}")
        worst = WORKS_LESS
    if command.main is None and not command.overrides:
        return BROKEN
    try:
        jobs = _jobs(command)
    except Exception as error:
        return _error(_line(error))
    for number, overrides in enumerate(jobs[:SWEPT], start=1):
        if len(jobs) > 1:
            print(f"  job {number} of {len(jobs)}: {' '.join(word for word in overrides if word not in command.overrides)}")
        worst = max(worst, _job(command, overrides))
    if len(jobs) > SWEPT:
        print(f"  not checked: the other {len(jobs) - SWEPT} jobs of the sweep")
        worst = max(worst, WORKS_LESS)
    return worst


def _jobs(command: Command) -> list[list[str]]:
    """The overrides of each job; a command without --multirun is one job."""
    if not command.multirun:
        return [list(command.overrides)]
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(command.overrides)), None)
    return [job for batch in batches for job in batch]


def _job(command: Command, overrides: Sequence[str]) -> int:
    try:
        config = compose(overrides, command)
    except Exception as error:
        return _refused(command, overrides, error)
    if "heddle" not in config:
        print("  stock verl: add +plugin=heddle to switch heddle on")
        return OK
    findings = lint.lint(config)
    for finding in findings:
        print(f"  {'error' if finding.fatal or finding.grave else 'warning'}: {finding.text}")
    if (options := lint.options_or_none(config)) is not None:
        _table(config, options)
    if not findings and not command.unread:
        print("  OK")
    return BROKEN if any(finding.fatal or finding.grave for finding in findings) else WORKS_LESS if findings else OK


def _table(config: DictConfig, options: Options) -> None:
    rows = parts.table(config, options)
    width = max(len(row.part) for row in rows)
    print(f"  {'part':<{width}}  {'':<3}  why")
    for row in rows:
        print(f"  {row.part:<{width}}  {'on' if row.on else 'off':<3}  {row.why}")


def _refused(command: Command, overrides: Sequence[str], error: Exception) -> int:
    """Report a command that does not compose, and whether stock verl refuses it too."""
    stock = [word for word in overrides if not word.lstrip("+~").startswith(("plugin=", "machine=", "heddle."))]
    try:
        compose(stock, command)
    except Exception as own:
        for line in gone(stock):
            _error(line)
        return _error(f"stock verl refuses this command, with or without the flag: {_line(own)}")
    return _error(_line(error))


def _error(text: str) -> int:
    print(f"  error: {text}")
    return BROKEN


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(doctor(sys.argv[1:]))
