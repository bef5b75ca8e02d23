"""Which grid lines to keep: few enough to ship, close enough that interpolation costs less than a tolerance everywhere.

All tables share their axes. Law: start from the powers of two; while some point of some table is off by more than the tolerance, add the
line through the worst point along the axis that lowers the error most; then drop every line that is not needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def choose(xs: Array, ys: Array, tables: Array, tolerance: float) -> tuple[list[int], list[int]]:
    """Indices of the lines to keep along both axes.

    Args:
        tables: shape [table, x, y], positive, non-decreasing along x and y.
        tolerance: largest relative error of bilinear interpolation at any of the given points.
    """
    lines = [_powers_of_two(xs), _powers_of_two(ys)]
    error = _error(xs, ys, tables, lines)
    while error.max() > tolerance:
        _, i, j = np.unravel_index(error.argmax(), error.shape)
        trials = [[sorted({*lines[0], int(i)}), lines[1]], [lines[0], sorted({*lines[1], int(j)})]]
        errors = [_error(xs, ys, tables, trial) for trial in trials if trial != lines]
        trials = [trial for trial in trials if trial != lines]
        # The fourth power looks at the many bad points, not only at the worst one, so that one line is not added per point.
        best = int(np.argmin([np.mean(np.maximum(e - tolerance / 2, 0) ** 4) for e in errors]))
        lines, error = trials[best], errors[best]
    for axis in (0, 1):
        for line in list(lines[axis][1:-1]):
            trial = [list(lines[0]), list(lines[1])]
            trial[axis].remove(line)
            if _error(xs, ys, tables, trial).max() <= tolerance:
                lines = trial
    return lines[0], lines[1]


def interpolate(xs: Array, ys: Array, values: Array, at_x: Array, at_y: Array) -> Array:
    """Bilinear interpolation of values [..., x, y] at every pair of `at_x` and `at_y`: shape [..., len(at_x), len(at_y)]."""
    i = np.clip(np.searchsorted(xs, at_x, "right") - 1, 0, len(xs) - 2)
    j = np.clip(np.searchsorted(ys, at_y, "right") - 1, 0, len(ys) - 2)
    u = ((at_x - xs[i]) / (xs[i + 1] - xs[i]))[:, None]
    v = (at_y - ys[j]) / (ys[j + 1] - ys[j])
    rows = values[..., i, :] * (1 - u) + values[..., i + 1, :] * u
    return rows[..., j] * (1 - v) + rows[..., j + 1] * v


def _powers_of_two(axis: Array) -> list[int]:
    keep = {0, len(axis) - 1} | {k for k, value in enumerate(axis) if value > 0 and np.log2(value).is_integer()}
    return sorted(keep)


def _error(xs: Array, ys: Array, tables: Array, lines: list[list[int]]) -> Array:
    kept = tables[:, lines[0]][:, :, lines[1]]
    return np.abs(interpolate(xs[lines[0]], ys[lines[1]], kept, xs, ys) / tables - 1.0)
