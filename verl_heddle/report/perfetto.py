"""Write a step as a Chrome trace for https://ui.perfetto.dev or chrome://tracing: a process per arm, a thread per lane of a replica.

A lane is a slot: turns that overlap on a replica get different lanes, lowest free lane first. An event is a turn in its slot, named by
prompt and trial; its arguments give the turn number, its tokens and the trajectory's, its waiting time and the reason for its placement.
Times are microseconds of simulated time. Source: "Trace Event Format" (Google, 2016), complete events ("X") and metadata ("M").
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Any

from verl_heddle.report.figure import Scene

LANES = 10_000
"""Thread ids per replica; more than the slots of any vLLM engine."""


def perfetto(path: str | os.PathLike[str], shown: Sequence[Scene]) -> int:
    """Write the trace, with gzip if the name ends in `.gz` (Perfetto opens both); returns the number of turns written.

    Raises:
        OSError: the file cannot be written.
    """
    turns = 0
    packed = os.fspath(path).endswith(".gz")
    with gzip.open(path, "wt", compresslevel=5) if packed else open(path, "w") as out:
        out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for number, event in enumerate(events(shown)):
            out.write((",\n" if number else "") + json.dumps(event, separators=(",", ":")))
            turns += event["ph"] == "X"
        out.write("\n]}\n")
    return turns


def events(shown: Sequence[Scene]) -> Iterator[dict[str, Any]]:
    """Trace events, arm by arm."""
    for process, scene in enumerate(shown, start=1):
        yield _named("process_name", process, 0, scene.title)
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
        yield from _turns(scene, process)


def _turns(scene: Scene, process: int) -> Iterator[dict[str, Any]]:
    result = scene.result
    log = result.turns
    columns = (
        "trajectory turn replica reason priority predicted_remaining end_s queue_s prefill_s generate_s tool_s output_tokens cached_tokens"
    )
    names = (*columns.split(), "preemptions")
    rows = zip(*(log.column(name).tolist() for name in names), strict=True)
    timed = sorted(((*_micros(row[6] - row[8] - row[9], row[6]), row) for row in rows), key=lambda entry: entry[:2])
    free: list[list[int]] = [[] for _ in result.replicas]
    used: list[list[tuple[int, int]]] = [[] for _ in result.replicas]
    width = [0] * len(result.replicas)
    for begin, end, row in timed:
        trajectory, turn, where, reason, priority, predicted, _, queue, prefill, _, tool, tokens, cached, lost = row
        while used[where] and used[where][0][0] <= begin:
            heappush(free[where], heappop(used[where])[1])
        if free[where]:
            lane = heappop(free[where])
        else:
            lane = width[where]
            width[where] += 1
            yield _named("thread_name", process, where * LANES + lane + 1, f"{log.replicas[where]} slot {lane}")
        heappush(used[where], (end, lane))
        item = result.source[trajectory]
        yield {
            "ph": "X",
            "name": f"{item.prompt_id} #{item.trial}",
            "cat": "turn",
            "pid": process,
            "tid": where * LANES + lane + 1,
            "ts": begin,
            "dur": end - begin,
            "args": {
                "turn": turn,
                "tokens": tokens,
                "trajectory_tokens": int(result.output_tokens[trajectory]),
                "reason": log.reasons[reason],
                "priority": priority,
                "predicted_remaining": None if predicted != predicted else round(predicted, 1),
                "queue_s": round(queue, 6),
                "prefill_s": round(prefill, 6),
                "tool_s_after": round(tool, 6),
                "cached_tokens": cached,
                "preemptions": lost,
            },
        }


def _micros(begin_s: float, end_s: float) -> tuple[int, int]:
    """Start and end in whole microseconds, at least one apart: viewers nest events that overlap by rounding and hide empty ones."""
    begin = round(begin_s * 1e6)
    return begin, max(begin + 1, round(end_s * 1e6))


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
