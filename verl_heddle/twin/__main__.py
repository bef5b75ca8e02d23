"""The process that judges: a pickled `(Columns, meta)` on standard input, a line of JSON on standard output; seconds it may live as the
only argument."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from contextlib import suppress
from math import ceil
from pathlib import Path

from verl_heddle.twin.judge import judge

LOWEST = 19
"""Of Linux's priorities."""


def main() -> None:
    """Judge one step."""
    stand_back()
    signal.alarm(ceil(float(sys.argv[1])))  # who asked may be dead by then
    columns, meta = pickle.load(sys.stdin.buffer)
    records = list(columns.records())
    for item in records:
        item.meta.update(meta)
    try:
        print(json.dumps(judge(records)))
    except ValueError as error:
        print(json.dumps({"why": str(error)}))


def stand_back() -> None:
    """Take only the time that nobody else wants. Where Linux shares time between sessions first (`sched_autogroup_enabled`), a process's
    own priority counts within its session only: the session's is set as well, if it is this process's own."""
    os.nice(LOWEST)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(LOWEST))


if __name__ == "__main__":
    main()
