"""The statistics against hand-made cases whose answers are known."""

import json
import math

import numpy as np
import pytest

from verl_heddle.traces import summary
from verl_heddle.traces.describe import spearman
from verl_heddle.trajectory import Trajectory, Turn


def episode(prompt: str, tokens: list[int | None], **rest: object) -> Trajectory:
    steps = tuple(Turn(0, count, "ls", 2.0, gen_s=6.0) for count in tokens)
    return Trajectory("made-up", "coding", prompt, 0, steps=steps, **{"prompt_tokens": 10, **rest})  # type: ignore[arg-type]


def test_groups_and_tails() -> None:
    found = summary([episode("a", [50, 50]), episode("a", [100]), episode("a", [400]), episode("b", [10]), episode("c", [10])])
    assert (found["trajectories"], found["prompts"], found["samples"]) == (5, 3, {"min": 1, "max": 3})
    assert found["longest_over_median"] == {"n": 1, "mean": 4.0, "p50": 4.0, "p90": 4.0, "p99": 4.0, "max": 4.0}
    assert found["within_share"] == pytest.approx(1.0)  # one group only: all variance is inside it
    assert found["output_tokens"]["p50"] == 100 and found["output_tokens"]["max"] == 400
    assert found["steps"]["mean"] == 1.2
    json.dumps(found, allow_nan=False)


def test_within_share_is_the_sum_of_squares_inside_groups() -> None:
    e = math.e
    logs = {"a": [1, 3], "b": [5, 7]}
    found = summary(episode(prompt, [round(1e6 * e**value)]) for prompt, group in logs.items() for value in group)
    assert found["within_share"] == pytest.approx((2 + 2) / 20, rel=1e-5)


def test_visits_of_a_live_run_are_groups_of_their_own() -> None:
    found = summary(episode("a", [10 * (visit + 1)], meta={"uid": str(visit)}) for visit in (0, 1) for _ in range(3))
    assert found["prompts"] == 2 and found["longest_over_median"]["max"] == 1.0
    assert found["within_share"] == pytest.approx(0.0)


def test_tool_times_leave_people_out() -> None:
    steps = (Turn(0, 1, "ls", 1.0, gen_s=3.0), Turn(0, 1, "human", 500.0, gen_s=3.0), Turn(0, 1, "cat", 2.0), Turn(0, 1, None, None))
    found = summary([Trajectory("made-up", "coding", "p", 0, None, steps)])
    assert found["tool_s"]["n"] == 2 and found["tool_s"]["mean"] == 1.5
    assert found["tool_share"] == pytest.approx(3 / 9)
    assert set(found["tools"]) == {"ls", "cat"}
    assert found["prompt_tokens"] is None and found["reward"] is None


def test_a_batch_waits_for_its_longest() -> None:
    assert summary([episode("a", [100])] * 9 + [episode("b", [1000])])["batch_max_over_mean"] == pytest.approx(1000 / 190, rel=0.1)
    assert summary([episode("a", [100])] * 10)["batch_max_over_mean"] == 1.0


def test_unknown_and_empty_trajectories_do_not_break_it() -> None:
    found = summary([episode("a", [None, None]), episode("a", [])])
    assert found["trajectories"] == 2 and found["steps"]["max"] == 2
    assert found["output_tokens"] is None and found["within_share"] is None and found["batch_max_over_mean"] is None
    assert summary([])["trajectories"] == 0


def test_spearman() -> None:
    values = np.array([1.0, 2.0, 3.0, 10.0])
    assert spearman(values, values**3) == pytest.approx(1)
    assert spearman(values, -values) == pytest.approx(-1)
    assert spearman(values, np.ones(4)) is None
    assert spearman(values[:2], values[:2]) is None
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 5, 50).astype(float), rng.integers(0, 5, 50).astype(float)
    assert spearman(left, right) == pytest.approx(scipy_stats.spearmanr(left, right).statistic)


def test_siblings_and_early_turns() -> None:
    groups = [episode(str(prompt), [prompt + 1] * 4) for prompt in range(10) for _ in range(3)]
    found = summary(groups)["spearman"]
    assert found["siblings"] == pytest.approx(1) and found["first_3"] == pytest.approx(1)
    assert found["first_10"] is None and found["prompt_tokens"] is None  # no trajectory that long; all prompts alike
