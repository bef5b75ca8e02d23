"""Format the answer as JSON with stable keys. `docs/simulate.md` defines the keys; `simulate.schema.json` is their JSON Schema.

Keys are only ever added; a change of meaning changes `schema`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from math import inf
from statistics import median_low
from typing import Any

import verl_heddle
from verl_heddle.report.advice import Advice
from verl_heddle.report.play import Run
from verl_heddle.report.study import Answer, Row

SCHEMA = "verl-heddle/simulate/1"


def document(answer: Answer, sentences: Sequence[str], advice: Advice | None = None) -> dict[str, Any]:
    """The JSON document. `sentences` is the explanation as printed; with `advice` the document describes a plan."""
    low = answer.worst_bound
    value = {
        "schema": SCHEMA,
        "command": "simulate" if advice is None else "plan",
        "version": verl_heddle.__version__,
        "config": config(answer),
        "bound": {
            "makespan_s": answer.bound_s,
            "longest_s": low.longest_s,
            "work_s": low.work_s,
            "seeds": dict(zip(_seeds(answer), answer.stock.bounds_s, strict=True)),
        },
        "arms": [arm(row) for row in answer.rows.values()],
        "explanation": list(sentences),
        "notes": list(answer.source.notes),
    }
    if advice is not None:
        value["recommendation"] = {
            "arm": advice.row.name,
            "tp": advice.row.tp,
            "heddle": advice.heddle,
            "speedup": advice.row.speedup,
            "settings": advice.settings,
            "overrides": advice.overrides,
            "tried": [{"setting": trial.name, "value": trial.value, "speedup": median_low(trial.ratios)} for trial in advice.trials],
        }
    return value


def config(answer: Answer) -> dict[str, Any]:
    """The inputs: the workload or trace, the model and GPUs, verl's settings, the seeds."""
    setting, draws = answer.setting, answer.source.draws
    work = [item for step in draws[answer.typical].steps for item in step]
    steps = answer.source.about["steps"]
    return {
        **answer.source.about,
        "trajectories": len(work) / steps,
        "turns": sum(len(item.steps) for item in work) / steps,
        "tokens": sum(item.output_tokens for item in work) / steps,
        "seeds": [draw.seed for draw in draws],
        "model": setting.model.rsplit(" on ", 1)[0],
        "gpu": setting.gpu,
        "gpus": setting.gpus,
        "fleet_gpus": answer.source.gpus or setting.gpus,
        "sample": answer.source.sample or None,
        "tp": setting.tp,
        "tps": list(setting.tps),
        "slots": setting.slots,
        "gpu_memory_utilization": setting.utilization,
        "kv_tokens": {str(tp): held for tp, held in setting.kv_tokens.items() if tp in setting.tps},
        "overhead_s": setting.overhead_s,
        "host_s": setting.host_s,
        "sync_s": setting.sync_s(setting.tp),
        "tools_at_once": None if setting.tools_at_once == inf else int(setting.tools_at_once),
        "offload_bytes_per_s": setting.tier.bytes_per_s,
        "offload_host_bytes": None if setting.tier.host_bytes == inf else int(setting.tier.host_bytes),
        "assumed": list(setting.assumed),
        "latency": setting.latency.source,
        "weights": setting.times.shape.weights if setting.times else None,
        "kv": setting.times.shape.kv if setting.times else None,
        "times": setting.times.document() if setting.times else None,
    }


def arm(row: Row) -> dict[str, Any]:
    """One arm: the numbers of its typical draw, ratios and ranges over all draws, and each draw."""
    run = row.typical
    return {
        "name": row.name,
        "title": row.title,
        "rule": row.rule,
        "tp": row.tp,
        **({"layout": list(row.layout)} if row.layout else {}),
        "speedup": row.speedup,
        "speedup_range": [min(row.speedups), max(row.speedups)],
        "gpu_hours": row.gpu_hours,
        "gpu_hours_per_1000": row.gpu_hours_per_1000,
        "bound_fraction": row.bound_fraction,
        "makespan_range_s": [min(row.makespans_s), max(row.makespans_s)],
        **_numbers(run, row.bounds_s[row.runs.index(run)]),
        "last": {
            "tokens": run.last.tokens,
            "turns": run.last.turns,
            "makespan_s": run.last.makespan_s,
            "alone_s": run.last.alone_s,
            "shared_s": run.last.shared_s,
        },
        "seeds": [
            {"seed": run.seed, "speedup": speedup, "bound_fraction": share, **_numbers(run, low)}
            for run, low, speedup, share in zip(row.runs, row.bounds_s, row.speedups, row.bound_fractions, strict=True)
        ],
    }


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `document`."""
    value: dict[str, Any] = json.loads(files("verl_heddle.report").joinpath("simulate.schema.json").read_text())
    return value


def _numbers(run: Run, low_s: float) -> dict[str, Any]:
    return {
        "makespan_s": run.makespan_s,
        "throughput_tok_s": run.throughput_tok_s,
        "bound_s": low_s,
        "tail": dict(run.tail),
        "migrations": run.migrations,
        "preemptions": run.preemptions,
        "recomputed_tokens": run.recomputed_tokens,
        "idle_share": run.idle_share,
        "queue_share": run.queue_share,
        "sync_s": run.sync_s,
    }


def _seeds(answer: Answer) -> list[str]:
    return [str(draw.seed) for draw in answer.source.draws]
