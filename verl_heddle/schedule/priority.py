"""The priority of a turn in vLLM, which runs lower values first and breaks ties by arrival.

`longest`: priority = -round((tokens + tool seconds / pace) / quantum). Tokens and tool seconds are those so far plus those predicted, and
predicted again at each turn; without a prediction the priority is 0. A makespan is made of time, here in units of tokens: `Pace` measures
the seconds per token from finished turns. Within one quantum the order is first come, first served, so that noise in the estimate does not
reorder trajectories of about the same length.

The length is the whole one, not what remains. By remaining length a running trajectory falls behind a waiting one, all trajectories of a
replica stay half done together, and their contexts evict each other from the KV cache (`bench/schedule/simulated.py` measures both orders).

`arrival`: priority 0, so vLLM's own order holds: first come, first served. Validation has `VALIDATION`, because the trainer waits for it.
For resident trajectories no better order without predictions was found (`bench/residents`): by first turn, trajectories whose turns queue
late begin late, and a step takes up to 5 % longer if slots are short and KV cache is not.

Source: Heddle section 4, Algorithm 1 (priority = predicted length, longest first), for vLLM's `scheduling_policy=priority`, which orders
the waiting queue and picks the victim when KV blocks run out. Tool time is our addition: longest processing time first with delivery times.
"""

from __future__ import annotations

LIMIT = 2**31 - 1
"""vLLM takes an int; 31 bits survive any serialisation."""

MEMORY = 1000.0
"""Turns after which the pace forgets by a factor e: a step or less, so that it follows the load."""


class Pace:
    """Seconds per token of a request, as a running ratio over finished turns."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def turn(self, tokens: int, engine_s: float | None) -> None:
        """A turn of `tokens` tokens kept a slot busy for `engine_s` seconds; None: not known."""
        if engine_s is not None and engine_s >= 0 and tokens > 0:
            keep = 1 - 1 / MEMORY
            self._seconds = self._seconds * keep + engine_s
            self._tokens = self._tokens * keep + tokens

    @property
    def s_per_token(self) -> float | None:
        """The ratio; None before the first measured turn."""
        return self._seconds / self._tokens if self._seconds > 0 else None


VALIDATION = -1
"""Priority of validation by arrival; lower runs first."""


def work_tokens(tokens: float, tool_s: float, s_per_token: float | None) -> float:
    """Work in tokens: generated tokens plus tool time at this pace (left out while the pace is not known)."""
    return tokens + (tool_s / s_per_token if s_per_token else 0.0)


def longest_first(length: float | None, quantum_tokens: int) -> int:
    """vLLM priority in [-LIMIT, 0] of a trajectory of this length in tokens.

    Raises:
        ValueError: `quantum_tokens` is not positive.
    """
    if quantum_tokens < 1:
        raise ValueError(f"quantum_tokens must be at least 1, got {quantum_tokens}")
    if length is None:
        return 0
    return -round(min(float(LIMIT), length / quantum_tokens))
