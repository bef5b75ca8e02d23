"""The roofline's error in fp8, which has no shipped table: against AIConfigurator's whole-tensor fp8 of dense models.

Run it in the environment of `export.py`, from the repository root; seconds. It prints the table of docs/models.md:

    PYTHONPATH=. .venv-export/bin/python bench/latency_export/fp8.py

Experts are left out: those op tables are of kernels that nobody tuned on Hopper, slower than bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from further import SYSTEMS
from source import TPS, Gpu, Source, check_version

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.latency_export.roofline import BATCHES, CACHED, CONTEXTS, NEW
from verl_heddle.latency.gpus import GPUS
from verl_heddle.latency.roofline import decode_s, prefill_s
from verl_heddle.latency.shape import known


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    check_version()
    print("| fp8 weights, dense models | degrees and models | decode step: median, p90 | prefill: median, p90 |\n|---|---|---|---|")
    for name, (system, vllm) in SYSTEMS.items():
        gpu = GPUS[name]
        if gpu.fp8 == gpu.bf16:
            continue
        decode: list[Any] = []
        prefill: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            for model, plain in known().items():
                shape = plain.in_precision("fp8")
                if shape.experts:
                    continue
                path = Path(folder) / model
                path.mkdir()
                (path / "config.json").write_text(json.dumps(shape.config))
                for tp in TPS:
                    if not shape.splits(tp) or shape.weight_bytes(tp) > 0.9 * gpu.memory_bytes:
                        continue
                    source = Source(Gpu(system, gpu.memory_bytes, (), vllm), str(path), tp, False, fp8=True)
                    steps = [[source.decode_ms(int(batch), int(context)) for context in CONTEXTS] for batch in BATCHES.ravel()]
                    reads = [[source.prefill_ms(int(new), int(context)) for context in CACHED] for new in NEW.ravel()]
                    decode.append(1000 * decode_s(gpu, shape, tp, BATCHES, CONTEXTS) / np.array(steps) - 1)
                    prefill.append(1000 * prefill_s(gpu, shape, tp, NEW, CACHED) / np.array(reads) - 1)
        cells = [f"{100 * np.median(off):.0f} %, {100 * np.quantile(off, 0.9):.0f} %" for off in map(np.abs, (decode, prefill))]
        print(f"| {name} | {len(decode)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
