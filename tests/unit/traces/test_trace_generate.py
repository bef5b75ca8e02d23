"""The generator against the numbers it claims, and its promises: a seed is a result, a parameter does what it says."""

from dataclasses import fields, replace

import numpy as np
import pytest
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st

from verl_heddle.traces import CODING, WORKLOADS, Tool, TraceError, Workload, decode, encode, generate, split_variance, summary
from verl_heddle.traces.workloads import _RANGES
from verl_heddle.trajectory import Trajectory

TOKEN_S = 0.02  # a decode step of a busy engine, to put tokens and tool times into one completion time

NAMES = sorted(WORKLOADS)
LARGE = {name: generate(name, 400) for name in NAMES}  # 6,400 trajectories: the paper's batch
FOUND = {name: summary(LARGE[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_tail_of_completion_times(name: str) -> None:
    """Heddle, Fig. 4: the longest takes more than 4 times the median."""
    times = np.array([trajectory.output_tokens * TOKEN_S + trajectory.tool_s for trajectory in LARGE[name]])
    assert 4 < times.max() / np.median(times) < 20
    assert 3 < FOUND[name]["batch_max_over_mean"] < 8  # public traces: 2.8 to 8.0


@pytest.mark.parametrize(("name", "mean_s"), [("coding", 0.46), ("search", 1.42), ("math", 0.05)])
def test_tool_times_have_the_papers_mean_two_modes_and_a_tail(name: str, mean_s: float) -> None:
    """Heddle, Table 1, within 8 %: prompts differ in their tools, so 400 of them leave 2 to 3 % of noise."""
    tool = FOUND[name]["tool_s"]
    assert tool["mean"] == pytest.approx(mean_s, rel=0.08)
    assert tool["p99"] > 5 * tool["mean"] and tool["max"] <= WORKLOADS[name].tool_timeout_s
    logs = np.log([turn.tool_latency_s for trajectory in LARGE[name] for turn in trajectory.steps if turn.tool_latency_s])
    bins, _ = np.histogram(logs, bins=20, range=tuple(np.quantile(logs, [0.005, 0.995])))
    dip = max(min(bins[:i].max(), bins[i + 1 :].max()) / bins[i] for i in range(1, 19))
    assert dip > 1.4, bins


@pytest.mark.parametrize(
    ("name", "p50", "p90", "turns"),
    [("coding", 6999, 20979, 8), ("search", 1242, 2404, 12), ("math", 8000, 23000, 4)],
)
def test_lengths_and_turns(name: str, p50: float, p90: float, turns: float) -> None:
    """Within 12 %: the medians of 400 prompts scatter by 4 to 5 %."""
    found = FOUND[name]
    assert found["output_tokens"]["p50"] == pytest.approx(p50, rel=0.12)
    assert found["output_tokens"]["p90"] == pytest.approx(p90, rel=0.12)
    assert found["steps"]["p50"] == turns
    lengths, steps = (np.log([getter(t) for t in LARGE[name]]) for getter in (lambda t: t.output_tokens, lambda t: len(t.steps)))
    assert 0.5 < np.corrcoef(lengths, steps)[0, 1] < 0.9  # public traces: 0.4 to 0.9


@pytest.mark.parametrize("name", NAMES)
def test_what_predicts_a_length(name: str) -> None:
    """As in the public traces: siblings a lot (0.43 to 0.82), the prompt's length nothing, early turns little except in long reasoning."""
    rank = FOUND[name]["spearman"]
    assert 0.7 < rank["siblings"] < 0.9
    assert abs(rank["prompt_tokens"]) < 0.15
    assert (0.35 < rank["first_3"] < 0.6) if name == "math" else (-0.2 < rank["first_3"] < 0.2)


@pytest.mark.parametrize("between", [0.4, 0.7, 0.9])
def test_prompt_effect_and_within_spread_are_separate(between: float) -> None:
    """Measured in groups of 16, whose own means take 1/16 of the variance; tolerance 0.04 for 1,000 prompts."""
    found = summary(generate("coding", 1000, cap_tokens=10**9, **split_variance(0.86, between)))
    assert found["within_share"] == pytest.approx((1 - between) * 15 / 16, abs=0.04)
    assert Workload.between_share.fget(replace(CODING, **split_variance(0.86, between))) == pytest.approx(between)  # type: ignore[attr-defined]


def test_default_share_between_prompts() -> None:
    for name in NAMES:
        assert WORKLOADS[name].between_share == pytest.approx(0.7)
        assert 0.22 < FOUND[name]["within_share"] < 0.34  # 0.28 expected; the cap takes a little from both sides


def test_a_group_waits_for_its_longest_sample() -> None:
    """DAPO log, groups of 16: longest/median 1.36 at p50 with short answers; long agents have wider groups."""
    ratios = FOUND["coding"]["longest_over_median"]
    assert 1.6 < ratios["p50"] < 2.4 and ratios["p90"] > 1.5 * ratios["p50"]
    alike = summary(generate("coding", 400, spread_sigma=0))["longest_over_median"]
    assert alike["p90"] / alike["p50"] < 0.9 * ratios["p90"] / ratios["p50"]


@pytest.mark.parametrize("name", NAMES)
def test_form_of_the_trajectories(name: str) -> None:
    law = WORKLOADS[name]
    for index, trajectory in enumerate(LARGE[name]):
        assert (trajectory.prompt_id, trajectory.trial) == (f"{name}/{index // 16:06d}", index % 16)
        assert trajectory.prompt_tokens == LARGE[name][index - index % 16].prompt_tokens
        total, last = trajectory.output_tokens, trajectory.steps[-1]
        assert total == law.cap_tokens if trajectory.meta["truncated"] else 1 <= total <= law.cap_tokens
        assert 1 <= len(trajectory.steps) <= law.max_turns and all(turn.output_tokens for turn in trajectory.steps)
        assert trajectory.steps[0].input_tokens == 0 and all(turn.input_tokens for turn in trajectory.steps[1:])
        assert last.tool is None and last.tool_latency_s is None
        assert all(turn.tool and turn.tool_latency_s is not None for turn in trajectory.steps[:-1])
    assert 0.01 < np.mean([t.meta["truncated"] for t in LARGE[name]]) < 0.04 or name == "search"


def test_a_seed_is_a_result() -> None:
    first = generate("search", 5, samples=4, seed=3)
    assert first == generate("search", 5, samples=4, seed=3) == generate("search", 5, samples=4, seed=np.random.default_rng(3))
    assert first != generate("search", 5, samples=4, seed=4)
    assert [decode(encode(trajectory)) for trajectory in first] == first


def test_parameters_are_replaced_one_by_one() -> None:
    slow, usual = generate("math", 20, tool_mean_s=2.0), generate("math", 20)
    assert [t.output_tokens for t in slow] == [t.output_tokens for t in usual]
    assert sum(t.tool_s for t in slow) > 10 * sum(t.tool_s for t in usual)
    assert sum(t.tool_s for t in generate("math", 20, tool_mean_s=0)) == 0
    assert all(len(t.steps) == 1 for t in generate("math", 5, max_turns=1))
    own = replace(CODING, name="own", prompt_sigma=0.0, sample_sigma=0.0)
    assert {t.output_tokens for t in generate(own, 3)} == {7000}


@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0, 4.0])
def test_the_mean_counts_time_outs(sigma: float) -> None:
    law = replace(CODING, tools=(Tool("fast", 0.5, 0.01, 0.3), Tool("slow", 0.5, 1.0, sigma)), tool_prompt_share=0.0)
    seconds = [turn.tool_latency_s or 0.0 for t in generate(law, 500) for turn in t.steps[:-1]]
    assert np.mean(seconds) == pytest.approx(0.46, rel=0.1)


@examples(25)
@given(st.data())
def test_any_allowed_parameters_give_well_formed_trajectories(data: st.DataObject) -> None:
    chosen = {}
    for name, (low, high) in _RANGES.items():
        if name in ("median_turns", "max_turns"):
            low, high = (low, type(low)(50))  # more turns only cost time here
        if name in ("tool_mean_s", "tool_timeout_s"):
            continue
        draw = st.integers(int(low), int(high)) if isinstance(low, int) else st.floats(low, high)
        chosen[name] = data.draw(draw, label=name)
    for trajectory in generate("coding", 3, samples=2, seed=1, **chosen):
        assert isinstance(trajectory, Trajectory) and decode(encode(trajectory)) == trajectory
        assert 1 <= trajectory.output_tokens <= chosen["cap_tokens"]
        assert all(turn.output_tokens and turn.output_tokens > 0 for turn in trajectory.steps)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"workload": "chess"}, "unknown workload 'chess'; allowed: coding, search, math"),
        ({"prompts": 0}, "prompts: got 0"),
        ({"samples": -1}, "samples: got -1"),
        ({"sigma": 1}, "sigma: unknown parameter; allowed: name, median_tokens"),
        ({"median_tokens": -1}, "coding.median_tokens: got -1; allowed: a number from 1"),
        ({"cap_tokens": 1e4}, "coding.cap_tokens: got 10000.0; allowed: a whole number"),
        ({"prompt_sigma": float("nan")}, "coding.prompt_sigma: got nan"),
        ({"tool_mean_s": 29.0}, "coding.tool_mean_s: got 29; allowed: at most half of tool_timeout_s"),
        ({"tools": ()}, "coding.tools"),
        ({"tools": (Tool("a", 0.5, 1, 1),)}, "shares add up to 0.5"),
    ],
)
def test_wrong_arguments(arguments: dict, words: str) -> None:
    with pytest.raises(TraceError, match=r".*") as caught:
        generate(**{"workload": "coding", "prompts": 1, **arguments})
    assert words in str(caught.value)
    with pytest.raises(TraceError):
        split_variance(1.0, 1.5)


def test_every_number_of_a_workload_has_a_range() -> None:
    assert set(_RANGES) == {field.name for field in fields(Workload)} - {"name", "tools"}
