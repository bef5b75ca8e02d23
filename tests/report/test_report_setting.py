"""What a question may be about, and what the defaults are."""

import pytest

from verl_heddle.report.draws import generated
from verl_heddle.report.setting import setting


@pytest.mark.parametrize(
    ("model", "gpu", "tp"),
    [("qwen3-8b", "h200", 1), ("Qwen/Qwen3-14B", "h200", 1), ("qwen3-32b", "h200", 2), ("qwen3-14b", "h100", 2), ("qwen3-32b", "h100", 4)],
)
def test_usual_degree_has_room_for_kv(model, gpu, tp):
    assert setting(model, gpu, 8).tp == tp


def test_degrees_follow_memory_and_division():
    assert setting("qwen3-32b", "h100", 8, utilization=0.5).tps == (2, 4, 8)
    assert setting("qwen3-32b", "h100", 8, utilization=0.9).tps == (1, 2, 4, 8)
    assert setting("qwen3-32b", "h200", 8, utilization=0.9).tp == 2
    odd = setting("qwen3-8b", "h200", 6)
    assert odd.tps == (1, 2) and odd.bound_tps == (1, 2, 4)  # a mixed layout of 4 + 2 would be possible


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("gpt-5", "h200", 8), "unknown model"),
        (("qwen3-8b", "abacus", 8), "unknown GPU"),
        (("qwen3-8b", "h200", 0), "at least 1"),
        (("qwen3-8b", "h200", 8, 3), "possible: 1, 2, 4, 8"),
        (("qwen3-8b", "h200", 6, 4), "does not divide"),
        (("qwen3-32b", "h100", 8, 1), "does not hold the model"),
        (("qwen3-32b", "h100", 1), "raise --gpu-memory-utilization"),
        (("qwen3-8b", "h200", 8, None, 256, 1.5), "in (0, 1]"),
    ],
)
def test_one_line_for_what_cannot_be(arguments, says):
    with pytest.raises(ValueError) as error:
        setting(*arguments)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_degrees_that_do_not_hold_the_longest_turn_are_left_out():
    where = setting("qwen3-32b", "h100", 8, tp=4)
    work = generated("coding", 1, 1, [0]).draws[0].steps[0]
    assert where.able(work) == (2, 4, 8)
    from dataclasses import replace

    long = [replace(work[0], prompt_tokens=where.kv_tokens[2])]
    assert where.able(long) == (4, 8)
    with pytest.raises(ValueError, match="longest turn needs"):
        where.able([replace(work[0], prompt_tokens=where.kv_tokens[4])])


def test_more_slots_than_the_token_budget():
    assert setting("qwen3-8b", "h200", 8, slots=10_000).engine("fcfs").batch_tokens == 10_000
    assert setting("qwen3-8b", "h200", 8).engine("priority").batch_tokens == 8192


def test_a_model_that_fits_only_with_the_memory_asked_about_has_a_fleet():
    """72B on two H100: at 0.95 of their memory, not at vLLM's usual 0.9."""
    where = setting("qwen2.5-72b", "h100", 2, 2, utilization=0.95)
    assert [replica.kv_tokens for replica in where.fleet(2)] == [where.kv_tokens[2]] and where.kv_tokens[2] > 8192
    with pytest.raises(ValueError, match=r"of their memory|does not hold"):
        setting("qwen2.5-72b", "h100", 2, 2, utilization=0.9)


def test_a_degree_that_nobody_chose_gives_way():
    from dataclasses import replace

    usual = setting("qwen3-8b", "h200", 8)
    (item,) = generated("coding", 1, 1, [0]).draws[0].steps[0]
    assert usual.holding([item]) == (usual, "")
    long = replace(item, prompt_tokens=usual.kv_tokens[2])
    fitted, why = usual.holding([long])
    assert fitted.tp == 4 and why.startswith("tp=4: the smallest degree") and f"{usual.kv_tokens[1]:,}" in why and "\n" not in why
    with pytest.raises(ValueError, match="longest turn needs"):
        setting("qwen3-8b", "h200", 8, tp=1).holding([long])
    with pytest.raises(ValueError, match="longest turn needs"):
        usual.holding([replace(item, prompt_tokens=usual.kv_tokens[8])])
