"""What a step's records cost between rollout and training, while all GPUs wait: as records, written at once, and as columns.

    python -m bench.records.run [--trajectories 10000] [--turns 20] [--workers 8]

Prints JSON: CPU seconds of the trainer's process until `sample` returns (`waiting_s`, by part), and what goes on beside the trainer
(`behind_s`, its lines' megabytes before and after gzip). `records`: a list of `Trajectory`, pickled, metrics, lines encoded and
appended before the sampler returns. `columns`: what the plugin does. Metrics are the same arithmetic in both, so the difference there is
making the columns.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl_heddle.report.attribution import step_metrics, with_batch_wait, write_batch_wait
from verl_heddle.report.step_metrics import prediction_quality
from verl_heddle.traces.columns import Columns
from verl_heddle.traces.recorder import append
from verl_heddle.traces.writer import TraceWriter
from verl_heddle.trajectory import Trajectory, Turn


def made(count: int, turns: int) -> list[Trajectory]:
    """Records as a live run makes them."""
    return [
        Trajectory(
            "verl",
            "w",
            f"{number:016x}",
            number % 16,
            500,
            tuple(
                Turn(
                    input_tokens=50,
                    output_tokens=200 + number % 97,
                    tool="python",
                    tool_latency_s=0.51,
                    gen_s=4.2,
                    ctx_tokens=500 + 250 * turn,
                    route_s=0.002,
                    queue_s=0.1,
                    transport_s=0.004,
                    between_s=0.01,
                    replica=f"10.0.0.{number % 8}:4711",
                    priority=-number % 50,
                    reason="sticky",
                    predicted_remaining=1000.5 + number % 89,
                    predicted_upper=2000.5,
                    preemptions=0,
                    cached_tokens=400,
                    start_s=5.0 * turn,
                )
                for turn in range(turns)
            ),
            1.0,
            "m",
            {
                "uid": f"u{number // 16}",
                "step": 1,
                "validate": False,
                "outcome": "finished",
                "truncated": False,
                "start_s": 1e9,
                "end_s": 1e9 + 5.0 * turns + number % 13,
                "setup_s": 0.1,
                "score_s": 0.2,
            },
        )
        for number in range(count)
    ]


def timed(parts: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    """The result; its CPU seconds go into `parts`."""
    began = time.process_time()
    result = work()
    parts[name] = round(time.process_time() - began, 3)
    return result


def as_records(records: list[Trajectory], workers: int, folder: Path) -> dict[str, Any]:
    """Everything before the sampler returns."""
    sent = [pickle.dumps(records[number::workers]) for number in range(workers)]
    parts: dict[str, float] = {}
    lists = timed(parts, "unpickle", lambda: [pickle.loads(one) for one in sent])
    whole = with_batch_wait([record for one in lists for record in one])
    timed(parts, "metrics", lambda: step_metrics(whole) | prediction_quality(whole))
    timed(parts, "write", lambda: append(folder / "records.jsonl", whole))
    return {"waiting_s": round(sum(parts.values()), 3), "parts": parts, "sent_mb": round(sum(map(len, sent)) / 1e6, 1)}


def as_columns(records: list[Trajectory], workers: int, folder: Path) -> dict[str, Any]:
    """Columns from the workers, lines by the writer."""
    began = time.process_time()
    sent = [pickle.dumps(Columns.of(records[number::workers])) for number in range(workers)]
    packed_s = (time.process_time() - began) / workers
    parts: dict[str, float] = {"worker packs": round(packed_s, 3)}
    whole = Columns()
    timed(parts, "unpickle", lambda: [whole.extend(pickle.loads(one)) for one in sent])
    write_batch_wait(whole.metas)
    timed(parts, "metrics", lambda: step_metrics(whole) | prediction_quality(whole))
    failures: list[Exception] = []
    writer = TraceWriter(folder / "trace.jsonl", 1, failures.append)
    timed(parts, "put", lambda: writer.put(whole, {"run": "bench"}))
    behind: dict[str, float] = {}
    timed(behind, "write", lambda: writer.flush(600))
    plain = (folder / "trace.jsonl").stat().st_size
    writer.put(Columns.of(records[:1]), {})  # begins the next segment, so that this one is compressed
    timed(behind, "compress", lambda: writer.flush(600))
    if failures:
        raise failures[0]
    return {
        "waiting_s": round(sum(parts.values()), 3),
        "parts": parts,
        "sent_mb": round(sum(map(len, sent)) / 1e6, 1),
        "behind_s": behind,
        "lines_mb": round(plain / 1e6, 1),
        "compressed_mb": round((folder / "trace.0001.jsonl.gz").stat().st_size / 1e6, 1),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--workers", type=int, default=8, help="agent-loop workers that send them")
    asked = parser.parse_args()
    records = made(asked.trajectories, asked.turns)
    with tempfile.TemporaryDirectory() as folder:
        found = {arm.__name__: arm(records, asked.workers, Path(folder)) for arm in (as_records, as_columns)}
    print(json.dumps({**vars(asked), **found}, indent=1))


if __name__ == "__main__":
    main()
