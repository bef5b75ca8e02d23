"""Raster, PNG, Chrome trace: that they show the step that was simulated."""

import gzip
import json
import zlib
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from report_cases import flat, small

from verl_heddle.report.figure import pictured, rasters, scenes
from verl_heddle.report.perfetto import events, perfetto
from verl_heddle.report.raster import COLUMNS, DARK, FIRST, GAP, IDLE, LIGHT, palette, png, raster


@pytest.fixture(scope="module")
def shown():
    answer = small(seeds=(0,))
    return answer, scenes(answer, pictured(answer))


def test_stock_is_above_heddle(shown):
    answer, drawn = shown
    assert pictured(answer)[:2] == ["stock", "heddle"]
    assert drawn[0].result.makespan_s == answer.stock.typical.last.makespan_s
    assert drawn[0].bound_s == pytest.approx(answer.bound_s)


def test_raster_of_a_step_one_can_do_by_hand():
    """Two replicas of one slot: 100 tokens on one, 200 on the other, a second a token; the second half of the first is idle."""
    result = flat([100, 200], replicas=2)
    picture = raster(result, result.makespan_s, 200)
    top, bottom = np.split(picture.pixels[:, 10:-10], [picture.pixels.shape[0] // 2])
    assert set(np.unique(top)) - {GAP} == {255}  # the longer one ends last, so it is on top
    half = FIRST + round(100 * (255 - FIRST) / 200)
    left, right = bottom[:, : COLUMNS // 2 - 20], bottom[:, COLUMNS // 2 + 10 :]
    assert set(np.unique(left)) - {GAP} == {half} and set(np.unique(right)) - {GAP} == {IDLE}


def test_raster_counts_what_runs(shown):
    """A band's height is the root of the number running: area over columns gives the busy time back."""
    for scene, picture in zip(shown[1], rasters(shown[1]), strict=True):
        busy = (picture.pixels >= FIRST).any(axis=0).mean() * picture.span_s
        union = max(end for item in scene.result.replicas for _, end in item.busy)
        assert busy <= union * 1.01
        assert picture.pixels.max() <= 255 and picture.pixels.shape[1] == COLUMNS


@pytest.mark.parametrize("gpus", [1, 64, 1000])
def test_raster_height_stays_in_bounds(gpus):
    picture = raster(flat([5] * gpus, replicas=gpus), 5.0, 5)
    assert 500 <= picture.pixels.shape[0] <= 2000


def test_palette_is_even_in_lightness():
    """Sequential and monotone in luminance, short next to the background: readable without colour."""
    for scheme, sign in ((LIGHT, -1), (DARK, 1)):
        light = palette(scheme)[FIRST:] @ np.array([0.2126, 0.7152, 0.0722])
        assert (sign * np.diff(light) >= -1.0).all() and sign * (light[-1] - light[0]) > 130


def test_png_is_a_png():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    data = png(pixels, palette(LIGHT))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    begin = data.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompressobj().decompress(data[begin:]), dtype=np.uint8).reshape(3, 5)
    assert (rows[:, 1:] == pixels).all() and (rows[:, 0] == 0).all()


def test_trace_lanes_never_overlap(shown):
    lanes = defaultdict(list)
    for event in events(shown[1]):
        if event["ph"] == "X":
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():
        spans.sort()
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
    slots = shown[0].setting.slots
    # A slot that frees and fills within a microsecond may need one more lane; a preempted turn keeps its lane while it waits.
    fixed = {number for number, scene in enumerate(shown[1], 1) if not scene.result.turns.column("preemptions").any()}
    assert 1 in fixed
    assert max(tid % 10_000 for pid, tid in lanes if pid in fixed) <= slots + 1


def test_trace_tells_every_turn(shown, tmp_path):
    path = tmp_path / "trace.json.gz"
    number = perfetto(path, shown[1])
    told = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    turns = [event for event in told if event["ph"] == "X"]
    assert number == len(turns) == sum(len(scene.result.turns) for scene in shown[1])
    first = [event for event in turns if event["pid"] == 1]
    assert sum(event["args"]["tokens"] for event in first) == shown[1][0].result.tokens
    assert all(event["args"]["reason"] and event["name"].count("#") == 1 for event in first)
    names = [event["args"]["name"] for event in told if event["name"] == "process_name"]
    assert names == [scene.title for scene in shown[1]]
    end = max(event["ts"] + event["dur"] for event in first) / 1e6
    assert end <= shown[1][0].result.makespan_s + 1e-5


def test_figure_is_written(shown, tmp_path):
    pytest.importorskip("matplotlib")
    from verl_heddle.report.figure import timeline

    path = tmp_path / "timeline.png"
    timeline(path, shown[0], shown[1])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
