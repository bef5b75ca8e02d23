"""Columns hold what records hold; the writer loses nothing, never keeps its caller waiting, and leaves files that are read as one."""

from __future__ import annotations

import gzip
import pickle
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from verl_heddle.report.attribution import split, step_metrics
from verl_heddle.report.step_metrics import prediction_quality
from verl_heddle.traces import writer as writing
from verl_heddle.traces.columns import Columns
from verl_heddle.traces.io import read
from verl_heddle.traces.writer import TraceWriter, flush_all
from verl_heddle.trajectory import Trajectory, Turn


def turn(rng):
    """One with any of its fields unknown."""

    def maybe(value):
        return None if rng.random() < 0.2 else value

    times = {
        name: maybe(float(rng.uniform(0, 9))) for name in ("tool_latency_s", "gen_s", "route_s", "queue_s", "transport_s", "between_s")
    }
    return Turn(
        3,
        maybe(int(rng.integers(50))),
        maybe("t"),
        **times,
        ctx_reset=bool(rng.random() < 0.1),
        replica=maybe(f"r{rng.integers(2)}"),
        reason=maybe("sticky"),
        predicted_remaining=maybe(float(rng.uniform(0, 99))),
        predicted_upper=maybe(float(rng.integers(0, 99))),
        preemptions=maybe(int(rng.integers(3))),
        start_s=maybe(float(rng.uniform(0, 9))),
    )


def meta(number):
    return {"step": 1, "validate": False, "outcome": "finished", "truncated": False, "start_s": 100.0 + number, "end_s": 150.0 + number % 7}


def lived(seed):
    rng = np.random.default_rng(seed)
    turns = [tuple(turn(rng) for _ in range(rng.integers(5))) for _ in range(rng.integers(1, 25))]
    return [Trajectory("s", "w", "p", n, 5, steps, 0.5, "m", meta(n)) for n, steps in enumerate(turns)]


def lines(count, start=0):
    return [Trajectory("s", "w", "p", start + n, 5, (Turn(0, 7, start_s=0.5),), None, "m", meta(n)) for n in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_columns_hold_what_records_hold(seed):
    some, more = lived(seed), lived(100 + seed)
    table = pickle.loads(pickle.dumps(Columns.of(some)))
    assert list(table.records()) == some and len(table) == len(some)
    table.extend(Columns.of(more))
    assert list(table.records()) == some + more
    assert list(table.where(lambda head: head.trial == 0).records()) == [some[0], more[0]]
    assert table.where(lambda head: True) is table


@pytest.mark.parametrize("seed", range(40))
def test_metrics_are_those_of_the_records(seed):
    """The arithmetic by columns against plain loops over records."""
    lives = lived(seed)
    found = step_metrics(Columns.of(lives), ["r0", "r2"])
    last = max(lives, key=lambda item: item.meta["end_s"])
    assert found["last/other_s"] == pytest.approx(split(last).other_s) and found["last/queue_s"] == pytest.approx(split(last).queue_s)
    assert found["tokens"] == sum(item.output_tokens for item in lives) and found["turns"] == sum(len(item.steps) for item in lives)
    assert found["moves"] == sum(a.replica != b.replica for item in lives for a, b in pairwise(item.steps))
    assert found["preemptions"] == sum(turn.preemptions or 0 for item in lives for turn in item.steps)
    assert [share for name, share in found.items() if name.startswith("idle_share/replica_")][-1] == 1.0, "r2 served nothing"
    for turns in (0, 2):
        rows = [
            (sum(t.output_tokens or 0 for t in item.steps[turns:]), item.steps[turns].predicted_remaining)
            for item in lives
            if len(item.steps) > turns and item.steps[turns].predicted_remaining is not None
        ]
        quality = prediction_quality(Columns.of(lives))
        assert (f"predict/bias_after_{turns}" in quality) == (len(rows) >= 10)
        if len(rows) >= 10:
            truth, said = np.log(np.maximum(1.0, np.array(rows))).T
            assert quality[f"predict/bias_after_{turns}"] == pytest.approx((said - truth).mean())


def test_whoever_puts_never_waits_for_the_disk(tmp_path, monkeypatch):
    disk, failures = threading.Event(), []
    monkeypatch.setattr(TraceWriter, "_write", lambda self, records, meta: disk.wait(60))
    writer = TraceWriter(tmp_path / "trace.jsonl", 0, failures.append)
    for _ in range(writing.MOST_PENDING + 2):
        writer.put(Columns.of(lines(1)), {})  # would never return, were it to wait
    assert len(failures) == 2 and not writer.flush(0.01)
    disk.set()
    assert writer.flush(60) and flush_all(60)


def test_segments_hold_every_line_once_in_order(tmp_path):
    path, failures = tmp_path / "run" / "trace.jsonl", []
    writer = TraceWriter(path, 2000, failures.append)
    for batch in range(6):
        writer.put(Columns.of(lines(10, 10 * batch)), {"run": "now"})
    assert writer.flush(60) and not failures
    closed = sorted(file for file in path.parent.iterdir() if file != path)
    assert [file.name for file in closed] == [f"trace.{number:04d}.jsonl.gz" for number in range(1, len(closed) + 1)] and len(closed) == 5
    found = list(read(path))
    assert [item.trial for item in found] == list(range(60)) and {item.meta["run"] for item in found} == {"now"}
    assert all(file.read_bytes()[:2] == b"\x1f\x8b" for file in closed) and not path.read_bytes().startswith(b"\x1f\x8b")


def test_a_crash_while_compressing_loses_nothing_and_is_made_good(tmp_path, monkeypatch):
    path, failures = tmp_path / "trace.jsonl", []
    monkeypatch.setattr(writing, "_compress", lambda file: (_ for _ in ()).throw(OSError("killed")))
    writer = TraceWriter(path, 1, failures.append)
    for batch in range(3):
        writer.put(Columns.of(lines(2, 2 * batch)), {})
    assert writer.flush(60) and len(failures) == 2
    plain = sorted(tmp_path.glob("trace.0*"))
    assert [item.trial for item in read(path)] == list(range(6)) and len(plain) == 2
    monkeypatch.undo()
    again = TraceWriter(path, 1, failures.append)
    again.put(Columns.of(lines(2, 6)), {})
    assert again.flush(60) and len(failures) == 2
    closed = sorted(tmp_path.glob("trace.0*"))
    assert len(closed) == 3 and all(gzip.decompress(file.read_bytes()) for file in closed)
    assert [item.trial for item in read(path)] == list(range(8)) and len(list(tmp_path.iterdir())) == 4


def test_a_record_that_cannot_be_written_costs_itself_only(tmp_path):
    failures: list[Exception] = []
    writer = TraceWriter(tmp_path / "trace.jsonl", 0, failures.append)
    good = lines(3)
    writer.put(Columns.of([good[0], replace(good[1], prompt_id=""), good[2]]), {})
    assert writer.flush(60) and len(failures) == 1
    assert [item.trial for item in read(tmp_path / "trace.jsonl")] == [0, 2]
