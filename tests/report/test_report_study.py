"""Arms side by side, and what is called a difference."""

from dataclasses import replace

import pytest
from report_cases import small

from verl_heddle.report.advice import advise, told, why
from verl_heddle.report.document import document, schema
from verl_heddle.report.draws import generated
from verl_heddle.report.explain import explain
from verl_heddle.report.setting import setting
from verl_heddle.report.study import ARMS, loses, median_by, mixed_layout, ranking, study, wins
from verl_heddle.report.text import assumptions, plan_report, report
from verl_heddle.report.words import mixture


@pytest.fixture(scope="module")
def answer():
    return small()


def test_every_arm_in_order_and_above_the_bound(answer):
    assert tuple(answer.rows) == ARMS
    for row in answer.rows.values():
        assert all(0 < share <= 1 for share in row.bound_fractions)
        assert row.typical.makespan_s in row.makespans_s
    assert answer.stock.speedup == 1.0
    best = answer.rows["stock_best_tp"]
    assert best.typical.makespan_s <= answer.stock.typical.makespan_s
    assert answer.rows["heddle_best_tp"].tp == best.tp


def test_processes_do_not_change_numbers(answer):
    assert small(jobs=2) == answer


def test_stock_always_comes_along_and_unknown_arms_do_not():
    assert list(small(("slime",), seeds=(0,)).rows) == ["stock", "slime"]
    with pytest.raises(ValueError, match="unknown arm 'magic'"):
        small(("magic",))


def test_what_counts_as_a_difference():
    assert wins([1.03, 1.05, 1.01]) and not wins([1.5, 0.99]) and not wins([1.01, 1.005])
    assert loses([0.9, 0.95]) and not loses([0.9, 1.1])
    assert median_by([3, 1, 2], lambda x: x) == 2 and median_by([4, 1, 2, 3], lambda x: x) == 2


def test_progress_counts_to_its_total():
    seen = []
    source = generated("math", 2, 2, [0, 1])
    study(setting("qwen3-8b", "h200", 2), source, ("stock_best_tp", "heddle", "heddle_best_tp"), 1, lambda *told: seen.append(told[:2]))
    assert seen == [(number, seen[-1][1]) for number in range(1, len(seen) + 1)] and seen[-1][0] <= seen[-1][1]


def test_sentences_say_what_the_numbers_say(answer):
    lines = explain(answer)
    assert 2 <= len(lines) <= 4 and all(line.endswith(".") and "\n" not in line for line in lines)
    assert lines[0].startswith("Stock verl at tp=1 takes ") and "no schedule" in lines[0]
    assert "ended last" in lines[1]


def test_sentence_where_nobody_waits():
    lines = explain(small(("heddle",), seeds=(0,), slots=256))
    assert lines[-1].startswith("heddle changes nothing at tp=1: turns do not wait for a slot or KV cache")


def test_sentence_where_slots_are_short_and_tp_is_right():
    lines = explain(small(("stock_best_tp", "heddle", "lpt_oracle"), gpus=1, slots=2))
    assert "tp=1 is the only fixed degree that works here" in lines[2] and "max_num_seqs" in lines[2]


def test_sentence_where_another_degree_is_better():
    lines = explain(small(("stock_best_tp",), workload="coding", prompts=2, slots=256))
    assert lines[2].startswith("Set tensor_model_parallel_size=4") and "x" in lines[2]


def test_text_holds_every_arm(answer):
    text = report(answer, explain(answer))
    assert all(f"\n{name} " in text for name in ARMS)
    assert "simulated, nothing was run" in text and max(map(len, assumptions(answer))) < 160


def test_plan_advises_what_it_can_support():
    answer = ranking(setting("qwen3-8b", "h200", 4), generated("coding", 2, 4, [0, 1]), 1)
    advice = advise(answer, 1)
    assert advice.row.tp == 4 and advice.row.speedup > 1.3 and not advice.heddle
    assert advice.overrides == ["actor_rollout_ref.rollout.tensor_model_parallel_size=4", "+plugin=observe"]
    text = plan_report(answer, advice, told(answer, advice))
    assert "(now)" in text and "+plugin=observe" in text and "forecast: " in text
    assert all(why(row) for row in answer.rows.values())


def test_plan_tries_more_slots_where_turns_wait():
    answer = ranking(setting("qwen3-8b", "h200", 2, slots=2), generated("search", 6, 4, [0, 1]), 1)
    advice = advise(answer, 1)
    assert [trial.name for trial in advice.trials] == ["max_num_seqs"]
    assert "actor_rollout_ref.rollout.max_num_seqs=4" in advice.overrides
    assert any("max_num_seqs=4 instead of 2" in line for line in told(answer, advice))


def test_plan_mixes_degrees_only_where_that_wins_in_every_draw(monkeypatch):
    monkeypatch.setattr("verl_heddle.report.study.mixed_layout", lambda setting, source: (2, 1, 1))
    answer = ranking(setting("qwen3-8b", "h200", 4), generated("search", 4, 4, [0, 1]), 1)
    mixed = answer.rows["heddle_mixed"]
    assert (mixed.layout, mixed.degrees, mixed.where) == ((2, 1, 1), "2+1+1", "on 2+1+1")
    advice = advise(answer, 1)
    assert not advice.row.layout and any(line.startswith("Do not mix degrees: 2+1+1") for line in told(answer, advice))

    def faster(factors):
        best = min(row.typical.makespan_s for row in answer.rows.values())
        runs = tuple(replace(run, makespan_s=best * factor) for run, factor in zip(mixed.runs, factors, strict=True))
        return replace(answer, rows=dict(answer.rows) | {"heddle_mixed": replace(mixed, runs=runs)})

    assert not advise(faster([0.1, 10.0]), 1).row.layout
    better = faster([0.1, 0.1])
    advice = advise(better, 1)
    assert advice.row.layout == (2, 1, 1) and advice.heddle
    assert advice.overrides == [
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "heddle.place.enable=true",
        "heddle.layout.enable=true",
        "heddle.layout.fixed=[2,1,1]",
        "+plugin=heddle",
    ]
    sentences = told(better, advice)
    assert any(line.startswith("Mix degrees, 2+1+1: ") and "heddle.layout.times=qwen3-8b/h200" in line for line in sentences)
    assert "'heddle.layout.fixed=[2,1,1]'" in plan_report(better, advice, sentences)
    arm = next(one for one in document(better, sentences, advice)["arms"] if one["name"] == "heddle_mixed")
    assert arm["layout"] == [2, 1, 1]
    pytest.importorskip("jsonschema").Draft202012Validator(schema()).validate(document(answer, sentences, advise(answer, 1)))


def test_the_mixed_layout_comes_from_history_and_fills_the_gpus():
    for model, gpus in (("qwen3-8b", 16), ("qwen3-30b-a3b", 8)):
        layout = mixed_layout(setting(model, "h200", gpus), generated("search", 2 * gpus, 16, [0]))
        assert not layout or (sum(layout) == gpus and len(set(layout)) > 1 and list(layout) == sorted(layout, reverse=True))
    assert mixed_layout(setting("qwen3-8b", "h200", 1), generated("search", 2, 4, [0])) == ()
    assert mixture([1, 1, 4, 2]) == "4+2+1+1" and mixture([1] * 12 + [8, 8]) == "2x8+12x1"
