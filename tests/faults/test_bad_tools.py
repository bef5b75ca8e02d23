"""Tools that hang, crash, return 100 MB, return invalid UTF-8 and raise BaseException: each step completes, with every trajectory."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from verl_heddle.traces.io import read

pytestmark = pytest.mark.e2e

TOOLS = Path(__file__).parent / "bad_tools.py"
CALL_S = 1.5
# What hangs, hangs for ever: any bound shows that the deadline holds, and a tight one would time a machine that two runs share.
HELD_S = 30
STEPS = 2


@pytest.fixture(scope="module")
def run(train):
    tools = f"actor_rollout_ref.rollout.multi_turn.function_tool_path={TOOLS}"
    return train("bad_tools", "+plugin=heddle", tools, f"heddle.tools.call_s={CALL_S}", steps=STEPS)


def test_every_step_completes_with_every_trajectory(run):
    assert run.code == 0, run.log[-3000:]
    for step in range(1, STEPS + 1):
        assert len(run.rollouts(step)) == 16 * 4, f"step {step}"
        assert run.steps[step]["heddle/outcomes/finished"] == 64


def test_every_kind_of_trouble_happened_and_was_counted(run):
    happened = Counter(re.findall(r"BAD TOOL (.*)", run.log))
    assert set(happened) == {"hangs", "crashes", "floods", "is no text", "leaves", "is deaf"}, happened
    counted: Counter[str] = Counter()
    for metrics in run.steps.values():
        counted.update({name: metrics[f"heddle/tools/{name}"] for name in ("calls", "crashes", "timeouts", "abandoned", "cut", "failures")})
    assert counted["crashes"] >= happened["crashes"] + happened["leaves"], "and what the policy itself got wrong"
    assert counted["timeouts"] >= happened["hangs"] and counted["abandoned"] > 0 and counted["cut"] == happened["floods"]
    assert counted["failures"] == counted["crashes"] + counted["timeouts"] and counted["calls"] > 100
    assert all(metrics["heddle/fallbacks/total"] == 0 for metrics in run.steps.values())


def test_the_model_reads_what_happened_and_goes_on(run):
    said = "".join(output for step in (1, 2) for _, output in run.rollouts(step))
    for text in ("no answer within 1.5 s", "ValueError: crashed on purpose", "SystemExit: left on purpose", "(truncated)"):
        assert text in said, text


def test_nobody_waited_longer_than_the_deadline(run):
    slowest = max(turn.tool_latency_s or 0 for item in read(run.trace) for turn in item.steps)
    assert CALL_S - 0.1 < slowest < HELD_S
