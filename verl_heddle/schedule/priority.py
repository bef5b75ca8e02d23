"""Progressive priority: the trajectory with most to come runs first.

Law: priority = -round(predicted remaining tokens / quantum), anew at each turn; no prediction = 0. vLLM runs lower values first
and breaks ties by arrival, so within one quantum the order is first come, first served. Source: Heddle section 4, Algorithm 1
(priority = predicted length, longest first), for vLLM's `scheduling_policy=priority`, which orders the waiting queue and picks
the victim when KV blocks run out.

The quantum keeps noise in the estimate from reordering trajectories that are really alike.
"""

from __future__ import annotations

LIMIT = 2**31 - 1
"""vLLM takes an int; 31 bits survive any serialisation on the way."""


def longest_first(predicted_remaining: float | None, quantum_tokens: int) -> int:
    """vLLM priority of a turn, in [-LIMIT, 0]; lower runs first.

    Raises:
        ValueError: `quantum_tokens` is not positive.
    """
    if quantum_tokens < 1:
        raise ValueError(f"quantum_tokens must be at least 1, got {quantum_tokens}")
    if predicted_remaining is None:
        return 0
    return -min(LIMIT, round(predicted_remaining / quantum_tokens))
