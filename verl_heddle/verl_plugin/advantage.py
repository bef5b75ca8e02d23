"""GRPO with a weight for each sample, registered as one of verl's advantage estimators: the corrected mode of shaping.

verl passes an estimator only rewards, masks and group names. The weights come from the shaper in the same process, looked up by group name
and by the tokens each row has generated. Without weights the result equals verl's `grpo` exactly, with one exception: if an agent loop
returns several rows for a trajectory, verl uses the last row, which cannot be identified here, so this estimator raises.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_adv_est

from verl_heddle.shape.select import advantages
from verl_heddle.shape.shaper import Shaper
from verl_heddle.verl_plugin.settings import ADVANTAGES

SHAPER: Shaper | None = None
"""This process's shaper, set by the manager."""


@register_adv_est(ADVANTAGES)
def weighted_grpo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns advantages and returns, as verl requires; both have the shape of `response_mask`, (rows, tokens).

    Args:
        index: group (uid) of each row.

    Raises:
        ValueError: a group has more rows than samples to train on.
    """
    by_deviation = True if config is None else bool(config.get("norm_adv_by_std_in_grpo", True))
    rewards, tokens = token_level_rewards.sum(dim=-1).tolist(), response_mask.sum(dim=-1).tolist()
    groups: dict[str, list[int]] = defaultdict(list)
    for row, uid in enumerate(index):
        groups[str(uid)].append(row)
    scores = [0.0] * len(rewards)
    for uid, rows in groups.items():
        weights = [1.0] * len(rows)
        if SHAPER is not None:
            if len(rows) > SHAPER.size:
                raise ValueError(
                    f"group {uid} has {len(rows)} rows for {SHAPER.size} samples: {ADVANTAGES} does not support agent loops that return "
                    "several rows for a trajectory; set algorithm.adv_estimator=grpo heddle.shape.corrected=false"
                )
            weights = SHAPER.weights(uid, [int(tokens[row]) for row in rows])
        for row, score in zip(rows, advantages([rewards[row] for row in rows], weights, by_deviation), strict=True):
            scores[row] = score
    spread = torch.tensor(scores, dtype=token_level_rewards.dtype, device=token_level_rewards.device).unsqueeze(-1) * response_mask
    return spread, spread
