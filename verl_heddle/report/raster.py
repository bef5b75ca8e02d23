"""A step as a picture: replicas over time, coloured by the length of the trajectories they run. Pixels only; axes are others' business.

Every replica is a band, as high as it has GPUs, the last to finish on top. In each column of a band the trajectories that hold a slot at
that moment are stacked, the longest (by tokens generated in all) at the bottom; the stack's height is the root of their number over the
most that a replica ran at once, so that a single straggler is still to be seen. A turn that lost its slot is drawn in one piece, at its
end.

Cost: about 0.3 microseconds per turn and column it covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl_heddle.simulate import Result

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


def raster(result: Result, span_s: float, longest: int) -> Raster:
    """Draw `result` on a time axis of `span_s` seconds; `longest` is the longest trajectory of all rasters shown together, tokens."""
    replicas = [item.replica for item in result.replicas]
    gpus = sum(replica.tp for replica in replicas)
    unit = max(2, ROWS // gpus)
    gap = 1 if unit > 2 else 0
    columns = COLUMNS
    where, left, right, tokens = _intervals(result, span_s / columns)

    count = right - left
    cell = np.repeat(where * columns + left, count) + _ramp(count)
    value = np.repeat(tokens, count)
    order = np.lexsort((-value, cell))
    cell, value = cell[order], value[order]
    held = np.bincount(cell, minlength=len(replicas) * columns)
    begins = np.cumsum(held) - held
    shades = FIRST + np.rint(value * ((255 - FIRST) / longest)).astype(np.int64)

    gpus_at = np.array([replica.tp for replica in replicas])
    most = max(1.0, float((held.reshape(len(replicas), columns) / gpus_at[:, None]).max()))
    ends = [max((end for _, end in item.busy), default=0.0) for item in result.replicas]
    bands = []
    for index in sorted(range(len(replicas)), key=lambda one: -ends[one]):
        tp = replicas[index].tp
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


def _turns(result: Result) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Replica, slot from, slot to, tokens of the whole trajectory; by turn."""
    log = result.turns
    end = np.array(log.column("end_s"))
    begin = end - log.column("prefill_s") - log.column("generate_s")
    owner = log.column("trajectory")
    return np.array(log.column("replica"), dtype=np.int64), begin, end, np.asarray(result.output_tokens)[owner].astype(np.int64)


def _intervals(result: Result, column_s: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """As `_turns`, in columns: a turn is drawn where it covers a column's middle, so that columns count those running at one moment."""
    where, begin, end, tokens = _turns(result)
    origin = float(result.start_s.min())
    left = np.clip(np.ceil((begin - origin) / column_s - 0.5), 0, COLUMNS).astype(np.int64)
    right = np.clip(np.ceil((end - origin) / column_s - 0.5), 0, COLUMNS).astype(np.int64)
    keep = right > left
    return where[keep], left[keep], right[keep], tokens[keep]


def _ramp(count: NDArray[np.int64]) -> NDArray[np.int64]:
    """0..n-1 for each n of `count`, one after the other."""
    total = int(count.sum())
    return np.arange(total) - np.repeat(np.cumsum(count) - count, count)
