"""`verl-heddle explain`: on traces whose cause is known, because they were made so."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from verl_heddle.latency import LatencyModel
from verl_heddle.report.recorded import engines_of
from verl_heddle.report.why import why
from verl_heddle.report.why_text import document, schema, sentences, settings, text
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.traces import generate, replayable, write

DOCS = Path(__file__).resolve().parents[2] / "docs" / "explain.md"
LATENCY = LatencyModel.affine(0.01, 0.0005, 1e-7, prefill_per_token_s=1e-5, prefill_base_s=0.01, tps=(1,))


def recorded(
    folder: Path, slots: int = 4, steps: int = 3, slowest: int = 2, latency=LATENCY, told: bool = True, prompts: int = 6, **workload
) -> Path:
    """A trace of simulated steps, as a live run under stock verl leaves it; step `slowest` has thrice the tokens."""
    lives = []
    for number in range(1, steps + 1):
        median = 300 if number == slowest else 100
        drawn = generate("search", prompts, 4, seed=number, **{"median_tokens": median, "cap_tokens": 2000, "tool_mean_s": 0.05} | workload)
        work = [replayable(item) for item in drawn]
        result = simulate(
            work, make_fleet(2, 1, latency, slots), latency, Stock(number), engine=EngineOptions(turn_overhead_s=0.01), step=number
        )
        for life in result.trajectories():
            life.meta["start_s"] += 1e9 + 1e4 * number
            life.meta["end_s"] += 1e9 + 1e4 * number
            life.meta["run"] = "r"
            if told:
                life.meta.update({"tp": 1, "slots": slots, "replicas": 2, "order": "fcfs"})
            lives.append(life)
    write(folder / "trace.jsonl", lives)
    return folder


def explain(*words: str):
    return subprocess.run([sys.executable, "-m", "verl_heddle.cli", "explain", *words], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    return why(recorded(tmp_path_factory.mktemp("crowded")))


def test_the_slowest_step_and_its_last_trajectory(crowded):
    assert crowded.step == 2 and crowded.metrics["makespan_s"] > 1.5 * crowded.typical_s
    assert crowded.last.meta["end_s"] == max(item.meta["end_s"] for item in crowded.items)
    total = crowded.late_s + crowded.split.total_s
    assert total == pytest.approx(crowded.metrics["makespan_s"], rel=1e-6), "nothing of the last life is unexplained"
    assert crowded.alone_s + crowded.shared_s == pytest.approx(crowded.split.generate_s, rel=0.15)


def test_the_step_as_it_was_is_reproduced(crowded):
    assert crowded.replayed_s == pytest.approx(crowded.metrics["makespan_s"], rel=0.05)
    assert crowded.bound.makespan_s < crowded.metrics["makespan_s"]


def test_where_slots_are_short_more_slots_are_advised(crowded):
    cases = {case.name: case for case in crowded.what_ifs}
    assert cases["more_slots"].ratio > 1.1 > 1.0 > cases["fewer_slots"].ratio
    assert "actor_rollout_ref.rollout.max_num_seqs=8" in {tip["try"] for tip in settings(crowded)}
    assert cases["known_order"].ratio > 1.02 and "+plugin=heddle" in {tip["try"] for tip in settings(crowded)}
    truth = simulate(
        [replayable(item) for item in crowded.items],
        make_fleet(2, 1, LATENCY, 8),
        LATENCY,
        Stock(2),
        engine=EngineOptions(turn_overhead_s=0.01),
    )
    assert cases["more_slots"].makespan_s == pytest.approx(truth.makespan_s, rel=0.15), "against the law the trace was made with"


def test_where_tools_are_slow_tools_are_blamed_and_no_setting_is_advised(tmp_path):
    answer = why(recorded(tmp_path, slots=64, tool_mean_s=8.0, median_tokens=60))
    cases = {case.name: case for case in answer.what_ifs}
    assert max(cases.values(), key=lambda case: case.ratio).name == "no_tools" and cases["no_tools"].ratio > 3
    assert "in tools" in sentences(answer)[2].split("spent ")[1].split(",")[0].split(" and ")[0]
    assert {tip["try"] for tip in settings(answer) if tip["try"]} <= {"heddle.shape.enable=true"} and "Beyond settings:\n  tools:" in text(
        answer
    )


def test_one_long_trajectory_is_named(tmp_path):
    folder = recorded(tmp_path, slots=64, steps=1, slowest=0)
    from verl_heddle.traces import read

    lives = list(read(folder / "trace.jsonl"))
    longest = max(range(len(lives)), key=lambda index: lives[index].meta["end_s"])
    one = lives[longest]
    extra = 4000
    turns = (
        *one.steps[:-1],
        replace(one.steps[-1], output_tokens=one.steps[-1].output_tokens + extra, gen_s=one.steps[-1].gen_s + extra * 0.0107),
    )
    lives[longest] = replace(one, steps=turns, meta={**one.meta, "end_s": one.meta["end_s"] + extra * 0.0107})
    write(folder / "trace.jsonl", lives)
    answer = why(folder)
    cases = {case.name: case for case in answer.what_ifs}
    assert answer.last.prompt_id == one.prompt_id and str(answer.last.trial) == str(one.trial)
    assert max(cases.values(), key=lambda case: case.ratio).name == "without_last"
    assert "its longest trajectory alone takes that long" in sentences(answer)[-1]


def test_other_degrees_need_a_table(crowded, tmp_path):
    from verl_heddle.latency import load

    table = load("h200", "qwen3-8b")
    folder = recorded(tmp_path, slots=64, latency=table, median_tokens=2000)
    answer = why(folder, table=table)
    cases = {case.name: case for case in answer.what_ifs}
    assert "tp_2" in cases and not any(case.kind == "tp" for case in crowded.what_ifs)
    assert answer.replayed_s == pytest.approx(answer.metrics["makespan_s"], rel=0.02), "the table is the law the trace was made with"


def test_what_the_trace_does_not_say_is_assumed_aloud(tmp_path):
    folder = recorded(tmp_path, told=False)
    assert "assumed: --tp 1, --slots 256" in text(why(folder))
    assert engines_of(why(folder).items, tp=1, slots=4).assumed == ()
    assert "assumed" not in text(why(folder, tp=1, slots=4))


def test_a_trace_without_engine_times_is_still_explained(tmp_path):
    folder = recorded(tmp_path)
    from verl_heddle.traces import read

    write(
        folder / "trace.jsonl",
        [replace(one, steps=tuple(replace(t, ctx_tokens=None) for t in one.steps)) for one in read(folder / "trace.jsonl")],
    )
    answer = why(folder)
    assert (
        answer.machine is None and "What would have helped is unknown" in text(answer) and "That trajectory, turn by turn" in text(answer)
    )


def test_json(crowded):
    jsonschema = pytest.importorskip("jsonschema")
    value = json.loads(json.dumps(document(crowded), allow_nan=False))
    checker = jsonschema.Draft202012Validator(schema())
    checker.check_schema(schema())
    assert list(checker.iter_errors(value)) == []
    broken = copy.deepcopy(value)
    del broken["last"]["turns"][0]["left"]
    assert len(list(checker.iter_errors(broken))) == 1
    assert value["last"]["turns"][0]["left"] == crowded.last.output_tokens and len(value["last"]["turns"]) == len(crowded.last.steps)
    words = DOCS.read_text()
    keys = {
        *value,
        *value["last"],
        *value["last"]["turns"][0],
        *value["what_ifs"][0],
        *value["settings"][0],
        *value["engines"],
        *value["bound"],
    }
    assert [key for key in sorted(keys) if f"`{key}`" not in words] == []
    assert [case["name"] for case in value["what_ifs"] if f"`{case['name']}`" not in words] == []


def test_the_command_on_a_file_a_folder_and_a_comparison(finished, tmp_path):
    folder = recorded(tmp_path)
    for run in (folder / "trace.jsonl", folder):
        done = explain(str(run), "--step", "3")
        assert done.returncode == 0 and "- Step 3 took" in done.stdout and "Settings to try:" in done.stdout, done.stderr
    out = finished[0]
    done = explain(str(out), "--arm", "heddle", "--pair", "2", "--json", "-")
    value = json.loads(done.stdout)
    assert value["source"] == "cmp, pair 2, heddle" and value["engines"]["order"] == "priority" and value["step"] in (2, 3, 4)
    every = json.loads(explain(str(out), "--json", "-").stdout)
    makespans = [
        step["makespan_s"] for run in json.loads((out / "compare.json").read_text())["runs"] for step in run["steps"] if step["counts"]
    ]
    assert every["makespan_s"] == pytest.approx(max(took for took in makespans if took is not None))
    assert "slowest step" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("/nowhere",), "no such file"),
        (("TRACE", "--step", "77"), "has no training step 77; it has 1, 2, 3"),
        (("TRACE", "--arm", "heddle"), "choose runs of a comparison"),
        (("CMP", "--arm", "chess"), "no finished run with a trace matches; available: pair 1 stock"),
        (("TRACE", "--model", "qwen3-8b"), "--model and --gpu go together"),
        (("TRACE", "--json", "/nowhere/x.json"), "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(finished, tmp_path, words, says):
    places = {"TRACE": str(recorded(tmp_path)), "CMP": str(finished[0])}
    done = explain(*(places.get(word, word) for word in words))
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
