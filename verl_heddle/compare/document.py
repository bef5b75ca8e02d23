"""The comparison as a JSON document with stable keys.

`docs/compare.md` explains each key; `compare.schema.json` in this folder is the JSON Schema. Keys are only ever added; a change of meaning
changes `schema`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.resources import files
from math import isfinite
from typing import Any

import verl_heddle
from verl_heddle.compare.bootstrap import Ratio
from verl_heddle.compare.findings import cautions, findings, not_helped
from verl_heddle.compare.measure import WINDOW, RunResult, Step
from verl_heddle.compare.result import ArmResult, Comparison

SCHEMA = "verl-heddle/compare/1"


def document(answer: Comparison) -> dict[str, Any]:
    """The whole comparison, as JSON values only."""
    plan = answer.plan
    return {
        "schema": SCHEMA,
        "version": verl_heddle.__version__,
        "config": {
            "name": plan.name,
            "command": list(plan.command),
            "recipe": plan.recipe,
            "pairs": plan.pairs,
            "steps": plan.steps,
            "seeds": [plan.seed_of(pair) for pair in range(1, plan.pairs + 1)],
            "warmup": answer.warmup,
            "base": answer.base.arm.name,
        },
        "engines": _engines(answer),
        "arms": [_arm(arm) for arm in answer.arms.values()],
        "runs": [_run(answer, key) for key in answer.entries],
        "config_diff": [{"key": key, "values": _plain(values)} for key, values in answer.config_diff().items()],
        "explanation": findings(answer),
        "did_not_help": not_helped(answer),
        "notes": cautions(answer),
    }


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `document`."""
    value: dict[str, Any] = json.loads(files("verl_heddle.compare").joinpath("compare.schema.json").read_text())
    return value


def ratio(found: Ratio | None) -> dict[str, Any] | None:
    """A ratio with its interval, as JSON values."""
    if found is None:
        return None
    return {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "verdict": found.verdict,
        "steps": found.steps,
        "by_pair": [{"pair": pair, "value": value} for pair, value in found.by_pair],
    }


def _engines(answer: Comparison) -> dict[str, Any] | None:
    if answer.machine is None:
        return None
    engines, fit = answer.machine.engines, answer.machine.latency.engines[answer.machine.engines.tp].fit
    return {
        "tp": engines.tp,
        "slots": engines.slots,
        "replicas": engines.replicas,
        "assumed": list(engines.assumed),
        "step_times": answer.machine.latency.source,
        "median_error": fit.median_error if fit else None,
        "p90_error": fit.p90_error if fit else None,
    }


def _arm(arm: ArmResult) -> dict[str, Any]:
    guess = arm.prediction
    return {
        "name": arm.arm.name,
        "overrides": list(arm.arm.overrides),
        "bare": arm.arm.bare,
        "pairs": sorted(arm.runs),
        "speedup": ratio(arm.speedup),
        "trained_ratio": ratio(arm.trained_ratio),
        "throughput_ratio": ratio(arm.throughput_ratio),
        "step_ratio": ratio(arm.step_ratio),
        "makespan_s": arm.mean("makespan_s"),
        "step_s": arm.mean("step_s"),
        "tokens_per_s": arm.mean("tokens_per_s"),
        "reward": arm.mean("reward"),
        "validation": arm.mean("validation"),
        "response_tokens": arm.mean("response_tokens"),
        "tail_ratio_time": arm.mean("tail_ratio_time"),
        "queue_share": arm.mean("queue_share"),
        "idle_share": arm.mean("idle_share/mean"),
        "split": arm.split,
        "windows": _windows(arm),
        "twin": asdict(arm.twin) if arm.twin else None,
        "bound_fraction": arm.bound_fraction,
        "decisions": arm.total("decisions/"),
        "outcomes": arm.total("outcomes/"),
        "fallbacks": arm.total("fallbacks/"),
        "moves": sum(arm.values("moves")),
        "preemptions": sum(arm.values("preemptions")),
        "prediction": asdict(guess) if guess else None,
    }


def _windows(arm: ArmResult) -> dict[str, float | None] | None:
    """Measurements of an asynchronous trainer's windows; None for a synchronous trainer."""
    if arm.shares is None:
        return None
    return {
        "trained_tokens_per_s": arm.trained_tokens_per_s,
        "window_s": arm.mean(WINDOW),
        **arm.shares,
        "interrupted_share": arm.mean("interrupted_share"),
        "read_again_share": arm.read_again_share,
        "age_steps": arm.mean("trained/age_steps/mean"),
        "dropped_share": arm.dropped_share,
        "length_bias": arm.mean("trained/length_bias"),
    }


def _run(answer: Comparison, key: Any) -> dict[str, Any]:
    entry, result = answer.entries[key], answer.arms[key.arm].runs.get(key.pair)
    return {
        "pair": key.pair,
        "arm": key.arm,
        "seed": answer.plan.seed_of(key.pair),
        "state": "missing" if entry is None else entry.state,
        "seconds": entry.seconds if entry else None,
        "why": entry.why if entry else "",
        "folder": f"runs/{key.folder}",
        "steps": _steps(result) if result else [],
    }


def _steps(result: RunResult) -> list[dict[str, Any]]:
    return [_step(step, step in result.warm) for step in result.steps]


def _step(step: Step, counts: bool) -> dict[str, Any]:
    names = (
        "makespan_s",
        "step_s",
        "tokens",
        "trajectories",
        "turns",
        "tokens_per_s",
        "reward",
        "validation",
        "response_tokens",
        "queue_share",
        "moves",
        "preemptions",
    )
    split = step.split
    return {
        "step": step.number,
        "counts": counts,
        **{name: step.get(name) for name in names},
        "window_s": step.get(WINDOW),
        "trained_tokens": step.get("trained/tokens"),
        "split": split,
        "bound_s": step.bound_s,
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Convert YAML values to JSON values; types that JSON lacks become text."""
    simple = str | int | bool | None
    return {
        name: value if isinstance(value, simple) or (isinstance(value, float) and isfinite(value)) else json.dumps(value, default=str)
        for name, value in values.items()
    }
