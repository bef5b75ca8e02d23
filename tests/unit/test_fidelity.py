"""The fidelity experiment without engines: what is run, how errors are computed, how disturbed runs are told, the table."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bench.fidelity import table
from bench.fidelity.configurations import BLOCK_TOKENS, CALIBRATION, KV_BOUND, MAX_SLOTS, PREDICTED, REPLICAS, Configuration
from bench.fidelity.disturbance import Mark, wait_for_calm
from bench.fidelity.model import MAX_CONTEXT
from bench.fidelity.predict import Machine, Recorded, compare, counting, evaluate, learn, predict, summary
from verl_heddle.latency import LatencyModel
from verl_heddle.simulate.workload import walk
from verl_heddle.traces import write

TRUTH = LatencyModel.affine(0.007, 0.0006, 1.7e-6, prefill_per_token_s=9e-5, prefill_base_s=0.007)
ALL = (*CALIBRATION, *PREDICTED, *KV_BOUND)


def recorded(configuration: Configuration, seed: int, role: str = "predicted", share: float = 0.0) -> Recorded:
    """A run on imaginary engines that are exactly as the simulator believes, recorded as live: contexts known, no two runs at one time."""
    began_s = 1000.0 * (1 + ALL.index(configuration) + len(ALL) * seed)
    result = predict(configuration, seed, Machine(TRUTH, {"route_s": 0.01}))
    records = []
    for item in result.trajectories():
        contexts = [context for context, _, _ in walk(item)]
        turns = tuple(replace(turn, ctx_tokens=context) for turn, context in zip(item.steps, contexts, strict=True))
        times = {name: began_s + item.meta[name] for name in ("start_s", "end_s")}
        records.append(replace(item, steps=turns, meta=item.meta | times))
    return Recorded(role, configuration, seed, records, share, 1.0)


@pytest.mark.parametrize("configuration", ALL, ids=lambda one: one.name)
def test_work_is_the_same_each_time_and_fits_the_engines(configuration):
    work, history = configuration.work(1)
    assert (work, history) == configuration.work(1)
    assert work != configuration.work(2)[0]
    assert len(work) == configuration.prompts
    assert configuration.slots <= MAX_SLOTS
    for item in work:
        assert item.prompt_tokens + item.output_tokens + sum(turn.input_tokens for turn in item.steps) <= MAX_CONTEXT
    assert (configuration.policy == "stock") == (not history)


def test_at_least_six_configurations_none_of_them_calibrated_on():
    assert len({one.name for one in ALL}) == len(ALL) >= 6 + len(CALIBRATION)
    assert {one.policy for one in PREDICTED} == {"stock", "known", "history"}
    assert {one.slots for one in PREDICTED} == {2, 4, 8}
    assert {one.tools for one in PREDICTED} == {"none", "short", "long"}


@pytest.mark.parametrize("configuration", KV_BOUND, ids=lambda one: one.name)
def test_the_kv_bound_are_bound_by_kv(configuration):
    held = configuration.kv_tokens(0)
    work, _ = configuration.work(0)
    ends = [max(context + output for context, _, output in walk(item)) for item in work]
    assert held % BLOCK_TOKENS == 0 and max(ends) < held < 0.4 * sum(ends) / len(REPLICAS)
    roomy = replace(configuration, kv_share=None)
    assert roomy.kv_tokens(0) is None and roomy.work(0) == (work, configuration.work(0)[1])
    bound, free = (predict(one, 0, Machine(TRUTH, {})) for one in (configuration, roomy))
    assert bound.preemptions > 0 and bound.recomputed_tokens > 2 * free.recomputed_tokens and bound.makespan_s > free.makespan_s
    assert {one.preempt for one in KV_BOUND} == {True, False} and all(one.tools != "none" for one in KV_BOUND)


def test_known_lengths_are_the_true_ones_and_history_is_another_visit_to_the_same_prompts():
    known = next(one for one in PREDICTED if one.policy == "known")
    work, seen = known.work(0)
    assert {end.trajectory.prompt: end.output_tokens for end in seen} == {item.prompt_id: item.output_tokens for item in work}
    work, seen = next(one for one in PREDICTED if one.policy == "history").work(0)
    assert {end.trajectory.prompt for end in seen} == {item.prompt_id for item in work}
    assert not {(end.trajectory.prompt, end.trajectory.sample) for end in seen} & {(item.prompt_id, item.trial) for item in work}


def test_unlucky_placement_loads_one_replica():
    configuration = next(one for one in PREDICTED if one.placed == "unlucky")
    result = predict(configuration, 0, Machine(TRUTH, {}))
    busy = [replica.busy_s for replica in result.replicas]
    assert busy[0] > 1.5 * busy[1]
    usual, _ = replace(configuration, placed="as it comes").work(0)
    assert sorted(configuration.work(0)[0], key=str) == sorted(usual, key=str)


def test_engines_as_the_simulator_believes_are_predicted_from_other_runs():
    machine = learn([recorded(configuration, seed) for configuration in CALIBRATION for seed in (0, 1)])
    for configuration in PREDICTED:
        run = recorded(configuration, 0)
        row = compare(run, predict(configuration, 0, machine))
        assert abs(row["makespan_error"]) < 0.015, row["configuration"]
        assert row["same_replica"] == 1.0
    assert sum(machine.overheads_s.values()) == pytest.approx(0.01, rel=0.01)


def test_errors_are_relative_to_what_happened():
    run = recorded(PREDICTED[0], 0)
    ends = [2 * item.meta["end_s"] - item.meta["start_s"] for item in run.records]
    late = replace(run, records=[replace(item, meta=item.meta | {"end_s": end}) for item, end in zip(run.records, ends, strict=True)])
    row = compare(late, predict(PREDICTED[0], 0, Machine(TRUTH, {"route_s": 0.01})))
    assert row["makespan_error"] == pytest.approx(-0.5)
    assert row["finish_errors"] == pytest.approx([-0.5] * len(run.records))
    both = summary([row, row | {"makespan_error": 0.1}])
    assert both["makespan_error_median"] == pytest.approx(0.3) and both["makespan_error_max"] == pytest.approx(0.5)
    assert both["makespan_bias"] == pytest.approx(-0.2) and both["finish_error_p90"] == pytest.approx(0.5)


def test_the_least_disturbed_attempt_counts_by_role():
    attempts = (("predicted", 0.3), ("predicted", 0.1), ("again", 0.0), ("predicted", 0.2))
    runs = [recorded(PREDICTED[0], 0, role, share) for role, share in attempts]
    assert [(run.role, run.foreign) for run in counting(runs)] == [("predicted", 0.1), ("again", 0.0)]


def test_our_own_work_is_not_foreign():
    before = Mark.now()
    while (after := Mark.now()).own_s - before.own_s < 0.4:
        sum(range(10000))
    own = (after.own_s - before.own_s) / (after.at_s - before.at_s) / (os.cpu_count() or 1)
    assert 0.0 <= after.foreign_since(before) <= 1.1 - own


def test_foreign_share_and_its_limits():
    before, cores = Mark(10.0, 100.0, 50.0), os.cpu_count() or 1
    assert Mark(14.0, 100.0 + 2.0 * cores, 50.0 + cores).foreign_since(before) == pytest.approx(0.25)
    assert Mark(14.0, 101.0, 52.0).foreign_since(before) == 0.0, "ticks do not make it negative"


def test_waiting_for_calm_ends(monkeypatch):
    monkeypatch.setattr("bench.fidelity.disturbance.LOOK_S", 0.01)
    assert wait_for_calm(limit=2.0, patience_s=60.0) < 60.0, "calm at the first look"
    assert wait_for_calm(limit=-1.0, patience_s=0.05) >= 0.05, "never calm"


def test_result_and_table(tmp_path):
    plan = [("calibration", one, seed) for one in CALIBRATION for seed in (0, 1)]
    plan += [("predicted", one, 0) for one in PREDICTED] + [("again", PREDICTED[0], 0)]
    runs = []
    for role, configuration, seed in plan:
        file = f"{role}-{configuration.name}-{seed}.jsonl"
        write(tmp_path / file, recorded(configuration, seed).records)
        run = {"role": role, "configuration": configuration.name, "seed": seed, "file": file}
        runs.append(run | {"foreign": 0.1, "load": 1.5})
    facts = {"date": "today", "commit": "c" * 40, "machine": "2 cores", "versions": {"verl": "0"}, "total_s": 600.0}
    facts["neighbour"] = {"alone_s": 0.1, "together_s": 0.2}
    result = json.loads(json.dumps(facts | evaluate(tmp_path, {"runs": runs})))
    assert list(result["configurations"]) == [one.name for one in PREDICTED]
    assert result["overall"]["runs"] == len(PREDICTED) and result["overall"]["makespan_error_max"] < 0.015
    assert result["without_overhead"]["makespan_bias"] < result["overall"]["makespan_bias"]
    assert len(result["repeated"]) == 2 and len(result["rounds"]) == 2

    readme = tmp_path / "README.md"
    readme.write_text("head\n<!-- table: begin -->\nold\n<!-- table: end -->\ntail\n")
    table.write_readme(readme, result)
    text = readme.read_text()
    table.write_readme(readme, result)
    assert readme.read_text() == text and "old" not in text and text.startswith("head\n") and text.endswith("\ntail\n")
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(PREDICTED) + 3
    assert len(table.console(result).splitlines()) > len(PREDICTED)
    kv = result | {"runs": [run | {"preemptions": 3, "predicted_preemptions": 2} for run in result["runs"]]}
    assert f"{PREDICTED[0].name} 3, simulated 2" in table.markdown(kv) and "lost their slot" not in table.markdown(result)
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the table"):
        table.write_readme(readme, result)
