"""A step as a picture: replicas over time, coloured by the length of the trajectories they run. Pixels only; axes are others' business.

Every replica is a band, as high as it has GPUs, the last to finish on top. In each column of a band the trajectories that hold a slot at
that moment are stacked, the longest (by tokens generated in all) at the bottom; the stack's height is the root of their number over the
most that a replica ran at once, so that a single straggler is still to be seen. A turn that lost its slot is drawn in one piece, at its
end.

Cost: about 0.3 microseconds per turn and column it covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl_heddle.report.attribution import engine_interval
from verl_heddle.simulate import Result
from verl_heddle.trajectory import Trajectory

COLUMNS = 900
"""Time resolution: about what a screen shows."""

ROWS = 576
"""Height aimed at, pixels; 9 for each of 64 GPUs."""

IDLE, GAP = 0, 1
"""Pixel values that are no trajectory: nothing running, and the line between two replicas. Trajectories have `FIRST` to 255."""

FIRST = 2

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Raster:
    """`pixels` has shape [rows, columns], top row first; column c covers `span_s` * [c, c + 1) / columns."""

    pixels: Pixels
    span_s: float
    longest: int
    """Tokens that value 255 stands for; values from `FIRST` are linear in tokens from 0 on."""
    gpus: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Who holds a slot when. Turns have shape [turns]; times are seconds from the step's beginning."""

    tps: tuple[int, ...]
    """Of each replica."""
    ends: tuple[float, ...]
    """When each replica had its last work."""
    where: NDArray[np.int64]
    """Number of the turn's replica."""
    begin_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    tokens: NDArray[np.int64]
    """Of the whole trajectory."""


def simulated(result: Result) -> Occupancy:
    """Of a simulated step."""
    log, origin = result.turns, float(result.start_s.min())
    end = np.array(log.column("end_s"))
    begin = end - log.column("prefill_s") - log.column("generate_s")
    return Occupancy(
        tps=tuple(item.replica.tp for item in result.replicas),
        ends=tuple(max((end for _, end in item.busy), default=0.0) for item in result.replicas),
        where=np.array(log.column("replica"), dtype=np.int64),
        begin_s=begin - origin,
        end_s=end - origin,
        tokens=np.asarray(result.output_tokens)[log.column("trajectory")].astype(np.int64),
    )


def recorded(step: Sequence[Trajectory], tp: int = 1, replicas: int = 1) -> Occupancy:
    """Of a step that a live run recorded, on at least so many replicas of one degree: those it names, and idle ones it does not."""
    origin = min(item.meta["start_s"] for item in step)
    names = sorted({turn.replica for item in step for turn in item.steps if turn.replica is not None})
    number = {name: index for index, name in enumerate(names)}
    rows = [
        (number[turn.replica], *(time - origin for time in engine_interval(item, turn)), item.output_tokens)
        for item in step
        for turn in item.steps
        if turn.replica is not None
    ]
    where, begin, end, tokens = zip(*rows, strict=True) if rows else ((), (), (), ())
    ends = [max((row[2] for row in rows if row[0] == index), default=0.0) for index in range(max(len(names), replicas))]
    return Occupancy(
        (tp,) * len(ends), tuple(ends), np.array(where, dtype=np.int64), np.array(begin), np.array(end), np.array(tokens, dtype=np.int64)
    )


def raster(step: Result | Occupancy, span_s: float, longest: int) -> Raster:
    """Draw a step on a time axis of `span_s` seconds; `longest` is the longest trajectory of all rasters shown together, tokens."""
    held_by = simulated(step) if isinstance(step, Result) else step
    gpus = sum(held_by.tps)
    unit = max(2, ROWS // gpus)
    gap = 1 if unit > 2 else 0
    columns, replicas = COLUMNS, len(held_by.tps)
    where, left, right, tokens = _intervals(held_by, span_s / columns)

    count = right - left
    cell = np.repeat(where * columns + left, count) + _ramp(count)
    value = np.repeat(tokens, count)
    order = np.lexsort((-value, cell))
    cell, value = cell[order], value[order]
    held = np.bincount(cell, minlength=replicas * columns)
    begins = np.cumsum(held) - held
    shades = FIRST + np.rint(value * ((255 - FIRST) / longest)).astype(np.int64)

    gpus_at = np.array(held_by.tps)
    most = max(1.0, float((held.reshape(replicas, columns) / gpus_at[:, None]).max()))
    bands = []
    for index in sorted(range(replicas), key=lambda one: -held_by.ends[one]):
        tp = held_by.tps[index]
        height = unit * tp - gap
        held_here = held[index * columns : (index + 1) * columns]
        begin = begins[index * columns : (index + 1) * columns]
        filled = np.ceil(height * np.sqrt(np.minimum(1.0, held_here / (most * tp)))).astype(np.int64)
        level = np.arange(height)[::-1, None]  # 0 at the bottom
        rank = level * held_here // np.maximum(1, filled)
        inside = level < filled
        picked = np.where(inside, begin + rank, 0)
        band = np.where(inside, shades[picked] if len(shades) else IDLE, IDLE).astype(np.uint8)
        bands += [band, np.full((gap, columns), GAP, dtype=np.uint8)]
    pixels = np.concatenate(bands)
    return Raster(pixels[: len(pixels) - gap] if gap else pixels, span_s, longest, gpus)


def _intervals(held_by: Occupancy, column_s: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Replica, first and past-last column, tokens, by turn; one is drawn where it covers a column's middle, so that columns count those
    running at one moment."""
    where, begin, end, tokens = held_by.where, held_by.begin_s, held_by.end_s, held_by.tokens
    left = np.clip(np.ceil(begin / column_s - 0.5), 0, COLUMNS).astype(np.int64)
    right = np.clip(np.ceil(end / column_s - 0.5), 0, COLUMNS).astype(np.int64)
    keep = right > left
    return where[keep], left[keep], right[keep], tokens[keep]


def _ramp(count: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..n-1 for each n of `count`, one after the other."""
    total = int(count.sum())
    return np.arange(total) - np.repeat(np.cumsum(count) - count, count)
