"""Quantiles of samples of which some are only known to be larger than a bound.

Law: the product-limit estimate of the survival function (Kaplan and Meier 1958); the p-quantile is the smallest event at which survival has
fallen to 1 - p. Where the largest samples are all censored and survival never falls so low, it is the largest sample seen. Without
censoring this is the empirical quantile. Cost: O(n log n).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from verl_heddle.predict.quantities import Floats


def quantile(values: Floats, censored: NDArray[np.bool_], p: float) -> float:
    """p-quantile of what `values` are, or are lower bounds of where `censored`.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("no values")
    order = np.lexsort((censored, values))  # of equal values events come first, as the estimate asks
    at_risk = np.arange(len(values), 0, -1)
    survival = np.cumprod(1 - (~censored[order]) / at_risk)
    reached = np.flatnonzero(survival <= 1 - p + 1e-12)
    return float(values[order][reached[0] if len(reached) else -1])
