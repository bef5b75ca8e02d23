"""Step times of a model on a GPU from the best available source: a recorded run, a shipped table, or a roofline, with a description of it.

Order: `calibrated` if the user has a recorded run; otherwise the shipped table of that GPU and shape (a fine-tune uses its base model's)
in the precision it was made for; otherwise the roofline, with its error against tables left out of its fit.

This module also loads the tables of further models and GPUs (`tables`, `table`): one file per GPU beside the first table, made by
`bench/latency_export/further.py`, with the same source and meaning as `verl_heddle.latency.shipped`. Sizes come from
`verl_heddle.latency.shape`, so a file holds only times.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from verl_heddle.latency import shipped
from verl_heddle.latency.calibrate import calibrate
from verl_heddle.latency.gpus import GPUS, Gpu, gpu_of
from verl_heddle.latency.model import HOST_STEP_S, MIN_KV_TOKENS, Engine, FitQuality, LatencyModel
from verl_heddle.latency.roofline import HELD_OUT, TPS, memory, roofline
from verl_heddle.latency.shape import Shape, known, shape_of
from verl_heddle.trajectory import Trajectory


def tables() -> dict[str, tuple[str, ...]]:
    """Models with a table, by GPU; those of `shipped.available` come first."""
    first = shipped.available()
    return {gpu: (*first.get(gpu, ()), *_document(gpu).get("times_ms", ())) for gpu in GPUS}


def table(gpu: str, model: str) -> LatencyModel | None:
    """The shipped table of a model on a catalogue GPU, both by exact name; None if there is none."""
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
    """The table file of a GPU; empty if there is none."""
    path = files("verl_heddle").joinpath(f"data/latency_{gpu.lower()}.json.gz")
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return document


TABLE, ROOFLINE, CALIBRATED = "table", "roofline", "calibrated"


@dataclass(frozen=True)
class Times:
    """A latency model, the `kind` of its source, and the requested model and GPU.

    A calibration also has `fits`, how well each recorded degree's engine explains its turns, and `file`, the run it was fitted to.
    """

    latency: LatencyModel
    kind: str
    shape: Shape
    gpu: Gpu
    fits: tuple[tuple[int, FitQuality], ...] = ()
    file: str | None = None

    def told(self, source: str) -> str:
        """Describe the source for reports. Marks a table as such, and names its model if that differs from the requested one."""
        if self.kind != TABLE:
            return source
        owner = self.latency.name.rsplit(" on ", 1)[0]
        return f"table{'' if owner == self.shape.name else f' of {owner}, which has the same shape as {self.shape.name}'}, {source}"

    def document(self) -> dict[str, Any]:
        """As JSON: `kind`; `errors` by quantity, each with `median` and `p90`; for a calibration also `turns` and `file`."""
        if self.kind == CALIBRATED:
            errors = {f"turns at tp={tp}": {"median": fit.median_error, "p90": fit.p90_error} for tp, fit in self.fits}
            return {"kind": self.kind, "errors": errors, "turns": sum(fit.turns for _, fit in self.fits), "file": self.file}
        errors = {kind: {"median": low, "p90": high} for kind, (low, high) in _held_out(self.shape)} if self.kind == ROOFLINE else {}
        return {"kind": self.kind, "errors": errors, "turns": None, "file": None}


def times(gpu: str, model: str, weights: str | None = None, kv: str | None = None) -> Times:
    """Times of `model` on `gpu`, from its table or else the roofline.

    Args:
        gpu: as accepted by `gpu_of`.
        model: as accepted by `shape_of`: a known name, a config.json, or a folder containing one.
        weights, kv: "bf16" or "fp8"; None: the precision in the model's config.

    Raises:
        ValueError: unknown, unreadable or not modelled; one line.
    """
    place, shape = gpu_of(gpu), shape_of(model).in_precision(weights, kv)
    if GPUS.get(place.name) == place:
        for name in tables()[place.name]:
            if known()[name] == replace(shape, name=name) and (found := table(place.name, name)) is not None:
                return Times(found, TABLE, shape, place)
    precision = "" if (shape.weights, shape.kv) == ("bf16", "bf16") else f" ({shape.weights} weights, {shape.kv} KV)"
    made = roofline(place, shape)
    errors = ", ".join(f"{100 * low:.0f} % in {kind}s (p90 {100 * high:.0f} %)" for kind, (low, high) in _held_out(shape))
    source = f"{made.source}, not measured; its error against held-out tables of {_kind(shape)} is {errors}"
    return Times(replace(made, name=f"{shape.name}{precision} on {place.name}", source=source), ROOFLINE, shape, place)


def _kind(shape: Shape) -> str:
    return "experts" if shape.experts else "dense models"


def _held_out(shape: Shape) -> list[tuple[str, tuple[float, float]]]:
    """The roofline's error for this kind of model: (quantity, (median, 90th percentile))."""
    return list(HELD_OUT[_kind(shape)].items())


