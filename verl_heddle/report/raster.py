"""Draw a step as pixels: replicas over time, coloured by the length of the trajectories they run. Callers draw the axes.

Bands. Each replica is a band whose height is proportional to its GPUs; the last to finish is on top. Each column of a band stacks the
trajectories that hold a slot at that moment, the longest (by total generated tokens) at the bottom. The height of a stack is the square
root of its count over the largest count (per GPU) in the step, so that a single straggler stays visible. A preempted turn is drawn as one
piece, at its end.

Colours. Each scheme has one sequential colour map for lengths, shared by the page and the figure. The maps are matplotlib's magma
(reversed) and inferno (both CC0), cut at the pale and the black end and given by 12 points. They are even in lightness, so they survive
colour blindness and greyscale printing. In both schemes short trajectories are close to the background and long ones stand out.

PNG. Images are written as palette PNG bytes without an image library. Source: PNG specification (ISO/IEC 15948), colour type 3.

Cost: about 0.3 microseconds per turn and column it covers.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl_heddle.report.attribution import engine_interval
from verl_heddle.simulate import Result
from verl_heddle.trajectory import Trajectory

COLUMNS = 900
"""Time resolution: about the pixel width of a screen."""

ROWS = 576
"""Target height, pixels; 9 for each of 64 GPUs."""

IDLE, GAP = 0, 1
"""Pixel values for an idle slot and for the line between two replicas. Trajectories use `FIRST` to 255."""

FIRST = 2

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Raster:
    """`pixels` has shape [rows, columns], top row first; column c covers `span_s` * [c, c + 1) / columns."""

    pixels: Pixels
    span_s: float
    longest: int
    """Tokens at value 255; values from `FIRST` are linear in tokens, starting at 0."""
    gpus: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Which turns hold a slot at which time. Arrays have shape [turns]; times are seconds from the start of the step."""

    tps: tuple[int, ...]
    """Degree of each replica."""
    ends: tuple[float, ...]
    """When each replica finished its last work."""
    where: NDArray[np.int64]
    """Index of the turn's replica."""
    begin_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    tokens: NDArray[np.int64]
    """Tokens of the whole trajectory."""


def simulated(result: Result) -> Occupancy:
    """Occupancy of a simulated step."""
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
    """Occupancy of a recorded step, on at least `replicas` replicas of degree `tp`; replicas that no turn names are idle."""
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
    """Draw a step on a time axis of `span_s` seconds; `longest`: tokens of the longest trajectory over all rasters shown together."""
    occupancy = simulated(step) if isinstance(step, Result) else step
    gpus = sum(occupancy.tps)
    unit = max(2, ROWS // gpus)
    gap = 1 if unit > 2 else 0
    columns, replicas = COLUMNS, len(occupancy.tps)
    where, left, right, tokens = _intervals(occupancy, span_s / columns)

    count = right - left
    cell = np.repeat(where * columns + left, count) + _ramp(count)
    value = np.repeat(tokens, count)
    order = np.lexsort((-value, cell))
    cell, value = cell[order], value[order]
    held = np.bincount(cell, minlength=replicas * columns)
    begins = np.cumsum(held) - held
    shades = FIRST + np.rint(value * ((255 - FIRST) / longest)).astype(np.int64)

    gpus_at = np.array(occupancy.tps)
    most = max(1.0, float((held.reshape(replicas, columns) / gpus_at[:, None]).max()))
    bands = []
    for index in sorted(range(replicas), key=lambda replica: -occupancy.ends[replica]):
        tp = occupancy.tps[index]
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


def _intervals(occupancy: Occupancy, column_s: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Replica, first column, column past the last, and tokens of each turn. A turn is drawn in columns whose middle it covers, so that a
    column counts the turns running at one moment."""
    where, begin, end, tokens = occupancy.where, occupancy.begin_s, occupancy.end_s, occupancy.tokens
    left = np.clip(np.ceil(begin / column_s - 0.5), 0, COLUMNS).astype(np.int64)
    right = np.clip(np.ceil(end / column_s - 0.5), 0, COLUMNS).astype(np.int64)
    keep = right > left
    return where[keep], left[keep], right[keep], tokens[keep]


def _ramp(count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate 0..n-1 for each n of `count`."""
    total = int(count.sum())
    return np.arange(total) - np.repeat(np.cumsum(count) - count, count)


def png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """Encode a PNG; `pixels` of shape [rows, columns] index `palette` of shape [256, 3], RGB."""
    rows, columns = pixels.shape
    filtered = np.zeros((rows, columns + 1), dtype=np.uint8)  # each row starts with its filter type, 0: none
    filtered[:, 1:] = pixels
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", palette.tobytes()), (b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def data_uri(image: bytes) -> str:
    """The image as a data URI for a self-contained page."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@dataclass(frozen=True, slots=True)
class Scheme:
    """Colours as "#rrggbb"; `lengths` from short to long."""

    background: str
    idle: str
    text: str
    muted: str
    bound: str
    lengths: tuple[str, ...]


LIGHT = Scheme(
    background="#ffffff",
    idle="#eceef1",
    text="#1b1f24",
    muted="#5b6470",
    bound="#0b7285",
    lengths=(
        "#fed89a",
        "#feb27a",
        "#fc8961",
        "#f2625d",
        "#d8456c",
        "#b73779",
        "#942c80",
        "#721f81",
        "#51127c",
        "#2c115f",
        "#100b2d",
        "#000004",
    ),
)

DARK = Scheme(
    background="#14171c",
    idle="#21262d",
    text="#e6e9ee",
    muted="#9aa4b0",
    bound="#66d9e8",
    lengths=(
        "#420a68",
        "#5f136e",
        "#7d1e6d",
        "#9b2964",
        "#b73557",
        "#d24644",
        "#e65d2f",
        "#f57b17",
        "#fb9d07",
        "#fac026",
        "#f3e55d",
        "#fcffa4",
    ),
)


def palette(scheme: Scheme) -> NDArray[np.uint8]:
    """RGB of every pixel value of a raster, shape [256, 3]."""
    points = np.array([rgb(color) for color in scheme.lengths], dtype=np.float64)
    at = np.linspace(0, len(points) - 1, 256 - FIRST)
    mixed = np.stack([np.interp(at, np.arange(len(points)), points[:, channel]) for channel in range(3)], axis=1)
    colors = np.zeros((256, 3))
    colors[FIRST:] = mixed
    colors[IDLE], colors[GAP] = rgb(scheme.idle), rgb(scheme.background)
    return np.rint(colors).astype(np.uint8)


def rgb(color: str) -> tuple[int, int, int]:
    """Parse "#rrggbb"."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
