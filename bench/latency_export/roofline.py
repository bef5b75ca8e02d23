"""The roofline's error against every shipped table, and how its factors are fitted.

    python bench/latency_export/roofline.py            print the error, and write the tables of docs/models.md (seconds)
    python bench/latency_export/roofline.py --fit      fit the factors to the tables of FITTED_GPUS and FITTED_MODELS; print them (a minute)

An error is |roofline - table| / table over BATCHES x CONTEXTS and NEW x CACHED, all degrees of the table together; in a fit the mean of the
logarithm's absolute error over decode and prefill alike, by coordinate descent from the factors in the code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.marked import replaced
from verl_heddle.latency.gpus import GPUS
from verl_heddle.latency.roofline import FACTORS, HELD_OUT, Factors, decode_s, prefill_s
from verl_heddle.latency.shape import known
from verl_heddle.latency.times import table, tables

FITTED_GPUS = ("A100", "H200", "L40S")
FITTED_MODELS = ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B")
"""One GPU of each generation but the newest, and one family of dense models and experts; every other table is held out."""

BATCHES, CONTEXTS = 2.0 ** np.arange(9)[:, None], np.array([512.0, 2048.0, 8192.0, 16384.0, 32768.0])
NEW, CACHED = 2.0 ** np.arange(8, 15)[:, None], np.array([0.0, 2048.0, 8192.0, 32768.0])
KINDS = ("decode step", "prefill")

PAGE = ROOT / "docs" / "models.md"

Pair = tuple[str, str]
Array = Any


def pairs() -> list[Pair]:
    """Every (GPU, model) with a shipped table."""
    return [(gpu, model) for gpu, models in tables().items() for model in models]


def fitted(pair: Pair) -> bool:
    """Whether the factors were fitted to this table."""
    return pair[0] in FITTED_GPUS and pair[1] in FITTED_MODELS


def ratios(pair: Pair, factors: Factors = FACTORS) -> tuple[Array, Array]:
    """Roofline over table, decode steps and prefills, of all degrees."""
    gpu, shape, known_times = GPUS[pair[0]], known()[pair[1]], table(*pair)
    assert known_times is not None
    decode, prefill = [], []
    for tp in known_times.tps:
        decode.append(decode_s(gpu, shape, tp, BATCHES, CONTEXTS, factors) / known_times.decode_s(tp, BATCHES, CONTEXTS))
        prefill.append(prefill_s(gpu, shape, tp, NEW, CACHED, factors) / known_times.prefill_s(tp, NEW, CACHED))
    return np.concatenate(decode).ravel(), np.concatenate(prefill).ravel()


def errors(chosen: Iterable[Pair], factors: Factors = FACTORS) -> dict[str, tuple[float, float]]:
    """Median and 90th percentile of the relative error over some tables, by kind."""
    both = [ratios(pair, factors) for pair in chosen]
    found = {}
    for index, kind in enumerate(KINDS):
        off = np.abs(np.concatenate([one[index] for one in both]) - 1)
        found[kind] = (float(np.median(off)), float(np.quantile(off, 0.9)))
    return found


def fit(chosen: list[Pair], factors: Factors = FACTORS) -> Factors:
    """The factors with the least mean logarithmic error over some tables."""

    def loss(trial: Factors) -> float:
        return float(np.mean(np.abs(np.log(np.concatenate([part for pair in chosen for part in ratios(pair, trial)])))))

    best, step = loss(factors), 1.2
    while step > 1.01:
        before = best
        for field in fields(Factors):
            for change in (step, 1 / step):
                trial = replace(factors, **{field.name: getattr(factors, field.name) * change})
                if (found := loss(trial)) < best - 1e-6:
                    factors, best = trial, found
        if best == before:
            step **= 0.5
    return factors


def held_out() -> dict[str, list[Pair]]:
    """The tables that the factors were not fitted to, of dense models and of experts."""
    rest = [pair for pair in pairs() if not fitted(pair)]
    return {kind: [pair for pair in rest if bool(known()[pair[1]].experts) == (kind == "experts")] for kind in HELD_OUT}


def held_out_table() -> str:
    """Error by group of tables, Markdown."""
    groups = {"fitted to": [pair for pair in pairs() if fitted(pair)], "**held out, all**": [pair for pair in pairs() if not fitted(pair)]}
    groups |= {f"held out, {kind}": some for kind, some in held_out().items()}
    for gpu in tables():
        if some := [pair for pair in pairs() if not fitted(pair) and pair[0] == gpu]:
            groups[f"held out, {gpu}"] = some
    lines = ["| tables | how many | decode step: median, p90 | prefill: median, p90 |", "|---|---|---|---|"]
    for name, some in groups.items():
        lines.append(f"| {name} | {len(some)} | {' | '.join(_percent(errors(some)[kind]) for kind in KINDS)} |")
    return "\n".join(lines)


def every_table() -> str:
    """Error by model and GPU, Markdown: decode then prefill, median/p90 in percent."""
    shown = [gpu for gpu in GPUS if tables()[gpu]]
    lines = [f"| model | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    for model in known():
        cells = []
        for gpu in shown:
            if model not in tables()[gpu]:
                cells.append("no table")
                continue
            found = errors([(gpu, model)])
            told = ", ".join("/".join(f"{100 * value:.0f}" for value in found[kind]) for kind in KINDS)
            cells.append(f"*{told}*" if fitted((gpu, model)) else told)
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_table() -> str:
    """The catalogue, Markdown."""
    lines = [
        "| `--gpu` | memory as torch sees it | bandwidth | dense bf16 | dense fp8 | link, one direction |",
        "|---|---|---|---|---|---|",
    ]
    for gpu in GPUS.values():
        fp8 = f"{gpu.fp8 / 1e12:,.0f} TFLOPS" if gpu.fp8 > gpu.bf16 else "none"
        lines.append(
            f"| {gpu.name} | {gpu.memory_bytes / 2**30:.2f} GiB | {gpu.bandwidth / 1e12:g} TB/s | {gpu.bf16 / 1e12:,.0f} TFLOPS | {fp8} | "
            f"{gpu.link / 1e9:.0f} GB/s |"
        )
    return "\n".join(lines)


def model_table() -> str:
    """The known models, Markdown."""
    lines = ["| `--model` | parameters | active | weights | KV bytes a token, tp=1 | tp | table |", "|---|---|---|---|---|---|---|"]
    for name, shape in known().items():
        with_table = [gpu for gpu in GPUS if name in tables()[gpu]]
        degrees = ", ".join(str(tp) for tp in (1, 2, 4, 8) if shape.splits(tp))
        lines.append(
            f"| {name} | {shape.parameters / 1e9:.1f} B | {shape.active_parameters / 1e9:.1f} B | {shape.weights}, "
            f"{shape.weight_bytes(1) / 1e9:.0f} GB | {shape.kv_bytes_per_token(1):,} | {degrees} | {', '.join(with_table) or 'none'} |"
        )
    return "\n".join(lines)


def page() -> str:
    """The page with its tables as they must be."""
    text = PAGE.read_text()
    for name, made in (("models", model_table()), ("gpus", gpu_table()), ("held-out", held_out_table()), ("every-table", every_table())):
        text = replaced(text, name, made, PAGE)
    return text


def _percent(error: tuple[float, float]) -> str:
    return ", ".join(f"{100 * value:.0f} %" for value in error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fit", action="store_true", help="fit the factors instead; change them in verl_heddle/latency/roofline.py by hand"
    )
    if parser.parse_args().fit:
        print(fit([pair for pair in pairs() if fitted(pair)]))
        return
    PAGE.write_text(page())
    print(held_out_table())


if __name__ == "__main__":
    main()
