"""The twin's process: reads a pickled `(Columns, meta)` from standard input and prints a line of JSON. Argument: its time limit, s."""

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
    """Run only on idle cores. On Linux this is a lower class than `nice` 19, so the update's threads need not wait for this process."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main() -> None:
    """Judge one step."""
    give_way()
    signal.alarm(ceil(float(sys.argv[1])))  # the parent may be dead by then
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
