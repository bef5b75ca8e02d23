"""Format numbers for readers; shared by the text table, the sentences, the figure and the page."""

from __future__ import annotations

from collections.abc import Sequence


def seconds(value: float) -> str:
    """Seconds: "585 s", "12.3 s", "0.35 s"; from 100 minutes on "2 h 05 min"."""
    if value >= 6000:
        minutes = round(value / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{number(value)} s"


def number(value: float) -> str:
    """A number with at least three digits, at most two of them decimal: "1,234", "585", "12.3", "0.35"."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 99.95 else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def count(value: float) -> str:
    """A count, or a mean of counts: "1,234", "0", "12.5"."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def ratio(value: float) -> str:
    """A speedup: "1.94x"."""
    return f"{value:.2f}x"


def percent(share: float) -> str:
    """A share: "27 %"."""
    return f"{100 * share:.0f} %"


def spread(values: Sequence[float], middle: float, form: str = "{:.2f}") -> str:
    """A value with its range: "1.94 (1.87..2.09)", or the value alone if the range rounds to a single number."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(middle) if low == high else f"{form.format(middle)} ({low}..{high})"


def mixture(layout: Sequence[int]) -> str:
    """Degrees of a layout, largest first: "4+2+1+1"; from five replicas on "2x8+12x4" for two of 8 and twelve of 4."""
    falling = sorted(layout, reverse=True)
    if len(falling) <= 4:
        return "+".join(map(str, falling))
    return "+".join(f"{falling.count(tp)}x{tp}" for tp in dict.fromkeys(falling))


def listed(items: Sequence[str]) -> str:
    """Join items: "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
