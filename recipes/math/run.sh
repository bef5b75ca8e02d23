#!/usr/bin/env bash
# GRPO on arithmetic with a simplifying tool, multi-turn: one stock verl command.
#
#   recipes/math/run.sh +plugin=heddle                       one GPU node, MODEL=path/or/name required
#   recipes/math/run.sh +plugin=heddle +machine=cpu          no GPU: the tiny model is made on the spot
#   recipes/math/run.sh +plugin=observe ...                  stock decisions, same instruments: the baseline
#
# Any Hydra override can follow. Environment: OUT (outputs/math), NAME of the run (math), MODEL, PYTHON (.venv/bin/python), STEPS (3),
# GPUS per node (2), NODES (1; with more, start Ray first and export RAY_ADDRESS). W&B logs offline unless WANDB_API_KEY or WANDB_MODE is set.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$(dirname "$here")")
PYTHON=${PYTHON:-$root/.venv/bin/python}
OUT=$(realpath -m "${OUT:-$root/outputs/math}")
NAME=${NAME:-math} STEPS=${STEPS:-3} GPUS=${GPUS:-2} NODES=${NODES:-1}
run=$OUT/$NAME
mkdir -p "$run"

make_model=()
[ -n "${MODEL:-}" ] || make_model=(--model)
"$PYTHON" "$here/prepare.py" --out "$OUT" --train-rows "${TRAIN_ROWS:-16}" --val-rows "${VAL_ROWS:-16}" "${make_model[@]}"
MODEL=${MODEL:-$OUT/tiny_model}

export HYDRA_FULL_ERROR=${HYDRA_FULL_ERROR:-1} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} RAY_DEDUP_LOGS=${RAY_DEDUP_LOGS:-0}
export WANDB_DIR=${WANDB_DIR:-$run}
[ -n "${WANDB_API_KEY:-}${WANDB_MODE:-}" ] || export WANDB_MODE=offline

exec "$PYTHON" -W ignore -m verl.trainer.main_ppo \
  algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False \
  data.train_files="$OUT/train.parquet" data.val_files="$OUT/val.parquet" data.return_raw_chat=True \
  data.train_batch_size=16 data.max_prompt_length=512 data.max_response_length=1024 data.shuffle=False \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.optim.lr=1e-4 \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.n=4 actor_rollout_ref.rollout.max_model_len=2048 actor_rollout_ref.rollout.max_num_seqs=8 \
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.rollout.multi_turn.enable=True actor_rollout_ref.rollout.multi_turn.format=hermes \
  actor_rollout_ref.rollout.multi_turn.function_tool_path="$here/tools.py" \
  actor_rollout_ref.rollout.multi_turn.max_assistant_turns=12 \
  reward.custom_reward_function.path="$here/reward.py" \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" \
  trainer.total_training_steps="$STEPS" trainer.total_epochs="$STEPS" trainer.project_name=heddle-math trainer.experiment_name="$NAME" \
  trainer.logger='[console,wandb]' trainer.val_before_train=False trainer.test_freq=-1 trainer.save_freq=-1 \
  trainer.resume_mode=disable trainer.default_local_dir="$run" trainer.rollout_data_dir="$run/rollouts" hydra.run.dir="$run/hydra" \
  "$@"
