"""Shipped tables of further models and GPUs: one file per GPU beside the first table, made by `bench/latency_export/further.py`.

Same source and meaning as `verl_heddle.latency.shipped`; sizes are those of `verl_heddle.latency.shape`, so that a file holds times alone.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files
from typing import Any

from verl_heddle.latency import shipped
from verl_heddle.latency.gpus import GPUS
from verl_heddle.latency.model import Engine, LatencyModel
from verl_heddle.latency.roofline import memory
from verl_heddle.latency.shape import known


def tables() -> dict[str, tuple[str, ...]]:
    """Models that have a table, by GPU; the GPU's first ones are those of `shipped.available`."""
    first = shipped.available()
    return {gpu: (*first.get(gpu, ()), *_document(gpu).get("times_ms", ())) for gpu in GPUS}


def table(gpu: str, model: str) -> LatencyModel | None:
    """The shipped table of a model on a GPU of the catalogue, both by their exact names; None where there is none."""
    if model in shipped.available().get(gpu, ()):
        return shipped.load(gpu, model)
    return _load(gpu, model) if model in _document(gpu).get("times_ms", ()) else None


@cache
def _load(gpu: str, model: str) -> LatencyModel:
    document, shape = _document(gpu), known()[model]
    engines = {}
    for name, rows in document["times_ms"][model].items():
        held = memory(GPUS[gpu], shape, int(name))
        decode, prefill = (shipped.surface(document["grid"][kind], rows[kind]) for kind in ("decode", "prefill"))
        engines[int(name)] = Engine(decode, prefill, held, held.load_s)
    return LatencyModel(f"{model} on {gpu}", engines, f"{document['source']}, {shape.weights}")


@cache
def _document(gpu: str) -> dict[str, Any]:
    """The file of a GPU; empty where there is none."""
    path = files("verl_heddle").joinpath(f"data/latency_{gpu.lower()}.json.gz")
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return document
