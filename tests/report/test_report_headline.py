"""The three lines that come first: only what wins is named, the best first, and what is pasted are overrides that exist."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from report_cases import small

from verl_heddle.options import walk
from verl_heddle.report.headline import HELPS, headline
from verl_heddle.report.text import report


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
    assert lines[1:] == ["Nothing that was asked about is faster beyond chance."], "oracles and peers cannot be had"


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
