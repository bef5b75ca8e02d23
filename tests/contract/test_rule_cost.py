"""The bench of what the preemption rule costs a step plays its cases on the installed vLLM; times are not asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.schedule.rule_cost import CASES, measured
from verl_heddle.schedule.preempt import STARTS


@pytest.mark.parametrize("case", CASES)
def test_each_case_is_what_its_name_says(case):
    told = measured(case, running=16, waiting=32, steps=4)
    assert told.get(f"refused_{case}", 0) == (0 if case == "wins" else 4)
    assert told["victims"] == (STARTS if case == "wins" else 0)
