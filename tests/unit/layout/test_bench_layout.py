"""What bench/layout measures with: no arm below the bound, and a tail regrouped by an oracle never loses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from bench.layout import exhaustive, regimes
from bench.layout.world import World, drawn


@pytest.fixture(scope="module")
def row():
    return regimes.cell("Qwen3-8B", 8, 8, range(2))


def test_a_cell_is_consistent(row):
    assert 0 < row["best_bound"] <= 1
    assert row["usual_over_best"] >= 1 and row["tail_over_best"] >= 1 and row["tail_over_usual"] >= 1
    for quality in ("q1", "q0.71"):
        assert 0 < row[quality]["bound"] <= 1 and row[quality]["tail"] >= 1
    assert row["q1"]["planner"] >= 0.97, "with lengths known the planner does not lose"


def test_every_layout_of_eight_is_tried():
    found = exhaustive.layouts((1, 2, 4, 8), 8)
    assert len(found) == len(set(found)) == 10 and all(sum(one) == 8 for one in found)


def test_a_tail_that_is_too_slow_alone_gains_by_regrouping():
    """One long trajectory at tp=1 beside idle GPUs: four to eight times as fast a degree takes over, less the wake-up and one prefill."""
    world = World("Qwen3-32B", 8, 8)
    truth = np.array([40_000.0] + [100.0] * 6)
    layout, groups = (2,) * 4, [[0], [1, 2], [3, 4], [5, 6]]
    alone = {tp: float(one.tau[0]) for tp, one in world.degrees.items()}
    gain = regimes._tail_gain(world, truth, layout, groups)
    assert 1.2 < gain < alone[2] / alone[8]
    assert regimes._tail_gain(world, truth, (8,), [list(range(7))]) == pytest.approx(1.0, abs=0.02)


def test_drawn_predictions_have_the_quality_they_claim():
    truth, step = drawn(4000, 0.71, 0.9, 0)
    assert np.corrcoef(np.log(truth), np.log(step.medians))[0, 1] == pytest.approx(0.71, abs=0.03)
