"""What a user can ask of shaping, as the core takes it. Defaults keep what the paper reports as good; the guard's bounds are ours."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from verl_heddle.shape.budget import Objective


class ShapeReason(StrEnum):
    """Why a prompt is sampled the way it is; counted as the metric `heddle/shape/prompts/<reason>`."""

    SHAPED = "shaped"
    """Spare samples, dual-end selection."""
    SATURATED = "saturated"
    """As many spare samples as allowed: shortest-only, because its whole distribution is long (DARTS's tail pruning)."""
    NO_SPARES = "no_spares"
    """Plain sampling: the budget gave its spare samples to others."""
    UNSEEN = "unseen"
    """Plain sampling: this prompt was never visited, and spares for everybody alike do not pay."""
    NO_GAIN = "no_gain"
    """Plain sampling of the whole step: no budget shortens it by the forecast."""
    NO_FORECAST = "no_forecast"
    """Plain sampling of the whole step: no latency model, or nothing learnt yet, and no fixed budget asked for."""
    CONTROL = "control"
    """Plain sampling on purpose, to have something to compare with."""
    LENGTH_BIAS = "length_bias"
    """Plain sampling: one more sample would make the kept shorter than the bound allows, or the run's kept have been."""
    MIXED_LOSS = "mixed_loss"
    """Plain sampling: selection has turned groups of mixed outcome into groups of one outcome, which teach nothing."""


@dataclass(frozen=True, slots=True)
class ShapeSettings:
    """See each field. `check` says what is wrong."""

    spare: float | None = None
    """Spare samples per prompt in the mean; None: as many as pay by the forecast."""
    unseen: bool = False
    """Whether the forecast's budget may go to prompts that were never visited. Of them only the pool is known, so all get the same: in
    bench/shaping that cost 15 to 49 % more tokens for 1.00 to 1.29x, mostly nothing."""
    uniform: bool = False
    """Every prompt gets the same number of spare samples (needs `spare`)."""
    most: float = 2.0
    """Samples of a prompt at most, as a multiple of n (DARTS: 2)."""
    longest: int = 1
    """Long slots of a group, L (DARTS: 1 of 8)."""
    patience: float | None = None
    """How long a long slot is waited for, as a multiple of the tokens with which the step's last group is expected to be full; inf: always
    (DARTS); None: as long as it costs next to nothing by the forecast."""
    objective: Objective = Objective.TAIL
    """What the allocation makes small."""
    price: float = 1.0
    """lambda of U = E - lambda T: seconds saved that a second of extra work has to earn."""
    corrected: bool = False
    """Give each kept sample an importance weight for the selection."""
    length_bias: float = 0.25
    """Bound: how much shorter the kept may be, in the mean over the prompts, than the samples they stand for, as a share of their
    geometric mean length; 1: no bound (seven short and one long of 16 in a public log: 0.11, shortest 8 of 16: 0.17)."""
    prompt_bias: float = 0.6
    """The same for a single prompt."""
    mixed_loss: float = 0.2
    """Bound: share of the groups of mixed outcome that selection may lose (shortest 8 of 16 lost 0.09 in a public log)."""
    rest_steps: int = 20
    """Steps of plain sampling after a bound was crossed; then shaping is tried again."""
    control_every: int = 0
    """Every so many-th prompt of a step is sampled plainly; 0: none. A control waits for its longest sample, as stock does."""

    def check(self, size: int) -> list[str]:
        """What is wrong for groups of this size, one plain line each."""
        problems = []
        if size < 2:
            problems.append(f"shaping needs groups of at least 2 samples (actor_rollout_ref.rollout.n), got {size}")
        if self.spare is not None and not 0 <= self.spare <= (self.most - 1) * size:
            problems.append(f"heddle.shape.spare must lie between 0 and {(self.most - 1) * size:g}, got {self.spare:g}")
        if self.uniform and (self.spare is None or self.spare != int(self.spare)):
            problems.append(f"heddle.shape.uniform needs a whole number in heddle.shape.spare, got {self.spare}")
        if not 1 <= self.most <= 4:
            problems.append(f"heddle.shape.most must lie between 1 and 4 times n, got {self.most:g}")
        if not 0 <= self.longest <= size:
            problems.append(f"heddle.shape.longest must lie between 0 and n={size}, got {self.longest}")
        for name, value in (("patience", self.patience or 0.0), ("price", self.price)):
            if not value >= 0:
                problems.append(f"heddle.shape.{name} must not be negative, got {value:g}")
        for name in ("length_bias", "prompt_bias", "mixed_loss"):
            if not 0 < getattr(self, name) <= 1:
                problems.append(f"heddle.shape.{name} must lie in 0 to 1, 1 for no bound, got {getattr(self, name):g}")
        if self.rest_steps < 1 or self.control_every < 0 or self.control_every == 1:
            given = f"{self.rest_steps} and {self.control_every}"
            problems.append(f"heddle.shape.rest_steps must be at least 1 and control_every 0 or at least 2, got {given}")
        return problems
