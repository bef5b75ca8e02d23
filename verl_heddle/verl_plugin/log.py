"""The plugin's log lines: on stderr, where verl's log levels cannot hide them."""

from __future__ import annotations

import sys

_said: set[str] = set()


def log(text: str) -> None:
    """Print `heddle: <text>` now. Ray forwards a worker's stderr to the driver's console."""
    print("heddle:", " ".join(text.split()), file=sys.stderr, flush=True)


def log_once(text: str) -> None:
    """`log`, unless this process has logged the same line before."""
    if text not in _said:
        _said.add(text)
        log(text)
