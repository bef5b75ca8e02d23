#!/usr/bin/env bash
# GRPO on arithmetic with a simplifying tool, multi-turn: one stock verl command.
#
#   recipes/math/run.sh +plugin=heddle +machine=cpu                        no GPU: the tiny model is made on the spot
#   MODEL=Qwen/Qwen3-8B GPUS=8 recipes/math/run.sh +size=qwen3-8b +plugin=heddle     one GPU node
#   NODES=4 RAY_ADDRESS=head:6379 MODEL=... recipes/math/run.sh ...        many nodes: start Ray on each first, same checkout on all
#   recipes/math/run.sh +plugin=observe ...                                stock decisions, same instruments: the baseline
#
# Any Hydra override can follow; recipes/config holds what is set and the sizes. Environment: OUT (outputs/math), NAME of the run
# (math), MODEL (a path or name), DATA (generated; see prepare.py --help), TRAIN_ROWS (16), VAL_ROWS (16), MAX_DIFFICULTY of
# generated tasks (8), MODEL_STEPS (of training the tiny model), PYTHON (.venv/bin/python), STEPS (3), GPUS per node (2), NODES (1). W&B logs
# offline unless WANDB_API_KEY or WANDB_MODE is set.
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" math "$@"
