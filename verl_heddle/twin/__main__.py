"""The process that judges: a pickled `(Columns, meta)` on standard input, a line of JSON on standard output; seconds it may live as the
only argument."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
from math import ceil
from typing import Any

from verl_heddle.twin.judge import judge


def give_way() -> None:
    """Run where a core is free. Lower than `nice` 19: on Linux the update's threads need not wait for this process when they wake."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main() -> None:
    """Judge one step."""
    give_way()
    signal.alarm(ceil(float(sys.argv[1])))  # who asked may be dead by then
    columns, meta = pickle.load(sys.stdin.buffer)
    records = list(columns.records())
    for item in records:
        item.meta.update(meta)
    try:
        answer: dict[str, Any] = dict(judge(records))
    except ValueError as error:
        answer = {"why": str(error)}
    print(json.dumps(answer | {"cpu_s": time.process_time()}))


if __name__ == "__main__":
    main()
