"""What a coming step will be like, before its prompts are known: trajectories like those of the step that is over.

Law: each trajectory comes again with the length that was predicted at its start, made right in the middle and as uncertain as the
predictions of that step turned out: with e = log(length / predicted), medians are predicted * exp(median of e), and the scale of the
log-logistic is that whose quartiles are those of e, (q3 - q1) / (2 log 3). True lengths would promise an isolation of the longest that no
placement can give. Where nothing was predicted, the middle of all lengths stands for each prediction.
Source: own. Cost: O(n log n).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log

import numpy as np

from verl_heddle.layout.price import Coming, coming
from verl_heddle.trajectory import Trajectory


def again(records: Sequence[Trajectory], cap_tokens: float = inf) -> Coming | None:
    """The coming step; None if nothing was generated.

    Args:
        records: whole trajectories, as recorded; those that were stopped tell a length that is too short.
        cap_tokens: most tokens that a trajectory may generate.
    """
    some = [record for record in records if record.output_tokens > 0]
    if not some:
        return None
    lengths = np.array([record.output_tokens for record in some], dtype=np.float64)
    told = np.array([record.steps[0].predicted_remaining or 0.0 for record in some])
    predicted = np.where(told > 0, told, np.median(lengths))
    low, middle, high = np.quantile(np.log(lengths / predicted), (0.25, 0.5, 0.75))
    return coming(predicted * np.exp(middle), (high - low) / (2 * log(3)), cap_tokens)
