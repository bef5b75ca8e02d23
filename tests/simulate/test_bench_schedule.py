"""bench/schedule: every arm of a row goes through the same gate and the same engines, so that only what it says differs."""

import sys
from pathlib import Path

import pytest

from verl_heddle.report.draws import generated
from verl_heddle.report.setting import setting
from verl_heddle.schedule.priority import longest_first
from verl_heddle.trajectory import TrajectoryId, TurnStart

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module, with the folders that it puts on the path."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "regimes"))
    for name in ("cells", "bench.schedule.simulated"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench.schedule.simulated as module

    yield module
    for name in ("cells", "bench.schedule.simulated"):
        sys.modules.pop(name, None)


def test_the_oracle_differs_from_longest_first_by_what_it_knows(bench):
    """Gate, engines and placement are alike; the order is that of the true whole length."""
    where = setting("qwen3-8b", "h200", 1, slots=4)
    (draw,) = generated("search", 4, 4, [0]).draws
    arms = bench.arms(draw, where)
    (learned, engine), (policy, its) = arms["longest"], arms["longest, true lengths"]
    assert its == engine
    assert (policy.admission is None) == (learned.admission is None) and policy.admission is not None
    policy.replicas_added(where.fleet(1))
    item = draw.steps[0][0]
    assert len(item.steps) > 1
    who = TrajectoryId(item.prompt_id, f"0:{item.prompt_id}", item.trial, 0)
    decision = policy.turn_started(TurnStart(who, who.key, 1, 500, item.steps[0].output_tokens), 0.0)
    assert decision.priority == longest_first(item.output_tokens, 64)  # no turn has told a pace: tools do not count yet


def test_a_row_has_every_arm(bench):
    where = setting("qwen3-8b", "h200", 1, slots=4)
    row = bench.measure("small", where, 1, generated("search", 4, 4, [0]).draws)
    assert {"stock", "stock + tier", "trajectory-FCFS", "plas", "heddle", "longest", "longest, true lengths"} <= set(row["speedup"])
    assert row["speedup"]["stock"] == 1.0 and "| small |" in bench.table([row])
