"""GRPO with a weight for each sample, under a name of verl's registry of advantage estimators: the corrected mode of shaping.

verl hands an estimator rewards, masks and group names, no more; so the weights are asked of the shaper, which lives in the same process, by
the group's name and the tokens each row has generated. Without weights it is verl's own `grpo`, number for number, but for agent loops that
return several rows for a trajectory: there verl looks at the last one only, which cannot be told here, and this one refuses.
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
"""Of this process; the manager puts it here."""


@register_adv_est(ADVANTAGES)
def weighted_grpo(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's contract: advantages and returns, both of the shape of `response_mask`, rows by tokens.

    Args:
        index: group (uid) of each row.

    Raises:
        ValueError: a group has more rows than samples that are trained on.
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
                    f"group {uid} has {len(rows)} rows for {SHAPER.size} samples: {ADVANTAGES} does not know agent loops that return "
                    "several rows for a trajectory; set algorithm.adv_estimator=grpo heddle.shape.corrected=false"
                )
            weights = SHAPER.weights(uid, [int(tokens[row]) for row in rows])
        for row, score in zip(rows, advantages([rewards[row] for row in rows], weights, by_deviation), strict=True):
            scores[row] = score
    spread = torch.tensor(scores, dtype=token_level_rewards.dtype, device=token_level_rewards.device).unsqueeze(-1) * response_mask
    return spread, spread
