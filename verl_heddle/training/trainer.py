"""What the simulation knows of a trainer, and what comes out of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MODES = ("sync", "colocate_async", "separate_async")


@dataclass(frozen=True, slots=True)
class Trainer:
    """One of verl's trainers, by its own keys.

    Raises:
        ValueError: a number is out of range.
    """

    mode: Literal["sync", "colocate_async", "separate_async"]
    prompts: int
    """Of a batch (`data.train_batch_size`)."""
    update_s: float
    """From a complete batch to new weights; rollout stands still for it, but in `separate_async`, where it goes on."""
    transfer_s: float = 0.0
    """In `separate_async`, how long new weights take to the rollout engines, which stand still."""
    steps: int = 12
    warmup_batches: float = 1.0
    """`num_warmup_batches`: prompts that an asynchronous trainer is ahead."""
    parameter_sync_step: int = 1
    """Parts in which `separate_async` takes a batch, each an update; weights go out after the last."""
    threshold: int | None = 8
    """`max_off_policy_threshold`: steps after which a group is too stale."""
    strategy: Literal["drop", "wait"] = "drop"
    """What becomes of those (`max_off_policy_strategy`)."""

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.strategy not in ("drop", "wait"):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, strategy drop or wait, got {self}")
        if self.prompts < 1 or self.steps < 1 or not (self.update_s >= 0 and self.transfer_s >= 0 and self.warmup_batches >= 0):
            raise ValueError(f"prompts and steps must be positive, times and warmup_batches not negative, got {self}")
        if self.parameter_sync_step < 1 or self.prompts % self.parameter_sync_step:
            raise ValueError(f"parameter_sync_step must divide the batch, got {self}")

    @property
    def sync(self) -> bool:
        """Whether rollout and update take turns."""
        return self.mode == "sync"

    @property
    def ahead(self) -> int:
        """Prompts that are asked for before the first step."""
        return 0 if self.sync else int(self.warmup_batches * self.prompts)


@dataclass(frozen=True, slots=True)
class Step:
    """One training step. Token counts are generated tokens."""

    seconds: float
    waited_s: float
    """Of them, for rollout to complete the batch."""
    trained_tokens: int
    trained_lengths: tuple[int, ...]
    """Of every trajectory in the batch."""
    ages: tuple[int, ...]
    """Steps between the request for a group and its training, for every group."""
    dropped_tokens: int
    recomputed_tokens: int
    """Read that an engine had read before: after a weight update, or because the KV cache was short."""
    interrupted: int
    """Turns that the weight update at its end interrupted."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a simulated run came to; `skip` first steps are left out of every number, since they start from empty engines."""

    steps: Sequence[Step]
    drawn_tokens: float
    """Mean tokens of all trajectories that were asked for: what an unbiased batch would have."""
    skip: int = 0

    @property
    def counted(self) -> Sequence[Step]:
        return self.steps[self.skip :]

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second."""
        return sum(step.trained_tokens for step in self.counted) / sum(step.seconds for step in self.counted)

    @property
    def waited_share(self) -> float:
        """Share of the time in which the trainer waited."""
        return sum(step.waited_s for step in self.counted) / sum(step.seconds for step in self.counted)

    @property
    def dropped_share(self) -> float:
        """Tokens dropped as too stale, as a share of those and the trained."""
        dropped = sum(step.dropped_tokens for step in self.counted)
        return dropped / max(1, dropped + sum(step.trained_tokens for step in self.counted))

    @property
    def length_bias(self) -> float:
        """How much longer (above 0) or shorter than drawn the trained trajectories are in the mean, as a share."""
        lengths = [length for step in self.counted for length in step.trained_lengths]
        return float(np.mean(lengths)) / self.drawn_tokens - 1

    @property
    def ages(self) -> tuple[float, int]:
        """Mean and most steps that a trained group is old."""
        ages = [age for step in self.counted for age in step.ages]
        return float(np.mean(ages)), max(ages)

    @property
    def recomputed_per_trained(self) -> float:
        """Tokens computed again for each token trained."""
        return sum(step.recomputed_tokens for step in self.counted) / max(1, sum(step.trained_tokens for step in self.counted))
