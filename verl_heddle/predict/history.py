"""The simplest estimate of a trajectory's length: the mean of what was seen, less what it has generated already.

Law: the mean output length of finished trajectories of the same prompt if there are any, else of all finished trajectories, else
nothing. Remaining = that mean less the tokens generated, never below `FLOOR_TOKENS`. Cancelled and failed trajectories are not
counted: their length is a lower bound, not a length. Source: "history-based prediction", the baseline of Heddle section 3. Cost:
O(1); memory: two numbers a prompt, bounded by `MAX_PROMPTS`.
"""

from __future__ import annotations

from collections import OrderedDict

FLOOR_TOKENS = 1.0
"""A trajectory that outlived its estimate has still something to say; a floor keeps it from looking finished."""

MAX_PROMPTS = 1_000_000
"""About 200 MB of table; larger data sets forget the prompts seen longest ago."""


class HistoryMean:
    """Running means of finished lengths, by prompt and pooled."""

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._prompts: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._pooled = (0, 0.0)
        self._max_prompts = max_prompts

    def observe(self, prompt: str, output_tokens: int) -> None:
        """A trajectory of `prompt` finished after generating `output_tokens`."""
        self._pooled = _add(self._pooled, output_tokens)
        self._prompts[prompt] = _add(self._prompts.pop(prompt, (0, 0.0)), output_tokens)
        if len(self._prompts) > self._max_prompts:
            self._prompts.popitem(last=False)

    def remaining(self, prompt: str, generated_tokens: int) -> float | None:
        """Expected tokens still to come, or None before anything has finished."""
        count, mean = self._prompts.get(prompt, self._pooled)
        return max(FLOOR_TOKENS, mean - generated_tokens) if count else None


def _add(entry: tuple[int, float], value: float) -> tuple[int, float]:
    count, mean = entry
    return count + 1, mean + (value - mean) / (count + 1)
