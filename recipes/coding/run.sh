#!/usr/bin/env bash
# GRPO on programming tasks with tests, run in a sandbox, multi-turn: one stock verl command.
#
#   recipes/coding/run.sh +plugin=heddle +machine=cpu                        no GPU: the tiny model is made on the spot
#   MODEL=Qwen/Qwen3-8B GPUS=8 recipes/coding/run.sh +size=qwen3-8b +plugin=heddle     one GPU node
#   NODES=4 RAY_ADDRESS=head:6379 MODEL=... recipes/coding/run.sh ...        many nodes: start Ray on each first, same checkout on all
#   recipes/coding/run.sh +plugin=observe ...                                stock decisions, same instruments: the baseline
#
# Any Hydra override can follow; recipes/config holds what is set and the sizes. Environment: OUT (outputs/coding), NAME of the run
# (coding), MODEL (a path or name), DATA (generated; see prepare.py --help), TRAIN_ROWS (8, one batch), VAL_ROWS (16), MAX_DIFFICULTY of
# generated tasks (8), MODEL_STEPS (of training the tiny model), PYTHON (.venv/bin/python), STEPS (3), GPUS per node (2), NODES (1). W&B logs
# offline unless WANDB_API_KEY or WANDB_MODE is set.
export TRAIN_ROWS=${TRAIN_ROWS:-8}
exec "$(dirname "${BASH_SOURCE[0]}")/../run.sh" coding "$@"
