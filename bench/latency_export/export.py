"""Write the shipped latency table from AIConfigurator's measured op tables, and measure what interpolating it costs.

For every GPU, model and tensor-parallel degree it asks AIConfigurator for the time of a decode step over batch x context and of a
prefill over new tokens x cached context, on a dense grid; makes each table monotone (`verl_heddle.latency.monotone_fit`); keeps the
fewest common grid lines that stay within --tolerance; adds weight, KV and overhead bytes; and writes one gzipped JSON file. Then it asks
for points that were not on the dense grid and reports, per table, the error of the written file against them.

Run it in an environment of its own, from the repository root:

    uv venv .venv-export && uv pip install -p .venv-export aiconfigurator==0.12.0 aiconfigurator-core==0.12.0
    PYTHONPATH=. .venv-export/bin/python bench/latency_export/export.py --out verl_heddle/data/latency.json.gz

It takes about ten minutes on one core and gives the same file each time.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from grid_choice import Array, choose
from sizes import kv_bytes_per_token, weight_bytes
from source import GPUS, MODELS, TPS, VLLM, WANTED, Source, check_version, shape

from verl_heddle.latency import Surface, monotone_fit

Key = tuple[str, str, int]

BATCHES = np.arange(1, 513)
"""Every batch: kernels change between neighbours."""

TILES = np.arange(256, 4353, 256)
"""Matrix products take a step up after each of these row counts, and the source has measured both sides of it (m and m + 1)."""

CONTEXTS = np.unique(np.round(2.0 ** np.arange(7, 17.01, 0.125)).astype(int))
NEW = np.unique(np.concatenate([np.arange(1, 258), np.round(2.0 ** np.arange(8, 17.01, 0.0625)).astype(int), TILES, TILES + 1]))
CACHED = np.unique(np.concatenate([[0, 1, 16, 32], np.round(2.0 ** np.arange(6, 17.01, 0.25)).astype(int)]))

DIGITS = 5
"""Significant digits kept: rounding is then a hundredth of the interpolation error, and rounding keeps the order of values."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the table (.json.gz)")
    parser.add_argument("--report", type=Path, help="also write the error report as JSON")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest interpolation error on the dense grid (default 0.02)")
    parser.add_argument("--held-back", type=int, default=48, help="held-back lines per axis and table (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="of the held-back lines")
    arguments = parser.parse_args()
    check_version()

    keys = [(gpu, model, tp) for gpu in GPUS for model in MODELS for tp in TPS]
    sources = {key: source(*key) for key in keys}
    decode_axes, decode = table(sources, "decode_ms", BATCHES, CONTEXTS, arguments.tolerance)
    prefill_axes, prefill = table(sources, "prefill_ms", NEW, CACHED, arguments.tolerance)
    prefill_axes[0].insert(0, 0)  # no new tokens, no time
    prefill = {key: [[0.0] * len(rows[0]), *rows] for key, rows in prefill.items()}
    document = assemble(sources, {"decode": decode_axes, "prefill": prefill_axes}, decode, prefill)
    packed = gzip.compress(json.dumps(document, separators=(",", ":")).encode(), 9, mtime=0)
    arguments.out.write_bytes(packed)
    print(f"{arguments.out}: {len(packed)} bytes; decode grid {shape_of(decode_axes)}, prefill grid {shape_of(prefill_axes)}")

    rng = np.random.default_rng(arguments.seed)
    report = []
    for key in keys:
        row: dict[str, Any] = {"gpu": key[0], "model": key[1], "tp": key[2]}
        row["decode"] = held_back(sources[key].decode_ms, BATCHES, CONTEXTS, decode_axes, decode[key], arguments.held_back, rng)
        row["prefill"] = held_back(sources[key].prefill_ms, NEW, CACHED, prefill_axes, prefill[key], arguments.held_back, rng)
        report.append(row)
    print_report(report)
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=1) + "\n")
    if max(row[kind]["max"] for row in report for kind in ("decode", "prefill")) > 0.03:
        sys.exit("a held-back point is off by more than 3 %: lower --tolerance")


def source(gpu: str, model: str, tp: int) -> Source:
    return Source(GPUS[gpu], MODELS[model][0], tp, bool(shape(model).get("num_experts")))


