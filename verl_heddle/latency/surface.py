"""A monotone surface over two axes: bilinear between grid points, fast for single points, vectorised for arrays.

Law: inside a cell the value is `a + b*x + c*y + d*x*y`, fixed by the cell's four corners. A decode step that costs
`base + per_seq * batch + per_context * batch * context` has exactly this form, so linear (not logarithmic) axes are exact where the
hardware follows a roofline, and the grid needs to be fine only elsewhere.
Invariants: continuous; non-decreasing in x and in y, because the corner values are (checked on construction).
Outside the grid: below the first line, the value at the first line; beyond the last line, linear with the slope of the last octave, made
non-decreasing across the other axis, up to `REACH` times the last line; constant after that.
Cost: two binary searches, 0.5 to 1 microseconds; arrays take 0.1 to 0.4 microseconds per point.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

REACH = 64.0
"""Linear extrapolation ends at this multiple of the last grid line: 32k sequences, 8M tokens of context. Beyond that the result would be
meaningless."""

_PLAIN = (int, float)
"""Types that take the scalar path; everything else, numpy scalars included, goes through `np.asarray`."""


def monotone_fit(values: ArrayLike) -> NDArray[np.float64]:
    """The array that is non-decreasing along both axes and minimises the largest relative distance to `values`.

    It is the geometric mean of the smallest non-decreasing array above `values` and the largest one below it (isotonic regression in the
    maximum norm of the logarithm). Measured tables dip a few percent where a library switches kernels, but a planner must not see a larger
    batch as faster. Monotone input is returned unchanged.

    Args:
        values: shape [x, y], positive or zero.
    """
    array = np.asarray(values, dtype=np.float64)
    above = np.maximum.accumulate(np.maximum.accumulate(array, axis=0), axis=1)
    below = np.minimum.accumulate(np.minimum.accumulate(array[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    middle = np.where(above == below, array, np.sqrt(above) * np.sqrt(below))
    return np.maximum.accumulate(np.maximum.accumulate(middle, axis=0), axis=1)  # rounding of the root can break the order by one bit


@dataclass(frozen=True, slots=True)
class Surface:
    """Values on a grid, with interpolation and extrapolation.

    `xs` and `ys` are increasing grid lines (at least two each), `values` has shape [len(xs)][len(ys)], finite and non-decreasing along
    both.

    Raises:
        ValueError: the axes do not increase, shapes do not match, or values are not finite, non-negative and non-decreasing.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    values: tuple[tuple[float, ...], ...] = field(repr=False)
    _edges: tuple[list[float], list[float]] = field(init=False, repr=False, compare=False)
    _cells: list[tuple[float, float, float, float]] = field(init=False, repr=False, compare=False)
    _table: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        xs, ys, values = (np.asarray(part, dtype=np.float64) for part in (self.xs, self.ys, self.values))
        _check(xs, ys, values)
        xs, ys, values = _extended(xs, ys, values)
        table = _cell_coefficients(xs, ys, values)
        object.__setattr__(self, "_edges", (xs.tolist(), ys.tolist()))
        object.__setattr__(self, "_table", table)
        object.__setattr__(self, "_cells", [tuple(row) for row in table.reshape(-1, 4).tolist()])

    @classmethod
    def fitted(cls, xs: Sequence[float], ys: Sequence[float], values: ArrayLike) -> Surface:
        """A surface through measured values after `monotone_fit`. Shapes and errors as in the constructor."""
        fit = monotone_fit(values)
        return cls(tuple(map(float, xs)), tuple(map(float, ys)), tuple(tuple(row) for row in fit.tolist()))

    @overload
    def __call__(self, x: float, y: float) -> float: ...
    @overload
    def __call__(self, x: NDArray[Any], y: float | NDArray[Any]) -> NDArray[np.float64]: ...
    @overload
    def __call__(self, x: float | NDArray[Any], y: NDArray[Any]) -> NDArray[np.float64]: ...

    def __call__(self, x: float | NDArray[Any], y: float | NDArray[Any]) -> float | NDArray[np.float64]:
        """Value at (x, y): a float for two scalars, otherwise an array of the broadcast shape."""
        if type(x) in _PLAIN and type(y) in _PLAIN:
            return self._at(x, y)  # type: ignore[arg-type]
        return self._at_many(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))

    def _at(self, x: float, y: float) -> float:
        xs, ys = self._edges
        last_i, last_j = len(xs) - 1, len(ys) - 1
        if x <= xs[0]:
            i, x = 0, xs[0]
        elif x >= xs[last_i]:
            i, x = last_i - 1, xs[last_i]
        else:
            i = bisect_right(xs, x) - 1
        if y <= ys[0]:
            j, y = 0, ys[0]
        elif y >= ys[last_j]:
            j, y = last_j - 1, ys[last_j]
        else:
            j = bisect_right(ys, y) - 1
        a, b, c, d = self._cells[i * last_j + j]
        return a + b * x + y * (c + d * x)

    def _at_many(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> float | NDArray[np.float64]:
        xs, ys = (np.asarray(edge) for edge in self._edges)
        x, y = np.clip(x, xs[0], xs[-1]), np.clip(y, ys[0], ys[-1])
        i = np.minimum(np.searchsorted(xs, x, "right") - 1, len(xs) - 2)
        j = np.minimum(np.searchsorted(ys, y, "right") - 1, len(ys) - 2)
        a, b, c, d = np.moveaxis(self._table[i, j], -1, 0)
        value = a + b * x + y * (c + d * x)
        return value if np.ndim(value) else float(value)


def _check(xs: NDArray[np.float64], ys: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    if xs.ndim != 1 or ys.ndim != 1 or min(len(xs), len(ys)) < 2 or values.shape != (len(xs), len(ys)):
        raise ValueError(
            f"a surface needs two or more grid lines per axis and values [x, y]; got axes {xs.shape}, {ys.shape}, values {values.shape}"
        )
    if np.any(np.diff(xs) <= 0) or np.any(np.diff(ys) <= 0):
        raise ValueError("the grid lines of a surface must increase")
    if not np.all(np.isfinite(values)) or values.min() < 0:
        raise ValueError("the values of a surface must be finite and not negative")
    if np.any(np.diff(values, axis=0) < 0) or np.any(np.diff(values, axis=1) < 0):
        raise ValueError("the values of a surface must not decrease along an axis; pass measured values through Surface.fitted")


def _extended(xs: NDArray[np.float64], ys: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Append a far line to both axes, so that extrapolation is interpolation in one more cell.

    The slope is that of the last octave, because the last cell may be narrow and sit where a kernel steps up.
    """
    for axis in (0, 1):
        lines = (xs, ys)[axis]
        grid = values if axis == 0 else values.T
        half = min(int(np.searchsorted(lines, lines[-1] / 2)), len(lines) - 2)
        slope = np.maximum.accumulate((grid[-1] - grid[half]) / (lines[-1] - lines[half]))
        far = lines[-1] * REACH
        grid = np.vstack([grid, grid[-1] + slope * (far - lines[-1])])
        if axis == 0:
            xs, values = np.append(xs, far), grid
        else:
            ys, values = np.append(ys, far), grid.T
    return xs, ys, values


def _cell_coefficients(xs: NDArray[np.float64], ys: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients (a, b, c, d) per cell of `a + b*x + c*y + d*x*y`, shape [x - 1, y - 1, 4]."""
    x0, x1 = xs[:-1, None], xs[1:, None]
    y0, y1 = ys[None, :-1], ys[None, 1:]
    v00, v01, v10, v11 = values[:-1, :-1], values[:-1, 1:], values[1:, :-1], values[1:, 1:]
    area = (x1 - x0) * (y1 - y0)
    d = (v00 - v01 - v10 + v11) / area
    b = ((v10 - v00) * y1 - (v11 - v01) * y0) / area
    c = ((v01 - v00) * x1 - (v11 - v10) * x0) / area
    a = (x1 * (y1 * v00 - y0 * v01) - x0 * (y1 * v10 - y0 * v11)) / area
    return np.stack([a, b, c, d], axis=-1)
