"""The end-to-end experiment's command composes with verl's real configuration, for the GPU and for the rehearsal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.gpu.experiments import endtoend
from bench.gpu.profiles import PROFILES
from verl_heddle.verl_plugin.overrides import compose

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("arm", endtoend.ARMS)
def test_the_overrides_are_keys_of_verl(profile, arm, tmp_path):
    made = PROFILES[profile]()
    line, variables = endtoend.command(made, arm, tmp_path / "model", tmp_path)
    assert Path(line[1]).is_file()
    config = compose([f"hydra.searchpath=[file://{ROOT}/recipes/config]", "+recipe=math", *line[2:]])
    assert config.heddle.observe is (arm == "stock")
    assert config.data.train_batch_size * made.endtoend.steps >= int(variables["TRAIN_ROWS"]), "every row is seen"
    rollout = config.actor_rollout_ref.rollout
    assert config.data.max_prompt_length + config.data.max_response_length <= rollout.max_model_len
    assert made.endtoend.mean_tokens * 5 <= config.data.max_response_length, "few trajectories are cut"
    trajectories = config.data.train_batch_size * rollout.n
    assert trajectories > rollout.max_num_seqs, "more trajectories than slots"
    if profile == "h200":
        assert config.trainer.device == "cuda" and rollout.free_cache_engine
        assert OmegaConf.select(rollout, "enable_sleep_mode", default=True)  # verl's default
        assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= rollout.max_model_len
