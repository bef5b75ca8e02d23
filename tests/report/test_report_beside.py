"""What a step costs beside its kernels: defaults that are something, told as assumed, and what they do to a speedup."""

import json

import pytest
from report_cases import command

from verl_heddle.latency import HOST_STEP_S, load
from verl_heddle.report.draws import generated
from verl_heddle.report.play import play
from verl_heddle.report.setting import OVERHEAD_S, setting
from verl_heddle.report.study import study
from verl_heddle.report.text import assumptions
from verl_heddle.simulate import HostTier

SOURCE = generated("search", 4, 4, [0])


def test_nobody_who_says_nothing_gets_an_ideal_host():
    plain, where = load("h200", "qwen3-8b"), setting("qwen3-8b", "h200", 8)
    assert where.overhead_s == OVERHEAD_S > 0 and where.host_s == HOST_STEP_S > 0
    assert where.latency.decode_s(1, 8, 1000) == pytest.approx(plain.decode_s(1, 8, 1000) + HOST_STEP_S)
    assert where.sync_s(1) == plain.weight_load_s(1) > where.sync_s(8)
    assert where.assumed == ("host_s", "overhead_s", "sync_s", "tools_at_once", "offload")
    given = setting("qwen3-8b", "h200", 8, overhead_s=0.0, host_s=0.0, sync_s=0.0, tools_at_once=4, tier=HostTier())
    assert given.assumed == () and given.latency.decode_s(1, 8, 1000) == plain.decode_s(1, 8, 1000) and given.sync_s(1) == 0.0


@pytest.mark.parametrize("bad", [{"host_s": -1.0}, {"overhead_s": 4000.0}, {"sync_s": float("nan")}])
def test_one_line_for_what_cannot_be(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad)).replace('_', '-')} must be"):
        setting("qwen3-8b", "h200", 8, **bad)


def test_the_output_says_what_was_assumed():
    for where, word in ((setting("qwen3-8b", "h200", 1), "assumed"), (setting("qwen3-8b", "h200", 1, None, 256, 0.5, 0.02), "as given")):
        lines = assumptions(study(where, SOURCE, ("stock", "stock_tier"), 1))
        assert any(line.startswith(f"{word}: ") and "ms per turn outside engine and tool" in line for line in lines)
        assert any("1 ms of host time in every step (assumed)" in line for line in lines)
        assert any("weight sync per step" in line for line in lines) and any(
            "stock_tier keeps KV cache without limit" in line for line in lines
        )


def test_a_speedup_counts_weight_sync_on_both_sides():
    """Two makespans of which one is half the other are not twice as fast where both wait ten seconds for weights."""
    answers = {sync: study(setting("qwen3-8b", "h200", 1, sync_s=sync), SOURCE, ("stock", "slime", "lpt_oracle"), 1) for sync in (0.0, 1e3)}
    without, late = (answers[sync].rows["lpt_oracle"] for sync in (0.0, 1e3))
    assert without.makespans_s == late.makespans_s
    assert abs(late.speedup - 1) < abs(without.speedup - 1) or without.speedup == late.speedup == 1.0
    run = late.runs[0]
    assert run.step_s == run.makespan_s + 1e3


def test_tools_that_run_one_at_a_time_take_longer():
    (draw,) = SOURCE.draws
    (free,) = play("stock", 1, setting("qwen3-8b", "h200", 1), draw)
    (queued,) = play("stock", 1, setting("qwen3-8b", "h200", 1, tools_at_once=1), draw)
    tools = sum(item.tool_s for item in draw.steps[0])
    assert queued.makespan_s > tools > free.makespan_s, "one after the other"
    for result in (free, queued):
        parts = sum(getattr(result, name) for name in ("queue_s", "prefill_s", "generate_s", "tool_s", "other_s"))
        assert parts == pytest.approx(result.finish_s - result.start_s)
    assert free.tool_s.sum() == pytest.approx(tools) and queued.tool_s.sum() > tools


def test_the_options_reach_the_document(tmp_path):
    words = ("simulate", "--workload", "search", "--model", "qwen3-8b", "--gpus", "1", "--prompts", "2", "--samples", "2", "--seeds", "1")
    told = (
        "--host-s",
        "0.002",
        "--overhead-s",
        "0.03",
        "--sync-s",
        "4",
        "--tools-at-once",
        "3",
        "--offload-gb-s",
        "50",
        "--offload-gib",
        "100",
    )
    out = tmp_path / "answer.json"
    assert command(*words, *told, "--arms", "stock,stock_tier,trajectory_fcfs", "--jobs", "1", "--json", str(out)) == 0
    config = json.loads(out.read_text())["config"]
    assert (config["host_s"], config["overhead_s"], config["sync_s"], config["tools_at_once"]) == (0.002, 0.03, 4.0, 3)
    assert (config["offload_bytes_per_s"], config["offload_host_bytes"], config["assumed"]) == (50e9, 100 * 2**30, [])
    assert command(*words, "--offload-gib", "0") == 2 and command(*words, "--host-s", "-1") == 2
