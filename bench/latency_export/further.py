"""Write the further latency tables, one file per GPU, from AIConfigurator's measured op tables, and measure what they cost in accuracy.

The same tables as `export.py` makes, of more models and GPUs and on a coarser grid: candidate lines are a few dozen per axis instead of
every batch, and of those the fewest are kept that stay within --tolerance. Models and their shapes are those of
`verl_heddle/data/models.json` that AIConfigurator knows; a degree is left out where it cannot be (heads do not divide) or the weights do
not fit. Tables of `verl_heddle/data/latency.json.gz` are not made again.

Run it in the environment of `export.py`, from the repository root; it takes about three minutes:

    PYTHONPATH=. .venv-export/bin/python bench/latency_export/further.py --out verl_heddle/data
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from export import Key, held_back, rounded, shape_of, table
from source import TPS, WANTED, Gpu, Source, check_version

from verl_heddle.latency import load
from verl_heddle.latency.gpus import GPUS as CATALOGUE
from verl_heddle.latency.shape import known

SYSTEMS = {"A100": ("a100_sxm", "0.14.0"), "H100": ("h100_sxm", "0.24.0"), "H200": ("h200_sxm", "0.24.0")}
SYSTEMS |= {"L40S": ("l40s", "0.24.0"), "B200": ("b200_sxm", "0.24.0")}
"""AIConfigurator's name of the GPU, and the newest vLLM that its op tables cover there. It has no H20."""

LEFT_OUT = {
    "GLM-4.5-Air": "not among AIConfigurator's architectures",
    # Its op tables of block-quantised matrix products have decode steps that get faster with the batch (B200: 28 ms at 1, 21 ms at 64, a
    # 7B at tp=4) and are three times those of bf16 on H200: launch times of kernels outside a CUDA graph, not what an engine does.
    "DeepSeek-V3": "AIConfigurator's tables of block fp8 are not those of a running engine",
    "Kimi-K2": "as DeepSeek-V3",
}

BATCHES = np.unique([*range(1, 66), *range(72, 513, 8), *range(81, 513, 16)])
"""Every small batch, and both sides of each step of 16 rows that kernels are tiled by."""

CONTEXTS = np.unique(np.round(2.0 ** np.arange(7, 17.01, 0.5)).astype(int))
NEW = np.unique(
    [*(1, 2, 4, 8, 16, 32, 48, 64, 65, 96, 128, 129, 192, 256, 257, 384), *np.round(2.0 ** np.arange(9, 17.01, 0.25)).astype(int)]
)
CACHED = np.unique(np.concatenate([[0, 32, 128], np.round(2.0 ** np.arange(9, 17.01, 0.5)).astype(int)]))

DIGITS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write latency_<gpu>.json.gz to")
    parser.add_argument("--gpus", default=",".join(SYSTEMS), help="which GPUs (default: all)")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest interpolation error on the candidate lines (default 0.02)")
    parser.add_argument("--held-back", type=int, default=8, help="held-back lines per axis and table (default 8)")
    arguments = parser.parse_args()
    check_version()
    total = 0
    rows: list[list[str]] = []
    for gpu in arguments.gpus.split(","):
        with tempfile.TemporaryDirectory() as folder:
            packed, told = one_gpu(gpu, Path(folder), arguments.tolerance, arguments.held_back)
        path = arguments.out / f"latency_{gpu.lower()}.json.gz"
        path.write_bytes(packed)
        total += len(packed)
        rows += told
        print(f"{path}: {len(packed):,} bytes", file=sys.stderr)
    print(f"{total:,} bytes", file=sys.stderr)
    print("| GPU | vLLM | tables | decode: interpolation | raw | prefill: interpolation | raw |\n|---|---|---|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def one_gpu(name: str, folder: Path, tolerance: float, lines: int) -> tuple[bytes, list[list[str]]]:
    """The file of one GPU, and its row of the error table."""
    system, vllm = SYSTEMS[name]
    gpu = Gpu(system, CATALOGUE[name].memory_bytes, (), vllm)
    sources: dict[Key, Source] = {}
    for model, shape in known().items():
        if model in LEFT_OUT or _shipped(name, model):
            continue
        path = folder / model
        path.mkdir()
        (path / "config.json").write_text(json.dumps(shape.config))
        for tp in TPS:
            if not shape.splits(tp) or shape.weight_bytes(tp) > 0.95 * gpu.memory_bytes:
                continue
            try:
                source = Source(gpu, str(path), tp, bool(shape.experts))
                source.decode_ms(1, 1024), source.prefill_ms(1024, 0)
            except Exception as error:
                print(f"{name} {model} tp={tp}: left out, {' '.join(str(error).split())[:160]}", file=sys.stderr)
                continue
            sources[name, model, tp] = source
    decode_axes, decode = table(sources, "decode_ms", BATCHES, CONTEXTS, tolerance)
    prefill_axes, prefill = table(sources, "prefill_ms", NEW, CACHED, tolerance)
    prefill_axes[0].insert(0, 0)  # no new tokens, no time
    times: dict[str, Any] = {}
    for key in sources:
        prefill[key] = [[0.0] * len(prefill_axes[1]), *prefill[key]]
        times.setdefault(key[1], {})[str(key[2])] = {"decode": _short(decode[key]), "prefill": _short(prefill[key])}
    print(f"{name}: {len(sources)} tables, decode {shape_of(decode_axes)}, prefill {shape_of(prefill_axes)}", file=sys.stderr)
    rng = np.random.default_rng(0)
    errors: dict[str, list[dict[str, float]]] = {"decode": [], "prefill": []}
    for key, source in sources.items():
        errors["decode"].append(
            held_back(source.decode_ms, BATCHES, CONTEXTS, decode_axes, times[key[1]][str(key[2])]["decode"], lines, rng)
        )
        rows = times[key[1]][str(key[2])]["prefill"]
        errors["prefill"].append(held_back(source.prefill_ms, NEW, CACHED, prefill_axes, rows, lines, rng))
    document = {
        "source": f"AIConfigurator {WANTED} (NVIDIA, Apache-2.0), vLLM {vllm} op tables",
        "grid": {"decode": decode_axes, "prefill": prefill_axes},
        "times_ms": times,
    }
    cells = [name, vllm, str(len(sources))]
    for kind in ("decode", "prefill"):
        found = errors[kind]
        cells.append(f"{100 * np.median([e['median'] for e in found]):.1f}/{100 * max(e['max'] for e in found):.0f}")
        cells.append(f"{100 * np.median([e['raw_p99'] for e in found]):.1f}/{100 * max(e['raw_max'] for e in found):.0f}")
    return gzip.compress(json.dumps(document, separators=(",", ":")).encode(), 9, mtime=0), [cells]


def _short(rows: list[list[float]]) -> list[list[float]]:
    return [[rounded(value, DIGITS) for value in row] for row in rows]


def _shipped(gpu: str, model: str) -> bool:
    try:
        return bool(load(gpu, model))
    except ValueError:
        return False


if __name__ == "__main__":
    main()
