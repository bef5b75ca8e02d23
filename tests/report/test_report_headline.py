"""The three lines that come first: only what wins is named, the best first, and what is pasted are overrides that exist."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from report_cases import small

from verl_heddle.options import walk
from verl_heddle.report.advice import advise
from verl_heddle.report.draws import generated
from verl_heddle.report.setting import setting
from verl_heddle.report.study import ranking
from verl_heddle.report.text import HELPS, headline, plan_headline, plan_report, report


@pytest.fixture(scope="module")
def answer():
    return small(slots=4, gpus=2)


def sped(answer, **factors):
    """The answer with these arms so many times as fast as stock in every draw, the others as fast as stock."""
    rows = {}
    for name, row in answer.rows.items():
        runs = tuple(replace(run, makespan_s=run.makespan_s / factors.get(name, 1.0), sync_s=0.0) for run in answer.stock.runs)
        rows[name] = replace(
            row, runs=runs, stock=tuple(replace(run, sync_s=0.0) for run in answer.stock.runs), tp=2 if "best_tp" in name else row.tp
        )
    return replace(answer, rows=rows)


def test_the_best_comes_first_and_is_what_is_pasted(answer):
    lines = headline(sped(answer, heddle=1.5, stock_best_tp=2.0, stock_tier=1.2, heddle_place=1.1))
    assert len(lines) == 3 and "takes" in lines[0] and f"tp={answer.stock.tp}" in lines[0]
    assert re.findall(r"\d\.\d\dx", lines[1]) == ["2.00x", "1.50x", "1.20x"] and lines[1].startswith("What helps most: tp=2 ")
    assert lines[2].endswith("<your overrides> actor_rollout_ref.rollout.tensor_model_parallel_size=2")


def test_what_does_not_win_is_no_help(answer):
    lines = headline(sped(answer, heddle=1.01, lpt_oracle=3.0, slime=2.0))
    assert lines[1:] == ["No simulated alternative is faster beyond chance."], "oracles and peers cannot be had"


def test_one_degree_is_not_two_answers(answer):
    same = sped(answer, heddle=1.5, heddle_best_tp=1.5)
    same = replace(same, rows={name: replace(row, tp=answer.stock.tp) for name, row in same.rows.items()})
    assert headline(same)[1] == "What helps most: the plugin 1.50x."


def test_it_comes_first(answer):
    assert report(answer, []).splitlines()[0] == headline(answer)[0]


def test_overrides_exist():
    ours = {key for key, _, _ in walk()}
    keys = {word.partition("=")[0] for _, overrides in HELPS.values() for word in overrides.split()}
    assert {key for key in keys if key.startswith("heddle.")} <= ours
    assert keys - ours == {"actor_rollout_ref.rollout.tensor_model_parallel_size", "+plugin"}


def test_a_plan_begins_with_its_answer_and_what_it_advises():
    asked = setting("qwen3-8b", "h200", 4, slots=4)
    ranked = ranking(asked, generated("search", 8, 4, [0, 1]), jobs=1)
    advice = advise(ranked, jobs=1)
    lines = plan_headline(ranked, advice)
    assert len(lines) == 3 and lines[2].split()[-len(advice.overrides) :] == advice.overrides
    assert plan_report(ranked, advice, []).splitlines()[:3] == lines
    assert "stock_tier" in ranked.rows and f"{ranked.stock.gpu_hours:.2g}"[:3] in lines[0]
    told = re.findall(r"\d\.\d\dx", re.sub(r"\([^)]*\)", "", lines[1]))
    assert told == sorted(told, reverse=True) and len(told) <= 3
    for name in ("stock_tp1", "heddle_tp1"):
        assert name in ranked.rows


def test_what_the_degree_does_alone_is_not_told_twice(answer):
    both = sped(answer, stock_best_tp=1.5, heddle_best_tp=1.5)
    assert headline(both)[1] == "What helps most: tp=2 1.50x."


def test_gpu_hours_count_weight_sync(answer):
    row = answer.stock
    assert row.gpu_hours == pytest.approx(answer.setting.gpus * row.typical.step_s / 3600)
    assert row.gpu_hours_per_1000 == pytest.approx(1000 * row.gpu_hours / (8 * 4)) and row.typical.sync_s > 0