@dataclass(frozen=True, slots=True)
class Scaled:
    """An engine's seconds multiplied by a factor."""

    seconds: Callable[[Any, Any], Any]
    factor: float

    def __call__(self, first: Any, second: Any) -> Any:
        return self.factor * self.seconds(first, second)


def calibrated(base: Times, records: Iterable[Trajectory], file: str, tp: int | None = None) -> Times:
    """`base` with engines fitted to a recorded run at the recorded degrees; other degrees are the base's with host time, times one factor.

    The factor is the median ratio of recorded to base decode time over the batches and contexts in the run.

    Args:
        records: live trajectories, as accepted by `verl_heddle.latency.calibrate`.
        file: name of the run in descriptions and errors.
        tp: degree of trajectories that do not record one.

    Raises:
        ValueError: a trajectory's degree is unknown, or there are too few turns; one line.
    """
    by_tp: dict[int, list[Trajectory]] = defaultdict(list)
    for item in records:
        degree = item.meta.get("tp") or tp
        if degree is None:
            raise ValueError(f"{file} does not record the tensor-parallel degree of its engines: pass --tp")
        by_tp[int(degree)].append(item)
    host = base.latency.with_host(HOST_STEP_S, "assumed")
    engines, factors = {}, []
    for degree, items in sorted(by_tp.items()):
        if degree not in host.engines:
            raise ValueError(f"{file} has engines at tp={degree}; {base.latency.name} covers only {', '.join(map(str, base.latency.tps))}")
        try:
            fitted = calibrate(items, degree).engines[degree]
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        engines[degree] = replace(host.engines[degree], decode=fitted.decode, prefill=fitted.prefill, fit=fitted.fit, host_s=0.0)
        factors.append(_factor(fitted, host.engines[degree]))
    if not engines:
        raise ValueError(f"{file} has no training trajectories to calibrate on")
    factor = float(np.median(factors))
    others = {
        degree: replace(engine, decode=Scaled(engine.decode, factor), prefill=Scaled(engine.prefill, factor), host_s=factor * engine.host_s)
        for degree, engine in host.engines.items()
        if degree not in engines
    }
    fits = tuple((degree, engine.fit) for degree, engine in engines.items() if engine.fit is not None)
    source = "; ".join(
        f"calibrated on {fit.turns:,} turns of {file} at tp={degree}, median error {100 * fit.median_error:.0f} % "
        f"(p90 {100 * fit.p90_error:.0f} %)"
        for degree, fit in fits
    )
    if others:
        source += f"; tp={', '.join(map(str, sorted(others)))}: the {base.kind} with host time, scaled by {factor:.2f}"
    return replace(base, latency=replace(base.latency, engines={**engines, **others}, source=source), kind=CALIBRATED, fits=fits, file=file)


def _factor(fitted: Engine, base: Engine) -> float:
    """Median ratio of fitted to base decode time, over batches up to the run's largest and contexts up to its longest."""
    assert fitted.fit is not None
    batch = np.geomspace(1.0, max(2.0, fitted.fit.max_batch), 8)[:, None]
    context = np.linspace(0.25, 1.0, 4) * max(128.0, fitted.fit.max_context)
    return float(np.median(np.asarray(fitted.decode(batch, context)) / (np.asarray(base.decode(batch, context)) + base.host_s)))


def would_fit(asked: Times, gpus: int, utilization: float) -> str:
    """Suggest one or two changes after which some degree within a node holds the model, or report that no known GPU does."""

    def holds(gpu: Gpu, shape: Shape, share: float, count: int = gpus) -> bool:
        degrees = [tp for tp in TPS if count % tp == 0 and shape.splits(tp)]
        return any(memory(gpu, shape, tp).kv_tokens(share) >= MIN_KV_TOKENS for tp in degrees)

    smaller = asked.shape.in_precision("fp8") if asked.shape.weights == "bf16" else None
    most = 0.9
    share = next((value for value in (0.6, 0.7, 0.8, most) if value > utilization and holds(asked.gpu, asked.shape, value)), None)
    ways = [] if share is None else [f"raise --gpu-memory-utilization to {share:g}"]
    if smaller is not None and holds(asked.gpu, smaller, utilization):
        ways.append("--weights fp8")
    if others := [name for name, gpu in GPUS.items() if gpu != asked.gpu and holds(gpu, asked.shape, utilization)]:
        ways.append(f"--gpu {' or '.join(others)}")
    if not ways and smaller is not None and holds(asked.gpu, smaller, most):
        ways.append(f"--weights fp8 with --gpu-memory-utilization {most:g}")
    if not ways and (others := [name for name, gpu in GPUS.items() if holds(gpu, asked.shape, most)]):
        ways.append(f"--gpu {' or '.join(others)} with --gpu-memory-utilization {most:g}")
    if not ways and holds(asked.gpu, asked.shape, most, max(TPS)):
        ways.append(f"--gpus {max(TPS)} with --gpu-memory-utilization {most:g}")
    return "; or ".join(ways) or "no known GPU holds it within a node, and multi-node replicas are not modelled"