def table(sources: dict[Key, Source], ask: str, xs: Any, ys: Any, tolerance: float) -> tuple[list[list[int]], dict[Key, list[list[float]]]]:
    """Ask every source on the dense grid; the chosen axes and each source's monotone values on them."""
    dense = []
    for key, source in sources.items():
        print("asking", ask, *key, file=sys.stderr, flush=True)
        dense.append(monotone_fit(grid(getattr(source, ask), xs, ys)))
    cube = np.stack(dense)
    i, j = choose(xs.astype(float), ys.astype(float), cube, tolerance)
    rows = {key: [[rounded(v) for v in line] for line in cube[k][np.ix_(i, j)]] for k, key in enumerate(sources)}
    return [xs[i].tolist(), ys[j].tolist()], rows


def grid(ask: Any, xs: Any, ys: Any) -> Array:
    return np.array([[ask(int(x), int(y)) for y in ys] for x in xs])


def rounded(value: float, digits: int = DIGITS) -> float:
    return float(f"{value:.{digits}g}")


def assemble(sources: dict[Key, Source], axes: dict[str, Any], decode: dict[Key, Any], prefill: dict[Key, Any]) -> dict[str, Any]:
    """The document that `verl_heddle.latency.load` reads."""
    models: dict[str, Any] = {}
    for model, (_, aliases) in MODELS.items():
        sizes = {
            str(tp): {
                "weight_bytes": weight_bytes(shape(model), tp),
                "kv_bytes_per_token": kv_bytes_per_token(shape(model), tp),
                "overhead_bytes": sources[next(iter(GPUS)), model, tp].overhead_bytes(),
            }
            for tp in TPS
        }
        models[model] = {"aliases": list(aliases), "memory": sizes}
    times: dict[str, Any] = {gpu: {model: {} for model in MODELS} for gpu in GPUS}
    for gpu, model, tp in sources:
        key = (gpu, model, tp)
        times[gpu][model][str(tp)] = {"decode": decode[key], "prefill": prefill[key]}
    return {
        "source": f"AIConfigurator {WANTED} (NVIDIA, Apache-2.0), vLLM {VLLM} op tables, bf16",
        "gpus": {name: {"memory_bytes": gpu.memory_bytes, "aliases": list(gpu.aliases)} for name, gpu in GPUS.items()},
        "models": models,
        "grid": axes,
        "times_ms": times,
    }


def held_back(ask: Any, xs: Any, ys: Any, axes: Any, rows: Any, count: int, rng: np.random.Generator) -> dict[str, float]:
    """Relative errors of the written table at points that the choice of its grid has not seen.

    Up to `count` log-uniform lines per axis are held back; a point counts if one of its coordinates is on such a line.
    `median`, `max`: against the source made monotone (what interpolation costs). `raw_median`, `raw_p99`, `raw_max`: against the source
    as it is (with what making it monotone costs).
    """
    fresh = [
        np.setdiff1d(np.round(np.exp(rng.uniform(np.log(max(1, seen[0])), np.log(seen[-1]), count))).astype(int), seen) for seen in (xs, ys)
    ]
    merged = [np.union1d(seen, lines) for seen, lines in zip((xs, ys), fresh, strict=True)]
    raw = grid(ask, *merged)
    unseen = np.isin(merged[0], fresh[0])[:, None] | np.isin(merged[1], fresh[1])[None, :]
    surface = Surface(tuple(axes[0]), tuple(axes[1]), tuple(map(tuple, rows)))
    told = surface(merged[0][:, None].astype(float), merged[1][None, :].astype(float))
    error, raw_error = np.abs(told / monotone_fit(raw) - 1)[unseen], np.abs(told / raw - 1)[unseen]
    return {
        "points": int(error.size),
        "median": float(np.median(error)),
        "max": float(error.max()),
        "raw_median": float(np.median(raw_error)),
        "raw_p99": float(np.quantile(raw_error, 0.99)),
        "raw_max": float(raw_error.max()),
    }


def shape_of(axes: Any) -> str:
    return " x ".join(str(len(axis)) for axis in axes)


def print_report(report: list[dict[str, Any]]) -> None:
    print("\nrelative error in % at held-back points: interpolation median/max, against the raw source median/p99/max")
    print(f"{'table':26}{'decode':>14}{'raw':>18}{'prefill':>16}{'raw':>18}")
    for row in report:
        cells = []
        for kind in ("decode", "prefill"):
            e = {name: 100 * value for name, value in row[kind].items()}
            cells += [f"{e['median']:.2f}/{e['max']:.2f}", f"{e['raw_median']:.2f}/{e['raw_p99']:.2f}/{e['raw_max']:.2f}"]
        print(f"{row['gpu'] + ' ' + row['model'] + ' tp' + str(row['tp']):26}{cells[0]:>14}{cells[1]:>18}{cells[2]:>16}{cells[3]:>18}")


if __name__ == "__main__":
    main()
