"""Aggregates measured runs by arm and compares each arm with the first, over the pairs that both have finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, log
from statistics import mean, median
from typing import Any

import numpy as np

from verl_heddle.compare.bootstrap import Ratio, paired_ratio
from verl_heddle.compare.ledger import Entry
from verl_heddle.compare.measure import SHARES, SPLIT, WINDOW, RunResult, Step
from verl_heddle.compare.plan import Arm, Key, Plan
from verl_heddle.report.recorded import Machine
from verl_heddle.traces.describe import spearman

OURS = (
    "trainer.experiment_name",
    "trainer.default_local_dir",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
    "ray_kwargs.ray_init.runtime_env.env_vars.",
    "hydra.",
    "heddle.trace.dir",
)
"""Configuration keys that `launch` sets differently in every run; a trailing dot means a whole node. Seeds differ too."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Accuracy of predictions of a trajectory's remaining tokens, over all predicted turns.

    `rank`: Spearman correlation with the truth. `factor`: median error as a factor, e.g. 1.5 (half of the predictions are within it).
    `bias`: sum predicted over sum true. `covered`: share of turns whose true value is below the predicted upper quantile.
    """

    turns: int
    rank: float | None
    factor: float
    bias: float
    covered: float | None


@dataclass(frozen=True, slots=True)
class Twin:
    """Estimates of the twin inside an arm's runs, over `steps` steps that count. `speedup`: verl's seconds over heddle's (geometric mean).
    `error`: median absolute error on the steps as they ran (share of the makespan)."""

    steps: int
    speedup: float
    error: float


@dataclass(frozen=True)
class ArmResult:
    """One arm over its finished runs, by pair. Ratios are relative to `base` (None for the base itself, or if no pair is shared)."""

    arm: Arm
    runs: Mapping[int, RunResult]
    base: ArmResult | None

    @cached_property
    def speedup(self) -> Ratio | None:
        """Makespan of the base over this arm's, measured from the trajectories."""
        return self._ratio("makespan_s")

    @cached_property
    def trained_ratio(self) -> Ratio | None:
        """Tokens trained on per second, this arm's over the base's; None for synchronous trainers, which log no windows."""
        return self._ratio(WINDOW, "trained/tokens")

    @property
    def headline(self) -> Ratio | None:
        """The ratio that decides the verdict: `trained_ratio` under an asynchronous trainer, else `speedup`."""
        return self.trained_ratio or self.speedup

    @cached_property
    def step_ratio(self) -> Ratio | None:
        """Seconds of the base's whole training step over this arm's, by verl's clock."""
        return self._ratio("step_s")

    @cached_property
    def throughput_ratio(self) -> Ratio | None:
        """Generated tokens per second of makespan, this arm's over the base's; unaffected if one arm sampled longer answers."""
        return self._ratio("makespan_s", "tokens")

    @property
    def steps(self) -> list[Step]:
        """The steps that count, over all runs."""
        return [step for run in self.runs.values() for step in run.warm]

    def values(self, name: str) -> list[float]:
        """The known values of a metric over the steps that count."""
        return [value for step in self.steps if (value := step.get(name)) is not None]

    def median(self, name: str) -> float | None:
        """Median of a metric over the steps that count; None if unknown."""
        found = self.values(name)
        return median(found) if found else None

    def mean(self, name: str) -> float | None:
        """Mean of a metric over the steps that count; None if unknown."""
        found = self.values(name)
        return mean(found) if found else None

    def total(self, prefix: str) -> dict[str, float]:
        """Sums over the steps that count of all metrics with this prefix, keyed by the rest of the name."""
        found: Counter[str] = Counter()
        for step in self.steps:
            for name, value in step.metrics.items():
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] += value  # type: ignore[assignment]
        return dict(found)

    @property
    def split(self) -> dict[str, float] | None:
        """Mean seconds of each part in `SPLIT`, which add up to the mean makespan; None without a trace."""
        splits = [step.split for step in self.steps if step.split is not None]
        return {name: mean(split[name] for split in splits) for name in SPLIT} if splits else None

    @property
    def shares(self) -> dict[str, float] | None:
        """Mean of each share in `SHARES`; None for synchronous trainers."""
        found = [step.shares for step in self.steps if step.shares is not None]
        return {name: mean(shares[name] for shares in found) for name in SHARES} if found else None

    @property
    def trained_tokens_per_s(self) -> float | None:
        """Tokens trained on per second over the windows that count; None for synchronous trainers."""
        seconds, tokens = sum(self.values(WINDOW)), sum(self.values("trained/tokens"))
        return tokens / seconds if seconds else None

    @property
    def read_again_share(self) -> float | None:
        """Share of prefilled tokens that the previous turn had left in the engine; None if engines do not report it."""
        read = sum(self.values("prefill_tokens"))
        return sum(self.values("read_again_tokens")) / read if read else None

    @property
    def dropped_share(self) -> float | None:
        """Share of the windows' tokens that were dropped as too stale to train on; None for synchronous trainers."""
        dropped, trained = sum(self.values("dropped/tokens")), sum(self.values("trained/tokens"))
        return dropped / (dropped + trained) if dropped + trained else None

    @property
    def bound_fraction(self) -> float | None:
        """Sum of the lower bounds over sum of the makespans; at most 1 if the model of step times is right."""
        known = [(step.bound_s, step.metrics["makespan_s"]) for step in self.steps if step.bound_s is not None]
        return sum(low for low, _ in known) / sum(took for _, took in known) if known else None

    @cached_property
    def prediction(self) -> Prediction | None:
        """Prediction accuracy over all runs; None if nothing was predicted."""
        rows = [row for run in self.runs.values() for row in run.predicted]
        if not rows:
            return None
        predicted, true = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
        errors = np.abs(np.log(np.maximum(predicted, 1.0)) - np.log(np.maximum(true, 1.0)))
        upper = [(row[2], row[3]) for row in rows if row[3] is not None]
        return Prediction(
            turns=len(rows),
            rank=spearman(predicted, true),
            factor=exp(float(np.median(errors))),
            bias=float(predicted.sum() / true.sum()),
            covered=mean(value <= high for value, high in upper) if upper else None,
        )

    @property
    def twin(self) -> Twin | None:
        """The twin's estimates; None if it judged no step that counts."""
        judged = [step for step in self.steps if step.get("twin/speedup")]
        if not judged:
            return None
        speedup = exp(mean(log(step.metrics["twin/speedup"]) for step in judged))
        return Twin(len(judged), speedup, median(abs(step.metrics["twin/error"]) for step in judged))

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, mean over the runs) of a metric, over all steps including the warm-up."""
        by_step: dict[int, list[float]] = {}
        for run in self.runs.values():
            for step in run.steps:
                if (value := step.get(name)) is not None:
                    by_step.setdefault(step.number, []).append(value)
        return [(number, mean(found)) for number, found in sorted(by_step.items())]

    def _ratio(self, seconds: str, tokens: str | None = None) -> Ratio | None:
        if self.base is None:
            return None
        pairs = []
        for pair, run in self.runs.items():
            other = self.base.runs.get(pair)
            if other is None:
                continue
            rows = [(_cost(base, seconds, tokens), _cost(step, seconds, tokens)) for step in run.warm if (base := other.step(step.number))]
            known = [(base, own) for base, own in rows if base is not None and own is not None]
            pairs.append((pair, [base for base, _ in known], [own for _, own in known]))
        return paired_ratio(pairs)


def _cost(step: Step, seconds: str, tokens: str | None) -> float | None:
    """Seconds, or seconds per token if `tokens` names a metric; None if unknown or zero."""
    took, made = step.get(seconds), 1.0 if tokens is None else step.get(tokens)
    return took / made if took and made else None


@dataclass(frozen=True)
class Comparison:
    """All arms in the plan's order; the first is the base of the others. `entries` has every run of the plan, None if not started."""

    plan: Plan
    arms: Mapping[str, ArmResult]
    entries: Mapping[Key, Entry | None]
    machine: Machine | None
    warmup: int
    notes: tuple[str, ...] = ()

    @property
    def base(self) -> ArmResult:
        """The arm that the others are compared with."""
        return next(iter(self.arms.values()))

    @property
    def in_windows(self) -> bool:
        """Whether the trainer is asynchronous, so that the runs have windows between batches instead of makespans."""
        return any(arm.shares is not None for arm in self.arms.values())

    @property
    def others(self) -> list[ArmResult]:
        """All arms but the base."""
        return list(self.arms.values())[1:]

    @property
    def missing(self) -> dict[Key, Entry | None]:
        """Runs that are not finished."""
        return {key: entry for key, entry in self.entries.items() if entry is None or entry.state != "finished"}

    def config_diff(self) -> dict[str, dict[str, Any]]:
        """verl keys whose values differ between arms in the first pair, by arm, without seeds and the keys in `OURS`."""
        configs = {name: next(iter(arm.runs.values())).config for name, arm in self.arms.items() if arm.runs}
        configs = {name: config for name, config in configs.items() if config}
        keys = sorted({key for config in configs.values() for key in config})
        rows = {key: {name: config.get(key) for name, config in configs.items()} for key in keys if not _ours(key)}
        return {key: row for key, row in rows.items() if len({str(value) for value in row.values()}) > 1}


def comparison(
    plan: Plan,
    results: Mapping[Key, RunResult],
    entries: Mapping[Key, Entry | None],
    machine: Machine | None,
    warmup: int,
    notes: Sequence[str] = (),
) -> Comparison:
    """Group the runs by arm and link each arm to the base."""
    base: ArmResult | None = None
    arms: dict[str, ArmResult] = {}
    for arm in plan.arms:
        arms[arm.name] = ArmResult(arm, {key.pair: run for key, run in results.items() if key.arm == arm.name}, base)
        base = base or arms[arm.name]
    return Comparison(plan, arms, entries, machine, warmup, tuple(notes))


def _ours(key: str) -> bool:
    return key.endswith("seed") or any(key == name or (name.endswith(".") and key.startswith(name)) for name in OURS)
