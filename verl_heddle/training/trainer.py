"""The settings of a simulated trainer, and the results of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MODES = ("sync", "colocate_async", "separate_async")


@dataclass(frozen=True, slots=True)
class Trainer:
    """One of verl's trainers; fields are named after its own keys where there is one.

    Raises:
        ValueError: a number is out of range.
    """

    mode: Literal["sync", "colocate_async", "separate_async"]
    prompts: int
    """Prompts per batch (`data.train_batch_size`)."""
    update_s: float
    """From a complete batch to new weights. Rollout stops for it, except in `separate_async`."""
    transfer_s: float = 0.0
    """In `separate_async`: time to send new weights to the rollout engines, which stop for it."""
    steps: int = 12
    warmup_batches: float = 1.0
    """`num_warmup_batches`: batches that an asynchronous trainer asks for in advance."""
    parameter_sync_step: int = 1
    """Parts in which `separate_async` takes a batch, with an update each; weights are sent after the last."""
    threshold: int | None = 8
    """`max_off_policy_threshold`: steps after which a group is too stale."""
    strategy: Literal["drop", "wait"] = "drop"
    """`max_off_policy_strategy`: drop groups that are too stale, or wait for groups that are about to be."""

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.strategy not in ("drop", "wait"):
            raise ValueError(f"mode must be one of {', '.join(MODES)}, strategy drop or wait, got {self}")
        if self.prompts < 1 or self.steps < 1 or not (self.update_s >= 0 and self.transfer_s >= 0 and self.warmup_batches >= 0):
            raise ValueError(f"prompts and steps must be positive, times and warmup_batches not negative, got {self}")
        if self.parameter_sync_step < 1 or self.prompts % self.parameter_sync_step:
            raise ValueError(f"parameter_sync_step must divide the batch, got {self}")

    @property
    def sync(self) -> bool:
        """Whether rollout and update alternate."""
        return self.mode == "sync"

    @property
    def ahead(self) -> int:
        """Prompts asked for before the first step."""
        return 0 if self.sync else int(self.warmup_batches * self.prompts)


@dataclass(frozen=True, slots=True)
class Step:
    """One training step. Token counts are generated tokens."""

    seconds: float
    waited_s: float
    """Part of `seconds` in which the trainer waited for a complete batch."""
    trained_tokens: int
    trained_lengths: tuple[int, ...]
    """Length of every trajectory in the batch."""
    ages: tuple[int, ...]
    """Steps between the request for a group and its training, for every group."""
    dropped_tokens: int
    recomputed_tokens: int
    """Context tokens prefilled again, after a weight update or because KV cache was short."""
    interrupted: int
    """Turns interrupted by the weight update at the end of the step."""


@dataclass(frozen=True, slots=True)
class Run:
    """Results of a simulated run. The first `skip` steps are left out of every number, because they start from empty engines."""

    steps: Sequence[Step]
    drawn_tokens: float
    """Mean tokens of all trajectories asked for: the mean of an unbiased batch."""
    skip: int = 0

    @property
    def counted(self) -> Sequence[Step]:
        """The steps after the first `skip`."""
        return self.steps[self.skip :]

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second."""
        return sum(step.trained_tokens for step in self.counted) / sum(step.seconds for step in self.counted)

    @property
    def waited_share(self) -> float:
        """Share of the time that the trainer waited."""
        return sum(step.waited_s for step in self.counted) / sum(step.seconds for step in self.counted)

    @property
    def dropped_share(self) -> float:
        """Tokens dropped as too stale, as a share of dropped and trained tokens."""
        dropped = sum(step.dropped_tokens for step in self.counted)
        return dropped / max(1, dropped + sum(step.trained_tokens for step in self.counted))

    @property
    def length_bias(self) -> float:
        """Mean length of trained trajectories relative to drawn ones, less 1: above 0 they are longer."""
        lengths = [length for step in self.counted for length in step.trained_lengths]
        return float(np.mean(lengths)) / self.drawn_tokens - 1

    @property
    def ages(self) -> tuple[float, int]:
        """Mean and maximum age of a trained group, in steps."""
        ages = [age for step in self.counted for age in step.ages]
        return float(np.mean(ages)), max(ages)

    @property
    def recomputed_per_trained(self) -> float:
        """Tokens recomputed per token trained."""
        return sum(step.recomputed_tokens for step in self.counted) / max(1, sum(step.trained_tokens for step in self.counted))
