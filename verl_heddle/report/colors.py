"""Colours of the pictures: one sequential map for lengths per scheme, and the names a page and a figure share.

The maps are matplotlib's magma (reversed) and inferno (both CC0), cut at the pale and the black end and given by 12 points: even in
lightness, so they survive colour blindness and grey printers. Short is near the background, long stands out, in both schemes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl_heddle.report.raster import FIRST, GAP, IDLE


@dataclass(frozen=True, slots=True)
class Scheme:
    """Hex colours. `lengths` from short to long."""

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
    """Hex, as "#rrggbb", to numbers."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
