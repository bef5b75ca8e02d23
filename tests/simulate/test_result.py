"""What a result tells, and that the rest of the house can read it."""

import json

import pytest
from simulate_cases import FULL

from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.attribution import accounted, split, step_metrics, with_batch_wait
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.traces import decode, encode, generate, replayable


@pytest.fixture(scope="module")
def result():
    work = generate("search", 6, 4, seed=1)
    fleet = make_fleet(8, (4, 2, 1, 1), FULL, slots=4)
    return simulate(work, fleet, FULL, Orchestrator(Options()), engine=EngineOptions("priority", turn_overhead_s=0.01), step=7)


def test_attribution_reads_it(result):
    records = with_batch_wait(result.trajectories())
    assert min(map(accounted, records)) == pytest.approx(1.0, rel=1e-9)
    assert max(map(accounted, records)) == pytest.approx(1.0, rel=1e-9)
    metrics = step_metrics(records, [item.replica.name for item in result.replicas])
    assert metrics["makespan_s"] == pytest.approx(result.makespan_s)
    assert metrics["tokens_per_s"] == pytest.approx(result.throughput_tok_s)
    assert metrics["moves"] == result.migrations and metrics["preemptions"] == result.preemptions
    assert metrics["last/queue_s"] == pytest.approx(result.split()["queue_s"])
    for index, record in enumerate(records):
        mine = result.split(index)
        assert split(record).tool_s == pytest.approx(mine["tool_s"])
        assert split(record).generate_s == pytest.approx(mine["generate_s"] + mine["prefill_s"])


def test_records_can_be_written_and_simulated_again(result):
    """A simulated trace is a trace: the same step comes out of it."""
    again = [replayable(decode(encode(record))) for record in result.trajectories()]
    fleet = [item.replica for item in result.replicas]
    policy = Orchestrator(Options())
    second = simulate(again, fleet, FULL, policy, engine=EngineOptions("priority", turn_overhead_s=0.01), step=7)
    assert second.makespan_s == result.makespan_s


def test_summary_is_json(result):
    numbers = json.loads(json.dumps(result.summary()))
    assert numbers["trajectories"] == 24 and numbers["turns"] == len(result.turns)
    assert numbers["throughput_tok_s"] == pytest.approx(numbers["tokens"] / numbers["makespan_s"])
    assert 0 <= numbers["idle_share"] < 1
    assert sum(numbers["last"].values()) == pytest.approx(numbers["makespan_s"])


def test_turn_rows_are_intervals_of_their_trajectory(result):
    log = result.turns
    rows = zip(*(log.column(name).tolist() for name in ("trajectory", "turn", "start_s", "end_s", "tool_s")), strict=True)
    ends = {}
    for index, turn, start, end, tool in sorted(rows):
        assert start == pytest.approx(ends.get(index, 0.0))
        assert end > start
        ends[index] = end + tool
        last = turn
        assert last < len(result.source[index].steps)
    assert [ends[i] for i in range(24)] == pytest.approx(result.finish_s.tolist())
