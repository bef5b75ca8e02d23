"""The twin: its counterfactual against what the other rule really takes (in simulation), and a process that may hang or die."""

from __future__ import annotations

import subprocess
import sys
import threading
from statistics import median
from types import SimpleNamespace

import pytest

from verl_heddle.latency import LatencyModel
from verl_heddle.options import Options
from verl_heddle.orchestrator import Orchestrator
from verl_heddle.simulate import EngineOptions, make_fleet, simulate
from verl_heddle.simulate.baselines import Stock
from verl_heddle.simulate.workload import most_kv
from verl_heddle.traces import generate, replayable
from verl_heddle.traces.columns import Columns
from verl_heddle.twin import process
from verl_heddle.twin.judge import judge
from verl_heddle.twin.process import Twin

LATENCY = LatencyModel.affine(0.01, 0.001, 1e-7, prefill_per_token_s=2e-4, prefill_base_s=0.01)
SLOTS, REPLICAS = 16, 2
WORK = [replayable(item) for item in generate("search", 12, 4, seed=3, median_tokens=150, cap_tokens=1200, tool_mean_s=0.3)]
KV_TOKENS = 2 * most_kv(WORK)
META = {"tp": 1, "slots": SLOTS, "replicas": REPLICAS, "kv_tokens": KV_TOKENS}


def ran(arm, seed=0, slower=1.0):
    """A step with too little KV cache, simulated under a rule and recorded as a live run would."""
    fleet = make_fleet(REPLICAS, 1, LATENCY, SLOTS, {1: KV_TOKENS})
    policy = Stock(seed) if arm == "stock" else Orchestrator(Options(seed=seed))
    if arm == "heddle":
        policy.step_times_known(LATENCY)
    order = "fcfs" if arm == "stock" else "priority"
    lives = simulate(WORK, fleet, LATENCY, policy, engine=EngineOptions(order=order, turn_overhead_s=0.01)).trajectories()
    told = {**META, **Options(observe=arm == "stock").decisions(), "order": order}
    for life in lives:
        start = life.meta["start_s"]
        life.meta.update(told, end_s=start + slower * (life.meta["end_s"] - start))
    return lives


def makespan(lives):
    return max(life.meta["end_s"] for life in lives) - min(life.meta["start_s"] for life in lives)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("arm", ["stock", "heddle"])
def test_it_tells_what_the_other_rule_takes(arm, seed):
    other = "heddle" if arm == "stock" else "stock"
    step = ran(arm, seed)
    told, truth = judge(step), median(makespan(ran(other, draw)) for draw in range(7))
    assert told[f"{arm}_s"] == pytest.approx(makespan(step)), "the rule that ran is as measured"
    assert told[f"{other}_s"] == pytest.approx(truth, rel=0.1) and abs(told["error"]) < 0.1
    assert told["speedup"] == told["stock_s"] / told["heddle_s"] and told["bound_s"] < min(told["stock_s"], told["heddle_s"])


def test_what_it_does_not_understand_it_does_not_judge():
    assert set(judge(ran("stock", slower=2.0))) == {"error"}
    step = ran("stock")
    step[0].meta["outcome"] = "cancelled"
    with pytest.raises(ValueError, match="cut short"):
        judge(step)


def asked(monkeypatch, code, budget_s=240.0):
    """A twin whose process is this program, after one step."""
    said = []
    twin = Twin(budget_s, said.append)
    if code is not None:
        run = subprocess.run
        monkeypatch.setattr(subprocess, "run", lambda words, **more: run([sys.executable, "-c", code], **more))
    twin.ask(7, Columns.of(ran("stock")), META)
    twin._thread.join(240.0)
    assert not twin._thread.is_alive()
    return twin, said


def test_a_step_that_ends_while_another_is_judged_is_left_out(monkeypatch):
    release, steps = threading.Event(), []
    twin = Twin(60.0, pytest.fail)
    monkeypatch.setattr(twin, "_run", lambda number, step, meta: (steps.append(number), release.wait(60.0)))
    for number in (7, 8):
        twin.ask(number, Columns.of([]), META)
    release.set()
    twin._thread.join(60.0)
    twin.ask(9, Columns.of([]), META)
    twin._thread.join(60.0)
    assert steps == [7, 9]


def test_an_answer_comes_once_and_names_its_step(monkeypatch):
    twin, said = asked(monkeypatch, None)
    told = twin.told()
    assert said == [] and told["step"] == 7 and told["speedup"] == pytest.approx(judge(ran("stock"))["speedup"])
    assert twin.told() == {} and twin.failures == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import time; time.sleep(60)", "more than 1 s (heddle.twin.budget_s)"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("print('no JSON')", "JSONDecodeError"),
        ("import sys; sys.exit('broken')", "broken"),
    ],
)
def test_a_process_that_hangs_or_dies_does_nothing_to_the_run(monkeypatch, code, words):
    twin, said = asked(monkeypatch, code, budget_s=1.0 if "sleep" in code else 60.0)
    assert twin.told() == {} and twin.failures == 1 and len(said) == 1 and words in said[0]


def test_judging_stops_where_its_share_of_the_cpu_is_used_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(process, "os", SimpleNamespace(cpu_count=lambda: 2))
    twin = Twin(60.0, pytest.fail)
    asked = []
    monkeypatch.setattr(twin, "_run", lambda number, step, meta: asked.append(number))

    def ask(number, at_s, cpu_s):
        clock[0] = at_s
        twin.ask(number, Columns.of([]), META)
        twin._thread.join()
        twin.cpu_s += cpu_s if asked[-1] == number else 0.0

    ask(1, 0.0, process.FREE_CPU_S)
    ask(2, 10.0, 10.0)  # 0.2 s of two cores: nothing is over
    ask(3, 20.0, 1.0)
    ask(4, 490.0, 1.0)
    assert asked == [1, 2], "ten seconds are the share of 500"
    ask(5, 510.0, 1.0)
    assert asked == [1, 2, 5]


def test_what_judging_takes_is_counted(monkeypatch):
    twin, _ = asked(monkeypatch, None)
    assert 0.1 < twin.cpu_s < 60 and "cpu_s" not in twin.told()


def test_a_process_whose_asker_is_dead_ends_by_itself():
    process = subprocess.Popen([sys.executable, "-m", "verl_heddle.twin", "1"], stdin=subprocess.PIPE)
    assert process.wait(30.0) == -14, "by its alarm, while it waits for a step"
