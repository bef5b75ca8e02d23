"""The recipes' Hydra groups compose with verl's config, in the order people write them, and later groups win."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_heddle.verl_plugin.overrides import compose

CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "config"
RECIPES = sorted(path.stem for path in (CONFIG / "recipe").glob("*.yaml"))
SIZES = sorted(path.stem for path in (CONFIG / "size").glob("qwen3-*.yaml"))


def composed(*groups):
    return compose([f"hydra.searchpath=[file://{CONFIG}]", *groups])


def test_both_recipes_and_every_size_are_there():
    assert RECIPES == ["coding", "math"] and len(SIZES) == 6


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_with_the_flag_and_a_machine(recipe):
    config = composed(f"+recipe={recipe}", "+plugin=heddle", "+machine=cpu", "data.max_response_length=77")
    assert config.trainer.project_name == f"heddle-{recipe}" and config.trainer.device == "cpu" and config.heddle.tools.enable
    assert config.data.max_response_length == 77 and config.actor_rollout_ref.rollout.n == 4


@pytest.mark.parametrize("size", SIZES)
def test_a_size_wins_over_the_recipe_and_is_marked_untested(size):
    config = composed("+recipe=coding", f"+size={size}", "+plugin=heddle")
    rollout = config.actor_rollout_ref.rollout
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6 and rollout.n == 8 and rollout.multi_turn.max_tool_response_length == 2000
    assert config.algorithm.norm_adv_by_std_in_grpo and config.actor_rollout_ref.actor.loss_agg_mode == "token-mean", "verl's own"
    assert config.data.max_prompt_length + config.data.max_response_length <= rollout.max_model_len
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= rollout.max_model_len, "one row must fit into a batch"
    assert "UNTESTED" in (CONFIG / "size" / f"{size}.yaml").read_text()
    assert "actor_rollout_ref" in composed("+recipe=math", f"+size={size}"), "known keys only"
