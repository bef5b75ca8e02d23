"""The first shipped latency table: `load(gpu, model)` and `available()`. `verl_heddle.latency.times` adds further models and GPUs.

Source: AIConfigurator's measured op tables, exported by `bench/latency_export/export.py`; see `verl_heddle/data/README.md` for the
version, the licence and the measured interpolation error. bf16 weights and KV, vLLM, one replica within one node.
"""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from verl_heddle.latency.model import Engine, LatencyModel, Memory
from verl_heddle.latency.surface import Surface

TABLE = "data/latency.json.gz"
"""Path inside the package `verl_heddle`."""


def available() -> dict[str, tuple[str, ...]]:
    """Names accepted by `load`: models by GPU."""
    table = _table()
    return {gpu: tuple(table["models"]) for gpu in table["gpus"]}


def load(gpu: str, model: str) -> LatencyModel:
    """The shipped latency model of `model` on `gpu`.

    Args:
        gpu: "H100", "h200_sxm", or torch's device name ("NVIDIA H200"), in any case.
        model: "Qwen3-8B", "qwen3-8b", "Qwen/Qwen3-8B", or a local path ending in the name; also fine-tunes of the same shape that the
            table lists as aliases.

    Raises:
        ValueError: unknown GPU or model; the message lists the known ones.
    """
    table = _table()
    gpu_name = _find(gpu, table["gpus"], "GPU")
    model_name = _find(re.split(r"[/\\]", model.rstrip("/\\"))[-1], table["models"], "model")
    return _load(gpu_name, model_name)


@cache
def _load(gpu: str, model: str) -> LatencyModel:
    table = _table()
    engines: dict[int, Engine] = {}
    for tp_name, shape in table["models"][model]["memory"].items():
        rows = table["times_ms"][gpu][model][tp_name]
        memory = Memory(
            gpu_bytes=table["gpus"][gpu]["memory_bytes"],
            weight_bytes=shape["weight_bytes"],
            kv_bytes_per_token=shape["kv_bytes_per_token"],
            overhead_bytes=shape["overhead_bytes"],
        )
        engines[int(tp_name)] = Engine(
            decode=surface(table["grid"]["decode"], rows["decode"]),
            prefill=surface(table["grid"]["prefill"], rows["prefill"]),
            memory=memory,
            load_s=memory.load_s,
        )
    return LatencyModel(f"{model} on {gpu}", engines, table["source"])


def surface(axes: list[list[float]], rows_ms: list[list[float]]) -> Surface:
    """The surface over a table's two axes, from times in milliseconds."""
    rows = np.asarray(rows_ms, dtype=np.float64) / 1000.0
    return Surface(tuple(map(float, axes[0])), tuple(map(float, axes[1])), tuple(tuple(row) for row in rows.tolist()))


def _find(name: str, entries: dict[str, Any], kind: str) -> str:
    wanted = plain(name)
    for key, entry in entries.items():
        if wanted in {plain(alias) for alias in (key, *entry["aliases"])}:
            return key
    exists = "; ".join(f"{gpu}: {', '.join(models)}" for gpu, models in available().items())
    raise ValueError(
        f"no latency table for {kind} {name!r}. Tables exist for {exists}. For others, record a run and use verl_heddle.latency.calibrate."
    )


def plain(name: str) -> str:
    """Lower-case letters and digits only, so that "H200 SXM", "h200_sxm" and "h200-sxm" compare equal."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def _table() -> dict[str, Any]:
    packed = files("verl_heddle").joinpath(TABLE).read_bytes()
    table: dict[str, Any] = json.loads(gzip.decompress(packed))
    return table
