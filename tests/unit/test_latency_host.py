"""The host's part of an engine step: what a table does not know, measured where there is a run."""

import pytest
from test_latency_calibrate import GPU_LIKE, recorded

from verl_heddle.fleet import Replica
from verl_heddle.latency import HOST_STEP_S, LatencyModel, calibrate, calibrate_host
from verl_heddle.simulate import lower_bound, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.trajectory import Trajectory, Turn

TABLE = LatencyModel.affine(0.0, 1e-4, 2e-8, prefill_per_token_s=2e-5, tps=(1, 2), speedup={2: 2.0})
"""What `GPU_LIKE` costs without the 5 ms of base time in each of its steps."""


def test_every_step_takes_it_and_so_does_the_bound():
    work = [Trajectory("t", "t", "p", 0, 10, (Turn(0, 100, None, None),))]
    plain = LatencyModel.affine(0.01, prefill_per_token_s=0.001)
    hosted = plain.with_host(0.002, "assumed")
    fleet = [Replica("r")]
    before, after = (simulate(work, fleet, model, Stock()).makespan_s for model in (plain, hosted))
    assert after - before == pytest.approx(100 * 0.002)
    assert lower_bound(work, 1, hosted, (1,)).longest_s == pytest.approx(lower_bound(work, 1, plain, (1,)).longest_s + 0.2)
    assert hosted.prefill_s(1, 0) == 0.0 and hosted.prefill_s(1, 10) == pytest.approx(plain.prefill_s(1, 10) + 0.002)
    assert "2 ms of host time in every step (assumed)" in hosted.source
    with pytest.raises(ValueError, match="host"):
        plain.with_host(-1.0, "assumed")


def test_a_run_tells_what_the_table_lacks():
    model = calibrate_host(TABLE, recorded(GPU_LIKE), 1)
    assert model.engines[1].host_s == pytest.approx(5e-3, rel=0.05)
    assert model.engines[2].host_s == model.engines[1].host_s, "at other degrees too"
    assert "calibrated on" in model.source


def test_a_table_that_knows_all_gets_nothing():
    assert calibrate_host(GPU_LIKE, recorded(GPU_LIKE), 1).engines[1].host_s == pytest.approx(0.0, abs=1e-4)


def test_degrees_that_were_not_recorded_get_what_the_recorded_one_shows():
    """The recorded degree is fitted and holds it already; it is not counted twice, and fitting again leaves the others alone."""
    model = calibrate(recorded(GPU_LIKE), 1, base=TABLE)
    assert model.engines[1].host_s == 0.0 and model.engines[2].host_s == pytest.approx(5e-3, rel=0.05)
    again = calibrate(recorded(GPU_LIKE, seed=1), 1, base=model)
    assert again.engines[2].host_s == model.engines[2].host_s


def test_the_default_is_within_what_was_measured():
    assert 0.0008 <= HOST_STEP_S <= 0.0017  # bench/fidelity/README.md: 0.13 of a core in steps of 6 to 13 ms
