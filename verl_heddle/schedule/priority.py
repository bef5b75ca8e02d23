"""Priority of a turn: that of its trajectory, the longest first.

`longest`: priority = -round((tokens + tool seconds / pace) / quantum), tokens and tool seconds those so far and those predicted to come,
predicted anew at each turn; no prediction = 0. Time is what a makespan is made of, and tokens are its unit here: `Pace` says how many
seconds a token takes, once turns have told. vLLM runs lower values first and breaks ties by arrival, so within one quantum the order is
first come, first served: the quantum keeps noise in the estimate from reordering trajectories that are really alike.

The whole length, not what is left of it: by what is left, whoever runs falls behind whoever waits, all trajectories of a replica stay
half-done together, and their contexts push each other out of the KV cache (`bench/schedule/simulated.py` measures both orders).

`arrival`: 0, so that vLLM's own order holds, first come, first served; validation `VALIDATION`, since the trainer waits for it. Among
resident trajectories no order that predicts nothing was found better (`bench/residents`): by first turn, those whose turns queue late begin
late, and a step lasts up to 5 % longer where slots are short and KV cache is not.

Source: Heddle section 4, Algorithm 1 (priority = predicted length, longest first), for vLLM's `scheduling_policy=priority`, which orders
the waiting queue and picks the victim when KV blocks run out. That tools count is ours: longest processing time first with delivery times.
"""

from __future__ import annotations

LIMIT = 2**31 - 1
"""vLLM takes an int; 31 bits survive any serialisation on the way."""

MEMORY = 1000.0
"""Turns until the pace forgets by a factor e: a step or less, so that it follows the load."""


class Pace:
    """Seconds a request takes per token, as a running ratio over finished turns; None until one has told."""

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
        """The pace."""
        return self._seconds / self._tokens if self._seconds > 0 else None


VALIDATION = -1
"""Priority of validation by arrival; lower runs first."""


def work_tokens(tokens: float, tool_s: float, s_per_token: float | None) -> float:
    """Work in tokens: what is generated, and the tools' time at that pace (left out while it is not known)."""
    return tokens + (tool_s / s_per_token if s_per_token else 0.0)


def longest_first(length: float | None, quantum_tokens: int) -> int:
    """vLLM priority of a turn of a trajectory of that length, tokens, in [-LIMIT, 0]; lower runs first.

    Raises:
        ValueError: `quantum_tokens` is not positive.
    """
    if quantum_tokens < 1:
        raise ValueError(f"quantum_tokens must be at least 1, got {quantum_tokens}")
    if length is None:
        return 0
    return -round(min(float(LIMIT), length / quantum_tokens))
