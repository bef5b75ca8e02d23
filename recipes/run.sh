#!/usr/bin/env bash
# What recipes/math/run.sh and recipes/coding/run.sh share: one stock verl command, from a laptop to a cluster. Usage: see there.
set -euo pipefail
recipe=${1:?usage: recipes/run.sh RECIPE [overrides]; better: recipes/math/run.sh, recipes/coding/run.sh}
shift
recipes=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$recipes")
PYTHON=${PYTHON:-$root/.venv/bin/python}
OUT=$(realpath -m "${OUT:-$root/outputs/$recipe}")
NAME=${NAME:-$recipe} STEPS=${STEPS:-3} GPUS=${GPUS:-2} NODES=${NODES:-1} DATA=${DATA:-generated}
run=$OUT/$NAME
mkdir -p "$run"

make_model=()
[ -n "${MODEL:-}" ] || make_model=(--model ${MODEL_STEPS:+--model-steps "$MODEL_STEPS"})
"$PYTHON" "$recipes/$recipe/prepare.py" --out "$OUT" --data "$DATA" --train-rows "${TRAIN_ROWS:-16}" --val-rows "${VAL_ROWS:-16}" ${MAX_DIFFICULTY:+--max-difficulty "$MAX_DIFFICULTY"} "${make_model[@]}"
MODEL=${MODEL:-$OUT/tiny_model}

export HYDRA_FULL_ERROR=${HYDRA_FULL_ERROR:-1} RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} RAY_DEDUP_LOGS=${RAY_DEDUP_LOGS:-0}
export WANDB_DIR=${WANDB_DIR:-$run}
[ -n "${WANDB_API_KEY:-}${WANDB_MODE:-}" ] || export WANDB_MODE=offline
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # tools and rewards import from recipes/, in every process

tools=(actor_rollout_ref.rollout.multi_turn.function_tool_path="$recipes/$recipe/tools.py")
[ "$DATA" = generated ] || [ ! -f "$recipes/$recipe/solver.py" ] ||
  tools=(actor_rollout_ref.rollout.multi_turn.function_tool_path="$recipes/$recipe/solver.py")
[ ! -f "$recipes/$recipe/tools.yaml" ] || tools=(actor_rollout_ref.rollout.multi_turn.tool_config_path="$recipes/$recipe/tools.yaml")

exec "$PYTHON" -W ignore -m verl.trainer.main_ppo hydra.searchpath="[file://$recipes/config]" +recipe="$recipe" \
  data.train_files="$OUT/train.parquet" data.val_files="$OUT/val.parquet" actor_rollout_ref.model.path="$MODEL" \
  "${tools[@]}" reward.custom_reward_function.path="$recipes/$recipe/reward.py" \
  trainer.nnodes="$NODES" trainer.n_gpus_per_node="$GPUS" trainer.total_training_steps="$STEPS" trainer.total_epochs="$((2 * STEPS + 8))" \
  trainer.experiment_name="$NAME" trainer.default_local_dir="$run" trainer.rollout_data_dir="$run/rollouts" hydra.run.dir="$run/hydra" \
  ++ray_kwargs.ray_init.runtime_env.env_vars.PYTHONPATH="'$PYTHONPATH'" \
  "$@"
