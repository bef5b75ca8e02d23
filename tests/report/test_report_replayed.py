"""explain replays a run with what it had: its KV cache, preemption on arrival, the bound on turns in flight."""

from dataclasses import replace

import pytest

from verl_heddle.latency import load
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.report.play import engine_for, preempt_rule
from verl_heddle.report.recorded import AsRecorded, Machine, engines_of, machine
from verl_heddle.report.setting import setting
from verl_heddle.report.why import why
from verl_heddle.schedule.preempt import Rule
from verl_heddle.schedule.priority import longest_first
from verl_heddle.simulate import make_fleet, simulate
from verl_heddle.traces import generate, replayable, write
from verl_heddle.trajectory import TrajectoryId, TurnStart

TABLE = load("h200", "qwen3-8b")


def lives(told, slots=8, kv_tokens=60_000, options=None, **workload):
    """A simulated step of heddle as its trace tells it, with `told` in every `meta`."""
    options = options or Options()
    drawn = [replayable(item) for item in generate("search", 12, 4, seed=1, **{"median_tokens": 900} | workload)]
    where = setting("qwen3-8b", "h200", 2, 1, slots)
    fleet = make_fleet(2, 1, where.latency, slots, {1: kv_tokens})
    engine = engine_for(options, where)
    policy = Orchestrator(options)
    policy.step_times_known(where.latency)
    result = simulate(drawn, fleet, where.latency, policy, engine=engine, step=1)
    made = result.trajectories()
    for life in made:
        life.meta.update({"run": "r", "tp": 1, "slots": slots, "replicas": 2, "order": "priority"} | told)
    return made, result


def decided(options: Options):
    """What a live run writes of its decisions."""
    return options.decisions() | {"utilization": 0.7, "kv_tokens": 60_000}


def test_the_trace_tells_what_decided():
    options = Options.longest()
    assert Rule.of(options.decisions()["preempt"]) == preempt_rule(options) and options.decisions()["per_slot"] == 4.0
    assert Options().decisions() == {"preempt": False, "residents": "least_served", "per_slot": 0}
    assert Options(observe=True).decisions() == {"preempt": False, "residents": False, "per_slot": 0}
    options.preempt.enable = False
    assert options.decisions()["preempt"] is False
    made, _ = lives(decided(options))
    engines = engines_of(made)
    assert (engines.preempt, engines.per_slot, engines.utilization, engines.kv_tokens) == (None, 4.0, 0.7, 60_000)
    assert engines_of(made, utilization=0.6).kv_tokens is None, "the user knows better"


def test_kv_cache_is_the_runs_and_not_that_of_another_setting():
    made, _ = lives(decided(Options()))
    known = machine([made], engines_of(made), TABLE)
    assert known.held(1) == 60_000 and [replica.kv_tokens for replica in known.fleet()] == [60_000] * 2
    assert known.held(2) == TABLE.kv_tokens(2, 0.7)
    silent = [replace(item, meta={k: v for k, v in item.meta.items() if k not in ("utilization", "kv_tokens")}) for item in made]
    assert machine([silent], engines_of(silent), TABLE).held(1) == TABLE.kv_tokens(1, 0.5)
    assert machine([silent], engines_of(silent, utilization=0.8), TABLE).held(1) == TABLE.kv_tokens(1, 0.8)


def test_what_is_assumed_is_said(tmp_path):
    made, _ = lives(decided(Options()))
    write(tmp_path / "told.jsonl", made)
    assert not [note for note in why(tmp_path / "told.jsonl", table=TABLE).notes if "assumed" in note]
    bare = [replace(item, meta={k: v for k, v in item.meta.items() if k not in decided(Options())}) for item in made]
    write(tmp_path / "bare.jsonl", bare)
    notes = " ".join(why(tmp_path / "bare.jsonl", table=TABLE).notes)
    assert "--gpu-memory-utilization 0.5" in notes and "the defaults, with resident sets" in notes


def test_a_run_with_preemption_and_gate_is_replayed_with_them():
    """With few slots and few in flight both decide much: without them the replay is of another run."""
    options = Options.longest()
    options.admission.per_slot = 1.0
    made, truth = lives(decided(options), options=options, slots=4)
    assert truth.preemptions > 0
    known = machine([made], engines_of(made), TABLE)
    exact = Machine(known.engines, setting("qwen3-8b", "h200", 2, 1, 4).latency, (1,))
    again = exact.replayed(made)
    assert again.makespan_s == pytest.approx(truth.makespan_s, rel=0.05) and again.preemptions > 0
    off = Machine(replace(known.engines, preempt=None, per_slot=0.0), exact.latency, (1,))
    assert off.replayed(made).preemptions < again.preemptions


def test_known_lengths_go_by_the_whole_length():
    made, _ = lives(decided(Options()))
    item = max(made, key=lambda one: len(one.steps))
    policy = AsRecorded(made, machine([made], engines_of(made), TABLE).fleet(), known=True)
    who = TrajectoryId(item.prompt_id, f"1:{item.prompt_id}", item.trial, 1)
    turns = [policy.turn_started(TurnStart(who, who.key, turn, 100, 10 * turn), 0.0).priority for turn in range(len(item.steps))]
    assert set(turns) == {longest_first(item.output_tokens, 64)}, "the key does not fall while the trajectory runs"


def test_settings_of_preemption_that_cannot_be_end_in_one_line(tmp_path):
    made, _ = lives(decided(Options()) | {"preempt": {"margin": -1}})
    with pytest.raises(ValueError, match="preempt"):
        write(tmp_path / "bad.jsonl", made)
        why(tmp_path / "bad.jsonl")


def test_a_run_with_resident_sets_is_replayed_with_them():
    """KV for a few of the contexts: without admission by KV the replay is of another run."""
    made, truth = lives(decided(Options()) | {"kv_tokens": 20_000}, kv_tokens=20_000, tool_mean_s=0.2)
    assert engines_of(made).residents == "least_served"
    known = machine([made], engines_of(made), TABLE)
    again = known.replayed(made)
    assert again.makespan_s == pytest.approx(truth.makespan_s, rel=0.15)
    without = replace(known, engines=replace(known.engines, residents="")).replayed(made)
    read, again_read, without_read = (sum(one.recomputed_tokens for one in result.replicas) for result in (truth, again, without))
    assert again_read == pytest.approx(read, rel=0.15) and without_read > 1.2 * read
