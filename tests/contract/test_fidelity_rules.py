"""The simulator against vLLM's own scheduler on a virtual clock, with the workloads of the fidelity bench (`bench/fidelity/rules.py`)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.fidelity import rules
from bench.fidelity.configurations import KV_BOUND
from bench.fidelity.table import rules_table


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_with_kv_cache_for_everything_the_two_agree():
    roomy = [replace(one, kv_share=None) for one in KV_BOUND if not one.preempt]
    result = rules.measured(roomy, range(1))
    assert result["overall"]["makespan_error_max"] < 0.01 and result["overall"]["finish_error_p90"] < 0.02
    assert all(run["preemptions"] == run["predicted_preemptions"] == 0 for run in result["runs"])


def test_under_kv_pressure_turns_lose_their_slots_in_both_and_the_table_tells():
    result = rules.measured(KV_BOUND[:1] + KV_BOUND[-1:], range(1))
    assert all(run["preemptions"] and run["predicted_preemptions"] for run in result["runs"])
    table = rules_table(result | {"commit": "c" * 40, "versions": {"vllm": "0"}})
    assert len(table.splitlines()) == 2 + 2 + 1 + 2 and KV_BOUND[0].name in table
